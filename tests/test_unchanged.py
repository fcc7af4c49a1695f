"""Every recipe draws the views, makes the network and has the losses that it had when tests/unchanged.json was stored.

The figures come from two steps of training with a tiny network. Draws are compared exactly, pixels, weights and losses
to what other processors, threads and decoders change. Where a change is meant, store the figures anew:
    PYTHONPATH=.:scripts python tests/test_unchanged.py
"""
import base64
import csv
import hashlib
import json
import math
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from helpers import ROOT, draw_images
from PIL import Image

FILE = Path(__file__).with_name("unchanged.json")
STORED = json.loads(FILE.read_text()) if FILE.is_file() else {}
LIBRARIES = ("numpy", "torch", "torchvision", "timm", "pytorch-metric-learning", "augly", "opencv-python-headless",
             "Pillow", "simplejpeg")
SIDE = 48  # of the network's input
LEVELS = 3  # that a figure of a view may differ by
# Tolerances, relative and absolute, of the losses of both steps and of the weights (norm, share of the norm). Between
# AVX2, AVX-512 and numbers of threads 4e-5 and 6e-6 were seen; without AVX, where a resized pixel is a level off, it
# was 0.004, 0.014 and 0.002: batch norm of eight rows makes much of little.
FAST = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
LOSSES, WEIGHTS = ((5e-4, 5e-4), 1e-4) if FAST else ((0.01, 0.05), 0.005)


def train_recipe(words):
    """The one place that calls the project: train as `train.py WORDS` does."""
    train.main(train.parse_args(words))


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


KINDS = {  # side of a square photo, what is cut out of it, mode, ending
    64: (64, 64, "RGB", "png"), 97: (97, 97, "L", "png"), 120: (80, 120, "RGBA", "png"), 300: (40, 300, "RGB", "png"),
    96: (96, 60, "RGB", "png"), 301: (301, 90, "P", "png"), 700: (700, 500, "RGB", "png"),
    701: (500, 701, "RGB", "jpg")}


def draw_data(root):
    """A folder like input/: eight training photos of many shapes and kinds, four pairs of such, small negatives."""
    for seed, (folder, count) in enumerate((("training_images", 8), ("query_images", 4), ("reference_images", 4))):
        for side, (width, height, mode, ending) in list(KINDS.items())[:count]:
            file = draw_images(root / folder, 1, side, side + seed, "square.png") / "square.png"
            img = Image.open(file).crop((0, 0, width, height)).convert(mode)
            img.save(root / folder / f"{folder[0].upper()}{side}.{ending}", quality=95)
            file.unlink()
    draw_images(root / "reference_images", 92, 48, 2, "N{:04d}.png")  # none of 96 comes twice in a batch
    (root / "public_ground_truth.csv").write_text("query_id,reference_id\n" + "".join(
        f"Q{side},R{side}\n" for side in list(KINDS)[:4]))
    return root


class Recorder:
    """A numpy generator that writes down what it draws; of noise the shape only."""

    def __init__(self, generator):
        self.generator, self.drawn = generator, []

    def __getattr__(self, name):
        def draw(*args, **kwargs):
            value = getattr(self.generator, name)(*args, **kwargs)
            x = np.asarray(value)
            self.drawn += x.shape if x.dtype == np.float32 else [f"{number:.6g}" for number in x.ravel().tolist()]
            return value
        return draw


