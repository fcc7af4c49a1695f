"""Operations of views against AugLy's and torchvision's on the same draws; images decoded no larger than needed."""
import os
import time
from types import SimpleNamespace

import augly.image as imaugs
import augly.utils
import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from augly.image.utils import rotated_rect_with_max_area
from PIL import Image, ImageFilter

from copydet import augmentations, images
from copydet.augmentations import OPS, Augmentation, LazyCrop
from copydet.batches import PREFETCHED, Images, collate_views, make_loader
from copydet.common import InputError
from copydet.distributed import Rank
from copydet.views import Preprocessing, Views, WholeImages, list_augmentations, parse_ops
from helpers import draw_images

SIZE = 96
PARAMETERS = {"crop": [0.2], "overlay-crop": [0.2, 1, 0.3, 0.7, 0.4], "jitter": [0.4] * 4, "saturation": [2],
              "brightness": [0.5, 1.5], "paste": [0.2, 0.9], "blend": [0.4]}  # of the operations that want some
PIPELINES = "crop:0.5=1 hflip=0.5", "rotation=0.5 crop:0.2=1 [gray=0.5 vflip=0.5]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("photos"), 12, size=512)


@pytest.fixture
def img(folder):
    """Shapes, gradients and fine texture, for the libraries."""
    texture = np.random.default_rng(0).integers(-20, 21, (128, 160, 3))
    return Image.fromarray((np.asarray(Image.open(folder / "0000.jpg").resize((160, 128))) + texture).clip(0, 255)
                           .astype(np.uint8))


def views_of(folder, decode="draft", view0=PIPELINES[0], view1=PIPELINES[1]):
    paths = sorted(path.name for path in folder.iterdir())
    return Views(str(folder), paths, preprocessing(decode), [parse_ops(view, 0.2) for view in (view0, view1)], seed=0)


def preprocessing(decode="draft"):
    return Preprocessing(SIZE, "square", [0.5] * 3, [0.5] * 3, decode=decode)


@pytest.fixture
def pixels(img):
    """The same for our operations."""
    return np.array(img)


def difference(a, b):
    """Largest and mean absolute difference in levels of pixels or pictures."""
    a, b = (np.asarray(x.convert("RGB") if isinstance(x, Image.Image) else x, int) for x in (a, b))
    return np.abs(a - b).max(), np.abs(a - b).mean()


def test_jitter_is_torchvisions_to_a_level(img, pixels):
    for name, factor, limit in (("brightness", 0.6, 1), ("brightness", 1.4, 1), ("contrast", 0.6, 1),
                                ("contrast", 1.4, 1), ("saturation", 0.3, 1), ("saturation", 1.7, 1), ("hue", 0.1, 12),
                                ("hue", -0.2, 12), ("hue", 0, 12)):  # of both libraries' rounded hues
        ours, theirs = (getattr(module, f"adjust_{name}") for module in (augmentations, TF))
        ours, theirs = ours(pixels, factor), theirs(img, factor)
        largest, mean = difference(ours, theirs)
        assert largest <= limit and mean < (0.01 if limit == 1 else 1.1), (name, factor, largest, mean)


def test_jitter_is_torchvisions_step_by_step(img, pixels):
    for seed in range(10):
        rng, expected = np.random.default_rng(seed), img
        draws = [rng.uniform(0.6, 1.4), rng.uniform(0.6, 1.4), rng.uniform(0.6, 1.4), rng.uniform(-0.1, 0.1)]
        for i in rng.permutation(4):
            name = ("brightness", "contrast", "saturation", "hue")[i]
            expected = getattr(TF, f"adjust_{name}")(expected, draws[i])
        ours = augmentations.color_jitter(pixels, np.random.default_rng(seed), 0.4, 0.4, 0.4, 0.1)
        assert difference(ours, expected)[1] < 2
        assert abs(np.mean(np.asarray(ours, float) - np.asarray(expected))) < 0.5


