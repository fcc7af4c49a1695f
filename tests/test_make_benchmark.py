"""make_benchmark.py on images drawn here: what it makes, what it leaves out, and what it refuses."""
import csv
import filecmp
import json
import re
import shutil

import numpy as np
import pytest
from helpers import run
from PIL import Image

import make_benchmark
from copydet.common import MANIFEST


def draw_image(file, seed, size=(96, 80), **options):
    """An image-like image of a few KB: random colours on a coarse grid, smoothly enlarged, with some boxes."""
    rng = np.random.default_rng(seed)
    img = Image.fromarray(rng.integers(0, 256, (7, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    for _ in range(4):
        x, y = rng.integers(0, size[0] - 20), rng.integers(0, size[1] - 20)
        img.paste(tuple(rng.integers(0, 256, 3).tolist()), (x, y, x + rng.integers(8, 40), y + rng.integers(8, 40)))
    file.parent.mkdir(parents=True, exist_ok=True)
    img.save(file, **options)
    return img


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """40 images: JPEG and PNG, nested, some with odd endings."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(40):
        draw_image(folder / f"{'abc'[i % 3]}/{i:02d}{('.jpg', '.PNG', '.JPEG', '.webp')[i % 4]}", i)
    return folder


def make(images, out, *flags, code=0):
    return run("scripts/make_benchmark.py", images, out, "-j", 1, *flags, code=code)


def rows(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "hard"
    return out, make(images, out, "--strength", "hard").stdout


def test_layout_counts_and_ids(made):
    out, said = made
    assert names(out / "training_images") == [f"T{i:06d}.jpg" for i in range(16)]  # 40 % of 40
    assert names(out / "reference_images") == [f"R{i:06d}.jpg" for i in range(12)]  # half of the other 24
    assert names(out / "query_images") == [f"Q{i:05d}.jpg" for i in range(18)]  # 6 with an original, 12 without
    assert names(out) == ["edits.csv", "public_ground_truth.csv", "query_images", "reference_images", "sources.csv",
                          "training_images"]
    assert "12 references, 6 queries with and 12 without an original, 16 training images" in said
    assert not list(out.parent.glob("*.partial"))


def test_ground_truth_is_in_the_form_of_disc21(made):
    truth = rows(made[0] / "public_ground_truth.csv")
    assert list(truth[0]) == ["query_id", "reference_id"]
    assert [row["query_id"] for row in truth] == [f"Q{i:05d}" for i in range(18)]
    found = [row["reference_id"] for row in truth if row["reference_id"]]
    assert len(found) == len(set(found)) == 6 and all(re.fullmatch(r"R\d{6}", name) for name in found)
    positive = [bool(row["reference_id"]) for row in truth]
    assert positive != sorted(positive) and positive != sorted(positive, reverse=True)  # mixed


def test_photos_are_in_one_place_only(made):
    out = made[0]
    source = {row["id"]: row["path"] for row in rows(out / "sources.csv")}
    stored = [path for name, path in source.items() if name[0] in "RT"]
    assert len(stored) == len(set(stored)) == 28
    for row in rows(out / "public_ground_truth.csv"):
        original = source[row["query_id"]]
        assert original == source[row["reference_id"]] if row["reference_id"] else original not in stored


def test_jpeg_is_copied_and_the_rest_encoded_anew(made):
    out = made[0]
    for row in rows(out / "sources.csv"):
        if row["id"][0] == "T":
            file = out / "training_images" / f"{row['id']}.jpg"
            same = filecmp.cmp(file, row["path"], shallow=False)
            assert same == row["path"].lower().endswith((".jpg", ".jpeg"))
            img, original = Image.open(file), Image.open(row["path"]).convert("RGB")
            assert (img.format, img.mode, img.size) == ("JPEG", "RGB", original.size)
            assert np.abs(np.asarray(img, float) - np.asarray(original)).mean() < 6


def test_edits_are_recorded(made):
    out = made[0]
    truth = rows(out / "public_ground_truth.csv")
    low, high = make_benchmark.STRENGTHS["hard"]
    for row, true in zip(rows(out / "edits.csv"), truth, strict=True):
        edits, amounts = row["edits"].split("+"), json.loads(row["amounts"])
        assert (row["query_id"], row["reference_id"]) == (true["query_id"], true["reference_id"])
        assert low <= len(edits) <= high and list(amounts) == edits
        for name, amount in amounts.items():
            edit = make_benchmark.EDITS[name]
            assert edit.hard[0] <= amount <= edit.hard[1] if edit.amount else amount is None


def same_files(one, two):
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    return [str(file) for file in files if not filecmp.cmp(one / file, two / file, shallow=False)] == []


def test_same_bytes_on_every_run_and_for_every_j(made, images, tmp_path):
    run("scripts/make_benchmark.py", images, tmp_path / "j3", "--strength", "hard", "-j", 3)
    assert same_files(made[0], tmp_path / "j3")
    make(images, tmp_path / "seed1", "--strength", "hard", "--seed", 1)
    assert not same_files(made[0], tmp_path / "seed1")


@pytest.mark.parametrize("strength", make_benchmark.STRENGTHS)
@pytest.mark.parametrize("name", make_benchmark.EDITS)
def test_each_edit_alone_gives_a_valid_photo(name, strength, tmp_path):
    sources = [make_benchmark.Source(str(tmp_path / f"{i}.png")) for i in range(5)]
    sizes = [(64, 64), (300, 64), (64, 200), (128, 96), (90, 90)]
    originals = [draw_image(tmp_path / f"{i}.png", i, size) for i, size in enumerate(sizes)]
    for i, source in enumerate(sources):
        others = sources[:i] + sources[i + 1:]
        query = make_benchmark.Query(f"Q{i:05d}", source, "", [name], others, np.random.default_rng(i))
        before = np.random.get_state()[1].copy()
        amounts = make_benchmark.make_query(query, strength=strength, quality=95, folder=tmp_path)
        assert np.array_equal(np.random.get_state()[1], before)  # no global generator was seeded or used
        img = Image.open(tmp_path / f"Q{i:05d}.jpg")
        assert (img.format, img.mode) == ("JPEG", "RGB") and min(img.size) >= 16 and max(img.size) <= 1024
        assert img.size != originals[i].size or np.abs(np.asarray(img, float) - np.asarray(originals[i])).mean() > 0.5
        assert list(amounts) == [name]


def test_only_the_edits_asked_for(images, tmp_path):
    make(images, tmp_path / "out", "--edits", "crop,blur", "--strength", "medium")
    assert {row["edits"] for row in rows(tmp_path / "out/edits.csv")} <= {"crop", "blur", "crop+blur"}
    said = run("scripts/make_benchmark.py", "--list-edits").stdout
    assert all(re.search(rf"^{name} ", said, re.M) for name in make_benchmark.EDITS)


def test_sample_of_a_large_folder(images, tmp_path):
    said = make(images, tmp_path / "out", "--sample-size", 20).stdout
    assert "20 usable images" in said
    used = {row["path"] for row in rows(tmp_path / "out/sources.csv")}
    assert {path.rsplit("/", 2)[1] for path in used} == {"a", "b", "c"}  # drawn at random, not the first ones


def test_counts_and_training_photos_from_flags(images, tmp_path):
    for i in range(10):
        draw_image(tmp_path / f"others/{i}.jpg", 100 + i)
    shutil.copy(images / "a/00.jpg", tmp_path / "others/copy.jpg")
    out = tmp_path / "out"
    said = make(images, out, "--training-images", tmp_path / "others", "--references", 9, "--queries", 7,
                "--distractors", 5).stdout
    assert [len(names(out / f)) for f in ("training_images", "reference_images", "query_images")] == [10, 9, 12]
    assert "1 near-duplicates" in said  # the copy would have been trained on and searched for
    trained = [row["path"] for row in rows(out / "sources.csv") if row["id"][0] == "T"]
    assert all(path.startswith(str(tmp_path / "others")) for path in trained)
    assert not any(path.endswith("copy.jpg") for path in trained)


def test_near_duplicates_and_bad_photos_are_left_out_and_listed(tmp_path):
    folder = tmp_path / "photos"
    for i in range(8):
        draw_image(folder / f"{i}.jpg", i)
    Image.open(folder / "0.jpg").resize((110, 92)).save(folder / "again.jpg", quality=60)
    good = (folder / "1.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(good[:len(good) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("not an image")
    (folder / "folder.jpg").mkdir()
    (folder / "._7.jpg").write_bytes(b"sidecar")
    Image.new("RGB", (90, 90), "navy").save(folder / "plain.png")
    draw_image(folder / "small.png", 50, (40, 90))
    said = make(folder, tmp_path / "out").stdout
    assert "8 usable images" in said and "6 unreadable, too small or empty, 1 near-duplicates" in said
    reasons = {row["path"].rsplit("/", 1)[1]: row["reason"] for row in rows(tmp_path / "out/skipped.csv")}
    assert sorted(reasons) == ["again.jpg", "cut.jpg", "empty.jpg", "folder.jpg", "plain.png", "small.png", "text.png"]
    assert "0.jpg" in reasons["again.jpg"] and "almost nothing" in reasons["plain.png"]
    assert all(reasons.values())


def test_near_duplicates_by_brute_force():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2, (300, 64), dtype=np.uint8)
    for i in range(100, 200):  # copies with 0 to 8 bits changed
        hashes[i] = hashes[i - 100]
        hashes[i, rng.choice(64, i % 9, replace=False)] ^= 1
    apart = (hashes[:, None] != hashes).sum(2)
    expected = [next((j for j in range(i) if apart[i, j] <= 4), -1) for i in range(300)]
    assert make_benchmark.near_duplicates(np.packbits(hashes, axis=1), 4).tolist() == expected


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_read_as_rgb(mode, tmp_path):
    img = draw_image(tmp_path / "rgb.png", 3)
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.asarray(img.convert("L")).astype(np.uint16) * 257).save(file)
    else:
        img.convert(mode).save(file)
    read = make_benchmark.open_image(file)
    assert read.mode == "RGB"
    assert np.abs(np.asarray(read.convert("L"), float) - np.asarray(img.convert("L"))).mean() < 12


def test_tiles_are_disjoint_and_whole(tmp_path):
    for i in range(3):
        draw_image(tmp_path / f"photos/{i}.png", i, (330, 200))
    Image.new("RGB", (330, 200)).save(tmp_path / "photos/black.png")
    said = make(tmp_path / "photos", tmp_path / "out", "--tile", 64, "--duplicate-bits", 0).stdout
    assert "45 usable tiles" in said and "15 unreadable" in said  # 5 x 3 of each image
    sources = [row for row in rows(tmp_path / "out/sources.csv") if row["id"][0] in "RT"]
    boxes = [(row["path"], *map(int, row["tile"].split(","))) for row in sources]
    assert len(set(boxes)) == len(boxes) == 18 + 13
    for _, left, top, right, bottom in boxes:
        assert right - left == bottom - top == 64 and left % 64 == top % 64 == 0 and right <= 330 and bottom <= 200
    assert {Image.open(f).size for f in (tmp_path / "out/reference_images").iterdir()} == {(64, 64)}


def test_leftovers_of_a_killed_run_are_replaced(images, tmp_path):
    (tmp_path / "out.partial/query_images").mkdir(parents=True)
    (tmp_path / "out.partial/query_images/old.jpg").touch()
    assert "is in the way" in make(images, tmp_path / "out", code=2).stderr
    (tmp_path / "out.partial" / MANIFEST).touch()
    (tmp_path / "out").mkdir()
    make(images, tmp_path / "out", "--references", 2, "--distractors", 1, "--training", 2)
    assert names(tmp_path / "out/query_images") == ["Q00000.jpg", "Q00001.jpg"]
    assert not (tmp_path / "out.partial").exists()


def test_refuses_to_overwrite(images, made):
    before = (made[0] / "edits.csv").read_bytes()
    assert "exists already" in make(images, made[0], code=2).stderr
    assert (made[0] / "edits.csv").read_bytes() == before


@pytest.mark.parametrize("flags, words", [
    (["--references", "30", "--distractors", "10", "--training", "5"],
     "40 usable ones, for 30 references + 10 distractors + 5 training images"),
    (["--references", "4", "--queries", "5"], "--queries 5"),
    (["--edits", "crop,melt"], "'melt' is none of crop, "),
    (["--edits", "overlay", "--training", "0", "--distractors", "0"], "--edits overlay"),
    (["--strength", "extreme"], "--strength"),
    (["--tile", "9"], "--tile: 9"),
    (["--training-images", "nowhere"], "nowhere: no such folder"),
    (["--tile", "500"], "smaller than 500"),
])
def test_wrong_flags_are_told_in_one_line(images, tmp_path, flags, words):
    done = make(images, tmp_path / "out", *flags, code=2)
    message = [line for line in done.stderr.splitlines() if line.startswith("make_benchmark.py: ")]
    assert len(message) == 1 and words in message[0]
    assert not list(tmp_path.iterdir())


def test_wrong_folders_are_told_in_one_line(images, tmp_path):
    (tmp_path / "bad").mkdir()
    assert "bad: holds no image" in make(tmp_path / "bad", tmp_path / "out", code=2).stderr
    (tmp_path / "bad/a.jpg").write_text("not an image")
    assert "bad: no usable image" in make(tmp_path / "bad", tmp_path / "out", code=2).stderr
    assert "lies inside the images" in make(tmp_path, tmp_path / "out", code=2).stderr
    draw_image(tmp_path / "one/1.jpg", 1)
    assert "too few images" in make(tmp_path / "one", tmp_path / "out", code=2).stderr
