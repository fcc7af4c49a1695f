"""Networks as finished graphs, ONNX and TorchScript: what --mode export wrote, and those of other programs.

A graph takes images as float32 [n, 3, h, w], normalised, or as bytes, uint8 [n, h, w, 3], with the normalisation
inside, and gives float32 [n, dim]. How its images are made (size, resizing, mean, standard deviation) is in the
metadata of our own, and told by flags for others. What a file says of itself is tried before work starts.
"""
from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from copydet.common import InputError, first_line
from copydet.options import PRESETS, Args

FORMS = {"float": "float32 [n, 3, h, w]", "bytes": "uint8 [n, h, w, 3]"}  # of a graph's input
TRIED = 2  # images


class Program(NamedTuple):
    """An open file: run(input) -> outputs, and what it says of its input, None where it says nothing."""
    run: Callable[[torch.Tensor], list[torch.Tensor]]
    forms: Sequence[str]  # of FORMS, that may be its own
    batch: int | None = None  # it takes so many images at a time
    size: int | None = None  # px


def open_onnx(file: str | Path, device: torch.device) -> Program:
    """An ONNX file on a device. Raises InputError: no package, unreadable, not one input of a known form."""
    session = onnx_session(file, device)
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise InputError(f"{file} has {len(inputs)} inputs ({', '.join(x.name for x in inputs)}); a descriptor has "
                         "one, images")
    name, kind, shape = inputs[0].name, inputs[0].type, inputs[0].shape
    form = {"tensor(float)": "float", "tensor(uint8)": "bytes"}.get(kind, "")
    fixed = [x if isinstance(x, int) and x > 0 else None for x in shape]
    here, there = (1, 3) if form == "float" else (3, 1)  # where the channels are, and where others have them
    if not form or len(fixed) != 4 or fixed[here] not in (3, None) or (fixed[here], fixed[there]) == (None, 3):
        raise InputError(f"{file}: its input `{name}` is {kind} {shape}, neither " + " nor ".join(FORMS.values()))
    sides = {side for side in (fixed[2:] if form == "float" else fixed[1:3]) if side}
    if len(sides) > 1:
        raise InputError(f"{file}: its input `{name}` is {kind} {shape}, not a square")

    def run(images: torch.Tensor) -> list[torch.Tensor]:
        outputs = session.run(None, {name: images.cpu().numpy()})
        return [torch.from_numpy(x) for x in outputs if isinstance(x, np.ndarray) and x.dtype.kind in "biuf"]

    return Program(run, [form], fixed[0], sides.pop() if sides else None)


def onnx_session(file: str | Path, device: torch.device = torch.device("cpu")) -> Any:
    """onnxruntime's session of a file. Raises InputError: the package is missing, the file cannot be read."""
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"{file}: ONNX needs a package: {error}; pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors come as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave cores to the loading
    providers = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(
            str(file), options, [name for name in providers if name in onnxruntime.get_available_providers()])
    except Exception as error:  # of many types of onnxruntime's own
        raise InputError(f"{file} cannot be read as ONNX: {first_line(error)}") from None


def open_torchscript(file: str | Path, device: torch.device) -> Program:
    """A TorchScript file on a device; this runs its code. Raises InputError: unreadable, not one input."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            net = torch.jit.load(str(file), device).eval()
        inputs = [x.name for x in net.forward.schema.arguments[1:] if not x.has_default_value()]
    except (RuntimeError, AttributeError, ValueError) as error:
        raise InputError(f"{file} cannot be read as TorchScript: {first_line(error)}") from None
    if len(inputs) != 1:
        raise InputError(f"{file} has {len(inputs)} inputs ({', '.join(inputs)}); a descriptor has one, images")

    def run(images: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            outputs = net(images.to(device))
        outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
        return [x for x in (outputs if isinstance(outputs, (list, tuple)) else [outputs]) if torch.is_tensor(x)]

    return Program(run, list(FORMS))


def onnx_metadata(file: str | Path) -> dict:
    """What --mode export wrote into an ONNX file; {}: it is of another program."""
    return parsed(onnx_session(file).get_modelmeta().custom_metadata_map)


def torchscript_metadata(file: str | Path) -> dict:
    """The same of TorchScript; no code runs."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = [name for name in archive.namelist() if name.endswith("/extra/config.json")]
            return json.loads(archive.read(found[0])) if found else {}
    except (ValueError, RecursionError, zipfile.BadZipFile, OSError):
        return {}


def parsed(texts: dict[str, str]) -> dict:
    """{name: value as JSON} -> {name: value}; {} where it is of another program."""
    try:
        return {name: json.loads(text) for name, text in texts.items()}
    except (ValueError, RecursionError):
        return {}


class Kind(NamedTuple):
    """What can be done with a file of one kind."""
    metadata: Callable[[str | Path], dict]
    open: Callable[[str | Path, torch.device], Program]


KINDS = {"onnx": Kind(onnx_metadata, open_onnx), "torchscript": Kind(torchscript_metadata, open_torchscript)}