def test_jitter_draws_each_step_once_in_random_order(pixels, monkeypatch):
    seen = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(augmentations, f"adjust_{name}",
                            lambda x, value, name=name: seen.append((name, value)) or x)
    for seed in range(200):
        augmentations.color_jitter(pixels, np.random.default_rng(seed), 0.4, 0.3, 0.2, 0.1)
    assert len({tuple(name for name, _ in seen[i:i + 4]) for i in range(0, 800, 4)}) == 24
    for name, middle, strength in (("brightness", 1, 0.4), ("contrast", 1, 0.3), ("saturation", 1, 0.2),
                                   ("hue", 0, 0.1)):
        values = (np.array([value for other, value in seen if other == name]) - middle) / strength
        assert len(values) == 200 and -1 <= values.min() < -0.9 and 0.9 < values.max() <= 1


@pytest.mark.parametrize("radius", [0.5, 1.5, 2, 3.9, 4, 7, 10])
def test_blur_is_pillows(img, pixels, radius):
    ours, pillows = augmentations.blur(pixels, radius), np.asarray(img.filter(ImageFilter.GaussianBlur(radius)))
    inside = np.s_[16:112, 16:144]  # at the border they continue the image differently
    assert difference(ours, pillows)[1] < 1 and difference(ours[inside], pillows[inside])[0] <= 8


@pytest.mark.parametrize("radius", [2, 4, 7])
def test_a_wide_blur_is_as_wide_as_pillows(radius):
    variances = [], []
    for left in range(60, 64):  # wherever it lies in the reduced image
        bar = Image.new("RGB", (128, 128))
        bar.paste("white", (left, 0, left + 1, 128))
        pillows = bar.filter(ImageFilter.GaussianBlur(radius))
        for img, found in zip((augmentations.blur(np.array(bar), radius), pillows), variances):
            found.append(np.average((np.arange(128) - left) ** 2, weights=np.asarray(img, float).sum((0, 2))))
    assert abs(np.mean(variances[0]) / np.mean(variances[1]) - 1) < 0.06, variances


def test_blur_of_odd_sizes_is_pillows(img):
    img = img.crop((0, 0, 99, 77))
    ours, pillows = augmentations.blur(np.array(img), 7), np.asarray(img.filter(ImageFilter.GaussianBlur(7)))
    inside = np.s_[16:61, 16:83]
    assert difference(ours, pillows)[1] < 1 and difference(ours[inside], pillows[inside])[0] <= 8


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.8])
def test_pixelized_as_by_augly(img, pixels, ratio):
    largest, mean = difference(augmentations.pixelize(pixels, ratio), imaugs.pixelization(img, ratio=ratio))
    assert largest <= 2 and mean < 0.1


def test_grey_and_flips_are_the_libraries(img, pixels):
    for name, expected in (("gray", TF.to_grayscale(img, 3)), ("hflip", TF.hflip(img)), ("vflip", TF.vflip(img))):
        largest, mean = difference(OPS[name](pixels, None, None), expected)
        assert (largest <= 1 and mean < 0.01) if name == "gray" else largest == 0


@pytest.mark.parametrize("decoder, limit", [(images.simplejpeg, 1), (None, 0)])
def test_jpeg_is_auglys(img, pixels, decoder, limit, monkeypatch):
    monkeypatch.setattr(images, "simplejpeg", decoder)
    for quality in (10, 20, 30, 50):
        ours, theirs = images.through_jpeg(pixels, quality), imaugs.encoding_quality(img, quality=quality)
        assert difference(ours, theirs)[1] <= limit  # simplejpeg encodes with the faster, less exact DCT
        assert abs(difference(ours, img)[1] / difference(theirs, img)[1] - 1) < 0.01


def test_operations_leave_their_input_as_it_is(pixels):
    """Views share the decoded image."""
    data = SimpleNamespace(size=SIZE, resize=lambda img, size: TF.resize(img, [size, size]),
                           random_image=lambda rng: pixels)
    before = pixels.copy()
    for name, op in OPS.items():
        result = op(pixels, np.random.default_rng(0), data, *PARAMETERS.get(name, []))
        result = result.pixels() if isinstance(result, LazyCrop) else result
        assert np.array_equal(pixels, before), name
        assert name == "erase" or (result.dtype == np.uint8 and result.ndim == 3 and result.flags.writeable), name


