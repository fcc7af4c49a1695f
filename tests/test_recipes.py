"""Every recipe runs: two training steps and an extraction with a tiny network; it differs from its parent as noted."""
import re
import subprocess

import h5py
import numpy as np
import pytest

import train
from helpers import ROOT, draw_photos

RECIPES = sorted(path.stem for path in (ROOT / "exp").glob("*.args"))
PARENTS = {  # recipe -> its parent and the flags that its note changes (besides --exp)
    "v2": ("v1", "view1 epochs"),
    "v3": ("v2", "head pred-dim fix-pred-lr decay-all loss scale input-size ncrops view1 epochs batch-size lr wd"),
    "v4": ("v3", "grow-epochs grow-to sample-size epochs"),
    "v5": ("v4", "grow-epochs grow-to scale loss ncrops sample-size view0 epochs lr"),
    "v6": ("v5", "miner type-of-triplets"), "v7": ("v5", "loss pos-margin"), "v8": ("v7", "pos-margin view0 view1"),
    "v9": ("v8", "view1 neg-margin epochs sample-size"),
    "v10": ("v9", "memory-size input-size gem-eval-p epochs sample-size"), "v11": ("v10", "miner memory-size"),
    "v12": ("v10", "memory-enqueue"), "v13": ("v12", "miner"), "v14": ("v10", "loss"),
    "v15": ("v10", "loss neg-margin"), "v16": ("v10", "head"), "v17": ("v10", "head"), "v18": ("v10", "arch lr"),
    "v19": ("v18", "amp batch-size memory-size epochs"), "v19m": ("v19", "arch sample-size"),
    "v20": ("v19", "batch-norm arch memory-size"), "v21": ("v20", "batch-norm arch batch-size memory-size"),
    "v22": ("v19", "view0 sample-size"), "v23": ("v19m", "weight input-size lr view0 op-prob seed"),
    "v24": ("v19", "dim neg-margin"), "v25": ("v19", "arch pool lr batch-size input-size"),
    "v26": ("v19", "view1 op-prob neg-margin"), "v27": ("v19", "lr wd neg-margin"), "v28": ("v27", "lr-schedule"),
    "v29": ("v27", "view1"), "v30": ("v29", "view1"), "v31": ("v30", "lr-schedule arch lr sample-size"),
    "v32": ("v31", "view1"), "v33": ("v31", "arch pool input-size optimizer lr wd batch-size sample-size"),
    "v34": ("v31", "arch"), "v35": ("v31", "arch batch-size"),
    "v36": ("v31", "weight input-size lr batch-size view0 op-prob seed"),
    "v42": ("v31", "arch gem-p gem-eval-p sample-size"), "v45": ("v42", "view1 op-prob"), "v49": ("v45", "arch view0"),
    "v52": ("v49", "resize view1"), "v55": ("v52", "view1"), "v58": ("v55", "arch sample-size memory-size view1"),
    "v60": ("v58", "loss margin temperature arch sample-size memory-size batch-size"),
    "v61": ("v58", "memory-enqueue arch memory-size"), "v68": ("v58", "weight input-size view1 seed"),
    "v69": ("v68", "lr"), "v72": ("v69", "weight input-size lr view1 seed"), "v79": ("v58", "view1 seed"),
    "v83": ("v79", "lr-schedule epochs"), "v84": ("v83", "weight input-size lr epochs view1 seed"),
    "v85": ("v84", "weight input-size lr epochs view1 seed"), "v86": ("v84", "lr"),
    "v98": ("v85", "weight lr lr-schedule epochs batch-size seed negatives negatives-dir"),
    "v101": ("v98", "weight pairs view0 view1 neg-margin memory-size epochs batch-size seed"),
    "v102": ("v101", "negatives"), "v103": ("v102", "negatives"), "v104": ("v103", "negatives"),
    "v105": ("v104", "lr"), "v106": ("v105", "lr"), "v107": ("v106", "lr"),
}


def flags_of(name):
    lines = (ROOT / "exp" / f"{name}.args").read_text().splitlines()
    return dict(re.match(r"--(\S+)\s*(.*)", line).groups() for line in lines if line.startswith("--"))


@pytest.mark.parametrize("name", PARENTS)
def test_a_recipe_changes_what_its_note_says(name):
    parent, changed = PARENTS[name]
    old, new = flags_of(parent), flags_of(name)
    assert {flag for flag in old.keys() | new.keys() if old.get(flag) != new.get(flag)} == {"exp", *changed.split()}


def test_every_recipe_but_the_first_has_a_parent():
    assert set(RECIPES) - set(PARENTS) == {"v1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """input/ as DISC21 lays it out, with generated photos."""
    root = tmp_path_factory.mktemp("input")
    draw_photos(root / "training_images", 8)
    draw_photos(root / "query_images", 8, name="Q{:05d}.jpg")
    draw_photos(root / "reference_images", 40, name="R{:06d}.jpg")
    pairs = [f"Q{i:05d},R{i:06d}" if i < 4 else f"Q{i:05d}," for i in range(8)]
    (root / "public_ground_truth.csv").write_text("\n".join(["query_id,reference_id", *pairs]) + "\n")
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_extracts(name, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0))  # the evaluation
    recipe, flags = (ROOT / "exp" / f"{name}.args").read_text(), flags_of(name)
    recipe = re.sub(r"(?m)^--weight .*", "", recipe).replace(" input/", f" {data}/")
    (tmp_path / "recipe.args").write_text(recipe)
    small = ["-a", "test_mambaout" if flags["pool"] == "backbone" else "test_efficientnet", "--no-pretrained",
             "--input-size", 32, "--batch-size", 4, "--epochs", 2, "--epoch-steps", 1, "--device", "cpu", "-j", 0]
    small += ["--memory-size", 160] if flags["memory-size"] != "0" else []
    small += ["--sample-size", 4, "--grow-epochs", 1] if "grow-epochs" in flags else []
    folder = data if "pairs" in flags else data / "training_images"
    train.main(train.parse_args([f"@{tmp_path}/recipe.args", *map(str, small), str(folder)]))
    assert (tmp_path / "exp" / name / "train" / "checkpoint_0001.pth.tar").is_file()
    train.main(train.parse_args(["--mode", "extract", "--exp", name, "-j", "0", "--device", "cpu", str(data)]))
    with h5py.File(tmp_path / "exp" / name / "extract" / "fb-isc-submission.h5") as file:
        assert file["query"].shape == (8, int(flags["dim"]))
        norms = np.linalg.norm(file["reference"][()], axis=1)
        assert file.attrs.get("contaminated") == ("public_ground_truth.csv" if "pairs" in flags else None)
    assert np.allclose(norms, 1, atol=1e-5)
