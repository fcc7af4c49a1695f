"""--mode export and load_descriptor: the same descriptors in other programs."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import find_copies
import train
from copydet import load_descriptor
from copydet.batches import collate_images
from copydet.checkpoints import DEFAULT, find_source, load_net
from copydet.common import InputError
from copydet.finding import pick_weights
from copydet.options import parse_args
from copydet.views import Preprocessing, WholeImages
from helpers import ROOT, WITH_PACKAGE, draw_images, run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return sorted(draw_images(tmp_path_factory.mktemp("photos"), 7).iterdir())


@pytest.fixture(scope="module")
def expected(weights, images):
    """Input tensors and descriptors of the images, by the network itself."""
    args, source = find_source(parse_args(["--mode", "extract", "--weight", weights, "x"]))
    net = load_net(args, source)
    whole = WholeImages([str(path) for path in images], Preprocessing.of(args, net))
    tensors = collate_images([whole[i] for i in range(len(images))])[0][0][1].to("cpu")
    with torch.no_grad():
        return tensors, net(tensors).numpy()


def exported(weights, folder, form):
    path = folder / f"net.{form}"
    args = parse_args(["--mode", "export", "--weight", str(weights), "--format", form, "-o", str(path)])
    train.main(args)
    return path


def test_load_descriptor_describes_paths_and_images(weights, images, expected):
    descriptor = load_descriptor(weights)
    rows = descriptor([images[0], *map(str, images[1:])])
    assert rows.dtype == np.float32 and rows.shape == (7, 256) and np.allclose(rows, expected[1], atol=1e-5)
    assert np.allclose(descriptor([Image.open(images[2])]), expected[1][2:3], atol=1e-5)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_descriptor(images[0])


def test_import_does_nothing_else(tmp_path):
    done = run("-c", "from train import load_descriptor", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert not done.stdout and not done.stderr and not list(tmp_path.iterdir())


IMPORTED = """
import os, sys, types
import cv2, timm, torch, torchvision  # the libraries set what they set
for name in ("log", "cli", "report", "index", "options", "views"):  # modules of other projects
    sys.modules[name] = types.ModuleType(name)
state = lambda: (dict(os.environ), torch.get_num_threads(), cv2.getNumThreads(), torch.get_rng_state().tolist())
before = state()
import copydet, pkgutil
for module in pkgutil.iter_modules(copydet.__path__):
    __import__("copydet." + module.name)
import train
assert state() == before
print("unchanged", len(list(pkgutil.iter_modules(copydet.__path__))))
"""


def test_importing_the_package_changes_nothing_global():
    assert "unchanged" in run("-c", IMPORTED, env=WITH_PACKAGE).stdout


def test_onnx_gives_the_same_descriptors(weights, tmp_path, expected):
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = exported(weights, tmp_path, "onnx")
    session = onnxruntime.InferenceSession(str(path))
    for n in (7, 1, 3):
        rows, = session.run(None, {"images": expected[0][:n].numpy()})
        assert rows.shape == (n, 256) and np.allclose(rows, expected[1][:n], atol=1e-5)
    config = {prop.key: json.loads(prop.value) for prop in onnx.load(path).metadata_props if prop.key in (
        "input_size", "resize", "mean", "std", "dim", "arch", "checkpoint_sha256")}
    assert (config["input_size"], config["resize"], config["mean"], config["dim"]) == (32, "crop", [0.5] * 3, 256)
    assert config["arch"] == "test_efficientnet.r160_in1k" and len(config["checkpoint_sha256"]) == 64


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_torchscript_gives_the_same_descriptors(weights, tmp_path, expected):
    path, extra = exported(weights, tmp_path, "torchscript"), {"config.json": ""}
    net = torch.jit.load(path, _extra_files=extra)
    for n in (7, 1):
        assert np.allclose(net(expected[0][:n]).numpy(), expected[1][:n], atol=1e-5)
    assert json.loads(extra["config.json"])["input_size"] == 32


def test_safetensors_load_as_a_checkpoint(weights, tmp_path, images, expected):
    from safetensors.torch import safe_open, save_file
    path = exported(weights, tmp_path, "safetensors")
    with safe_open(path, "pt") as tensors:
        config, state = tensors.metadata()["config"], {name: tensors.get_tensor(name) for name in tensors.keys()}
    assert json.loads(config)["gem_eval_p"] == 5
    assert np.allclose(load_descriptor(path)(images), expected[1], atol=1e-5)
    save_file(state, path)
    with pytest.raises(InputError, match="no settings in its metadata, no config.json"):
        load_descriptor(path)
    (tmp_path / "config.json").write_text(config)  # as older versions wrote it
    assert np.allclose(load_descriptor(path)(images), expected[1], atol=1e-5)


def test_the_network_that_comes_with_the_project(tmp_path, capsys):
    """Small, of 16 bits, used where no other is named, and told."""
    assert DEFAULT.stat().st_size < 6e6
    with safe_open(DEFAULT, "pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys()}
    assert kinds <= {torch.float16, torch.int64}
    images = draw_images(tmp_path / "images", 3, 96)
    rows = load_descriptor()(sorted(images.iterdir()))
    assert rows.shape == (3, 256) and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    args = find_copies.parse_args([str(images), "-o", str(tmp_path / "r")])
    assert pick_weights(args) == ("--weight", str(DEFAULT))
    assert "exp/default.safetensors" in capsys.readouterr().err
    assert "--half" in run("train.py", "--mode", "export", "--half", "--weight", DEFAULT, code=2).stderr
