"""ladder.py through its command line, with a tiny network: stopped and continued, a chain, a recipe that fails."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imagehash
import numpy as np
import pytest
import torch
from helpers import ROOT, draw_images, run
from PIL import Image

import ladder
from copydet.descriptors import Descriptors

PARENT = """# {name}: metric learning of a tiny network.
--arch test_efficientnet --input-size 32 --dim 16 --epochs 2 --batch-size 4 --memory-size 0 --no-pretrained
"""
FLAGS = ["--steps", 3, "--baselines", "phash", "--no-pretrained", "-a", "test_efficientnet",
         "--input-size", 32, "--batch-size", 3, "--memory-size", 8, "--device", "cpu", "-j", 0]


def rows(folder):
    file = folder / "ladder.csv"
    return list(csv.DictReader(file.open())) if file.is_file() else []


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    """A ladder stopped after its first trained row, continued, and grown by a seed: folder, command, rows when stopped,
    table."""
    tmp = tmp_path_factory.mktemp("ladder")
    (tmp / "first.args").write_text(PARENT.format(name="first"))
    (tmp / "second.args").write_text("# second: first, continued.\n" + PARENT.format(name="x") +
                                     "--weight exp/first/train/checkpoint_0004.pth.tar\n")
    (tmp / "broken.args").write_text(PARENT.format(name="broken") + "--ncrops 1\n")
    draw_images(tmp / "photos", 24)
    command = ["scripts/ladder.py", tmp / "photos", "-o", tmp / "ladder", "--training", 8, *FLAGS, "--seeds"]
    both = [*command, 1, "--recipes", f"{tmp}/second.args,{tmp}/broken.args"]
    process = subprocess.Popen([sys.executable, *map(str, both)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while len(rows(tmp / "ladder")) < 2 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130
    before = rows(tmp / "ladder")
    run(*both, code=1)
    torch.jit.save(torch.jit.script(torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten())), tmp / "known.pt")
    known = f"{tmp}/known.pt --allow-code --input-size 32 --resize square --mean 0.5 --std 0.5"
    return tmp / "ladder", both, before, run(*command, 2, "--recipes", tmp / "first.args", "--weight", known).stdout


def test_a_stopped_ladder_goes_on_and_keeps_its_rows(climbed):
    folder, _, before, _ = climbed
    after = rows(folder)
    assert len(before) == 2 and after[:2] == before
    assert [(row["recipe"], row["seed"]) for row in after] == [("phash", ""), ("first", "1"), ("second", "1"),
                                                               ("broken", "1"), ("known", ""), ("first", "2")]
    assert (folder / "first-s1" / "output.txt").read_text().count("--save-steps") == 1  # trained once


def test_rows_hold_scores_steps_and_minutes(climbed):
    for row in rows(climbed[0]):
        if row["recipe"] == "broken":
            assert row["status"] == "failed" and "--ncrops 1: an image needs at least 2 views" in row["error"]
        else:
            assert row["status"] == "ok" and not row["error"]
            scores = [float(row[name]) for name in ("ap", "r_p90", "isolated_ap", "isolated_r_p90")]
            assert all(0 <= score <= 1 for score in scores) and scores[0] > 0
        if row["recipe"] in ("first", "second"):
            assert row["steps"] == "4" and float(row["minutes"]) >= 0  # 2 epochs of 2 steps
    seeds = [row["ap"] for row in rows(climbed[0]) if row["recipe"] == "first"]
    assert len(set(seeds)) == len(seeds) == 2


def test_a_recipe_starts_from_its_parent_of_the_same_seed(climbed):
    args = json.loads((climbed[0] / "second-s1" / "train" / "args.json").read_text())
    assert args["weight"] == str(climbed[0] / "first-s1" / "train" / "checkpoint_0001.pth.tar")
    assert (args["seed"], args["batch_size"], args["memory_size"]) == (1, 3, 0)  # no memory was turned on


def test_table_and_picture(climbed):
    folder, _, _, said = climbed
    line = next(line for line in said.splitlines() if line.startswith("first "))
    scores = [float(row["ap"]) for row in rows(folder) if row["recipe"] == "first"]
    assert f"{np.mean(scores):.3f} ({min(scores):.3f}..{max(scores):.3f})" in line and "metric learning" in line
    assert "seed 1, failed: " in said and "known.pt --allow-code --input-size 32" in said
    img = Image.open(folder / "ladder.png")
    assert img.format == "PNG" and min(img.size) > 500


@pytest.mark.parametrize("changed, words", [
    (["--steps", "5"], "budget '3 steps', not '5 steps'"),
    (["--lr", "0.5"], "overrides"),
    (["--strength", "hard"], "benchmark"),
    (["--weight", "{tmp}/known.pt --preset sscd"], "has a row known of other flags"),
])
def test_other_settings_are_refused(climbed, changed, words):
    folder, command, _, _ = climbed
    before = (folder / "ladder.csv").read_bytes()
    said = run(*command, *(word.format(tmp=folder.parent) for word in changed), code=2).stderr
    assert len(said.splitlines()) == 1 and words in said
    assert (folder / "ladder.csv").read_bytes() == before


def test_a_changed_recipe_is_refused(climbed):
    folder, command, _, _ = climbed
    file = folder.parent / "broken.args"
    file.write_text(file.read_text() + "--lr 1\n")
    assert "broken.args: --lr has changed" in run(*command, code=2).stderr


@pytest.mark.parametrize("flags, words", [
    (["--recipes", "v5,nowhere"], "nowhere.args"),
    (["--recipes", "v5", "--inptu-size", "64"], "--inptu-size"),
    (["--recipes", "v5", "--seed", "3"], "--seed: the ladder sets it"),
    (["--recipes", "v5", "--steps", "0"], "--steps: 0"),
    (["--recipes", "v5", "--baselines", "raw"], "--backbone-weights"),
    (["--recipes", "v5", "--baselines", "sift"], "sift"),
    (["--recipes", "v5", "more"], "more"),
    (["--recipes", "v5", "--weight", "nowhere.onnx --preset sscd"], "--weight: no such file: nowhere.onnx"),
    (["--recipes", "v5", "--weight", "exp/v5.args"], "there is a row v5 already"),
])
def test_wrong_flags_are_told_in_one_line(tmp_path, flags, words):
    said = run("scripts/ladder.py", tmp_path, "-o", tmp_path / "ladder", *flags, code=2).stderr
    assert len(said.splitlines()) == 1 and words in said
    assert not (tmp_path / "ladder").exists()


def test_parents_come_first_and_each_recipe_once():
    names = [recipe.name for recipe in ladder.with_parents(["v36", "v7", "v23", "v31"])]
    assert names == ["v31", "v36", "v7", "v19m", "v23"]


def test_memory_size_leaves_recipes_without_memory_alone():
    overrides = ladder.split_flags(["--memory-size=64", "-b", "8", "--wd", "-1"])
    assert ladder.flags_for(ladder.read_recipe("v7"), overrides) == ["-b", "8", "--wd", "-1"]
    assert ladder.flags_for(ladder.read_recipe("v31"), overrides) == ["--memory-size", "64", "-b", "8", "--wd", "-1"]


@pytest.mark.parametrize("steps, epochs, shared", [(500, 5, (5, 100)), (501, 5, (5, 101)), (7, 1, (1, 7)),
                                                   (3, 5, (3, 1)), (1000, 300, (250, 4))])
def test_a_budget_is_shared_by_the_epochs(steps, epochs, shared):
    assert ladder.share_steps(steps, epochs, 10**9) == shared
    assert steps <= shared[0] * shared[1] < steps + shared[1]


def test_minutes_become_steps_by_the_log(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"batch_size": 10, "world_size": 2, "ncrops": 3}))
    # 60 views a step: 5 steps in 30 s with the start-up, then 15 in 9 s
    (tmp_path / "log.csv").write_text("epoch,step,images_per_s\n0,5,10\n0,10,100\n0,20,100\n")
    log = ladder.read_log(tmp_path)
    assert log == [(5, 30.0), (5, 3.0), (10, 6.0)]
    assert ladder.steps_in(0.5, log) == 50


@pytest.mark.parametrize("name", ladder.HASHES)
def test_distance_of_hashes_is_hamming_distance(name, tmp_path):
    if name == "pdq":
        pytest.importorskip("pdqhash")
    for folder in ladder.FOLDERS.values():
        draw_images(tmp_path / folder, 12, size=96, seed=len(folder))
    (tmp_path / "query_images" / "bad.jpg").write_text("no image")
    ladder.write_hashes(name, tmp_path, tmp_path / "hashes.h5")
    bits = [ladder.HASHES[name](Image.open(tmp_path / f"query_images/{i:04d}.jpg")) for i in range(12)]
    hamming = np.array([[(a != b).sum() for b in bits] for a in bits])
    with Descriptors(tmp_path / "hashes.h5") as file:
        x, n = file["query"].read().astype(float), len(bits[0])
        assert len(file["reference"]) == len(file["train"]) == len(x) == 12
    assert "bad.jpg" in (tmp_path / "skipped.csv").read_text()
    assert n == {"pdq": 256, "phash": 64}[name] and hamming.max() > n / 4
    assert np.allclose(np.square(x[:, None] - x).sum(2), 4 / n * hamming, atol=1e-6)


def test_phash_is_the_library_distance(tmp_path):
    draw_images(tmp_path, 2, size=96)
    one, other = (Image.open(tmp_path / f"000{i}.jpg") for i in range(2))
    distance = np.square(ladder.hash_image("phash", tmp_path / "0000.jpg") -
                         ladder.hash_image("phash", tmp_path / "0001.jpg")).sum()
    assert imagehash.phash(one) - imagehash.phash(other) == round(float(distance) * 64 / 4)


class Recorder(ladder.Ladder):
    """A ladder that notes its commands instead of running them; a training leaves the log of its pace."""

    def command(self, log, script, *words, **options):
        self.commands = [*getattr(self, "commands", []), [script.name, *map(str, words)]]
        if "--epoch-steps" in words:
            folder = Path(words[words.index("--exp") + 1]) / "train"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "args.json").write_text('{"batch_size": 4, "world_size": -1, "ncrops": 2}')
            (folder / "log.csv").write_text("step,images_per_s\n5,1\n20,40\n")  # 0.2 s a step after the start-up
            (folder / "checkpoint_0000.pth.tar").touch()


@pytest.fixture
def recorder(tmp_path):
    """A ladder of recipe v101 on a benchmark of four training images and two pairs, with a budget of 3 minutes."""
    for folder in ladder.FOLDERS.values():
        draw_images(tmp_path / "data" / folder, 4)
    (tmp_path / "data" / ladder.TRUTH).write_text("query_id,reference_id\n0000,0001\n0001,0002\n0002,\n")
    words = [str(tmp_path / "data"), "--recipes", "v101", "--budget-minutes", "3", "-o", str(tmp_path / "ladder"),
             "-b", "2", "--no-pretrained"]
    return Recorder(ladder.parse_args(words))


def test_raw_features_are_of_the_network_before_training(recorder, tmp_path):
    recorder.baseline("centred", tmp_path)
    (train, *extract), (script, *centre) = recorder.commands
    assert "--no-pretrained" in extract and "--weight" not in extract and extract[-1] == "qrt"
    assert script == "postprocess.py" and centre[-2:] == ["center", "l2"]


def test_a_probe_makes_minutes_into_steps_once(recorder):
    recipe = recorder.args.recipes[0]
    assert recorder.steps(recipe, ["--lr", "1"]) == recorder.steps(recipe, ["--lr", "1"]) == 900
    assert len(recorder.commands) == 1 and not (recorder.out / "probe").exists()
    assert json.loads((recorder.out / "ladder.json").read_text())["recipes"][recipe.name]["steps"] == 900


def test_pairs_and_negatives_are_those_of_the_benchmark(recorder):
    recipe = recorder.args.recipes[-1]
    assert [r.name for r in recorder.args.recipes] == ["v83", "v86", "v98", "v101"]
    with pytest.raises(ladder.Failed, match="its parent v98 failed"):
        recorder.training_words(recipe, [], "1")
    recorder.rows["v98", "1"] = {"status": "ok"}
    (recorder.out / "v98-s1" / "train").mkdir(parents=True)
    checkpoint = recorder.out / "v98-s1" / "train" / "checkpoint_0001.pth.tar"
    checkpoint.touch()
    images, *words = recorder.training_words(recipe, [], "1")
    flags = dict(zip(words, words[1:]))
    data = recorder.benchmark
    assert (images, flags["--pairs"], flags["--weight"]) == (data, data / ladder.TRUTH, checkpoint)
    assert flags["--negatives-dir"] == data / "reference_images"
    assert recorder.longest_epoch(recipe) == 1 and recorder.longest_epoch(recorder.args.recipes[0]) == 2


def test_an_interrupt_waits_until_what_was_started_is_known():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with ladder.interrupts_after(lambda: done.append("last")):
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("started")
    assert done == ["started", "last"]
