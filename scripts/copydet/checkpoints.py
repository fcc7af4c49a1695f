"""Checkpoints: plain dicts of tensors and values that load without running code, and what they say of their network."""
from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from copydet.common import InputError, check_file, read_json
from copydet.options import Args, can_be

if TYPE_CHECKING:
    import torch

    from copydet.network import Descriptor

FROM_CHECKPOINT = ("arch", "pool", "stages", "grid", "head", "dim", "pred_dim", "gem_p", "gem_eval_p", "eval_crops",
                   "input_size", "resize", "exif_transpose", "decode")
PACKAGED = {"gem_eval_p": 1.0, "resize": "square"}  # how the winner's package evaluates, whatever its files say


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint written last: that of the highest epoch, or latest.pth.tar where that came after it."""
    files = sorted(folder.glob("checkpoint_*.pth.tar"))[-1:] + list(folder.glob("latest.pth.tar"))
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)


def read_checkpoint(file: str | Path) -> dict:
    """Dict of a checkpoint of this script or of the published ISC21 weights; tensors on the CPU.

    Only tensors, plain containers and argparse.Namespace are unpickled. InputError: anything else, not readable.
    """
    import torch
    if str(file).endswith(".safetensors"):
        return read_safetensors(Path(file))
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


def read_safetensors(file: Path) -> dict:
    """The same of weights that --mode export wrote, with config.json beside them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    config = file.with_name("config.json")
    check_file(file)
    settings = read_json(config)
    try:
        state = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {(str(error).splitlines() or ['broken'])[0]}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{config} is not what --mode export writes")
    return {"state_dict": state, "args": settings, "arch": settings.get("arch"), "preprocess": settings,
            "contaminated": settings.get("contaminated")}


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
    """What describes images: a checkpoint, or a backbone alone."""
    file: str | Path | None  # None: a backbone alone
    arch_tag: str
    sha256: str
    state: dict = field(default_factory=dict)
    preprocess: dict = field(default_factory=dict)  # mean and std, where the checkpoint tells them
    contaminated: str | None = None  # the ground truth that it was trained on
    calibration: dict | None = None


def take_source(args: Args, file: str | Path | None) -> tuple[Args, Source]:
    """What the checkpoint `file` holds (None: a backbone alone), and the command line with the settings of the
    checkpoint that were not given. Raises InputError: not readable, unknown network."""
    from copydet.network import check_arch
    checkpoint = read_checkpoint(file) if file else {}
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
    if checkpoint.get("packaged"):
        print(f"=> {file}: weights of the ISC21 winner's script, described as its package does: GeM p "
              f"{args.gem_eval_p:g}, {args.input_size} px, {args.resize}")
    if not file and "head" not in args.given:
        args = args.replace(head="none")
    same = all(getattr(args, name) == stored.get(name) for name in FROM_CHECKPOINT)
    data = Path(file or args.backbone_weights or os.devnull).read_bytes()
    return args, Source(file, check_arch(args.arch), hashlib.sha256(data).hexdigest(), checkpoint.get("state_dict", {}),
                        checkpoint.get("preprocess", {}), checkpoint.get("contaminated"),
                        checkpoint.get("calibration") if same else None)  # it was measured with those settings


def find_source(args: Args) -> tuple[Args, Source]:
    """`take_source` of --weight, or of the newest checkpoint of --exp. Raises InputError where there is none."""
    raw = args.backbone_weights or args.no_pretrained
    folder = args.out.parent / "train"
    file = args.weight or (None if raw else newest_checkpoint(folder))
    if not (file or raw):
        raise InputError(f"no checkpoint in {folder}; train --exp {args.exp} first, or give --weight FILE, "
                         "--backbone-weights FILE (raw features)")
    return take_source(args, file)


def load_net(args: Args, source: Source) -> Descriptor:
    """The network of a source, for evaluation, with the mean and std that belong to it."""
    from copydet.network import build_net, read_backbone_weights
    raw = args.backbone_weights and not source.file
    net = build_net(args, read_backbone_weights(args.backbone_weights, args.arch) if raw else False)
    if source.file:
        load_weights(net, source.state, source.file)
    net.try_out(args)
    net.mean, net.std = (source.preprocess.get(name, getattr(net, name)) for name in ("mean", "std"))
    return net.eval().requires_grad_(False)