def test_pasted_tiled_and_blended_images_are_there_whole():
    """Red among images of other colours: its share of the view, and the box that it fills."""
    red, other = np.full((40, 30, 3), (250, 0, 0), np.uint8), np.full((50, 50, 3), (0, 0, 90), np.uint8)
    data = SimpleNamespace(size=64, random_image=lambda rng: other)
    sides, tiles = [], set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        for name, parameters in (("paste", [0.3, 0.6]), ("collage", [])):
            view = OPS[name](red, rng, data, *parameters)
            mask = (view == (250, 0, 0)).all(2)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert view.shape == (64, 64, 3) and mask.sum() == height * width, (name, seed)
            if name == "paste":
                sides.append(np.sqrt(height * width) / 64)
                assert 0.7 < height / width < 1.4
            else:
                tiles.add((round(64 / (height + 2)), round(64 / (width + 2))))  # between gaps of 0 to 4
        share = OPS["blend"](red, rng, data, 0.4)[0, 0] / (250, 1, 90)
        assert 0.39 < share[0] <= 1 and share[0] + share[2] == pytest.approx(1, abs=0.02)
    assert 0.28 < min(sides) < 0.33 and 0.57 < max(sides) < 0.62
    assert tiles == {(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2)}
    OPS["collage"](red, rng, SimpleNamespace(size=1, random_image=lambda rng: other))  # no room for tiles


def test_perspective_is_torchvisions(img, pixels):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        dx, dy = rng.integers(0, 41, 4), rng.integers(0, 33, 4)
        moved = [[dx[0], dy[0]], [159 - dx[1], dy[1]], [159 - dx[2], 127 - dy[2]], [dx[3], 127 - dy[3]]]
        expected = TF.perspective(img, [[0, 0], [159, 0], [159, 127], [0, 127]], [[int(v) for v in xy] for xy in moved])
        ours = augmentations.random_perspective(pixels, np.random.default_rng(seed), 0.5)
        apart = np.abs(ours.astype(int) - np.asarray(expected)).max(2)
        assert (apart <= 1).mean() > 0.97, seed  # Pillow cuts off, OpenCV rounds; at the border OpenCV mixes with black


def test_text_is_auglys(img, pixels):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        style = dict(font_size=rng.uniform(0.1, 0.3), color=tuple(rng.integers(0, 256, 3).tolist()))
        x, y = rng.uniform(0, 0.5), rng.uniform(0, 0.5)
        expected = imaugs.overlay_text(img, text=rng.integers(1, 1000, 5).tolist(), x_pos=x, y_pos=y, **style)
        assert difference(augmentations.overlay_text(pixels, np.random.default_rng(seed)), expected) == (0, 0)


def test_text_has_the_lines_and_lengths_asked_for(pixels, monkeypatch):
    drawn = []
    monkeypatch.setattr(augmentations.ImageDraw, "Draw", lambda img: SimpleNamespace(
        text=lambda xy, text, color, font: drawn[-1].append((xy[1], len(text), font.path, font.size))))
    for seed in range(300):
        drawn.append([])
        OPS["text"](pixels, np.random.default_rng(seed), None, 5.0, 9.0, 2.0)
    assert {len(lines) for lines in drawn} == {1, 2}
    assert {length for lines in drawn for _, length, *_ in lines} == set(range(5, 10))
    assert len({font for lines in drawn for *_, font, _ in lines}) > 100
    for first, second in (lines for lines in drawn if len(lines) == 2):
        assert first[2] == second[2] and 0 <= second[0] - first[0] - second[3] < 1.01
    files = augmentations.fonts()
    assert len(files) == 363 and not any(name in path for path in files for name in ("Sky", "MyMusic"))


def test_emoji_are_auglys(img, pixels):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        names = sorted(os.listdir(augly.utils.SMILEY_EMOJI_DIR))
        path = os.path.join(augly.utils.SMILEY_EMOJI_DIR, names[rng.integers(len(names))])
        size, x, y = rng.uniform(0.1, 0.3), rng.uniform(0, 1), rng.uniform(0, 1)
        expected = imaugs.overlay_emoji(img, emoji_path=path, emoji_size=size, x_pos=x, y_pos=y)
        assert difference(augmentations.overlay_emoji(pixels, np.random.default_rng(seed)), expected) == (0, 0)


