"""copydet.verification and verify.py: transforms, verdicts, false friends; the command resumed, in parallel, cached."""
import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from augly import utils as augly_utils
from PIL import Image, ImageDraw, ImageFont, ImageOps

import verify as command
from copydet import verification as v
from copydet.common import InputError
from copydet.descriptors import write_descriptors
from copydet.images import open_image
from helpers import ROOT, SHIPPED, WITH_PACKAGE, draw_images, photo, run, turn, warp

SCRIPT = "scripts/verify.py"
def describe(img):
    return v.describe(np.asarray(img))


def match(query, reference):
    return v.verify(describe(query), describe(reference))


# ---------------------------------------------------------------------------------------------------------------------
# Geometry


TRANSFORMS = {
    "the same": [[1, 0, 0], [0, 1, 0]],
    "crop": [[1.6, 0, -200], [0, 1.6, -120]],
    "turned by 30 degrees": turn(30, 0.8, (200, 150), (200, 150)),
    "turned by 180 degrees": turn(180, 1, (200, 150), (200, 150)),
    "inset": [[0.4, 0, 230], [0, 0.4, 20]],
    "stretched": [[1, 0, 0], [0, 0.6, 50]],
    "mirrored": [[-1, 0, 400], [0, 1, 0]],
    "mirrored crop, turned": turn(20, 1.3, (200, 150), (200, 150)) @ np.array([[-1, 0, 400], [0, 1, 0], [0, 0, 1]]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(400, 300), (1200, 900)])
def test_known_transforms_are_found(name, size):
    """Corners within 3 px of a query of 400 px, in px of the images as they are, large or small."""
    reference = photo("motorcycle_left", size)
    to_small = 400 / size[0]
    transform = np.array(TRANSFORMS[name]) * [to_small, to_small, 1]
    found = match(warp(reference, transform, (400, 300)), reference)
    assert found.verdict == v.COPY
    assert found.mirrored == name.startswith("mirrored")
    np.testing.assert_allclose(found.outline, v.corners(size, transform), atol=3)
    np.testing.assert_allclose(found.outline, v.corners(size, found.transform))
    mapped = found.points[:, 2:] @ found.transform[:, :2].T + found.transform[:, 2]
    np.testing.assert_allclose(mapped, found.points[:, :2], atol=6)
    assert len(found.points) == found.inliers


def test_coverage_is_what_overlaps_and_agrees():
    reference = photo("coffee")
    crop = match(warp(reference, [[2, 0, -200], [0, 2, -150]], (400, 300)), reference)  # the middle quarter
    assert 0.8 < crop.agreement <= 1
    assert crop.coverage_query == pytest.approx(crop.agreement, abs=0.03)
    assert crop.coverage_reference == pytest.approx(crop.agreement / 4, abs=0.03)
    page = photo("chelsea")
    page.paste(reference.resize((160, 120)), (20, 160))
    inset = match(page, reference)
    assert inset.verdict == v.COPY
    assert inset.coverage_query == pytest.approx(0.16 * inset.agreement, abs=0.02)
    assert inset.coverage_reference == pytest.approx(inset.agreement, abs=0.03)


def test_other_images_have_nothing_in_common():
    for a, b in (("coffee", "rocket"), ("astronaut", "china"), ("camera", "flower")):
        assert match(photo(a), photo(b)) is not None and match(photo(a), photo(b)).verdict == v.NONE


def test_two_photos_of_one_scene_are_told_with_an_outline():
    """Left and right picture of a stereo camera: the same scene; reported, whatever the verdict."""
    found = match(photo("motorcycle_left"), photo("motorcycle_right"))
    assert found.verdict in (v.COPY, v.PART) and found.inliers >= v.LEAST_INLIERS


@pytest.mark.parametrize("linear, plausible", [
    ([[1, 0], [0, 1]], True), ([[0, -1], [1, 0]], True), ([[0.2, 0], [0, 0.2]], True), ([[3, 0], [0, 1]], True),
    ([[-1, 0], [0, 1]], False), ([[0.01, 0], [0, 0.01]], False), ([[40, 0], [0, 40]], False),
    ([[8, 0], [0, 1]], False), ([[1, 5], [0, 1]], False), ([[1, 1], [1, 1]], False)])
def test_implausible_transforms_are_refused(linear, plausible):
    assert v.is_plausible(np.column_stack([linear, [10, 20]]).astype(float)) == plausible