class Graph:
    """An open graph: images float32 [n, 3, h, w], normalised by `mean` and `std` -> float32 [n, dim], rows of unit
    length.

    It takes all images of a batch at once where that gives what they give one by one; else one by one, or as many as
    it says. Raises InputError: the file cannot be read, or cannot describe images like those that will come.
    """

    def __init__(self, kind: str, file: str | Path, args: Args, program: Program | None = None) -> None:
        self.kind, self.file, self.args, self.threads = kind, file, args, torch.get_num_threads()
        self.program = program or KINDS[kind].open(file, torch.device("cpu"))
        self.form, self.batch, self.dim = self.program.forms[0], self.program.batch, 0
        self.mean, self.std = args.mean or [0.5] * 3, args.std or [0.5] * 3
        self.try_out()

    def __reduce__(self) -> tuple:
        return Graph, (self.kind, self.file, self.args)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, h, w] -> descriptors [n, dim]."""
        return F.normalize(torch.cat([self.rows(part) for part in images.split(self.batch or len(images))]).float())

    def rows(self, images: torch.Tensor) -> torch.Tensor:
        """The outputs [n, dim] of one call. Raises ValueError: not one float output of that shape."""
        n, wanted = len(images), self.batch or len(images)
        if n < wanted:
            images = F.pad(images, (0,) * 7 + (wanted - n,))
        if self.form == "bytes":
            images = images.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        outputs = self.program.run(images.contiguous())
        found = [x for x in outputs if x.is_floating_point() and x.ndim == 2 and len(x) == wanted]
        if len(found) != 1:
            shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in outputs)
            raise ValueError(f"for {wanted} images it gives {shapes or 'nothing'}; a descriptor is one float "
                             f"[{wanted}, dim]")
        return found[0][:n]

    def try_out(self) -> None:
        """Find the form of the input and the size of the batch by describing noise. Raises InputError."""
        errors = {}
        for form in self.program.forms:
            self.form = form
            if form == "bytes":
                self.mean, self.std = [0.0] * 3, [1 / 255] * 3
            try:
                return self.try_form()
            except Exception as error:  # programs raise many kinds
                errors[form] = first_line(error)
        raise InputError(f"{self.file} cannot describe images of {self.args.input_size} px: " + "; ".join(
            (f"as {FORMS[form]}: " if len(errors) > 1 else "") + error for form, error in errors.items()))

    def try_form(self) -> None:
        """The same for one form. Raises what the program raises, ValueError: no descriptors."""
        size = self.args.input_size
        rng = torch.Generator().manual_seed(0)
        std = torch.tensor(self.std).view(3, 1, 1)
        images = (torch.rand(TRIED, 3, size, size, generator=rng) - torch.tensor(self.mean).view(3, 1, 1)) / std
        alone = torch.cat([self.rows(image[None]) for image in images])
        if not alone.isfinite().all():
            raise ValueError("its output has NaN or infinity")
        if not alone.any(1).all():
            raise ValueError("its output is 0 everywhere")
        if self.args.resize == "short":
            self.rows(F.pad(images[:1], (0, size)))
        self.dim = alone.shape[1]
        if not self.program.batch:
            self.batch = None if self.same_at_once(images, F.normalize(alone.float())) else 1

    def same_at_once(self, images: torch.Tensor, alone: torch.Tensor) -> bool:
        """Whether images [n, 3, h, w] give at once the descriptors [n, dim] that they give one by one."""
        self.batch = None
        try:
            return bool(((self(images) - alone).abs() < 1e-3).all())
        except Exception:  # programs raise many kinds
            return False

    def ready(self, size: int, device: torch.device, amp_dtype: torch.dtype | None = None) -> Graph:
        """This graph on a device. Its precision is its own."""
        if (device.type, torch.get_num_threads()) != ("cpu", self.threads):
            self.program = KINDS[self.kind].open(self.file, device)
        return self


def open_graph(kind: str, file: str | Path, args: Args, stored: dict) -> tuple[Args, Graph]:
    """A graph that has been tried out, and the command line with what it needs. `stored`: the settings of one of ours,
    which are in `args` already; {}: of another program, whose settings are flags or a preset.

    Raises InputError: flags that are missing, or contradict the file; a file that cannot be used as it is meant.
    """
    if kind == "torchscript" and not args.allow_code:
        raise InputError(f"{file} is TorchScript, a program that runs when it is loaded; if you trust whoever made it, "
                         "add --allow-code")
    program = KINDS[kind].open(file, torch.device("cpu"))
    if stored:
        args = args.replace(mean=stored["mean"], std=stored["std"])
    else:
        preset = PRESETS.get(args.preset, {})
        known = {"input_size": program.size, "resize": None} | preset | {
            name: getattr(args, name) for name in ("input_size", "resize", "mean", "std") if name in args.given}
        args = args.replace(**{name: known.get(name) for name in ("input_size", "resize", "mean", "std")})
        needed = ["input_size", "resize"] + ["mean", "std"] * (program.forms == ["float"])
        ask_for(file, [name for name in needed if not known.get(name)])
    size = stored.get("input_size", program.size)
    if size and (args.input_size != size or args.resize == "short"):
        raise InputError(f"{file} takes images of {size} x {size} px only, not --input-size {args.input_size} --resize "
                         f"{args.resize}")
    graph = Graph(kind, file, args, program)
    if graph.form == "float":
        ask_for(file, [name for name in ("mean", "std") if not getattr(args, name)])
    elif said := [f"--{name}" for name in ("mean", "std") if name in args.given]:
        raise InputError(f"{', '.join(said)}: {file} takes bytes, {FORMS['bytes']}, and normalises them itself")
    else:
        args = args.replace(mean=None, std=None)
    return args, graph


def ask_for(file: str | Path, missing: list[str]) -> None:
    """Raise InputError that asks for these flags, if any."""
    if missing:
        raise InputError(f"{file} does not say how its images are made: give "
                         + ", ".join(f"--{name.replace('_', '-')}" for name in missing)
                         + f" (or --preset: {', '.join(PRESETS)})")