def test_screenshots_are_auglys_and_leave_the_template_clean(img, pixels):
    large, seen = img.resize((800, 640), Image.BICUBIC), set()
    for seed in (0, 1, 2, 3, 0):
        name = ("web.png", "mobile.png")[np.random.default_rng(seed).integers(2)]
        for image, limit in ((img, 1), (large, 5)):  # larger ones by another filter
            expected = imaugs.overlay_onto_screenshot(image, template_filepath=os.path.join(
                augly.utils.SCREENSHOT_TEMPLATES_DIR, name))
            found = augmentations.overlay_onto_screenshot(np.array(image), np.random.default_rng(seed))
            largest, mean = difference(found, expected)
            assert largest <= limit and mean < 0.3, (name, image.size, largest, mean)
            found[:] = 255  # as text and emoji may be
        seen.add(name)
    assert len(seen) == 2


def test_edges_are_enhanced_by_either_filter(img, pixels):
    found = [OPS["edge"](pixels, np.random.default_rng(seed), None) for seed in range(20)]
    expected = [img.filter(kind) for kind in (ImageFilter.EDGE_ENHANCE, ImageFilter.EDGE_ENHANCE_MORE)]
    counts = [sum(difference(x, y) == (0, 0) for x in found) for y in expected]
    assert sum(counts) == 20 and min(counts) > 2


@pytest.mark.parametrize("angle", [0.5, 20, 45, 90, 130, 179])
def test_turned_and_cropped_at_once_is_one_after_the_other(folder, angle):
    img = Image.open(folder / "0001.jpg")
    turned = imaugs.rotate(img, degrees=float(angle))
    part = LazyCrop(np.array(img)).turn(angle)
    assert np.abs(np.subtract(part.size, rotated_rect_with_max_area(512, 512, angle))).max() < 1
    assert np.abs(np.subtract(part.size, turned.size)).max() <= 1
    width, height = part.size
    box = width // 8, height // 5, width // 2, height // 2
    expected = TF.resized_crop(turned, box[1], box[0], box[3], box[2], [SIZE, SIZE])
    assert difference(part.crop(box, SIZE).pixels(), expected)[1] < 2  # up to half a pixel apart


def test_turned_photos_are_as_rough_as_auglys(pixels):
    """Neither smoother, as interpolation makes them, nor rougher."""
    for angle in (20, 45, 130):
        part = LazyCrop(pixels).turn(angle)
        ours = part.crop((0, 0, *part.size), SIZE).pixels()
        theirs = np.asarray(TF.resize(imaugs.rotate(Image.fromarray(pixels), degrees=float(angle)), [SIZE, SIZE]))
        roughness = [np.abs(np.diff(x.astype(int), axis=1)).mean() for x in (ours, theirs)]
        assert abs(roughness[0] / roughness[1] - 1) < 0.03, (angle, roughness)


def test_a_crop_of_an_image_is_torchvisions(img, pixels):
    box = 13, 7, 90, 101
    expected = TF.resized_crop(img, box[1], box[0], box[3], box[2], [SIZE, SIZE])
    largest, mean = difference(LazyCrop(pixels).crop(box, SIZE).pixels(), expected)
    assert largest <= 1 and mean < 0.3


def test_crops_cover_the_areas_and_ratios_asked_for():
    boxes = np.array([augmentations.crop_box((640, 480), np.random.default_rng(seed), 0.2) for seed in range(500)])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (left + width <= 640).all() and (top + height <= 480).all()
    area, ratio = width * height / (640 * 480), width / height
    assert 0.19 < area.min() < 0.23 and 0.95 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35


def test_the_same_draws_show_the_same_part_of_a_photo_decoded_small_or_whole(folder):
    small, whole = views_of(folder), views_of(folder, "full")
    scales, angles = set(), []
    for i in range(len(small)):
        plans = [[data.plan(image, 3, i, number) for number, image in enumerate(data.open(i))]
                 for data in (small, whole)]
        for (_, a, ops), (_, b, other_ops) in zip(*plans):
            assert (a.angle, a.box, a.side, ops) == (b.angle, b.box, b.side, other_ops)
            assert difference(a.pixels(), b.pixels())[1] < 4
            scales.add(a.image.pixels.shape[0] / a.image.size[1])
            assert b.image.pixels.shape[:2] == (512, 512)
            side = min(a.box[2:]) * a.image.pixels.shape[0] / 512
            assert a.image.pixels.shape[0] == 512 or side >= SIZE * (2 if a.angle else 1)
            angles += [a.angle]
    assert scales >= {0.5, 1} and 0 in angles and max(angles) > 90


