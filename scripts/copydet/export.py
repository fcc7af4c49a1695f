"""The trained network as a file for other programs: images [n, 3, s, s] -> descriptors [n, dim] of unit length.

The graph holds backbone, pooling, head and normalisation. How to make its input (size, resizing, mean, standard
deviation) is in the file's metadata, or in config.json beside safetensors.
"""
import io
import json
from pathlib import Path
from typing import Any

import torch

from copydet.common import InputError, check_output, replacing

INPUT = "images: float32 [n, 3, s, s], RGB, images resized to s = input_size as `resize` says, 0..1, (x - mean) / std"


def check_target(form: str, path: Path, source: str | Path | None) -> None:
    """Raise InputError where the file `path` cannot be written, is the checkpoint itself, or would put its config.json
    in the place of another program's."""
    check_output("-o", path, [source] if source else [])
    config = path.with_name("config.json")
    if form == "safetensors" and config.exists():
        try:
            ours = json.loads(config.read_text(encoding="utf-8"))["output"].startswith("descriptors: ")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            ours = False
        if not ours:
            raise InputError(f"-o {path}: {config} is there already, of another program; give another folder")


def write_onnx(net: torch.nn.Module, config: dict, path: Path) -> None:
    """ONNX with a free batch size; onnx's `metadata_props` hold the config, values as JSON. Raises InputError: a
    package is missing."""
    images, n = example(config), torch.export.Dim("n", min=1)
    try:
        program: Any = torch.onnx.export(net, (images,), input_names=["images"], output_names=["descriptors"],
                                         dynamo=True, dynamic_shapes=({0: n},), verbose=False)
    except ImportError as error:
        raise InputError(f"--format onnx needs a package: {error}; pip install onnx onnxscript") from None
    program.model.metadata_props.update({name: json.dumps(value) for name, value in config.items()})
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)


def write_torchscript(net: torch.nn.Module, config: dict, path: Path) -> None:
    """TorchScript by tracing; torch.jit.load's `_extra_files` {"config.json": ""} takes the config."""
    file = io.BytesIO()  # where the disk is full, writing by itself PyTorch ends the process
    with torch.inference_mode():
        torch.jit.save(torch.jit.trace(net, example(config)), file, _extra_files={"config.json": json.dumps(config)})
    with replacing(path) as temporary:
        temporary.write_bytes(file.getbuffer())


def write_safetensors(net: torch.nn.Module, config: dict, path: Path) -> None:
    """Weights alone, and config.json beside them; `load_descriptor` and --weight read both."""
    from safetensors.torch import save_file
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, temporary)
    with replacing(path.with_name("config.json")) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


FORMATS = {"onnx": write_onnx, "torchscript": write_torchscript, "safetensors": write_safetensors}
ENDINGS = {"onnx": ".onnx", "torchscript": ".pt", "safetensors": ".safetensors"}


def example(config: dict) -> torch.Tensor:
    """Two images [2, 3, s, s] to trace with."""
    return torch.zeros(2, 3, config["input_size"], config["input_size"])
