"""bench.py: each section gives figures beside floors, files can be compared, wrong use is told in a line."""
import json

import numpy as np
import pytest

import bench
from helpers import draw_images, run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("photos"), 4)


def measured(capsys, *words):
    assert bench.main(list(map(str, words))) == 0
    return capsys.readouterr().out


def test_figures_stand_beside_floors_and_earlier_ones(images, tmp_path, capsys):
    small = ["--images", images, "--side", 80, "--repeats", 1]
    table = measured(capsys, "views", "decode", *small, "--input-size", 32, "-o", tmp_path / "a.json")
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {"views", "decode"} and "of which jitter" in table
    assert all(row["value"] > 0 for row in rows) and sum(row["floor"] is not None for row in rows) == 3
    shares = [row["value"] for row in rows if row["unit"] == "%"]
    assert len(shares) > 5 and sum(shares) < 130
    table = measured(capsys, "decode", *small, "--compare", tmp_path / "a.json")
    assert "change" in table and table.count("%") == 2
    assert table.count(" of a memory copy of the pixels; limited by the JPEG decoder") == 2
    verdicts = [row["verdict"] for row in rows if row["verdict"]]
    assert len(verdicts) == 3 and " of decoding and resizing alone; limited by " in verdicts[0]


def test_training_and_extraction_with_a_tiny_network(images, capsys):
    table = measured(capsys, "train", "loop", "extract", "--images", images, "--count", 8, "--side", 80, "--repeats", 1,
                     "-a", "test_efficientnet", "--no-pretrained", "--input-size", 32, "--batch-size", 4,
                     "--memory-size", 64, "-j", 0, "--device", "cpu")
    assert "training step, test_efficientnet, 32 px, memory 64" in table and "beside a plain loop" in table
    assert "2 steps from files, test_efficientnet, 32 px, -j 0" in table
    assert table.count(" of forward, backward and optimizer alone; limited by ") == 2
    assert table.count("; limited by ") == 3  # training step, loop, extraction
    cosine = float(table.split("descriptors")[1].split()[0])
    assert cosine > 0.99


def test_start_over_many_photos(images, capsys):
    table = measured(capsys, "start", "--images", images, "--side", 64, "--links", 2500, "--repeats", 1,
                     "--device", "cpu", "-j", 0)
    memory = float(table.split("2,500 paths")[1].split()[0])
    assert 0 < memory < 2500 * 300 / 2**20  # 300 MB for a million
    assert "list 2,500 images, beside os.walk" in table and "from start to exit" in table


def test_medians_are_of_rounds_in_turns(monkeypatch):
    times = iter([100, 100, 1, 10, 3, 30, 2, 20])
    order = []
    monkeypatch.setattr(bench, "timed", lambda work: order.append(work) or next(times))
    assert np.array_equal(bench.in_turns(3, "a", "b"), [2, 20]) and "".join(order) == "ab" * 4


@pytest.mark.parametrize("words, message", [
    (["views"], "--images DIR is needed"), (["decode", "--images", "nowhere"], "no images in nowhere"),
    (["search", "--compare", "nowhere.json"], "--compare nowhere.json: not written by -o")])
def test_wrong_use_is_told(words, message):
    assert message in run("scripts/bench.py", *words, code=2).stderr