def test_views_of_photos_decoded_small_look_like_those_of_whole_ones(folder):
    small, whole = views_of(folder), views_of(folder, "full")
    for i in range(len(small)):
        assert difference(small[(0, i)][0].pixels, whole[(0, i)][0].pixels)[1] < 4


def test_overlays_and_crops_as_in_the_notes(folder, monkeypatch):
    data, calls = views_of(folder), []
    monkeypatch.setattr(augmentations.imaugs, "overlay_image",
                        lambda below, **kwargs: calls.append((below, kwargs)) or below)
    for seed in range(200):
        image, before = data.open(0)[0], len(calls)
        part = OPS["overlay-crop"](LazyCrop(image), np.random.default_rng(seed), data, 0.15, 0.5, 0.3, 0.7, 0.4)
        assert part.size == (SIZE, SIZE) and (part.image is image) == (len(calls) == before)
        share = part.box[2] * part.box[3] / np.prod(augmentations.size_of(part.image))
        assert share > (0.69 if len(calls) > before else 0.14)
    assert 70 < len(calls) < 130
    size, opacity, x, y = (np.array([kwargs[name] for _, kwargs in calls]) for name in
                           ("overlay_size", "opacity", "x_pos", "y_pos"))
    assert 0.3 <= size.min() < 0.35 and 0.65 < size.max() <= 0.7
    assert 0.4 <= opacity.min() < 0.45 and 0.95 < opacity.max() <= 1
    assert (np.maximum(x, y) <= 1 - size).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2)])
def test_operations_on_odd_photos_fail_alone(tmp_path, size):
    """Each of them leaves a view behind, or the next image is taken; an overlay as large as memory is not made."""
    Image.effect_noise(size, 50).convert("RGB").save(tmp_path / "0.png")
    for i in range(1, 6):
        Image.effect_noise((300, 200), 50).convert("RGB").save(tmp_path / f"{i}.png")
    for name in OPS:
        op = ":".join(map(str, [name, *PARAMETERS.get(name, [])]))
        data = views_of(tmp_path, view0=f"perspective=0.5 {op}=1", view1="hflip")
        for epoch in range(3):
            images, labels, unreadable, failed = data[(epoch, 0)]
            assert images.pixels.shape == (2, SIZE, SIZE, 3) and labels == [len(unreadable)] * 2
            assert not unreadable


def test_what_opencv_cannot_turn_is_told(tmp_path, monkeypatch):
    Image.new("RGB", (400, 300)).save(tmp_path / "0.png")
    Image.new("RGB", (300, 200)).save(tmp_path / "1.png")
    turn = cv2.warpAffine

    def short_sides(pixels, *args, **kwargs):  # of OpenCV 4: up to 32,767 px
        if pixels.shape[1] > 300:
            raise cv2.error("dst.cols < SHRT_MAX")
        return turn(pixels, *args, **kwargs)

    monkeypatch.setattr(augmentations.cv2, "warpAffine", short_sides)
    _, labels, unreadable, _ = views_of(tmp_path, view0="rotation=1", view1="hflip")[(0, 0)]
    assert labels == [1, 1] and unreadable == [(str(tmp_path / "0.png"), "too long a side for OpenCV to turn it")]


def test_an_error_of_opencv_is_one_operations(folder, monkeypatch):
    def fail(pixels, rng, data):
        raise cv2.error("too long")
    monkeypatch.setitem(OPS, "gray", Augmentation("fails", fail))
    _, _, unreadable, failed = views_of(folder, view0="gray=1", view1="hflip")[(0, 0)]
    assert not unreadable and failed == ["gray: too long"]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def test_a_jpeg_is_decoded_as_small_as_all_who_look_at_it_allow(folder):
    for factors, expected in (((), 512), ((1.9,), 512), ((2,), 256), ((5, 3.9), 256), ((4, 9), 128), ((100,), 64)):
        for draft in (True, False):
            image = images.ImageFile(folder / "0000.jpg", draft=draft)
            for factor in factors:
                image.shrink(factor)
            assert image.size == (512, 512) and image.pixels.shape == (expected if draft else 512,) * 2 + (3,)


