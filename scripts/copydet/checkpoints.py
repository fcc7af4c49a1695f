"""What --weight can be: checkpoints, plain dicts of tensors and values that load without running code, what --mode
export wrote, graphs of other programs; and what they say of their network."""
from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from copydet.common import HERE, INSTALLED, ROOT, InputError, read_json, sha256_of
from copydet.options import OF_OTHERS, Args, can_be

if TYPE_CHECKING:
    import torch

    from copydet.graphs import Graph
    from copydet.network import Descriptor

OF_NETWORK = ("arch", "pool", "stages", "grid", "width", "head", "dim", "pred_dim", "gem_p", "gem_eval_p",
              "eval_crops")
OF_IMAGES = ("input_size", "resize", "exif_transpose", "decode")
FROM_CHECKPOINT = OF_NETWORK + OF_IMAGES
DEFAULT = (HERE if INSTALLED else ROOT) / "exp" / "default.safetensors"  # comes along, made by exp/default.args
ABOUT_DEFAULT = ("described by exp/default.safetensors, a small network trained on 5,000 photos; one trained on images "
                 "like yours, or SSCD's by --weight, finds more")
PACKAGED = {"gem_eval_p": 1.0, "resize": "square"}  # how the winner's package evaluates, whatever its files say


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint written last: that of the highest epoch, or latest.pth.tar where that came after it."""
    files = sorted(folder.glob("checkpoint_*.pth.tar"))[-1:] + list(folder.glob("latest.pth.tar"))
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)


def kind_of(file: str | Path) -> str:
    """Of a file of weights, in READERS: by its ending, TorchScript by its content, as its endings are those of
    checkpoints."""
    if (ending := Path(file).suffix.lower()[1:]) in READERS:
        return ending
    try:
        with zipfile.ZipFile(file) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return "torchscript"
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        pass  # damaged, or a kind of zip that zipfile does not implement: its reader tells
    return "checkpoint"


def read_weights(file: str | Path) -> dict:
    """What a file of any kind holds, as the dict of a checkpoint; a graph has its kind as `graph` in place of
    `state_dict`. Raises InputError: not readable, or not what its kind has to be."""
    return READERS[kind_of(file)](file)


def read_checkpoint(file: str | Path) -> dict:
    """The same of weights that can be trained on. InputError: a graph, whose network is finished."""
    found = read_weights(file)
    if "graph" in found:
        raise InputError(f"{file} is a finished network, which can describe images (--mode extract) and nothing else")
    return found


def read_saved(file: str | Path) -> dict:
    """Dict of a checkpoint of this script or of the published ISC21 weights; tensors on the CPU.

    Only tensors, plain containers and argparse.Namespace are unpickled. InputError: anything else, not readable.
    """
    import torch
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise InputError(f"{file} is not a readable checkpoint") from None
        raise InputError(f"{file} holds an object of type {found[1]} and was not loaded: it could run code; save it "
                         "again as a plain dict of tensors") from None
    except Exception as error:  # damaged files raise nearly every type
        raise InputError(f"{file} is not a readable checkpoint: {(str(error).splitlines() or ['empty'])[0]}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{file} is not a checkpoint: it has no 'state_dict'")
    for name, value in checkpoint["state_dict"].items():
        if not torch.is_tensor(value):
            raise InputError(f"{file} is not a checkpoint: {name} in its 'state_dict' is no tensor")
    state = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    args = checkpoint.get("args") or {}
    if isinstance(args, argparse.Namespace):  # the notes' own script
        args = vars(args)
        if args.get("gem_p") == 1.0:  # from v42 on: the published isc_selfsup_v98 and isc_ft_v107 are among them
            args, checkpoint = args | PACKAGED, checkpoint | {"packaged": True}
    if not (isinstance(args, dict) and isinstance(checkpoint.get("preprocess") or {}, dict)):
        raise InputError(f"{file} is not a checkpoint of this script: `args` or `preprocess` in it are no tables")
    return checkpoint | {"state_dict": state, "args": args}


def read_safetensors(file: str | Path) -> dict:
    """The same of weights that --mode export wrote; older versions wrote config.json beside them."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, "pt") as tensors:
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}
            text = (tensors.metadata() or {}).get("config")
        beside = Path(file).with_name("config.json")
        if not (text or beside.is_file()):
            raise InputError(f"{file} is not what --mode export writes: no settings in its metadata, no config.json")
        config = json.loads(text) if text else read_json(beside)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {(str(error).splitlines() or ['broken'])[0]}") from None
    return {"state_dict": state} | exported(file, config)


