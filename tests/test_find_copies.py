"""find_copies.py: cache, pairs, calibration, report; the page in headless Chromium."""
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import find_copies as fc
from copydet import cache as cached
from copydet import copies, finding
from copydet.calibration import Calibration
from copydet.common import InputError, shown
from copydet.descriptors import Descriptors, write_descriptors
from copydet.edits import Source
from copydet.images import list_images
from helpers import ROOT, WITH_PACKAGE, draw_images, fake_describe, run, run_here

SCRIPT = "scripts/find_copies.py"
HOSTILE = ["<img src=x onerror=\"document.title='owned'\">.jpg", "</script><script>document.title='owned'</script>.jpg",
           "it's \"quoted\".jpg", "100%41 %.jpg", "emoji 🐈‍⬛.jpg", "line\nbreak.jpg", "&lt;b&gt;&amp;.jpg"]
BAD = ["broken.jpg", "empty.PNG", "pipe.jpg", "nowhere.jpg"]


def table(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def unit_rows(n, dim=8, seed=0):
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# Folders, through train.py


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of a small network."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), file)
    return file


FLAGS = ["--", "-a", "test_efficientnet", "--input-size", 32, "-j"]


def test_hostile_folders_become_a_report_and_the_second_run_describes_nothing(tmp_path, weights):
    archive = draw_images(tmp_path / "archive", 3)
    for i, name in enumerate(HOSTILE):
        target = archive / f"folder {i}" / name.replace("</", "<")
        target.parent.mkdir()
        shutil.move(draw_images(tmp_path / "one", 1, seed=9 + i) / "0000.jpg", target)
    shutil.copy(archive / "0001.jpg", os.fsencode(archive / "bytes ") + b"\xff.jpg")
    (archive / "same").mkdir()
    shutil.copy(archive / "0000.jpg", archive / "same" / "0000.jpg")
    (archive / "broken.jpg").write_bytes((archive / "0002.jpg").read_bytes()[:200])
    (archive / "empty.PNG").touch()
    (archive / "folder.jpg").mkdir()
    os.mkfifo(archive / "pipe.jpg")
    for name, target in (("loop", "loop"), ("again", "."), ("nowhere.jpg", "gone.jpg")):
        (archive / name).symlink_to(target)
    report = archive / "report"  # inside: its thumbnails are no images of the archive
    command = [SCRIPT, archive, "-o", report, "--backbone-weights", weights, *FLAGS]
    run_here(*command, 1, "-b", 8)
    pairs = table(report / "pairs.csv")
    copies = [(row["query_id"], row["reference_id"]) for row in pairs if float(row["score"]) > -1e-6]
    assert sorted(copies) == [(f"{archive}/0000.jpg", f"{archive}/same/0000.jpg"),
                              (f"{archive}/0001.jpg", f"{archive}/bytes \\xff.jpg")]
    names = {row[column] for row in pairs for column in ("query_id", "reference_id")}
    assert names == {f"{archive}/{shown(path)}" for path in list_images(archive)[0]
                     if not path.startswith("report/")} - {f"{archive}/{name}" for name in BAD}
    skipped = {Path(row["path"]).name: row["reason"] for row in table(report / "skipped.csv")}
    assert set(skipped) == {*BAD, "folder.jpg", "loop"}
    before = (report / "index.html").read_bytes()
    again = run_here(*command, 0)  # flags that only say how fast to compute describe nothing anew
    assert "describing" not in again.stderr
    assert (report / "index.html").read_bytes() == before and not list((report / "cache").glob(".chunk-*"))


def test_a_folder_without_a_readable_photo_is_an_error(tmp_path, weights):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("text")
    done = run(SCRIPT, tmp_path / "bad", "-o", tmp_path / "r", "--backbone-weights", weights, *FLAGS, 0, code=2)
    assert "none of the 1 images" in done.stderr and not (tmp_path / "r" / "index.html").exists()
    assert table(tmp_path / "r" / "skipped.csv")[0]["path"] == str(tmp_path / "bad" / "a.jpg")


class FakeExtraction:
    """Stands for train.py: the descriptor is made of the file's bytes; remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def describe(self, files):
        self.asked.append([Path(file).name for file in files])
        return [(np.array([len(Path(file).read_bytes()), 1], np.float32), None) for file in files], {}


def bring_up(cache, folder, with_hash=False, extraction=None):
    extraction = extraction or FakeExtraction()
    stamps, odd = cached.stamp_files(str(folder), with_hash)
    cached.update(cache, str(folder), stamps, odd, extraction)
    return sum(extraction.asked, []), [Path(path).name for path in cache.read(str(folder), stamps.keys())[0]]


def test_cache_describes_what_is_new_or_changed_and_forgets_what_is_gone(tmp_path):
    folder = draw_images(tmp_path / "photos", 4)
    names = sorted(path.name for path in folder.iterdir())
    cache = cached.Cache(tmp_path / "c.sqlite")
    assert bring_up(cache, folder) == (names, names)
    assert bring_up(cache, folder) == ([], names)
    (folder / names[0]).write_bytes(b"other")
    os.utime(folder / names[1])
    (folder / names[2]).unlink()
    (folder / "new.jpg").write_bytes(b"new")
    assert bring_up(cache, folder) == ([names[0], names[1], "new.jpg"], [names[0], names[1], names[3], "new.jpg"])
    assert cache.count() == 4
    stamps, odd = cached.stamp_files(str(folder), False, ["new.jpg"])
    cached.update(cache, str(folder), stamps, odd, FakeExtraction())
    assert len(stamps) == 3 and cache.count() == 4  # --exclude forgets nothing
    assert bring_up(cache, folder, with_hash=True)[0] == []  # size and time vouch for what has no hash yet
    os.utime(folder / names[1])
    assert bring_up(cache, folder, with_hash=True)[0] == []
    info = (folder / "new.jpg").stat()
    (folder / "new.jpg").write_bytes(b"wen")
    os.utime(folder / "new.jpg", ns=(info.st_atime_ns, info.st_mtime_ns))
    assert bring_up(cache, folder)[0] == [] and bring_up(cache, folder, with_hash=True)[0] == ["new.jpg"]


def test_photos_in_a_folder_that_cannot_be_read_now_are_not_forgotten(tmp_path, monkeypatch):
    folder = draw_images(tmp_path / "photos", 1)
    draw_images(folder / "drive", 2)
    cache = cached.Cache(tmp_path / "c.sqlite")
    bring_up(cache, folder)
    monkeypatch.setattr(cached, "list_images", lambda root, exclude: (["0000.jpg"], [("drive", "Permission denied")]))
    assert bring_up(cache, folder) == ([], ["0000.jpg"]) and cache.count() == 3
    monkeypatch.undo()
    assert bring_up(cache, folder) == ([], ["0000.jpg", "0000.jpg", "0001.jpg"])


KILLED = """
import os, signal, sys
import test_find_copies as t
from copydet import cache as cached
cached.CHUNKS = 3, 100
class Dies(t.FakeExtraction):
    def describe(self, files):
        if len(self.asked) == 2: os.kill(os.getpid(), signal.SIGKILL)
        return super().describe(files)
t.bring_up(cached.Cache(sys.argv[1]), sys.argv[2], extraction=Dies())
"""


def test_a_killed_run_loses_one_chunk(tmp_path):
    folder = draw_images(tmp_path / "photos", 20)
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "c.sqlite", folder], cwd=ROOT,
                            env=WITH_PACKAGE)
    assert killed.returncode == -9
    cache = cached.Cache(tmp_path / "c.sqlite")
    assert cache.count() == 6  # chunks of 3, then as many as there are already
    assert bring_up(cache, folder) == ([f"{i:04d}.jpg" for i in range(6, 20)], [f"{i:04d}.jpg" for i in range(20)])


@pytest.mark.parametrize("flags, settings", [([], "whole, local features"), (["--no-verify"], "whole"),
                                             (["--no-verify", "--query-regions", "7"], "7")])
def test_precision_is_measured_on_the_way_that_all_queries_go(tmp_path, weights, monkeypatch, flags, settings):
    """Edited copies are described, searched and verified; again when the archive has doubled."""
    archive, queries = draw_images(tmp_path / "archive", 24, 128), draw_images(tmp_path / "queries", 3, 128, seed=5)
    monkeypatch.setattr(cached.Extraction, "describe", fake_describe)
    found, report = [], tmp_path / "report"
    command = [str(queries), str(archive), "-o", str(report), "--weight", str(weights), "-j", "1"]
    for more in (0, 1, 30):
        draw_images(archive / f"new {more}", more, 128, seed=more)
        assert fc.main(command + flags) == 0
        found += measured_in(report, archive, settings)
        pairs = table(report / "pairs.csv")
        assert len(pairs) == 30 and all(0 <= float(pair["precision"]) <= 1 for pair in pairs)
    assert [one["references"] for one in found] == [24, 24, 55] and found[0] == found[1]
    for one in found:
        assert np.all(np.diff(one["scores"]) > 0) and np.all(np.diff(one["recall"]) <= 0) and one["recall"][0] <= 1
    assert not list((report / "cache").glob(".chunk-*"))


def measured_in(report, archive, settings):
    files = [file for file in (report / "cache").glob("*.sqlite") if not file.name.startswith("features")]
    found = []
    for file in files:
        cache = cached.Cache(file)
        found += filter(None, [cache.measured(str(archive), settings)])
        cache.db.close()
    return found


def test_each_way_of_search_has_a_precision_of_its_own(tmp_path, weights, monkeypatch, capsys):
    """Not one that another run left in the cache; nor, for an archive of few images, the checkpoint's."""
    monkeypatch.setattr(cached.Extraction, "describe", fake_describe)
    images, report = draw_images(tmp_path / "images", 24, 128), tmp_path / "report"
    command = [str(images), "-o", str(report), "--weight", str(weights), "-j", "1"]
    for flags, settings in (([], "whole, local features"), (["--no-verify"], "whole")):
        assert fc.main(command + flags) == 0
        assert len(measured_in(report, images, settings)) == 1
    few = draw_images(tmp_path / "few", 19, 128)
    assert fc.main([str(few), "-o", str(tmp_path / "r"), "--weight", str(weights), "-j", "1"]) == 0
    assert "20 usable images are the least on which precision is measured: scores only" in capsys.readouterr().err
    assert "precision" not in table(tmp_path / "r" / "pairs.csv")[0]
    assert fc.main([str(few), "-o", str(tmp_path / "r"), "--weight", str(weights), "--precision", "0.9"]) == 2
    assert "--precision: 20 usable images are the least" in capsys.readouterr().err


def test_duplicates_and_pasted_images_are_no_false_answers():
    rows = np.eye(6, dtype=np.float32)
    rows[1] = unit_rows(1, 6)[0] * 0.01 + rows[0]  # a duplicate of image 0
    rows[1] /= np.linalg.norm(rows[1])
    names = [f"{i}.jpg" for i in range(6)]
    archive = copies.Collection("a", names, names, names, [None] * 6, copies.ArrayRows(rows, np.array(names)),
                            np.zeros(6, bool), {})
    edited = copies.of_copies([("c0", rows[0] * 0.9), ("c2", rows[2] * 0.9)], 1)
    pairs = np.array([(i, j, -1, -1) for i in range(2) for j in range(6)], copies.PAIRS)
    true, counted = copies.judge(pairs, archive, edited, np.array([0, 2]), [[Source("3.jpg")], []])
    assert true.reshape(2, 6).tolist() == [[j == i for j in range(6)] for i in (0, 2)]
    assert counted.reshape(2, 6).tolist() == [[j not in (1, 3) for j in range(6)], [True] * 6]


def test_a_cache_in_use_is_an_error(tmp_path, weights):
    args = fc.parse_args([str(draw_images(tmp_path / "a", 1)), "-o", str(tmp_path), "--weight", str(weights)])
    with ExitStack() as stack:
        finding.open_cache(tmp_path, finding.pick_weights(args), args, "whole", stack)
        with pytest.raises(InputError, match="in use by another run"):
            finding.open_cache(tmp_path, finding.pick_weights(args), args, "whole", stack)


# ---------------------------------------------------------------------------------------------------------------------
# Descriptor files, pairs, calibration

CALIBRATION = {"scores": [-1.0, -0.5, -0.1], "recall": [0.8, 0.4, 0.2], "false_rate": [0.008, 0.00025, 0.0],
               "copies_ratio": 0.25}  # for 100 images a precision of 0.2, 0.8 and 1


def planted(folder, ids=None, copies=30, others=70, name="all.h5", **attrs):
    """Descriptor file: `copies` queries near their references R0.., as many as `others` queries near nothing."""
    reference = unit_rows(copies + others, seed=1)
    query = np.concatenate([reference[:copies] + 0.02 * unit_rows(copies, seed=2), unit_rows(others, seed=3)])
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    write_descriptors(folder / name, {
        "query": (query.astype(np.float32), [f"Q{i:04d}" for i in range(len(query))]),
        "reference": (reference, ids or [f"R{i:04d}" for i in range(len(reference))])}, attrs)
    return folder / name


def test_pairs_are_those_of_brute_force_best_first(tmp_path):
    file = planted(tmp_path)
    run_here(SCRIPT, file, "-o", tmp_path / "r", "--topk", 3)
    pairs = table(tmp_path / "r" / "pairs.csv")
    with Descriptors(file) as f:
        q, r = f["query"].read().astype(float), f["reference"].read().astype(float)
    distances = np.square(q[:, None] - r[None]).sum(axis=2)
    wanted = sorted(((-distances[i, j], i, j) for i in range(100) for j in np.argsort(distances[i])[:3]), reverse=True)
    assert [(p["query_id"], p["reference_id"]) for p in pairs] == [(f"Q{i:04d}", f"R{j:04d}") for _, i, j in wanted]
    assert np.allclose([float(p["score"]) for p in pairs], [w[0] for w in wanted])


def test_within_one_collection_each_pair_once_in_groups(tmp_path):
    rows = unit_rows(40)
    rows[[10, 20]], rows[31] = rows[0], rows[30]
    write_descriptors(tmp_path / "r.h5", {"reference": (rows, [f"R{i:02d}" for i in range(40)])}, {})
    run_here(SCRIPT, tmp_path / "r.h5", "-o", tmp_path / "r", "--threshold", "-0.001")
    pairs = table(tmp_path / "r" / "pairs.csv")
    assert [(p["query_id"], p["reference_id"], p["group"]) for p in pairs] == [
        ("R00", "R10", "1"), ("R00", "R20", "1"), ("R10", "R20", "1"), ("R30", "R31", "2")]


def test_precision_sets_the_threshold_by_the_calibration(tmp_path):
    file = planted(tmp_path, calibration=CALIBRATION)
    calibration = Calibration(json.dumps(CALIBRATION), "x", 100)
    run_here(SCRIPT, file, "-o", tmp_path / "r", "--precision", 0.9)
    pairs = table(tmp_path / "r" / "pairs.csv")
    assert len(pairs) >= 30 and all(float(p["score"]) >= -0.3 for p in pairs)
    assert all(float(p["precision"]) == pytest.approx(calibration.at(float(p["score"])), abs=1e-4) for p in pairs)


@pytest.mark.parametrize("flags, message", [
    (["{all}", "-o", "{tmp}/r", "--precision", "0.9"], "carry no calibration"),
    (["{all}", "-o", "{tmp}/r", "--precision", "1.5"], "--precision: 1.5 is not between"),
    (["{all}", "-o", "{tmp}/r", "--precision", "0.9", "--threshold", "0"], "give one"),
    (["{all}", "-o", "{tmp}/none/r"], "no such folder"),
    (["{all}", "{other}", "-o", "{tmp}/r"], "different checkpoint_sha256"),
    (["{bad}", "-o", "{tmp}/r"], "should rise"),
    (["{tmp}", "-o", "{tmp}/r"], "no images in"),
    (["{tmp}", "-o", "{tmp}/r", "--backbone-weights", "x", "--weight", "{all}"], "needs one of --exp"),
    (["{tmp}", "-o", "{tmp}/r", "--exp", "no-such"], "no checkpoint in"),
    (["{tmp}/none", "-o", "{tmp}/r"], "no such file or folder"),
    (["{tmp}", "-o", "{tmp}/r", "--weight", "{all}"], "no images in"),
    (["{tmp}", "-o", "{tmp}/r", "--weight", "{all}", "--", "--exp", "x"], "cannot be given to train.py"),
])
def test_what_is_wrong_is_said_before_any_work(tmp_path, capsys, flags, message):
    files = {"tmp": tmp_path, "all": planted(tmp_path, checkpoint_sha256="a" * 64),
             "other": planted(tmp_path, name="other.h5", checkpoint_sha256="b" * 64),
             "bad": planted(tmp_path, name="bad.h5", calibration=CALIBRATION | {"scores": [0, -1, 1]})}
    try:
        code = fc.main([flag.format(**files) for flag in flags])
    except SystemExit as left:  # what the parser refuses
        code = left.code
    assert code == 2
    assert message in capsys.readouterr().err and not (tmp_path / "r" / "index.html").exists()


def test_a_full_disk_is_said_and_leaves_no_half_page(tmp_path):
    file = planted(tmp_path)
    run_here(SCRIPT, file, "-o", tmp_path / "r", "--pairs", 10, "--topk", 1)
    before = (tmp_path / "r" / "index.html").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))  # the error differs in its words only
    done = subprocess.run([sys.executable, SCRIPT, file, "-o", tmp_path / "r", "--threshold", "0"], cwd=ROOT,
                          capture_output=True, text=True, preexec_fn=limit)  # the page is what does not fit
    assert done.returncode == 1 and "Traceback" not in done.stderr and "File too large" in done.stderr
    assert (tmp_path / "r" / "index.html").read_bytes() == before and not list((tmp_path / "r").glob(".*.tmp"))