def test_both_decoders_give_the_same_pixels(folder, tmp_path, monkeypatch):
    pytest.importorskip("simplejpeg")
    img = Image.open(folder / "0000.jpg").crop((0, 0, 301, 203))
    img.save(tmp_path / "a.jpg"), img.save(tmp_path / "b.jpg", progressive=True, subsampling=0)
    img.convert("L").save(tmp_path / "c.jpg"), img.convert("CMYK").save(tmp_path / "d.jpg")
    img.save(tmp_path / "e.png")
    for factor in (1, 2):
        found = []
        for decoder in (images.simplejpeg, None):
            monkeypatch.setattr(images, "simplejpeg", decoder)
            for path in sorted(tmp_path.iterdir()):
                image = images.ImageFile(path)
                image.shrink(factor)
                found.append(image.pixels)
            monkeypatch.undo()
        for a, b in zip(found[:5], found[5:]):
            assert a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1


def test_broken_jpegs_are_told_and_turned_ones_turned(folder, tmp_path):
    data = (folder / "0000.jpg").read_bytes()
    for length in (0, 2, 300, len(data) // 2):
        (tmp_path / "cut.jpg").write_bytes(data[:length])
        with pytest.raises(images.UnreadableImage):
            images.ImageFile(tmp_path / "cut.jpg").pixels
    img = Image.open(folder / "0000.jpg").crop((0, 0, 300, 200))
    exif = img.getexif()
    exif[274] = 6
    img.save(tmp_path / "turned.jpg", exif=exif)
    for turn, size in ((False, (300, 200)), (True, (200, 300))):
        image = images.ImageFile(tmp_path / "turned.jpg", turn)
        assert image.size == size and image.pixels.shape == (*size[::-1], 3)
        assert np.array_equal(image.pixels, np.asarray(images.open_image(tmp_path / "turned.jpg", turn)))


def test_pillow_reads_what_the_fast_decoder_refuses(folder, monkeypatch):
    pytest.importorskip("simplejpeg")

    def refuse(*args, **kwargs):
        raise ValueError

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", refuse)
    image = images.ImageFile(folder / "0000.jpg")
    image.shrink(2)
    assert image.pixels.shape == (256, 256, 3)


def test_whole_photos_are_decoded_small_and_stay_the_same(folder):
    found = []
    for decode in ("draft", "full"):
        data = WholeImages([str(folder / "0000.jpg"), str(folder / "no.jpg")], preprocessing(decode))
        i, images, reason = data[0]
        assert i == 0 and images.pixels.shape == (1, SIZE, SIZE, 3) and reason is None and "No such file" in data[1][2]
        found.append(images.pixels)
    assert 0 < difference(*found)[1] < 2


@pytest.mark.parametrize("text, message", [
    ("crop", "'crop' is not crop:area,p, each as key=number"), ("text:1:2:3:4", "'text:1:2:3:4' is not text:fewest"),
    ("jitter:hue=1,p=1", "is not jitter:brightness,contrast,saturation,hue,p"),
    ("crop:area", "'crop:area' is not crop"),
    ("crop:area=x", "'crop:area=x' is not"), ("hflip:p=2", "p from 0 to 1"), ("crop:area=1,area=1", "is not crop:area"),
    ("hflip:q=1", "'hflip:q=1' is not hflip:p"), ("sparkle:p=1", "unknown augmentation 'sparkle'")])
def test_wrong_parameters_are_told(text, message):
    with pytest.raises(InputError, match=f"--view1: .*{message}"):
        parse_ops(text, 0.2, "--view1")


def test_views_of_older_checkpoints_are_read():
    """name:value:value=probability, as recipes had it before the keys."""
    old = "rotation=0.2 overlay-crop:0.25:0.25:0.35:0.8:0.6=1 [jitter:0.5:0.5:0.5:0.15=0.6 text:4:12:3 hflip] erase"
    new = ("rotation:p=0.2 overlay-crop:area=0.25,overlay=0.25,low=0.35,high=0.8,opacity=0.6,p=1 [jitter:hue=0.15,"
           "brightness=0.5,contrast=0.5,saturation=0.5,p=0.6 text:fewest=4,most=12,lines=3 hflip] erase")
    assert parse_ops(old, 0.1) == parse_ops(new, 0.1) == [
        [("rotation", (), 0.2)], [("overlay-crop", (0.25, 0.25, 0.35, 0.8, 0.6), 1.0)],
        [("jitter", (0.5, 0.5, 0.5, 0.15), 0.6), ("text", (4.0, 12.0, 3.0), 0.1), ("hflip", (), 0.1)],
        [("erase", (), 0.1)]]


def test_the_list_of_augmentations_names_all_with_their_keys():
    lines = list_augmentations().splitlines()
    assert [line.partition(":")[0] for line in lines[::2]] == list(OPS) and all(line.strip() for line in lines)
    assert "overlay-crop:area,overlay,low,high,opacity" in lines and "text:fewest=,most=,lines=1" in lines


def test_erasing_comes_last():
    assert parse_ops("[hflip gray] erase", 0.2)[1] == [("erase", (), 0.2)]
    for text in ("erase hflip", "hflip [gray erase]", "erase erase"):
        with pytest.raises(InputError, match="--view1: 'erase' must come last"):
            parse_ops(text, 0.2, "--view1")


def test_tensors_are_torchvisions_and_hold_the_noise_of_erased_parts():
    """Against ToTensor, RandomErasing's assignment and Normalize, view after view."""
    rng, mean, std = np.random.default_rng(0), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    items, expected = [], {}
    for i in range(3):
        made = [(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), erased and augmentations.erased_part(SIZE, rng))
                for erased in (i % 2 == 0, i == 1)]
        items.append((Images.of(made, mean, std), [i, i], [], []))
        for j, (pixels, erased) in enumerate(made):
            tensor = TF.to_tensor(pixels)
            if erased:
                top, left, noise = erased
                tensor[:, top:top + noise.shape[1], left:left + noise.shape[2]] = torch.from_numpy(noise)
            expected[j, i] = TF.normalize(tensor, mean, std)
    images, labels, _, _ = collate_views(items)
    found = images.to("cpu")
    assert len(images) == 6 and len(images.boxes) == 3 and labels.tolist() == [0, 1, 2] * 2
    assert torch.allclose(found, torch.stack([expected[key] for key in sorted(expected)]), atol=1e-5)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)