def hash_of(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def words_of(name, data, out):
    """The command line that trains a recipe for two epochs of one step with a tiny network; results go to `out`, which
    --exp can name because it is absolute."""
    recipe = re.sub(r"(?m)^--weight .*", "", (ROOT / "exp" / f"{name}.args").read_text())
    file = out.with_suffix(".args")
    recipe = re.sub(r"(?m)^--negatives .*", "--negatives 2", recipe)  # 30 take a second
    file.write_text(recipe.replace(" input/", f" {data}/"))
    arch = "test_mambaout" if "--pool backbone" in recipe else "test_efficientnet"  # which has NHWC maps, as Swin has
    small = f"-a {arch} --no-pretrained --input-size {SIDE} --batch-size 4 --epochs 2 --epoch-steps 1 --seed 1 " \
            f"--whiten 0 --calibrate 0 --amp off --device cpu -j 0 -p 1 --exp {out}"
    return [f"@{file}", *small.split(), str(data if "--pairs" in recipe else data / "training_images")]


def look_of(file):
    """Each photo and view of views.png: the mean of each quarter and colour, and of the steps between neighbours."""
    pixels, step, cells = np.asarray(Image.open(file)).astype(float), SIDE + 2, []
    for top in range(2, pixels.shape[0] - 2, step):
        for left in range(2, pixels.shape[1] - 2, step):
            cell = pixels[top:top + SIDE, left:left + SIDE]
            means = cell.reshape(2, SIDE // 2, 2, SIDE // 2, 3).mean((1, 3))
            cells += [*means.ravel(), np.abs(np.diff(cell, axis=1)).mean()]
    return base64.b64encode(np.uint8(np.round(cells))).decode()


def weights_of(state):
    """{backbone or head: [norm of all its numbers, a projection of them as a share of it]}."""
    figures = {}
    for part, inside in (("backbone", True), ("head", False)):
        x = [value.double().flatten() for name, value in state.items() if name.startswith("backbone.") == inside]
        x = torch.cat([torch.zeros(1, dtype=torch.double), *x])
        norm = x.norm().item()
        figures[part] = [norm, (x @ torch.arange(len(x)).double().cos()).item() / max(norm, 1e-9)]
    return figures


def measure(name, data, out, monkeypatch):
    """{figure: value} of a recipe."""
    recorders, default_rng = [], np.random.default_rng

    def recorded(seed=None):
        recorders.append((seed, Recorder(default_rng(seed))))
        return recorders[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", recorded)
        train_recipe(words_of(name, data, out))
    drawn = sorted({f"{seed}: {' '.join(map(str, recorder.drawn))}" for seed, recorder in recorders if recorder.drawn})
    with open(out / "train" / "log.csv", newline="") as lines:
        log = list(csv.DictReader(lines))
    state = torch.load(out / "train" / "checkpoint_0000.pth.tar", weights_only=True)["state_dict"]
    shapes = [f"{key} {list(value.shape)} {value.dtype}" for key, value in state.items()]
    return {"draws": hash_of("\n".join(drawn)), "views": look_of(out / "train" / "views.png"),
            "state": hash_of("\n".join(shapes)), "weights": weights_of(state),
            "loss": [float(row["loss"]) for row in log], "lr": [float(row["lr"]) for row in log]}


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def differences(now, stored):
    """Names of the figures that are not as stored."""
    views = [np.frombuffer(base64.b64decode(figures["views"]), np.uint8).astype(int) for figures in (now, stored)]
    same = {name: now[name] == stored[name] for name in ("draws", "state")}
    same["views"] = len(views[0]) == len(views[1]) and abs(views[0] - views[1]).max() <= LEVELS
    same["lr"] = now["lr"] == pytest.approx(stored["lr"], rel=1e-5)
    same["loss"] = all(math.isclose(a, b, rel_tol=t, abs_tol=t) for a, b, t in zip(now["loss"], stored["loss"], LOSSES))
    same["weights"] = all(math.isclose(a, b, rel_tol=WEIGHTS, abs_tol=WEIGHTS) for part in stored["weights"]
                          for a, b in zip(now["weights"][part], stored["weights"][part]))
    return [name for name, equal in same.items() if not equal]


def versions():
    return {name: version(name).partition("+")[0] for name in LIBRARIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_data(tmp_path_factory.mktemp("input"))


@pytest.mark.parametrize("name", STORED.get("recipes", ()))
def test_a_recipe_is_what_it_was(name, data, tmp_path, monkeypatch):
    stored = STORED["recipes"][name]
    now = measure(name, data, tmp_path / name, monkeypatch)
    if differ := differences(now, stored):
        if versions() != STORED["versions"]:
            pytest.skip(f"{', '.join(differ)} differ, and so do the libraries: {STORED['versions']} when stored")
        raise AssertionError("\n".join([f"{name} is not as stored:", *(f"{key}: {now[key]}, stored {stored[key]}"
                                                                      for key in differ)]))


def test_other_draws_weights_and_losses_are_seen(data, tmp_path, monkeypatch):
    """What is compared tells recipes apart that differ in a little."""
    of = lambda name, other: differences(STORED["recipes"][name], STORED["recipes"][other])
    assert of("v9", "v8") == ["draws", "views", "loss", "weights"] and of("v16", "v10") == ["state", "loss", "weights"]
    assert "loss" in of("v15", "v10") and not of("v34", "v31")
    monkeypatch.setattr(sys.modules[__name__], "words_of", lambda *args, words=words_of: [*words(*args), "--seed", "2"])
    now = measure("v31", data, tmp_path / "v31", monkeypatch)
    assert {"draws", "views", "loss", "weights"} <= set(differences(now, STORED["recipes"]["v31"]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        data, figures = draw_data(Path(folder, "input")), {}
        names = sorted((path.stem for path in (ROOT / "exp").glob("*.args")),
                       key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
        for name in names:
            with pytest.MonkeyPatch.context() as monkeypatch:
                figures[name] = measure(name, data, Path(folder, name), monkeypatch)
    text = json.dumps({"versions": versions(), "recipes": figures}, indent=1)
    FILE.write_text(re.sub(r"\[\s+([^\[\]]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")
