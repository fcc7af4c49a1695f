"""Whatever lies where results go, and whoever else writes there: nobody's files but ours are touched, no run deletes
another one's work, what failed for a passing reason is tried again. A report of a fault is one row more."""
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import eval_metrics
import find_copies as fc
from copydet import cache as cached
import index
import ladder
import make_benchmark
import merge_shards
import postprocess
import select_ref_subset
import train
import verify
from copydet.common import MANIFEST, InputError, OutputFolder, locked, open_folder, run_main, settings_in
from copydet.descriptors import write_descriptors
from copydet.images import list_images
from copydet.options import parse_args
from helpers import ROOT, WITH_PACKAGE, draw_images, fake_describe

MODULES = {"find_copies": fc, "eval_metrics": eval_metrics, "index": index, "ladder": ladder,
           "postprocess": postprocess, "make_benchmark": make_benchmark, "merge_shards": merge_shards,
           "select_ref_subset": select_ref_subset, "verify": verify}


def table(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def unit(n, seed, dim=8):
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def descriptor_files(folder):
    """all.h5 with a ground truth beside it, its references as two shards, and two parts of an extraction."""
    rows, ids = unit(40, 0), [f"R{i:02d}" for i in range(40)]
    query = unit(40, 1)
    query[:20] = rows[:20]
    write_descriptors(folder / "all.h5", {"query": (query, [f"Q{i:02d}" for i in range(40)]), "reference": (rows, ids),
                                          "train": (unit(40, 2), [f"T{i:02d}" for i in range(40)])}, {})
    for i in range(2):
        part = slice(20 * i, 20 * i + 20)
        write_descriptors(folder / f"shard-{i}.h5", {"reference": (rows[part], ids[part])}, {"shard": f"{i}/2"})
    (folder / "gt.csv").write_text("query_id,reference_id\n" + "".join(f"Q{i:02d},R{i:02d}\n" for i in range(20)))


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Run find_copies.py here, without a network."""
    monkeypatch.setattr(cached.Extraction, "describe", fake_describe)
    (tmp_path / "weights").write_bytes(b"any")

    def call(*words, code=0):
        words = [str(word) for word in words]
        described = [] if all(word.endswith(".h5") for word in words[:1]) else ["--weight", str(tmp_path / "weights")]
        try:
            got = fc.main([*words, *described])
        except SystemExit as left:  # what the parser refuses
            got = left.code
        assert got == code
    return call


# ---------------------------------------------------------------------------------------------------------------------
# Nobody's files but ours: (tool, what lies there, command, words of the refusal). All that lies there stays as it is.

GALLERY = ["gal/thumbs/family.jpg", "gal/index.html", "gal/pairs.csv"]
REFUSED = [
    ("find_copies", ["gal/thumbs/family.jpg"], "ph -o gal --weight w", "-o gal: holds what is not of this program"),
    ("find_copies", GALLERY, "all.h5 -o gal", "-o gal: holds what is not of this program"),
    ("find_copies", ["gal/x"], "all.h5 -o gal/x", "is not a folder"),
    ("find_copies", ["gone -> nowhere/deep"], "all.h5 -o gone", "is not a folder"),
    ("find_copies", ["out/" + MANIFEST, "out/pairs.csv"], "all.h5 -o out", "pairs.csv is not of this program"),
    ("find_copies", ["ph/2019/a.jpg"], "ph -o ph --weight w", "-o ph: holds what is not of this program"),
    ("find_copies", ["pix/chunk-2019/a.jpg"], "ph -o r --cache pix --weight w", "pix: holds what is not of this"),
    ("eval_metrics", GALLERY, "all.h5 gt.csv --report gal", "--report gal: holds what is not of this program"),
    ("eval_metrics", [], "all.h5 gt.csv --candidates gt.csv", "--candidates gt.csv is an input"),
    ("eval_metrics", ["truth.csv -> gt.csv"], "all.h5 gt.csv --candidates truth.csv", "truth.csv is an input"),
    ("eval_metrics", ["dev |"], "all.h5 gt.csv --candidates dev", "is not a file"),
    ("index", ["i/trained.faiss", "i/notes.txt"], "build --index i shard-0.h5", "--index i: holds what is not"),
    ("index", [], "search --index i all.h5 -o all.h5", "-o all.h5 is an input"),
    ("index", [], "curve i --queries all.h5 --truth gt.csv -o gt.png", "gt.csv is an input"),
    ("ladder", ["l/photos/a.jpg", "l/probe/b.jpg"], "ph -o l --recipes v5", "l: holds what is not of this program"),
    ("postprocess", [], "all.h5 -o all.h5 l2", "-o all.h5 is an input"),
    ("merge_shards", [], "shard-0.h5 shard-1.h5 -o shard-1.h5", "-o shard-1.h5 is an input"),
    ("select_ref_subset", [], "gt.csv -o gt.csv", "-o gt.csv is an input"),
    ("make_benchmark", ["b.partial/a.jpg"], "ph b --references 2 --training 1 --queries 1 -j 1", "is in the way"),
    ("make_benchmark", ["b -> nowhere/deep", "nowhere/deep"], "ph b -j 1", "b: exists already"),
    ("train", ["exp/train/holiday.jpg", "exp/train/skipped.csv"], "--exp {exp} ph", "train: holds what is not of this"),
    ("train", ["exp/train/" + MANIFEST, "exp/train/checkpoint_0001.pth.tar"], "--exp {exp} --overwrite ph",
     "checkpoint_0001.pth.tar is not of this program"),
    ("train", ["exp/extract/holiday.jpg", "exp/extract/skipped.csv"], "--mode extract --exp {exp} ph",
     "extract: holds what is not of this"),
    ("train", ["exp/extract/fb-isc-submission.h5"], "--mode extract --exp {exp} --no-pretrained -a test_efficientnet "
     "--target-set r bench", "not an HDF5 file"),
    ("verify", ["o.skipped.csv"], "all.h5 . -o o.csv", "o.skipped.csv: not as this program writes it"),
    ("verify", [], "all.h5 . -o all.h5", "-o all.h5 is an input"),
    ("verify", ["pix/a.jpg"], "all.h5 . -o o.csv --cache pix", "--cache pix: holds what is not of this program"),
    ("verify", ["dev |"], "all.h5 . -o dev", "is not a file"),
    ("make_benchmark", [], "ph gt.csv/b -j 1", "gt.csv: File exists"),
    ("train", ["exp/extract/fb-isc-submission.h5/a.jpg"], "--mode extract --exp {exp} --no-pretrained -a "
     "test_efficientnet --target-set r bench", "fb-isc-submission.h5: is a folder"),
    ("train", [], "--mode export --weight net.pth.tar -o gt.csv/n.onnx", "gt.csv: File exists"),
    ("train", [], "--exp {exp}caf\udce9 ph", "TensorBoard writes to no path that is not UTF-8"),
]


def lay(folder, names):
    """Files, pipes (NAME |) and links (NAME -> TARGET) with something in them."""
    for name in names:
        name, _, target = name.partition(" -> ")
        file = folder / name.removesuffix(" |")
        file.parent.mkdir(parents=True, exist_ok=True)
        if target:
            file.symlink_to(target)
        elif name.endswith(" |"):
            os.mkfifo(file)
        elif not file.exists():
            file.write_text("" if file.name == MANIFEST else "of somebody")


def contents(folder):
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()}


def call(tool, words):
    """Exit code of a command line, in this process."""
    try:
        if tool == "train":
            return run_main(lambda: train.main(parse_args(words)))
        return MODULES[tool].main(words)
    except SystemExit as left:
        return left.code


@pytest.mark.parametrize("tool, there, command, words", REFUSED, ids=[f"{row[0]} {row[2]}" for row in REFUSED])
def test_what_is_somebody_elses_is_refused_and_stays(tmp_path, monkeypatch, capsys, weights, tool, there, command,
                                                     words):
    descriptor_files(tmp_path)
    lay(tmp_path, there)
    draw_images(tmp_path / "ph", 6, size=96)
    draw_images(tmp_path / "bench" / "reference_images", 2)
    (tmp_path / "w").write_bytes(b"any")
    shutil.copy(weights, tmp_path / "net.pth.tar")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert call(tool, command.format(exp=tmp_path / "exp").split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1], said
    assert contents(tmp_path) == before


def test_work_in_progress_is_taken_up_and_nothing_else_is_deleted(tmp_path):
    lay(tmp_path, ["a/b.jpg", "c/.settings.json.0.tmp"])
    with pytest.raises(InputError, match="a is in the way, and not of this program .b.jpg."):
        open_folder(tmp_path / "a", {}, resume=False)
    open_folder(tmp_path / "c", {"n": 1}, resume=True)  # what a run left that was killed at once
    lay(tmp_path, ["c/block"])
    open_folder(tmp_path / "c", {"n": 1}, resume=True)
    assert settings_in(tmp_path / "c") == {"n": 1} and (tmp_path / "c" / "block").exists()
    open_folder(tmp_path / "c", {"n": 2}, resume=False)
    assert os.listdir(tmp_path / "c") == ["settings.json"] and (tmp_path / "a" / "b.jpg").exists()
    for content in ("[]", "{", ""):
        (tmp_path / "c" / "settings.json").write_text(content)
        assert settings_in(tmp_path / "c") in (None, [])
        with pytest.raises(InputError, match="settings.json is broken"):
            open_folder(tmp_path / "c", {}, resume=True)


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "null")
    with pytest.raises(InputError, match="not a file"), eval_metrics.replacing(tmp_path / "null"):
        pass
    (tmp_path / "link").symlink_to("real")
    for text in ("one", "two"):  # first the link leads nowhere
        with eval_metrics.replacing(tmp_path / "link") as temporary:
            temporary.write_text(text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "two"


def test_a_report_of_an_older_version_is_ours_but_for_what_it_did_not_write(tmp_path, find):
    descriptor_files(tmp_path)
    report = tmp_path / "r"
    stale = f"{'0a' * 12}.jpg"
    lay(report, ["thumbs/family.jpg", f"thumbs/{stale}", "notes.txt", "pairs.csv"])
    (report / "index.html").write_text('<!DOCTYPE html>\n<html lang="en"><head><title>Copies</title>')
    find(tmp_path / "all.h5", "-o", report)
    assert {file.name for file in (report / "thumbs").iterdir()} == {"family.jpg"}
    assert (report / "notes.txt").read_text() == "of somebody" and len(table(report / "pairs.csv")) > 20
    (report / "thumbs" / "more.jpg").touch()
    find(tmp_path / "all.h5", "-o", report)
    assert {file.name for file in (report / "thumbs").iterdir()} == {"family.jpg", "more.jpg"}


def test_images_are_not_deleted_for_a_quickstart(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    for place in ("quickstart/photos", "exp/quickstart"):
        lay(tmp_path, [f"{place}/a.jpg"])
        done = subprocess.run(["bash", "scripts/quickstart.sh", place], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "makes anew" in done.stderr and (tmp_path / place / "a.jpg").exists()


def test_pictures_of_a_training_are_no_images(tmp_path):
    draw_images(tmp_path, 2)
    lay(tmp_path, ["run/train/views.png", "run/train/mine.png"])
    (tmp_path / "run" / "train" / MANIFEST).write_text("views.png\n")
    assert list_images(tmp_path)[0] == ["0000.jpg", "0001.jpg", "run/train/mine.png"]


def test_a_manifest_leads_to_no_file_outside(tmp_path):
    lay(tmp_path, ["photo.jpg", "r/mine.txt"])
    (tmp_path / "r" / MANIFEST).write_text(f"../photo.jpg\n{tmp_path}/photo.jpg\nmine.txt\n")
    with OutputFolder(tmp_path / "r", "-o") as folder:
        folder.remove("../photo.jpg", f"{tmp_path}/photo.jpg", "mine.txt")
    assert contents(tmp_path) == {"photo.jpg": b"of somebody", f"r/{MANIFEST}": b""}


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(InputError), OutputFolder(tmp_path / "new" / "deep", "-o", parents=True):
        raise InputError("no such file")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The output folder among the images


def test_only_what_we_wrote_is_left_out_of_the_images(tmp_path, find, monkeypatch):
    photos = draw_images(tmp_path / "holiday" / "photos", 4)
    monkeypatch.chdir(tmp_path / "holiday")
    find("photos", "-o", ".")  # above the images
    assert len(table("pairs.csv")) == 6
    shutil.move(photos, tmp_path / "ph")
    (tmp_path / "ph" / "sub").mkdir()
    for _ in range(2):  # among them, two reports, and one lies in a folder of images
        for report in ("r1", "sub/r2"):
            find(tmp_path / "ph", "-o", tmp_path / "ph" / report, "--topk", 3)
            assert len(table(tmp_path / "ph" / report / "pairs.csv")) == 6
    shutil.copy(tmp_path / "ph" / "0000.jpg", tmp_path / "ph" / "r1" / "mine.jpg")
    find(tmp_path / "ph", "-o", tmp_path / "ph" / "r1")
    assert len(table(tmp_path / "ph" / "r1" / "pairs.csv")) == 10


# ---------------------------------------------------------------------------------------------------------------------
# Two names of one file


def same(report):
    return {(Path(row["query_id"]).name, Path(row["reference_id"]).name, row["score"], row["same_file"])
            for row in table(report / "pairs.csv") if row["same_file"]}


def test_links_to_one_file_are_told_and_are_no_pairs(tmp_path, find):
    photos = draw_images(tmp_path / "photos", 3)
    shutil.copy(photos / "0000.jpg", photos / "copy.jpg")
    os.link(photos / "0000.jpg", photos / "0000 hard.jpg")
    (photos / "a soft.jpg").symlink_to("0000.jpg")
    find(photos, "-o", tmp_path / "r", "--threshold", "-0.0001")
    rows = table(tmp_path / "r" / "pairs.csv")
    first = "0000 hard.jpg"  # by name; links come after files
    assert same(tmp_path / "r") == {("0000.jpg", first, "", "hard link"), ("a soft.jpg", first, "", "symbolic link")}
    pairs = [(Path(row["query_id"]).name, Path(row["reference_id"]).name) for row in rows if not row["same_file"]]
    assert pairs == [(first, "copy.jpg")] and rows[-1]["same_file"] and rows[-1]["group"] == ""


def test_a_query_that_is_a_link_into_the_archive_is_told(tmp_path, find):
    archive, queries = draw_images(tmp_path / "archive", 3), draw_images(tmp_path / "queries", 1, seed=5)
    (queries / "soft.jpg").symlink_to(archive / "0001.jpg")
    os.link(archive / "0002.jpg", archive / "again.jpg")
    os.link(archive / "0002.jpg", queries / "hard.jpg")
    find(queries, archive, "-o", tmp_path / "r", "--topk", 2)
    assert same(tmp_path / "r") == {("soft.jpg", "0001.jpg", "", "symbolic link"), ("hard.jpg", "0002.jpg", "", "hard "
                                    "link"), ("hard.jpg", "again.jpg", "", "hard link")}
    pairs = [Path(row["query_id"]).name for row in table(tmp_path / "r" / "pairs.csv") if not row["same_file"]]
    assert sorted(pairs) == ["0000.jpg"] * 2 + ["hard.jpg"] * 2 + ["soft.jpg"] * 2
    find(archive / "0001.jpg", archive, "-o", tmp_path / "r")  # a name is no other name of itself
    assert {row["reference_id"] for row in table(tmp_path / "r" / "pairs.csv") if row["same_file"]} == set()


def test_links_beside_descriptor_files_are_told(tmp_path, find):
    descriptor_files(tmp_path)
    draw_images(tmp_path / "query_images", 1, name="Q00.jpg")
    (tmp_path / "reference_images").mkdir()
    os.link(tmp_path / "query_images" / "Q00.jpg", tmp_path / "reference_images" / "R00.jpg")
    find(tmp_path / "all.h5", "-o", tmp_path / "r", "--images", tmp_path)
    assert same(tmp_path / "r") == {("Q00", "R00", "", "hard link")}
    assert not [row for row in table(tmp_path / "r" / "pairs.csv") if row["query_id"] == "Q00" and
                row["reference_id"] == "R00" and row["score"]]


# ---------------------------------------------------------------------------------------------------------------------
# What failed for a passing reason


NOBODY = """
import sys
import find_copies as fc, helpers
from copydet import cache as cached
cached.Extraction.describe = helpers.fake_describe
sys.exit(fc.main([*sys.argv[1:], "--no-verify"]))
"""


@pytest.fixture
def nobody():
    """(folder of a user without rights, function that runs Python as that user); this user where it has none."""
    folder = Path(tempfile.mkdtemp(prefix="nobody-"))
    before = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if not os.geteuid() else []
    env = {**WITH_PACKAGE, "OMP_NUM_THREADS": "1", "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def call(*words):
        return subprocess.run([*before, sys.executable, *map(str, words)], cwd=ROOT, env=env, text=True,
                              capture_output=True)

    folder.chmod(0o777)
    try:
        if call("-c", "import numpy, pytest; open('README.md')").returncode:
            pytest.skip("no other user can run this Python")
    except FileNotFoundError:
        pytest.skip("no setpriv")
    yield folder, call
    shutil.rmtree(folder)


def test_what_may_not_be_read_is_tried_again_and_what_is_no_image_is_not(nobody):
    folder, python = nobody
    photos = draw_images(folder / "photos", 3)
    (photos / "text.jpg").write_text("no image")
    (folder / "w").write_bytes(b"any")
    locked = photos / "0001.jpg"

    def find(*flags):
        done = python("-c", NOBODY, photos, "-o", folder / "r", "--weight", folder / "w", *flags)
        assert done.returncode == 0, done.stderr
        asked = [line for line in done.stderr.splitlines() if line.startswith("describing")]
        skipped = {Path(row["path"]).name for row in table(folder / "r" / "skipped.csv")}
        return asked and int(asked[0].split()[1]), skipped

    (folder / "r").mkdir(mode=0o777)
    (folder / "r").chmod(0o777)
    locked.chmod(0)
    assert find() == (4, {"0001.jpg", "text.jpg"})
    assert find() == (1, {"0001.jpg", "text.jpg"})
    assert find("--hash") == ([], {"0001.jpg", "text.jpg"})  # its hash cannot be had either
    locked.chmod(0o644)
    assert find("--hash") == (1, {"text.jpg"})
    locked.chmod(0)
    assert find("--hash") == ([], {"0001.jpg", "text.jpg"})  # and is not forgotten
    locked.chmod(0o644)
    assert find("--hash") == ([], {"text.jpg"}) and find() == ([], {"text.jpg"})
    photos.chmod(0o755)


@pytest.mark.parametrize("what, mode", [("r", 0o555), ("r/cache", 0o555), ("r/cache/FILE", 0o444), ("w", 0o000)])
def test_what_may_not_be_written_is_told_in_a_line(nobody, what, mode):
    folder, python = nobody
    draw_images(folder / "photos", 2)
    (folder / "w").write_bytes(b"any")
    (folder / "r").mkdir()
    (folder / "r").chmod(0o777)
    find = lambda: python("-c", NOBODY, folder / "photos", "-o", folder / "r", "--weight", folder / "w")
    assert find().returncode == 0
    path = next((folder / "r" / "cache").glob("*.sqlite")) if what.endswith("FILE") else folder / what
    path.chmod(mode)
    draw_images(folder / "photos", 3)
    done = find()
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if str(folder) in line and line.startswith("-c: ")], done.stderr


@pytest.mark.parametrize("error, kept", [
    ("PermissionError: [Errno 13] Permission denied", False), ("OSError: [Errno 5] Input/output error", False),
    ("UnidentifiedImageError: cannot identify image file", True), ("OSError: image file is truncated", True)])
def test_what_an_older_version_remembered(tmp_path, error, kept):
    cache = cached.Cache(tmp_path / "c.sqlite")
    cache.store("/root", [("/root/a.jpg", cached.Stamp(1, 2), None, error)], {})
    assert ("/root/a.jpg" in cache.stamps("/root")) == kept


# ---------------------------------------------------------------------------------------------------------------------
# Files of other times, odd caches


@pytest.mark.parametrize("seconds", [13_569_465_600, 2**33 + 2**34, -2**31 + 1, -1, 0])
def test_a_file_of_another_time_is_an_image_like_others(tmp_path, find, seconds):
    photos = draw_images(tmp_path / "photos", 3)
    os.utime(photos / "0001.jpg", ns=(0, seconds * 10**9 + 1))
    asked = []
    describe = cached.Extraction.describe
    cached.Extraction.describe = lambda self, files: asked.append(len(files)) or describe(self, files)
    try:
        for _ in range(2):
            find(photos, "-o", tmp_path / "r")
    finally:
        cached.Extraction.describe = describe
    assert asked == [3] and len(table(tmp_path / "r" / "pairs.csv")) == 3


@pytest.mark.parametrize("content", [b"text, no SQLite file" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_cache_that_is_none_is_told_in_a_line(tmp_path, find, capsys, content):
    photos = draw_images(tmp_path / "photos", 2)
    find(photos, "-o", tmp_path / "r", "--no-verify")
    file, = (tmp_path / "r" / "cache").glob("*.sqlite")
    file.write_bytes(content)
    find(photos, "-o", tmp_path / "r", code=2)
    assert f"{file}: " in capsys.readouterr().err and file.read_bytes() == content
    file.unlink()
    find(photos, "-o", tmp_path / "r")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers on the command line


@pytest.mark.parametrize("words, code, said", [
    (["--threshold", "-6e-1"], 0, "pairs of"), (["--threshold", "-.5"], 0, "pairs of"),
    (["--threshold=-6E-1"], 0, "pairs of"), (["--threshold", "-0"], 0, "pairs of"),
    (["--threshold", "0.8"], 2, "0.8 is above 0"), (["--threshold", "1.5"], 2, "1.5 is above 1"),
    (["--threshold", "nan"], 2, "nan is not a number"),
    (["--threshold", "-inf"], 2, "--threshold"), (["--threshold=-inf"], 2, "-inf is not a number"),
    (["--threshold", "many"], 2, "many"),
])
def test_thresholds(tmp_path, find, capsys, words, code, said):
    descriptor_files(tmp_path)
    find(tmp_path / "all.h5", "-o", tmp_path / "r", *words, code=code)
    out = capsys.readouterr()
    assert said in out.out + out.err and len(out.err.strip().splitlines()) <= 2
    assert code == 0 or not (tmp_path / "r").exists()


@pytest.mark.parametrize("words, value", [(["--neg-margin", "-1e-1"], -0.1), (["--lr", "nan"], None),
                                          (["--temperature", "inf"], None)])
def test_numbers_of_training(words, value):
    if value is None:
        with pytest.raises(SystemExit):
            parse_args(words)
    else:
        assert parse_args(words).neg_margin == value


@pytest.mark.parametrize("flags, spoil, code, words", [
    ("--optimizer adamw", {}, 0, "the optimizer starts anew"), ("--freeze 1", {}, 0, "the optimizer starts anew"),
    ("--decay-all", {}, 0, "the optimizer starts anew"), ("", {"optimizer": {}}, 2, "not as this script writes it"),
    ("", {"epoch": "x"}, 2, "not as this script writes it"), ("", {"rng": []}, 2, "not as this script writes it")])
def test_a_run_is_resumed_or_told_why_not(tmp_path, capsys, monkeypatch, flags, spoil, code, words):
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "ph", 4)
    training = TRAINING.format(exp=tmp_path / "exp") + " --seed 1"
    assert call("train", training.split()) == 0
    file = tmp_path / "exp" / "train" / "checkpoint_0000.pth.tar"
    torch.save(torch.load(file, weights_only=True) | spoil, file)
    assert call("train", f"{training} --epochs 2 --resume auto {flags}".split()) == code
    assert words in "".join(capsys.readouterr())


# ---------------------------------------------------------------------------------------------------------------------
# Several runs at once: each ends with a right result or is refused in words


TOGETHER = """
import importlib, json, os, sys, traceback
import helpers
from copydet.cache import Extraction
from copydet.common import run_main
tool, rounds = sys.argv[1], json.loads(sys.argv[2])
module = importlib.import_module(tool)
Extraction.describe = helpers.fake_describe
work = module.main if tool != "train" else lambda words: run_main(lambda: module.main(module.parse_args(words)))
codes = []
for number, commands in enumerate(rounds):
    gate, go = os.pipe()
    children = []
    for i, command in enumerate(commands):
        if not (child := os.fork()):
            os.close(go)
            said = os.open(f"said-{number}-{i}", os.O_WRONLY | os.O_CREAT)
            os.dup2(said, 1), os.dup2(said, 2)
            os.read(gate, 1)  # until all are there
            try:
                code = work(command.split())
            except SystemExit as left:
                code = left.code
            except BaseException:
                traceback.print_exc()
                code = 99
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        children.append(child)
    os.close(gate), os.close(go)
    codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
print(json.dumps(codes))
"""
REFUSALS = ("another run is writing it", "is in use by another run", "exists already", "holds checkpoints of another")
TRAINING = "--exp {exp} -a test_efficientnet --no-pretrained --input-size 32 -b 4 --memory-size 0 --epochs 1 -j 0 ph"
EXPORT = "--mode export --weight net.pth.tar --format safetensors -o z/n.safetensors"
VERIFICATION = "shown.h5 bench -j 1 --candidates 2"
EXTRACTION = "--mode extract --exp {exp} -a test_efficientnet --no-pretrained --seed 1 --input-size 32 -j 0 bench"


def together(folder, tool, rounds):
    """Exit codes [rounds][commands] of the command lines of each round, which start at the same moment, each a process
    of its own."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "scripts", ROOT / "tests")))
    done = subprocess.run([sys.executable, "-c", TOGETHER, tool, json.dumps(rounds)], cwd=folder, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, text=True)
    assert not done.returncode, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    for number, row in enumerate(codes):
        said = [(folder / f"said-{number}-{i}").read_text() for i in range(len(row))]
        for code, text in zip(row, said):
            assert code == 0 or code == 2 and any(words in text for words in REFUSALS), text
        assert 0 in row or "holds checkpoints" in "".join(said), said
    return codes


def groups_in(file):
    with h5py.File(file) as h5:
        return {name: len(h5[name]) for name in ("query", "reference", "train") if name in h5}


def pairs_on_page(report):
    text = (report / "index.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    return len(json.loads(text)["pairs"])


def check_index(folder, codes):
    """All shards, each once."""
    for number, row in enumerate(codes):
        made = index.Index(folder / f"i{number}")
        assert {shard["file"] for shard in made.shards} == {"shard-0000.faiss", "shard-0001.faiss"}
        assert [shard["rows"] for shard in made.shards] == [20, 20]


def check_training_and_extraction(folder, codes):
    """Two trainings, twice; queries and references into one file, which keeps what was let; shards side by side."""
    trained, extracted = folder / "exp" / "train", folder / "exp" / "extract"
    assert (trained / "checkpoint_0000.pth.tar").is_file() and codes[1] == [2, 2]
    for code, group, count in zip(codes[2], ("query", "reference"), (3, 5)):
        assert code or groups_in(extracted / "fb-isc-submission.h5")[group] == count
    assert codes[4] == [0, 0] and os.listdir(folder / "z") == ["n.safetensors"]
    assert codes[3] == [0, 0] and len(list(extracted.glob("skipped.shard-*-of-2.csv"))) == 1
    assert not [*trained.glob(".*.tmp"), *extracted.glob("*.blocks"), *extracted.glob(".*.lock")]


OUT = "all.h5 -o out.h5"
CONCURRENT = [  # tool, rounds of command lines, check(folder, exit codes)
    ("find_copies", [["all.h5 -o r", "all.h5 -o r --topk 3", "all.h5 -o r --topk 1"]] * 4, lambda folder, codes: len(
        table(folder / "r" / "pairs.csv")) == pairs_on_page(folder / "r") in (400, 120, 40)),
    ("find_copies", [["ph -o r1 --cache c --weight w", "ph -o r2 --cache c --weight net.pth.tar",
                      "ph -o r3 --cache c --weight w"]] * 3, lambda folder, codes: all(row[1] == 0 for row in codes)
     and len(table(folder / "r2" / "pairs.csv")) == 15 and len(list((folder / "c").glob("*.sqlite"))) == 3),
    ("eval_metrics", [["all.h5 gt.csv --report rep --candidates c.csv"] * 3], lambda folder, codes: codes == [[0] * 3]
     and (folder / "rep/index.html").read_text().rstrip().endswith("</html>")),
    ("postprocess", [[f"{OUT} l2", f"{OUT} center l2", f"{OUT} isolate"]] * 4, lambda folder, codes: groups_in(
        folder / "out.h5") == {"query": 40, "reference": 40, "train": 40} and not list(folder.glob(".out.h5*"))),
    ("select_ref_subset", [["gt.csv --references all.h5 --size 5 -o s.txt"] * 3] * 3, lambda folder, codes: codes
     == [[0] * 3] * 3 and 20 <= len((folder / "s.txt").read_text().split()) <= 25),
    ("verify", [[f"{VERIFICATION} -o v.csv"] * 2 + [f"{VERIFICATION} -o w{i}.csv --cache c" for i in range(2)]],
     lambda folder, codes: codes[0][2:] == [0, 0] and not [*folder.glob("*.blocks"), *folder.glob(".*.lock")]
     and {len(table(folder / f"{name}.csv")) for name in ("v", "w0", "w1")} == {6}),
    ("merge_shards", [["shard-0.h5 shard-1.h5 -o out.h5"] * 2] * 2, lambda folder, codes: codes == [[0, 0]] * 2
     and groups_in(folder / "out.h5") == {"reference": 40}),
    ("make_benchmark", [[f"ph b{i} --references 2 --training 1 --queries 1 -j 1"] * 3 for i in range(3)],
     lambda folder, codes: all(len(table(folder / f"b{i}" / "public_ground_truth.csv")) >= 1 for i in range(3))
     and not [*folder.glob("*.partial"), *folder.glob(".*")]),
    ("index", [[f"build --index i{i} --factory IVF1,Flat shard-0.h5 shard-1.h5",
                f"build --index i{i} --factory IVF1,Flat shard-1.h5 shard-0.h5"] for i in range(4)], check_index),
    ("train", [[TRAINING, TRAINING + " --seed 3"]] * 2 + [[EXTRACTION + " --target-set q", EXTRACTION +
     " --target-set r"], [EXTRACTION + f" --target-set r --shard {i}/2" for i in range(2)], [EXPORT] * 2],
     check_training_and_extraction),
]


@pytest.mark.parametrize("tool, rounds, check", CONCURRENT, ids=[f"{row[0]} {row[1][0][0]}" for row in CONCURRENT])
def test_runs_at_the_same_time_lose_nothing(tmp_path, weights, tool, rounds, check):
    descriptor_files(tmp_path)
    draw_images(tmp_path / "ph", 6, size=96)
    draw_images(tmp_path / "bench" / "reference_images", 5)
    (tmp_path / "bench" / "reference_images" / "bad.jpg").write_text("no image")
    draw_images(tmp_path / "bench" / "query_images", 3)
    (tmp_path / "w").write_bytes(b"any")
    write_descriptors(tmp_path / "shown.h5", {"query": (unit(3, 0), ["0000", "0001", "0002"]), "reference": (
        unit(3, 1), ["0000", "0001", "bad"])}, {})
    shutil.copy(weights, tmp_path / "net.pth.tar")
    rounds = [[command.replace("{exp}", str(tmp_path / "exp")) for command in commands] for commands in rounds]
    codes = together(tmp_path, tool, rounds)
    assert check(tmp_path, codes) in (None, True), codes


def test_a_run_removes_what_a_killed_one_left_and_nothing_of_others(tmp_path, find):
    photos = draw_images(tmp_path / "photos", 2)
    find(photos, "-o", tmp_path / "r", "--no-verify")
    cache = tmp_path / "r" / "cache"
    key = next(cache.glob("*.sqlite")).stem
    for name in (f".chunk-{key}-dead", ".chunk-0123456789abcdef-alive", "chunk-2019"):
        lay(cache, [f"{name}/0.jpg"])
    find(photos, "-o", tmp_path / "r", "--no-verify")
    assert {path.name for path in cache.iterdir()} == {f"{key}.sqlite", MANIFEST, ".chunk-0123456789abcdef-alive",
                                                       "chunk-2019"}


def test_a_lock_is_free_once_its_process_is_gone_however(tmp_path):
    code = """
import os, signal, sys, time
from pathlib import Path
from copydet.common import locked
with locked(Path("lock"), "it"):
    if not os.fork():
        time.sleep(600)  # outlives the process that holds the lock
    os.kill(os.getpid(), signal.SIGKILL)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, start_new_session=True)
    try:
        assert killed.wait() == -9
        with locked(tmp_path / "lock", "it"):
            assert (tmp_path / "lock").is_file()
        assert not list(tmp_path.iterdir())
    finally:
        os.killpg(killed.pid, 9)
