"""The trained network as a file for other programs: images [n, 3, s, s] -> descriptors [n, dim] of unit length.

The graph holds backbone, pooling, head and normalisation. How to make its input (size, resizing, mean, standard
deviation) is in the file's metadata, and what else a checkpoint tells: where it comes from, calibration, contamination.
--weight and `load_descriptor` read all of the formats.
"""
import io
import json
from pathlib import Path
from typing import Any

import torch

from copydet.common import InputError, replacing

INPUT = "images: float32 [n, 3, s, s], RGB, images resized to s = input_size as `resize` says, 0..1, (x - mean) / std"


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
    """Weights alone; `config` of the file's metadata holds the config. A net of 16 bits is written as such, what reads
    it computes in 32."""
    from safetensors.torch import save
    with replacing(path) as temporary:
        temporary.write_bytes(save({name: value.contiguous() for name, value in net.state_dict().items()},
                                   {"config": json.dumps(config)}))


FORMATS = {"onnx": write_onnx, "torchscript": write_torchscript, "safetensors": write_safetensors}
ENDINGS = {"onnx": ".onnx", "torchscript": ".pt", "safetensors": ".safetensors"}


def example(config: dict) -> torch.Tensor:
    """Two images [2, 3, s, s] to trace with."""
    return torch.zeros(2, 3, config["input_size"], config["input_size"])