def read_graph(file: str | Path) -> dict:
    """The same of ONNX and TorchScript. Of another program: nothing but the kind."""
    from copydet.graphs import KINDS
    kind = kind_of(file)
    config = KINDS[kind].metadata(file)
    ours = isinstance(config, dict) and str(config.get("output", "")).startswith("descriptors: ")
    return {"graph": kind} | (exported(file, config) if ours else {})


READERS: dict[str, Callable[[str | Path], dict]] = {
    "checkpoint": read_saved, "safetensors": read_safetensors, "onnx": read_graph, "torchscript": read_graph}


def exported(file: str | Path, config: dict) -> dict:
    """The metadata of a file that --mode export wrote, as a checkpoint says the same. Raises InputError: they are not
    that."""
    if not isinstance(config, dict) or not all(
            isinstance(config.get(name), kind) for name, kind in (("arch", str), ("input_size", int), ("resize", str),
                                                                  ("mean", list), ("std", list))):
        raise InputError(f"{file}: its metadata are not what --mode export writes")
    return {"args": config, "arch": config["arch"], "preprocess": config, "contaminated": config.get("contaminated"),
            "calibration": config.get("calibration"), "made_from": config.get("checkpoint_sha256"),
            "provenance": config.get("provenance")}


def provenance_of(file: str | Path | None, checkpoint: dict) -> dict:
    """Where a network comes from: the checkpoint's name, its run, and the libraries that it was trained with; of an
    export as the export tells it."""
    if file is None or checkpoint.get("provenance"):
        return checkpoint.get("provenance") or {}
    stored = checkpoint.get("args", {})
    found = {"file": Path(file).name, "exp": Path(str(stored.get("exp") or "")).name or None,
             **{name: stored.get(name) for name in ("seed", "epochs", "loss")}, "epoch": checkpoint.get("epoch"),
             "images": checkpoint.get("photos"), "versions": checkpoint.get("versions")}
    return {name: value for name, value in found.items() if isinstance(value, (str, int, dict))}


def weights_sha256(file: str | Path) -> str:
    """Hex digest of a file of weights; with FILE.data, where large ONNX keeps them."""
    beside = f"{file}.data"
    return sha256_of(file, *[beside] * os.path.isfile(beside))


def load_weights(net: torch.nn.Module, state: dict, file: str | Path) -> None:
    """Load strictly. Raises InputError that names three of the tensors that do not fit."""
    own = net.state_dict()
    shapes = [f"{k} {list(state[k].shape)}, here {list(own[k].shape)}" for k in own
              if k in state and state[k].shape != own[k].shape]
    keys = [f"{k} missing" for k in own if k not in state] + [f"{k} unexpected" for k in state if k not in own]
    if shapes or keys:
        raise InputError(f"{file} does not fit this network ({len(shapes + keys)} differences): "
                         + "; ".join((shapes + keys)[:3])
                         + "; --dim differs?" * any(text.startswith(("fc.", "bn.")) for text in shapes))
    net.load_state_dict(state)


@dataclass(frozen=True)
class Source:
    """What describes images: a checkpoint, what was exported, a graph of another program, or a backbone alone."""
    file: str | Path | None  # None: a backbone alone
    arch_tag: str  # "": of another program
    sha256: str  # of the checkpoint, that which was exported too
    file_sha256: str
    state: dict = field(default_factory=dict)
    preprocess: dict = field(default_factory=dict)  # mean and std, where the checkpoint tells them
    contaminated: str | None = None  # the ground truth that it was trained on
    calibration: dict | None = None
    graph: Graph | None = None
    provenance: dict = field(default_factory=dict)


