"""Augmentations: operations on the pixels of one image, in the table OPS by the name that --view0 and --view1 use.

Every random choice comes from the generator that an operation is given, never from a global one. Distributions: notes
v8..v86, augly 0.1.2, torchvision 0.10.
"""
from __future__ import annotations

import functools
import inspect
import math
import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import augly.image as imaugs
import augly.utils
import cv2
import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from augly.image.utils import get_template_and_bbox, rotated_rect_with_max_area
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from copydet.images import ImageFile, through_jpeg
from copydet.regions import WHOLE, Box

LONGEST = 4  # times the shorter side, of what --resize short makes
COLLAGES = ((1, 2), (2, 1), (2, 2), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2))  # rows, columns
EDGE_FILTERS = (ImageFilter.EDGE_ENHANCE, ImageFilter.EDGE_ENHANCE_MORE)


class Training(Protocol):
    """What an augmentation may ask of the data set: side of a view in px, an entry of RESIZES, another image."""
    size: int
    resize: Callable

    def random_image(self, rng: np.random.Generator) -> np.ndarray: ...


def size_of(img: np.ndarray | ImageFile | LazyCrop) -> tuple[int, ...]:
    """(width, height) of pixels, an image or a LazyCrop"""
    return img.shape[1::-1] if isinstance(img, np.ndarray) else img.size


class LazyCrop:
    """What a view shows of an image: the image turned, then a box of it resized to a square, or all of it; in one go
    and only when the pixels are asked for, so that the image is decoded no larger than its views need it."""

    def __init__(self, image: np.ndarray | ImageFile) -> None:
        self.image, self.angle = image, 0.0
        self.box: tuple | None = None  # left, top, width, height
        self.side = 0  # 0: as it is
        self.resize: Callable | None = None
        self.size = self.frame = size_of(image)  # of the pixels; of what the box is cut from

    @classmethod
    def of(cls, img: np.ndarray | ImageFile | LazyCrop) -> LazyCrop:
        """The same, or all of pixels or an image."""
        return img if isinstance(img, LazyCrop) else cls(img)

    def turn(self, degrees: float) -> LazyCrop:
        """Counter-clockwise, cut to the largest upright rectangle without background, as augly does."""
        if self.angle or self.side:
            return LazyCrop(self.pixels()).turn(degrees)
        self.angle = degrees
        self.size = self.frame = tuple(max(1, int(side)) for side in rotated_rect_with_max_area(*self.size, degrees))
        return self

    def crop(self, box: tuple, side: int) -> LazyCrop:
        """Box (left, top, width, height) resized to a square of `side`, all in pixels."""
        if self.side:
            return LazyCrop(self.pixels()).crop(box, side)
        self.box, self.side, self.size = box, side, (side, side)
        return self

    def part(self, region: Box) -> LazyCrop:
        """Region (left, top, right, bottom) of an image as it is, in fractions of its sides."""
        (left, top, right, bottom), (width, height) = region, self.size
        if region != WHOLE:  # else no pixel is lost by rounding
            self.box = left * width, top * height, (right - left) * width, (bottom - top) * height
        return self

    def whole(self, resize: Callable, side: int) -> LazyCrop:
        """All of it, made a square of `side` pixels by an entry of RESIZES."""
        if self.angle or self.side:
            return LazyCrop(self.pixels()).whole(resize, side)
        self.resize, self.side, self.size = resize, side, (side, side)
        return self

    def shrink(self) -> float:
        """How many times smaller the image may be; turning does not interpolate, so then it is twice as large."""
        if self.resize:
            return min(self.box[2:] if self.box else self.frame) / (self.side + 32)  # what --resize crop needs
        return min(self.box[2:]) / self.side / (2 if self.angle else 1) if self.box else 1

    def pixels(self) -> np.ndarray:
        """uint8 [h, w, 3]"""
        if isinstance(self.image, ImageFile):
            self.image.shrink(self.shrink())
        pixels = self.image.pixels if isinstance(self.image, ImageFile) else self.image
        scale = pixels.shape[1] / size_of(self.image)[0]
        left, top, width, height = (scale * value for value in self.box or (0, 0, *self.frame))
        width, height = max(1, round(width)), max(1, round(height))
        if self.resize:
            if self.box:
                left, top = min(round(left), pixels.shape[1] - 1), min(round(top), pixels.shape[0] - 1)
                pixels = pixels[top:top + height, left:left + width]
            return self.resize(torch.from_numpy(pixels).permute(2, 0, 1), self.side).permute(1, 2, 0).numpy()
        if self.angle:
            x, y = left - scale * self.frame[0] / 2, top - scale * self.frame[1] / 2  # from the middle of the image
            cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
            x, y = cos * x - sin * y + pixels.shape[1] / 2, sin * x + cos * y + pixels.shape[0] / 2
            matrix = from_corner(np.array([[cos, -sin, x], [sin, cos, y], [0, 0, 1]]))[:2]
            pixels = cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
                                    borderMode=cv2.BORDER_REPLICATE)  # AugLy's rotated queries are as rough
        elif self.box:
            left, top = round(left), round(top)
            pixels = pixels[top:top + height, left:left + width]
        return resize(pixels, self.side, self.side) if self.side else pixels