def test_matches_to_one_place_count_once():
    """Twenty features of the query that match one feature of the reference are no twenty inliers."""
    rng = np.random.default_rng(0)
    places, vectors = rng.uniform(20, 280, (30, 2)), rng.integers(0, 60, (30, 128)).astype(np.uint8)
    frames = np.column_stack([places, np.full(30, 8), np.zeros(30)]).astype(np.float32)
    thumbnail = rng.integers(0, 256, (96, 96)).astype(np.uint8)
    reference = v.Features((300, 300), frames, vectors, thumbnail)
    repeated = np.r_[np.arange(10), np.full(20, 0)]
    query = v.Features((300, 300), frames[repeated], vectors[repeated], thumbnail)
    assert v.verify(query, reference).inliers == 10


def test_frames_that_agree_by_chance_have_no_fit():
    rng = np.random.default_rng(0)
    frames = [np.column_stack([rng.uniform(0, 300, (12, 2)), rng.uniform(5, 30, 12), rng.uniform(0, 360, 12)])
              for _ in range(2)]
    found = v.fit(*frames, tolerance=4)
    assert found is None or found[1].sum() < v.LEAST_INLIERS


@pytest.mark.parametrize("img", [Image.new("RGB", (300, 200), "white"), Image.linear_gradient("L"),
                                 Image.new("RGB", (1, 1)), Image.new("L", (3000, 2))])
def test_blank_and_tiny_images_are_not_verifiable(img):
    for query, reference in ((img, photo("coffee")), (photo("coffee"), img), (img, img)):
        assert match(query, reference) == v.ABSTAINED
    small = photo("coffee", (20, 15))
    assert match(small, photo("coffee")).verdict == v.ABSTAIN


def test_features_survive_storage():
    features = describe(photo("coffee"))
    again = v.Features.from_bytes(features.to_bytes())
    assert again.size == features.size == (400, 300)
    for name in ("frames", "descriptors", "thumbnail"):
        np.testing.assert_array_equal(getattr(again, name), getattr(features, name))
    assert len(again) == len(again.frames) > 100


def test_mirrored_features_are_those_of_the_mirrored_image():
    """Descriptors of features that are found in both, at the mirrored place with the mirrored angle, are alike."""
    img = photo("chelsea")
    guess, real = describe(img).mirrored, describe(ImageOps.mirror(img))
    apart = np.hypot(*(guess.frames[:, None, :2] - real.frames[None, :, :2]).transpose(2, 0, 1))
    angle = (guess.frames[:, None, 3] - real.frames[None, :, 3] + 180) % 360 - 180
    i, j = np.nonzero((apart < 0.5) & (np.abs(angle) < 2))
    assert len(i) > len(guess) / 2
    cosine = (guess.vectors[i] * real.vectors[j]).sum(1) / 255**2
    assert np.median(cosine) > 0.98


# ---------------------------------------------------------------------------------------------------------------------
# False friends: two different images that share something


def write(img, xy, text, size, fill="white", stroke=0, anchor="la"):
    ImageDraw.Draw(img).text(xy, text, fill=fill, font=ImageFont.load_default(size), stroke_width=stroke,
                             stroke_fill="black", anchor=anchor)


def logo(name, side, place):
    img, mark = photo(name), Image.new("RGB", (160, 160), "navy")
    draw = ImageDraw.Draw(mark)
    draw.ellipse([8, 8, 152, 152], fill="gold", outline="white", width=6)
    draw.polygon([(80, 20), (130, 120), (30, 120)], fill="crimson")
    write(mark, (80, 85), "ACME", 36, anchor="mm")
    write(mark, (80, 135), "since 1912", 20, "black", anchor="mm")
    img.paste(mark.resize((side, side), Image.Resampling.LANCZOS), place)
    return img


def watermark(name, text, size, places):
    img = photo(name).convert("RGBA")
    layer = Image.new("RGBA", img.size, (255, 255, 255, 0))
    for place in places:
        write(layer, place, text, size, (255, 255, 255, 110))
    return Image.alpha_composite(img, layer).convert("RGB")


def single(name):
    return watermark(name, "stockphoto.example", 36, [(40, 120)])


def tiled(name):
    return watermark(name, "SAMPLE 2021", 18, [(x, y) for x in range(10, 400, 130) for y in range(10, 300, 60)])