def take_source(args: Args, file: str | Path | None) -> tuple[Args, Source]:
    """What the file of weights holds (None: a backbone alone), and the command line with the settings of the file that
    were not given. Raises InputError: not readable, unknown network, flags that contradict the file."""
    read = read_weights if args.mode == "extract" else read_checkpoint
    checkpoint = read(file) if file else {}
    stored = dict(checkpoint.get("args", {}))
    if file:
        stored["arch"] = checkpoint.get("arch") or stored.get("arch")
    for name in (*FROM_CHECKPOINT, "eval_input_size", "view1", "op_prob", "calibrate"):
        if stored.get(name) is not None and not can_be(name, stored[name]):
            raise InputError(f"{file}: its setting {name} is {stored[name]!r}, which no --{name.replace('_', '-')} is")
    if stored.get("eval_input_size"):
        stored["input_size"] = stored["eval_input_size"]
    args = args.replace(**{name: stored[name] for name in (*FROM_CHECKPOINT, "view1", "op_prob", "calibrate")
                           if name not in args.given and stored.get(name) is not None})
    check_given(args, file, checkpoint, stored)
    graph, arch_tag = None, ""
    if "graph" in checkpoint:
        from copydet.graphs import open_graph
        args, graph = open_graph(checkpoint["graph"], str(file), args, checkpoint.get("preprocess", {}))
        arch_tag = stored["arch"] or ""
    else:
        from copydet.network import check_arch
        arch_tag = check_arch(args.arch)
    if checkpoint.get("packaged"):
        print(f"=> {file}: weights of the ISC21 winner's script, described as its package does: GeM p "
              f"{args.gem_eval_p:g}, {args.input_size} px, {args.resize}")
    if not file and "head" not in args.given:
        args = args.replace(head="none")
    same = all(getattr(args, name) == stored.get(name) for name in FROM_CHECKPOINT)
    sha256 = weights_sha256(file or args.backbone_weights or os.devnull)
    return args, Source(file, arch_tag, checkpoint.get("made_from") or sha256, sha256, checkpoint.get("state_dict", {}),
                        checkpoint.get("preprocess", {}), checkpoint.get("contaminated"),
                        checkpoint.get("calibration") if same else None,  # it was measured with those settings
                        graph, provenance_of(file, checkpoint))


def check_given(args: Args, file: str | Path | None, checkpoint: dict, stored: dict) -> None:
    """Raise InputError naming a flag that contradicts the file: settings of a finished network, or of images that the
    file tells of."""
    if "graph" in checkpoint:
        for name in OF_NETWORK:
            if name in args.given and getattr(args, name) != stored.get(name):
                raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: {file} is a finished network"
                                 + (f", which has {stored[name]}" if stored.get(name) is not None else ""))
    if "graph" not in checkpoint or stored.get("arch"):
        for name in OF_OTHERS[:3]:
            if name in args.given:
                raise InputError(f"--{name}: for a --weight of another program; {file or 'the backbone'} has its own")


def find_source(args: Args) -> tuple[Args, Source]:
    """`take_source` of --weight, or of the newest checkpoint of --exp, or where no experiment is named of DEFAULT.
    Raises InputError where there is none."""
    raw = args.backbone_weights or args.no_pretrained
    folder = args.out.parent / "train"
    file = args.weight or (None if raw else newest_checkpoint(folder))
    if not (file or raw) and "exp" not in args.given and DEFAULT.is_file():
        file = DEFAULT
        print(f"=> {ABOUT_DEFAULT}")
    if not (file or raw):
        raise InputError(f"no checkpoint in {folder}; train --exp {args.exp} first, or give --weight FILE, "
                         "--backbone-weights FILE (raw features)")
    return take_source(args, file)


def load_net(args: Args, source: Source) -> Descriptor | Graph:
    """The network of a source, for evaluation, with the mean and std that belong to it."""
    if source.graph:
        return source.graph
    from copydet.network import build_net, read_backbone_weights
    raw = args.backbone_weights and not source.file
    net = build_net(args, read_backbone_weights(args.backbone_weights, args.arch) if raw else False)
    if source.file:
        load_weights(net, source.state, source.file)
    net.try_out(args)
    net.mean, net.std = (source.preprocess.get(name, getattr(net, name)) for name in ("mean", "std"))
    return net.eval().requires_grad_(False)