class Numbers(torch.utils.data.Dataset):
    """Item i -> two views of the colours i and 2 i."""

    def __getitem__(self, i):
        pixels = [(np.full((SIZE, SIZE, 3), (i, 2 * i)[j], np.uint8), None) for j in range(2)]
        return Images.of(pixels, (0.5,) * 3, (0.5,) * 3), [i, i], [], []


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_in_memory_that_is_used_again_hold_until_the_next(workers):
    batches = [list(range(i, i + 5)) for i in range(0, 100, 5)]
    loader = make_loader(Numbers(), batches, collate_views, workers, Rank(), (2, 5, SIZE, SIZE, 3))
    places = set()
    for batch, (made, labels, *_) in zip(batches, loader):
        time.sleep(0.02)  # time to write over it
        assert labels.tolist() == batch * 2
        assert (made.pixels == (labels * torch.tensor([1, 2]).repeat_interleave(5))[:, None, None, None]).all()
        places.add(made.pixels.data_ptr() - loader.collate_fn.memory.data_ptr())
    size = made.pixels.numel()
    assert places == {i * size for i in range(workers * (PREFETCHED + 1))}


def test_an_overlay_needs_no_limit_of_pillows(monkeypatch):
    """Programs that import this package may have switched off Pillow's limit on pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    below, above = Image.new("RGB", (64, 64)), Image.new("RGB", (32, 32), "white")
    assert augmentations.overlay(below, above, 0.5, opacity=1.0, x_pos=0.0, y_pos=0.0).getpixel((5, 5)) == (255,) * 3