def meme(name):
    img = Image.new("RGB", (400, 420), "white")
    img.paste(photo(name), (0, 60))
    write(img, (200, 30), "When you find the original", 28, "black", anchor="mm")
    write(img, (200, 390), "on page forty-two", 32, "black", anchor="mm")
    return img


def caption(name):
    img = photo(name)
    write(img, (200, 28), "ONE DOES NOT SIMPLY", 32, stroke=3, anchor="mm")
    write(img, (200, 270), "CROP A PICTURE", 36, stroke=3, anchor="mm")
    return img


def banner(name, top=235):
    img = photo(name)
    ImageDraw.Draw(img).rectangle([0, top, 400, 300], fill=(170, 0, 20))
    ImageDraw.Draw(img).rectangle([0, top, 90, 300], fill="white")
    write(img, (45, (top + 300) // 2), "NEWS 7", 22, "black", anchor="mm")
    write(img, (100, top + 6), "BREAKING: storm reaches the coast", 17)
    write(img, (100, top + 32), "Live from the harbour, 18:45", 15)
    return img


def paragraph(name, size=24):
    img = photo(name)
    for i, line in enumerate(("Lorem ipsum dolor sit amet,", "consectetur adipiscing elit,", "sed do eiusmod tempor",
                              "incididunt ut labore et dolore", "magna aliqua 1914-1918.")):
        write(img, (20, 60 + i * (size + 4)), line, size, stroke=2)
    return img


def screen(name):
    img = Image.open(Path(augly_utils.SCREENSHOT_TEMPLATES_DIR, "web.png")).convert("RGB").resize((480, 360))
    img.paste(photo(name, (300, 200)), (90, 100))
    return img


def stickers(name):
    img = photo(name)
    for i, sticker in enumerate(("animals_and_nature/cat_face", "symbols/recycling_symbol", "food_and_drink/pizza")):
        emoji = Image.open(Path(augly_utils.EMOJI_DIR, f"{sticker}.png")).convert("RGBA").resize((64, 64))
        img.paste(emoji, (20 + 150 * i, 30 + 90 * i), emoji)
    return img


def texture(name, *box):
    return Image.open(SHIPPED[0] / f"{name}.png").convert("RGB").crop(box)


FRIENDS = {
    "logo, same corner": lambda: (logo("astronaut", 80, (310, 10)), logo("camera", 80, (310, 10))),
    "logo, other corners": lambda: (logo("chelsea", 100, (10, 10)), logo("coffee", 100, (280, 180))),
    "large logo": lambda: (logo("rocket", 120, (10, 170)), logo("hubble_deep_field", 120, (270, 10))),
    "small logo": lambda: (logo("ihc", 60, (330, 230)), logo("moon", 60, (330, 230))),
    "logo of two sizes": lambda: (logo("china", 60, (300, 200)), logo("flower", 130, (10, 10))),
    "watermark 1": lambda: (single("astronaut"), single("coffee")),
    "watermark 2": lambda: (single("camera"), single("chelsea")),
    "watermark 3": lambda: (single("china"), single("rocket")),
    "tiled watermark 1": lambda: (tiled("chelsea"), tiled("motorcycle_left")),
    "tiled watermark 2": lambda: (tiled("coffee"), tiled("flower")),
    "tiled watermark 3": lambda: (tiled("astronaut"), tiled("china")),
    "meme in bars 1": lambda: (meme("astronaut"), meme("chelsea")),
    "meme in bars 2": lambda: (meme("coffee"), meme("rocket")),
    "meme in bars 3": lambda: (meme("china"), meme("camera")),
    "caption 1": lambda: (caption("motorcycle_left"), caption("flower")),
    "caption 2": lambda: (caption("chelsea"), caption("ihc")),
    "caption 3": lambda: (caption("coffee"), caption("camera")),
    "news banner 1": lambda: (banner("astronaut"), banner("motorcycle_left")),
    "news banner 2": lambda: (banner("camera", 220), banner("china", 220)),
    "news banner 3": lambda: (banner("chelsea"), banner("hubble_deep_field")),
    "text 1": lambda: (paragraph("coffee"), paragraph("retina")),
    "text 2": lambda: (paragraph("rocket", 26), paragraph("chelsea", 26)),
    "text 3": lambda: (paragraph("flower"), paragraph("astronaut")),
    "screen 1": lambda: (screen("chelsea"), screen("china")),
    "screen 2": lambda: (screen("astronaut"), screen("rocket")),
    "stickers": lambda: (stickers("coffee"), stickers("motorcycle_left")),
    "bricks": lambda: (texture("brick", 0, 0, 256, 512), texture("brick", 256, 0, 512, 512)),
    "rows of bricks": lambda: (texture("brick", 0, 0, 512, 256), texture("brick", 0, 256, 512, 512)),
    "grass": lambda: (texture("grass", 0, 0, 256, 512), texture("grass", 256, 0, 512, 512)),
    "gravel": lambda: (texture("gravel", 0, 0, 512, 256), texture("gravel", 0, 256, 512, 512)),
    "coins": lambda: (texture("coins", 0, 0, 384, 150), texture("coins", 0, 150, 384, 303)),
}
SHARED = [name for name in FRIENDS if name.startswith(("logo,", "large", "meme", "caption", "news", "text", "screen"))]


@pytest.mark.parametrize("name", FRIENDS)
def test_false_friends_are_no_copies(name):
    a, b = (describe(img) for img in FRIENDS[name]())
    for query, reference in ((a, b), (b, a)):
        found = v.verify(query, reference)
        assert found.verdict != v.COPY, found
        if name in SHARED:
            assert found.verdict == v.PART and found.inliers >= 20


@pytest.mark.parametrize("edit", [logo, single, tiled, meme, caption, banner, paragraph, stickers])
def test_their_true_copies_are_copies(edit):
    """The same edits on a picture and the picture itself."""
    rest = (80, (310, 10)) if edit is logo else ()
    assert match(edit("motorcycle_left", *rest), photo("motorcycle_left")).verdict == v.COPY


# ---------------------------------------------------------------------------------------------------------------------
# verify.py


def draw_textures(folder, count, seed, name):
    """Images of 96 px of noise at several scales, which have many local features."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        layers = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((96, 96), Image.BICUBIC)
                  for side in (4, 12, 32)]
        Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(folder / name.format(i))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """40 queries, the first half copies of references, mirrored every other one; 30 references; their descriptors."""
    root = tmp_path_factory.mktemp("planted")
    draw_textures(root / "reference_images", 30, seed=1, name="R{:06d}.png")
    draw_textures(root / "query_images", 40, seed=2, name="Q{:05d}.png")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((70, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for i in range(20):
        img = Image.open(root / f"reference_images/R{i:06d}.png").crop((8, 8, 90, 90))
        (ImageOps.mirror(img) if i % 2 else img).save(root / f"query_images/Q{i:05d}.png")
        rows[i] = rows[40 + i]
    ids = [f"Q{i:05d}" for i in range(40)], [f"R{i:06d}" for i in range(30)]
    write_descriptors(root / "sub.h5", {"query": (rows[:40], ids[0]), "reference": (rows[40:], ids[1])}, {})
    (root / "gt.csv").write_text("query_id,reference_id\n" + "".join(
        f"Q{i:05d},{f'R{i:06d}' if i < 20 else ''}\n" for i in range(40)))
    run(SCRIPT, root / "sub.h5", root, "-o", root / "pairs.csv", "--candidates", 3, "-j", 1)
    return root


def table(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_pairs_are_verified_and_scored(planted):
    rows = table(planted / "pairs.csv")
    assert tuple(rows[0]) == command.COLUMNS
    assert len(rows) == 40 * 3
    assert [row["query_id"] for row in rows] == sorted(row["query_id"] for row in rows)
    verified = {(row["query_id"], row["reference_id"]) for row in rows if row["verdict"] == v.COPY}
    assert verified == {(f"Q{i:05d}", f"R{i:06d}") for i in range(20)}
    for row in rows:
        copy = row["verdict"] == v.COPY
        assert copy == (float(row["score"]) > 0) == (int(row["inliers"]) > 0) == bool(row["outline"])
        if copy:
            corners = np.array(row["outline"].split(), float).reshape(4, 2)
            i = int(row["query_id"][1:])
            expected = np.array([[-8, -8], [88, -8], [88, 88], [-8, 88]])
            np.testing.assert_allclose(corners, expected * [-1, 1] + [82, 0] if i % 2 else expected, atol=1)
    assert not (planted / "pairs.skipped.csv").exists() and not list(planted.glob("*.blocks"))
    scored = run("scripts/eval_metrics.py", planted / "pairs.csv", planted / "gt.csv")
    assert '"average_precision": 1.0' in scored.stdout


def test_any_number_of_processes_gives_the_same_bytes(planted, tmp_path):
    run(SCRIPT, planted / "sub.h5", planted, "-o", tmp_path / "pairs.csv", "--candidates", 3, "-j", 4)
    assert (tmp_path / "pairs.csv").read_bytes() == (planted / "pairs.csv").read_bytes()


def test_a_killed_run_goes_on(planted, tmp_path):
    """Killed in the second block of queries; the first is not computed again; other flags begin anew."""
    output = tmp_path / "pairs.csv"
    flags = [str(planted / "sub.h5"), str(planted), "-o", str(output), "--candidates", "3", "-j", "2"]
    die = ("import os, signal, sys; import verify; rows_of = verify.rows_of\n"
           "verify.rows_of = lambda query, *rest: os.kill(os.getpid(), signal.SIGKILL) if query == 'Q00032' else "
           "rows_of(query, *rest)\nverify.main(sys.argv[1:])")
    killed = subprocess.run([sys.executable, "-c", die, *flags], cwd=ROOT, capture_output=True, timeout=300,
                            env=WITH_PACKAGE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    blocks = tmp_path / "pairs.csv.blocks"
    assert [file.name for file in blocks.glob("*.json") if file.name != "settings.json"] == ["0-32.json"]
    before = tmp_path / "before"
    shutil.copytree(blocks, before)
    run(SCRIPT, *flags)
    assert (tmp_path / "pairs.csv").read_bytes() == (planted / "pairs.csv").read_bytes()
    text = (before / "0-32.json").read_text()
    for candidates, taken_up in (("3", True), ("2", False)):
        shutil.copytree(before, blocks)
        (blocks / "0-32.json").write_text(text.replace('"copy"', '"as it was"'))
        run(SCRIPT, *flags, "--candidates", candidates)
        assert ("as it was" in (tmp_path / "pairs.csv").read_text()) == taken_up


def test_features_are_kept_until_the_image_changes(planted, tmp_path):
    """Marked features in the cache are used by the next run, but for the reference whose file was replaced."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(planted, data)
    flags = [data / "sub.h5", data, "-o", tmp_path / "pairs.csv", "--candidates", 1, "-j", 1, "--cache", cache]
    run(SCRIPT, *flags)
    db = sqlite3.connect(next(cache.glob("*.sqlite")))
    nothing = describe(Image.new("L", (96, 96)))
    asked_for = {row["reference_id"] for row in table(tmp_path / "pairs.csv")}
    assert {Path(os.fsdecode(path)).stem for path, in db.execute("SELECT path FROM images")} == asked_for
    db.execute("UPDATE images SET features = ?", (nothing.to_bytes(),))
    db.commit()
    os.utime(data / "reference_images/R000003.png", (1, 1))
    run(SCRIPT, *flags)
    verdicts = {row["query_id"]: row["verdict"] for row in table(tmp_path / "pairs.csv")}
    assert [name for name, verdict in verdicts.items() if verdict == v.COPY] == ["Q00003"]
    assert {verdicts[f"Q{i:05d}"] for i in range(20) if i != 3} == {v.ABSTAIN}


def test_unreadable_images_are_listed_and_others_not_opened(planted, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(planted, data)
    pairs = table(planted / "pairs.csv")
    asked_for = {row["reference_id"] for row in pairs if row["query_id"] in ("Q00000", "Q00001")}
    for file in (data / "reference_images").iterdir():
        if file.stem not in asked_for:
            file.write_bytes(b"never opened")
    (data / "reference_images/R000000.png").write_bytes(b"broken")
    (data / "query_images/Q00001.png").write_bytes(b"broken")
    rows = run_two_queries(data, tmp_path)
    broken = [row for row in rows if row["query_id"] == "Q00001" or row["reference_id"] == "R000000"]
    assert len(broken) >= 4 and {row["verdict"] for row in broken} == {v.ABSTAIN}
    skipped = {Path(row["path"]).stem: row["reason"] for row in table(tmp_path / "pairs.skipped.csv")}
    told = json.loads((tmp_path / "pairs.run.json").read_text())
    assert told["outcome"] == "done" and told["counts"]["skipped"] == 2 and told["counts"]["queries"] == 2
    assert set(skipped) == {"Q00001", "R000000"} and set(skipped.values()) == {"no image of a kind that is read here"}


def test_what_cannot_be_read_now_is_tried_again_whatever_its_time(tmp_path, monkeypatch):
    """Drives that fail, and files of the year 2400: neither loses the work on others."""
    paths = [str(draw_images(tmp_path, 2) / f"{i:04d}.jpg") for i in range(2)]
    os.utime(paths[1], (13_569_465_600,) * 2)
    verifier, fails, described = v.Verifier(1, tmp_path), [paths[0]], []

    def describe_or_fail(path):
        described.append(path)
        if path in fails:
            raise v.UnreadableImage(v.NOT_NOW + "Input/output error")
        return describe(open_image(path))

    monkeypatch.setattr(v, "describe_file", describe_or_fail)
    monkeypatch.setattr(verifier, "run", map)
    assert verifier.describe(paths) == [(paths[0], v.NOT_NOW + "Input/output error")]
    assert verifier.cache.read(paths[0]) is None and len(verifier.cache.read(paths[1])) and not list(
        verifier.cache.unreadable(paths))
    fails.clear()
    assert verifier.describe(paths) == [] and described == [*paths, paths[0]]
    assert len(verifier.cache.read(paths[0]))


def test_an_image_without_features_is_kept_too(tmp_path):
    path, cache = str(tmp_path / "blank.png"), v.FeatureCache(tmp_path)
    Image.new("RGB", (100, 80), "white").save(path)
    cache.write(v.describe_files([path]))
    assert len(cache.read(path)) == 0 and not list(cache.unreadable([path])) and not cache.missing([path])


@pytest.mark.parametrize("content", [b"text, no SQLite file" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_cache_that_is_none_is_told_in_a_line(tmp_path, content):
    file = v.FeatureCache(tmp_path).file
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file}: .*it can be deleted"):
        v.FeatureCache(tmp_path)


def run_two_queries(data, out):
    """verify.py on the first two queries of a benchmark alone."""
    with command.Descriptors(data / "sub.h5") as file:
        query, reference = file["query"], file["reference"]
        groups = {"query": (query.read()[:2], query.ids[:2]), "reference": (reference.read(), reference.ids)}
    write_descriptors(data / "two.h5", groups, {})
    run(SCRIPT, data / "two.h5", data, "-o", out / "pairs.csv", "--candidates", 3, "-j", 1)
    return table(out / "pairs.csv")


def test_images_in_subfolders_and_of_any_ending_are_found(tmp_path):
    draw_images(tmp_path, 1, name="a.jpg")
    draw_images(tmp_path / "deep/down", 1, name="b.webp")
    draw_images(tmp_path / "deep/down", 1, name="cafe\u0301.jpg")
    (tmp_path / "b.jpg").mkdir()
    found = command.find_images(tmp_path, ["a", "b", "caf\u00e9"])
    assert {name: Path(path).relative_to(tmp_path).as_posix() for name, path in found.items()} == {
        "a": "a.jpg", "b": "deep/down/b.webp", "caf\u00e9": "deep/down/cafe\u0301.jpg"}
    with pytest.raises(InputError, match="no image of c"):
        command.find_images(tmp_path, ["a", "c"])


@pytest.mark.parametrize("flags, message", [
    (["no.h5", "."], "no such file: no.h5"), (["{sub}", "nowhere"], "no such folder: nowhere/query_images"),
    (["{sub}", "."], "query_images"), (["{sub}", "{root}", "-o", "no/pairs.csv"], "-o no/pairs.csv: no such folder"),
    (["{sub}", "{root}", "--cache", "no/cache"], "--cache no/cache"),
    (["{sub}", "{root}", "-j", "0"], "not a whole number"),
    (["{root}/gt.csv", "{root}"], "gt.csv: not an HDF5 file")])
def test_wrong_input_is_told_in_one_line(planted, tmp_path, flags, message):
    flags = [flag.format(root=planted, sub=planted / "sub.h5") for flag in flags]
    output = [] if "-o" in flags else ["-o", tmp_path / "pairs.csv"]
    told = run(ROOT / SCRIPT, *flags, *output, code=2, cwd=tmp_path, apart=True).stderr.splitlines()
    assert message in told[-1] and not list(tmp_path.glob("*.blocks"))