def crop_box(size: tuple[int, ...], rng: np.random.Generator, smallest: float) -> tuple[int, int, int, int]:
    """Box (left, top, width, height) of `smallest`..1 of the area of an image of size (width, height) at aspect ratio
    3/4..4/3; the torchvision one."""
    full_width, full_height = size
    for _ in range(10):
        area = full_width * full_height * rng.uniform(smallest, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= full_width and 0 < h <= full_height:
            top, left = rng.integers(full_height - h + 1), rng.integers(full_width - w + 1)
            return int(left), int(top), w, h
    w, h = min(full_width, round(full_height * 4 / 3)), min(full_height, round(full_width * 4 / 3))
    return (full_width - w) // 2, (full_height - h) // 2, w, h


def resize(pixels: np.ndarray, height: int, width: int, mode: str = "bilinear") -> np.ndarray:
    """uint8 [h, w, 3] -> [height, width, 3] with antialiasing, as Pillow does to within a level, but vectorised."""
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # channels last, which is the fast path
    image = torch.nn.functional.interpolate(image, (height, width), mode=mode, antialias=True)
    return image.permute(0, 2, 3, 1)[0].numpy()


def on_pillow(op: Callable) -> Callable:
    """An operation on Pillow images, for pixels."""
    @functools.wraps(op)
    def on_pixels(pixels: np.ndarray, *args: Any) -> np.ndarray:
        return np.array(op(Image.fromarray(pixels), *args))
    return on_pixels


enhance_edges = on_pillow(Image.Image.filter)


def gray(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def pixelize(pixels: np.ndarray, ratio: float) -> np.ndarray:
    """Reduced to `ratio` of its size and back."""
    height, width, _ = pixels.shape
    return resize(resize(pixels, int(height * ratio), int(width * ratio), "bicubic"), height, width, "bicubic")


def blur(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of standard deviation `radius`, in pixels. A wide one is done on the image reduced by 2 or 4, less
    the variance that reducing (box) and enlarging (triangle) add."""
    height, width, _ = pixels.shape
    factor = next(f for f in (4, 2, 1) if radius >= f and height % f == width % f == 0) if radius >= 1 else 1
    if factor > 1:
        pixels = cv2.resize(pixels, (width // factor, height // factor), interpolation=cv2.INTER_AREA)
        radius = math.sqrt(radius ** 2 - (factor ** 2 - 1) / 12 - factor ** 2 / 6) / factor
    pixels = cv2.GaussianBlur(pixels, (0, 0), radius, borderType=cv2.BORDER_REPLICATE)
    return resize(pixels, height, width) if factor > 1 else pixels


def color_jitter(pixels: np.ndarray, rng: np.random.Generator, brightness: float, contrast: float, saturation: float,
                 hue: float) -> np.ndarray:
    """Brightness, contrast and saturation by a factor of 1 +- strength, hue by +- strength turns, in random order."""
    steps = [(adjust_brightness, rng.uniform(max(0, 1 - brightness), 1 + brightness)),
             (adjust_contrast, rng.uniform(max(0, 1 - contrast), 1 + contrast)),
             (adjust_saturation, rng.uniform(max(0, 1 - saturation), 1 + saturation)),
             (adjust_hue, rng.uniform(-hue, hue))]
    for i in rng.permutation(4):
        pixels = steps[i][0](pixels, steps[i][1])
    return pixels


def blend(pixels: np.ndarray, other: np.ndarray, factor: float) -> np.ndarray:
    """other + factor * (pixels - other), clipped and cut to whole levels as Pillow does; OpenCV rounds them."""
    return cv2.addWeighted(pixels, factor, other, 1 - factor, -0.49)


def adjust_brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return blend(pixels, np.zeros_like(pixels), factor)


def adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    mean = cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0]
    return blend(pixels, np.full_like(pixels, int(mean + 0.5)), factor)


def adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    return blend(pixels, gray(pixels), factor)


def adjust_hue(pixels: np.ndarray, turns: float) -> np.ndarray:
    """Shift the hue of the HSV colour, in steps of 1/255 turn as torchvision does."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(255 * turns) % 256)  # goes around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def shuffle_pixels(pixels: np.ndarray, rng: np.random.Generator, fraction: float) -> np.ndarray:
    """Permute a `fraction` of the pixels among themselves. AugLy's does it after seeding numpy with the constant 10."""
    flat = pixels.reshape(-1, 3).copy()
    chosen = rng.choice(len(flat), int(fraction * len(flat)), replace=False)
    flat[chosen] = flat[rng.permutation(chosen)]
    return flat.reshape(pixels.shape)


def random_perspective(pixels: np.ndarray, rng: np.random.Generator, distortion: float) -> np.ndarray:
    """Each corner moves inwards by up to `distortion` of half the side; uncovered pixels are black."""
    (h, w), d = pixels.shape[:2], distortion / 2
    dx, dy = rng.integers(0, int(w * d) + 1, 4), rng.integers(0, int(h * d) + 1, 4)
    corners = np.array([[0, 0], [w - 1, 0], [w - 1, h - 1], [0, h - 1]], np.float32)
    moved = (corners + np.stack([dx, dy], 1) * [[1, 1], [-1, 1], [-1, -1], [1, -1]]).astype(np.float32)
    matrix = from_corner(cv2.getPerspectiveTransform(moved, corners))
    return cv2.warpPerspective(pixels, matrix, (w, h), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def from_corner(matrix: np.ndarray) -> np.ndarray:
    """A map between places counted from the corner of the first pixel, as Pillow does, for OpenCV, which counts from
    its middle; 3 x 3, homogeneous."""
    to_corner = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    return np.linalg.inv(to_corner) @ matrix @ to_corner


@on_pillow
def overlay_text(img: Image.Image, rng: np.random.Generator, fewest: float | None = None, most: float | None = None,
                 lines: float = 1) -> Image.Image:
    """Five characters of augly's default font (notes v8); with `fewest` and `most`, that many of a random font's own
    characters in each of 1..`lines` lines (v48, v50). Random colour, starting in the upper left quarter."""
    size, color = rng.uniform(0.1, 0.3), tuple(rng.integers(0, 256, 3).tolist())
    x, y = rng.uniform(0, 0.5) * img.width, rng.uniform(0, 0.5)
    if fewest is None:
        file, texts = augly.utils.FONT_PATH, [rng.integers(1, 1000, 5)]
    else:
        file = fonts()[rng.integers(len(fonts()))]
        texts = [rng.integers(0, 2**31, rng.integers(int(fewest), int(most or fewest) + 1))
                 for _ in range(rng.integers(1, int(lines) + 1))]
    chars, draw = characters(file), ImageDraw.Draw(img)
    for line, text in enumerate(texts):
        letters = "".join(chr(chars[c % len(chars)]) for c in text)
        draw.text((x, (y + line * size) * img.height), letters, color, font(file, int(min(img.size) * size)))
    return img


@functools.cache
def fonts() -> list[str]:
    """Files of augly's fonts but for two that cannot be used (notes v48)."""
    names = Path(augly.utils.FONT_LIST_PATH).read_text(encoding="utf-8").split()
    names = sorted(Path(name).name for name in names if not re.search("TypeMyMusic|PainttheSky-Regular", name))
    return [os.path.join(augly.utils.FONTS_DIR, name) for name in names]


@functools.lru_cache(256)
def font(file: str, size: int) -> ImageFont.FreeTypeFont:
    """Of `size` pixels."""
    return ImageFont.truetype(file, size)


@functools.cache
def characters(file: str) -> list[int]:
    """Code points of a font's characters, which augly keeps beside it."""
    return pickle.loads(Path(file).with_suffix(".pkl").read_bytes())


@functools.cache
def emoji() -> list[Image.Image]:
    """AugLy's smileys, RGBA."""
    folder = Path(augly.utils.SMILEY_EMOJI_DIR)
    return [Image.open(folder / name).convert("RGBA") for name in sorted(os.listdir(folder))]


@on_pillow
def overlay_emoji(img: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random smiley of 0.1..0.3 of the height, anywhere, possibly in part beyond the edge."""
    smiley = emoji()[rng.integers(len(emoji()))]
    height = max(1, int(img.height * rng.uniform(0.1, 0.3)))
    smiley = smiley.resize((int(smiley.width * height / smiley.height), height), Image.Resampling.NEAREST)
    img.paste(smiley, (int(img.width * rng.uniform(0, 1)), int(img.height * rng.uniform(0, 1))), smiley)
    return img


@functools.cache
def screenshot(name: str) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Template of a web page or a telephone with the box (left, top, right, bottom) for the image."""
    template, box = get_template_and_bbox(os.path.join(augly.utils.SCREENSHOT_TEMPLATES_DIR, name),
                                          augly.utils.BBOXES_PATH)
    return np.array(template.convert("RGB")), box


def overlay_onto_screenshot(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image, as large as fits, on black in the middle of the template's box (AugLy reduces by Lanczos' filter)."""
    template, (left, top, right, bottom) = screenshot(("web.png", "mobile.png")[rng.integers(2)])
    factor = min((right - left) / pixels.shape[1], (bottom - top) / pixels.shape[0])
    height, width = (max(1, int(side * factor)) for side in pixels.shape[:2])
    template = template.copy()
    template[top:bottom, left:right] = 0
    top, left = (top + bottom - height) // 2, (left + right - width) // 2
    template[top:top + height, left:left + width] = resize(
        pixels, height, width, "bicubic" if factor < 1 else "bilinear")
    return template


@on_pillow
def overlay_onto_image(img: Image.Image, rng: np.random.Generator, views: Training) -> Image.Image:
    """Paste the image onto another training image, 0.1..0.5 of its height (notes v32)."""
    below = Image.fromarray(views.random_image(rng))
    return overlay(below, img, overlay_size=rng.uniform(0.1, 0.5), x_pos=rng.uniform(0, 0.5), y_pos=rng.uniform(0, 0.5))


def overlay_and_crop(img: np.ndarray | LazyCrop, rng: np.random.Generator, views: Training, smallest: float,
                     prob: float, low: float, high: float, opacity: float) -> LazyCrop:
    """With `prob` one of the image and another training image is pasted into the other: `low`..`high` of its height,
    opacity from `opacity` up; then a crop of at least 0.7. Otherwise a crop of at least `smallest` (notes v79)."""
    if rng.random() >= prob:
        return LazyCrop.of(img).crop(crop_box(size_of(img), rng, smallest), views.size)
    images = [Image.fromarray(pixels) for pixels in (LazyCrop.of(img).pixels(), views.random_image(rng))]
    below, above = images if rng.random() < 0.5 else images[::-1]
    size = rng.uniform(low, high)
    both = overlay(below, above, opacity=rng.uniform(opacity, 1), overlay_size=size,
                   x_pos=rng.uniform(0, 1 - size), y_pos=rng.uniform(0, 1 - size))
    return LazyCrop(np.array(both)).crop(crop_box(both.size, rng, 0.7), views.size)


def overlay(below: Image.Image, above: Image.Image, overlay_size: float, **place: float) -> Image.Image:
    """AugLy's; size and place are fractions of the image `below`. Raises ValueError where it would make a huge picture
    of a long image `above` first."""
    pixels = (overlay_size * below.height) ** 2 * above.width / above.height
    if pixels > (Image.MAX_IMAGE_PIXELS or math.inf):  # other programs set it to None
        raise ValueError(f"an overlay of {pixels:,.0f} pixels")
    return imaugs.overlay_image(below, overlay=above, overlay_size=overlay_size, **place)


def part_of_another(rng: np.random.Generator, views: Training, height: int, width: int) -> np.ndarray:
    """A crop of at least 0.3 of another training image, made height x width."""
    pixels = views.random_image(rng)
    left, top, w, h = crop_box(size_of(pixels), rng, 0.3)
    return resize(pixels[top:top + h, left:left + w], height, width)


def canvas(rng: np.random.Generator, views: Training) -> np.ndarray:
    """A square of a view's side: another training image, or one colour, which is often a grey."""
    if rng.random() < 0.65:
        return part_of_another(rng, views, views.size, views.size)
    colour = rng.integers(0, 256, 3) if rng.random() < 0.5 else rng.choice((0, 30, 240, 255))
    return np.full((views.size, views.size, 3), colour, np.uint8)


def paste(pixels: np.ndarray, rng: np.random.Generator, views: Training, low: float, high: float) -> np.ndarray:
    """Onto a canvas, at `low`..`high` of its side and an aspect ratio of 3/4..4/3, anywhere inside."""
    below, side = canvas(rng, views), views.size
    size, ratio = side * rng.uniform(low, high), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)) / 2)
    height, width = (min(side, max(1, round(value))) for value in (size * ratio, size / ratio))
    top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
    below[top:top + height, left:left + width] = resize(pixels, height, width)
    return below


def collage(pixels: np.ndarray, rng: np.random.Generator, views: Training) -> np.ndarray:
    """One of two to six tiles on a canvas, the others show other training images."""
    below, side = canvas(rng, views), views.size
    rows, columns = COLLAGES[rng.integers(len(COLLAGES))]
    gap, own = int(rng.integers(0, side // 32 + 1)), rng.integers(rows * columns)
    for tile in range(rows * columns):
        (top, bottom), (left, right) = ((side * i // n + gap, side * (i + 1) // n - gap)
                                        for i, n in zip(divmod(tile, columns), (rows, columns)))
        if top < bottom and left < right:
            below[top:bottom, left:right] = resize(pixels, bottom - top, right - left) if tile == own else \
                part_of_another(rng, views, bottom - top, right - left)
    return below


def blend_with_another(pixels: np.ndarray, rng: np.random.Generator, views: Training, low: float) -> np.ndarray:
    return blend(pixels, part_of_another(rng, views, *pixels.shape[:2]), rng.uniform(low, 1))


def erased_part(side: int, rng: np.random.Generator) -> tuple[int, int, np.ndarray] | None:
    """A rectangle of 0.02..0.33 of a square's area, ratio 0.3..3.3, that becomes N(0, 1) noise before normalisation:
    (top, left, float32 [3, h, w]), or None where ten attempts do not fit."""
    for _ in range(10):
        area, ratio = side ** 2 * rng.uniform(0.02, 0.33), math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < side and 0 < w < side:
            top, left = rng.integers(side - h + 1), rng.integers(side - w + 1)
            return int(top), int(left), rng.standard_normal((3, h, w), dtype=np.float32)
    return None


# name -> whole image, uint8 tensor [3, h, w], to a square of a size, for extraction and the `clean` view
def shorter_side(sides: Sequence[int], size: int) -> list[int]:
    """Sides of an image whose shorter one is made `size`, the longer one LONGEST times that at most."""
    return [min(int(size * side / min(sides)), LONGEST * size) for side in sides]


RESIZES: dict[str, Callable] = {
    "crop": lambda img, s: TF.center_crop(TF.resize(img, s + 32), [s, s]),  # notes v3..v51
    "square": lambda img, s: TF.resize(img, [s, s]),  # notes v52 and later
    "short": lambda img, s: TF.resize(img, shorter_side(img.shape[-2:], s)),  # extraction only
}


@dataclass(frozen=True)
class Augmentation:
    """(pixels uint8 [h, w, 3], numpy Generator, Training, parameters...) -> new pixels; what it does, in a line."""
    meaning: str
    apply: Callable

    def __call__(self, *args: Any) -> Any:
        return self.apply(*args)

    @property
    def parameters(self) -> dict[str, object]:
        """Name -> default, or inspect.Parameter.empty where a value has to be given."""
        return {name: p.default for name, p in list(inspect.signature(self.apply).parameters.items())[3:]}


OPS = {  # name -> augmentation; --list-augmentations prints this table
    "clean": Augmentation("the whole image, as --resize makes it a square",
                          lambda img, rng, v: LazyCrop.of(img).whole(v.resize, v.size)),
    "crop": Augmentation("a crop of at least the fraction `area`, made a square",
                         lambda img, rng, v, area: LazyCrop.of(img).crop(crop_box(size_of(img), rng, area), v.size)),
    "overlay-crop": Augmentation(
        "with probability `overlay` the image and another one are pasted into each other, `low`..`high` of the height, "
        "from `opacity` up; then a crop of 0.7 or more, else of `area` or more",
        lambda img, rng, v, area, overlay, low, high, opacity: overlay_and_crop(
            img, rng, v, area, overlay, low, high, opacity)),
    "jitter": Augmentation("brightness, contrast, saturation by factors of 1 +- each, hue by +- turns, in random order",
                           lambda img, rng, v, brightness, contrast, saturation, hue: color_jitter(
                               img, rng, brightness, contrast, saturation, hue)),
    "saturation": Augmentation("saturation times `factor`", lambda img, rng, v, factor: adjust_saturation(img, factor)),
    "brightness": Augmentation("brightness times `low`..`high`",
                               lambda img, rng, v, low, high: adjust_brightness(img, rng.uniform(low, high))),
    "pixelize": Augmentation("reduced to 0.1..1 of the side and enlarged again",
                             lambda img, rng, v: pixelize(img, max(rng.uniform(0.1, 1), 1 / min(img.shape[:2])))),
    "shuffle": Augmentation("a tenth of the pixels change places", lambda img, rng, v: shuffle_pixels(img, rng, 0.1)),
    "jpeg": Augmentation("JPEG of quality 10, 20, 30 or 50",
                         lambda img, rng, v: through_jpeg(img, int(rng.choice([10, 20, 30, 50])))),
    "gray": Augmentation("without colour", lambda img, rng, v: gray(img)),
    "blur": Augmentation("Gaussian blur, radius 0.01..10 px", lambda img, rng, v: blur(img, rng.uniform(0.01, 10))),
    "gaussian": Augmentation("Gaussian blur, radius 0.1..2 px", lambda img, rng, v: blur(img, rng.uniform(0.1, 2))),
    "perspective": Augmentation("each corner moves inwards by up to a quarter of the side",
                                lambda img, rng, v: random_perspective(img, rng, 0.5)),
    "hflip": Augmentation("left and right change places", lambda img, rng, v: cv2.flip(img, 1)),
    "vflip": Augmentation("top and bottom change places", lambda img, rng, v: cv2.flip(img, 0)),
    "rotation": Augmentation("turned by 0..180 degrees, cut to the largest upright rectangle",
                             lambda img, rng, v: LazyCrop.of(img).turn(rng.uniform(0, 180))),
    "edge": Augmentation("edges enhanced", lambda img, rng, v: enhance_edges(img, EDGE_FILTERS[rng.integers(2)])),
    "text": Augmentation("five characters of one font; with `fewest` and `most`, that many of a random font in each of "
                         "1..`lines` lines",
                         lambda img, rng, v, fewest=None, most=None, lines=1: overlay_text(
                             img, rng, fewest, most, lines)),
    "emoji": Augmentation("a smiley of 0.1..0.3 of the height", lambda img, rng, v: overlay_emoji(img, rng)),
    "screenshot": Augmentation("inside the screenshot of a web page or a telephone",
                               lambda img, rng, v: overlay_onto_screenshot(img, rng)),
    "overlay": Augmentation("pasted onto another image, 0.1..0.5 of its height",
                            lambda img, rng, v: overlay_onto_image(img, rng, v)),
    "paste": Augmentation("pasted onto another image or a colour, `low`..`high` of the view's side", paste),
    "collage": Augmentation("one of two to six tiles, beside other images", collage),
    "blend": Augmentation("mixed with another image, its own part `low`..1", blend_with_another),
    "erase": Augmentation("a rectangle of 0.02..0.33 of the area becomes noise; comes last",  # no colour: see Images
                          lambda img, rng, v: erased_part(v.size, rng)),
}
GEOMETRY = ("rotation", "crop", "overlay-crop", "clean")  # first in a view they come before the image is decoded
