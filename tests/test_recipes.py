"""Every recipe runs: two training steps and an extraction with a tiny network; it differs from its parent as noted."""
import re
import shutil

import h5py
import numpy as np
import pytest

import train
from helpers import ROOT, draw_photos

RECIPES = sorted(path.stem for path in (ROOT / "exp").glob("*.args"))
PARENTS = {  # recipe -> its parent and the flags that its note changes (besides --exp)
    "v6": ("v5", "miner type-of-triplets"), "v7": ("v5", "loss pos-margin"), "v8": ("v7", "pos-margin view0 view1"),
    "v9": ("v8", "view1 neg-margin epochs sample-size"),
    "v10": ("v9", "memory-size input-size gem-eval-p epochs sample-size"), "v14": ("v10", "loss"),
    "v15": ("v10", "loss neg-margin"), "v16": ("v10", "head"), "v17": ("v10", "head"), "v18": ("v10", "arch lr"),
    "v19": ("v18", "amp batch-size memory-size epochs"), "v19m": ("v19", "arch sample-size"),
    "v20": ("v19", "batch-norm arch memory-size"), "v22": ("v19", "view0 sample-size"),
    "v23": ("v19m", "weight input-size lr view0 op-prob seed"), "v24": ("v19", "dim neg-margin"),
    "v25": ("v19", "arch pool lr batch-size input-size"), "v26": ("v19", "view1 op-prob neg-margin"),
    "v27": ("v19", "lr wd neg-margin"), "v28": ("v27", "lr-schedule"), "v29": ("v27", "view1"), "v30": ("v29", "view1"),
    "v31": ("v30", "lr-schedule arch lr sample-size"), "v32": ("v31", "view1"),
    "v33": ("v31", "arch pool input-size optimizer lr wd batch-size sample-size"), "v34": ("v31", "arch"),
    "v35": ("v31", "arch batch-size"), "v36": ("v31", "weight input-size lr batch-size view0 op-prob seed"),
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
    assert set(RECIPES) - set(PARENTS) == {"v5"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_extracts(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ROOT", tmp_path)
    data = draw_photos(tmp_path / "data" / "training_images", 8).parent
    for folder in ("query_images", "reference_images"):
        shutil.copytree(data / "training_images", data / folder)
    recipe = (ROOT / "exp" / f"{name}.args").read_text()
    (tmp_path / "recipe.args").write_text(re.sub(r"(?m)^--weight .*", "", recipe))
    swin = flags_of(name)["pool"] == "backbone"
    small = ["-a", "test_mambaout" if swin else "test_efficientnet", "--no-pretrained", "--input-size", "32",
             "--batch-size", "4", "--epochs", "1", "--device", "cpu", "-j", "0"]
    small += ["--memory-size", "16"] if flags_of(name)["memory-size"] != "0" else []
    train.main(train.parse_args([f"@{tmp_path}/recipe.args", *small, str(data / "training_images")]))
    train.main(train.parse_args(["--mode", "extract", "--exp", name, "-j", "0", "--device", "cpu", str(data)]))
    with h5py.File(tmp_path / "exp" / name / "extract" / "fb-isc-submission.h5") as file:
        assert file["query"].shape == (8, int(flags_of(name)["dim"]))
        norms = np.linalg.norm(file["reference"][()], axis=1)
    assert np.allclose(norms, 1, atol=1e-5)
