"""Edits that make a copy of an image, from AugLy and Pillow: for benchmarks and calibration.

They are other code than training's operations (augmentations.py), and are drawn with other amounts.
"""
from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from augly import utils as augly_utils
from augly.image import functional as imaugs
from augly.image.utils import get_template_and_bbox
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, ImageStat

from copydet.common import ProcessesApart
from copydet.images import UnreadableImage, open_image

LARGEST = 1024  # pixels, longer side of a query
DULL = 8  # standard deviation of grey levels (0..255) below which an image shows almost nothing
DONORS = 4  # other images that one query can need: three in a collage, one blended in

Donors = Iterator[Image.Image]  # other images, RGB, without end
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class Edit(NamedTuple):
    """One kind of edit: `apply(image, amount, generator, donors)` returns the edited image."""
    group: str
    apply: Callable[[Image.Image, float, np.random.Generator, Donors], Image.Image]
    amount: str = ""  # what the amount is; it is drawn uniformly from the range of the chosen strength
    mild: tuple[float, float] | tuple[()] = ()
    medium: tuple[float, float] | tuple[()] = ()
    hard: tuple[float, float] | tuple[()] = ()


# ---------------------------------------------------------------------------------------------------------------------
# Edits. Every random choice comes from the generator given, never from a global one. AugLy's perspective, noise and
# pixel shuffling are not used: the first does not run on numpy 2, the others seed numpy's global generator.


def crop(img: Image.Image, area: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Cut out `area` of the image at a ratio near its own; where possible a part that shows something."""
    for _ in range(10):
        stretch = math.sqrt(math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))))
        w = min(img.width, round(img.width * math.sqrt(area) * stretch))
        h = min(img.height, round(img.height * math.sqrt(area) / stretch))
        left, top = int(rng.integers(img.width - w + 1)), int(rng.integers(img.height - h + 1))
        part = img.crop((left, top, left + w, top + h))
        if contrast(part) >= 2 * DULL:
            break
    return part


def change_aspect(img: Image.Image, stretch: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    factor = math.sqrt(stretch) ** rng.choice([-1, 1])
    return img.resize((round(img.width * factor), round(img.height / factor)), Image.Resampling.BICUBIC)


def rotate(img: Image.Image, degrees: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Rotate and keep the largest upright rectangle without empty corners."""
    return imaugs.rotate(img, degrees=float(degrees * rng.choice([-1, 1])))


def perspective(img: Image.Image, shift: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Move each corner inwards by up to `shift` of the side; the outside gets a random colour."""
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
    moved = corners + rng.uniform(shift / 3, shift, (4, 2)) * (1 - 2 * corners)
    rows = [row for (x, y), (u, v) in zip(corners * img.size, moved * img.size)
            for row in ([u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v])]
    coefficients = np.linalg.solve(rows, (corners * img.size).ravel())
    return img.transform(img.size, Image.Transform.PERSPECTIVE, coefficients.tolist(), Image.Resampling.BICUBIC,
                         fillcolor=random_color(rng))


def jitter_color(img: Image.Image, strength: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Brightness, contrast and saturation by factors of 1 +- strength, hue by +- strength / 4 of the circle."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    img = imaugs.color_jitter(img, brightness_factor=brightness, contrast_factor=contrast, saturation_factor=saturation)
    hue, s, v = img.convert("HSV").split()
    turn = round(256 * rng.uniform(-strength, strength) / 4)
    return Image.merge("HSV", (hue.point(lambda h: (h + turn) % 256), s, v)).convert("RGB")


def change_brightness(img: Image.Image, factor: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    return ImageEnhance.Brightness(img).enhance(factor ** rng.choice([-1, 1]))


def apply_filter(img: Image.Image, fraction: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Blend in a filtered image: sharpened, edges, relief, few colours, inverted lights or stretched contrast."""
    filters = [lambda: img.filter(ImageFilter.UnsharpMask(4, 300, 0)),
               lambda: img.filter(ImageFilter.EDGE_ENHANCE_MORE),
               lambda: ImageOps.invert(img.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB"),
               lambda: img.filter(ImageFilter.EMBOSS),
               lambda: ImageOps.posterize(img, 2),
               lambda: ImageOps.solarize(img, 128),
               lambda: ImageOps.equalize(img)]
    return Image.blend(img, filters[rng.integers(len(filters))](), fraction)


def blur(img: Image.Image, fraction: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    return imaugs.blur(img, radius=fraction * min(img.size))


def pixelize(img: Image.Image, ratio: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    return imaugs.pixelization(img, ratio=max(ratio, 8 / min(img.size)))


def add_noise(img: Image.Image, sigma: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    noise = rng.normal(0, 255 * sigma, (img.height, img.width, 3))
    return Image.fromarray((np.asarray(img) + noise).clip(0, 255).astype(np.uint8))


def shuffle_pixels(img: Image.Image, fraction: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Permute a fraction of the pixels among themselves."""
    pixels = np.array(img).reshape(-1, 3)
    chosen = rng.choice(len(pixels), int(fraction * len(pixels)), replace=False)
    pixels[chosen] = pixels[rng.permutation(chosen)]
    return Image.fromarray(pixels.reshape(img.height, img.width, 3))


def overlay_text(img: Image.Image, size: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Write one to three lines of random letters of a random font of AugLy; its default font where that one fails."""
    fonts = sorted(Path(augly_utils.FONTS_DIR).rglob("*.ttf"))
    text = [rng.integers(1, 1000, rng.integers(4, 13)).tolist() for _ in range(rng.integers(1, 4))]
    options = dict(text=text, font_size=max(size, 10 / min(img.size)), color=random_color(rng),
                   x_pos=rng.uniform(0, 0.4), y_pos=rng.uniform(0, 0.7))
    try:
        return imaugs.overlay_text(img, font_file=str(fonts[rng.integers(len(fonts))]), **options)
    except (OSError, RuntimeError, ValueError):  # some fonts of AugLy cannot be drawn by every Pillow
        return imaugs.overlay_text(img, **options)


def overlay_emoji(img: Image.Image, size: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    emojis = sorted(Path(augly_utils.SMILEY_EMOJI_DIR).glob("*.png"))
    x_pos, y_pos = rng.uniform(0, 1 - size, 2)
    return imaugs.overlay_emoji(img, emoji_path=str(emojis[rng.integers(len(emojis))]), emoji_size=size, x_pos=x_pos,
                                y_pos=y_pos)


def overlay_stripes(img: Image.Image, opacity: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    return imaugs.overlay_stripes(img, line_width=rng.uniform(0.2, 0.5), line_color=random_color(rng),
                                  line_angle=rng.uniform(-90, 90), line_density=rng.uniform(0.3, 0.8),
                                  line_type=str(rng.choice(["solid", "dashed", "dotted"])), line_opacity=opacity)


def blend(img: Image.Image, opacity: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Show another image through."""
    return Image.blend(img, next(donors).resize(img.size), opacity)


def pad(img: Image.Image, fraction: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Add a border in one colour: on all sides, beside, or above and below."""
    sides = [(fraction, fraction), (fraction, 0), (0, fraction)][rng.integers(3)]
    return imaugs.pad(img, w_factor=sides[0], h_factor=sides[1], color=random_color(rng))


def overlay_onto_image(img: Image.Image, size: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Paste the image onto another image: the query then mostly shows that one."""
    background = next(donors)
    stretch = img.width / img.height * background.height / background.width
    size = min(size, 0.95 / stretch)  # not wider than the background
    return imaugs.overlay_image(background, overlay=img, overlay_size=size, x_pos=rng.uniform(0, 1 - size * stretch),
                                y_pos=rng.uniform(0, 1 - size))


def make_collage(img: Image.Image, cells: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Put the image beside one other image or two by two with three, all cut to the same size."""
    columns, rows = (2, 2) if cells >= 3 else [(2, 1), (1, 2)][rng.integers(2)]
    own = rng.integers(columns * rows)
    canvas = Image.new("RGB", (columns * img.width, rows * img.height))
    for i in range(columns * rows):
        image = img if i == own else ImageOps.fit(next(donors), img.size)
        canvas.paste(image, (i % columns * img.width, i // columns * img.height))
    return canvas


def make_screenshot(img: Image.Image, margin: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    """Show the image in a web page or phone app of AugLy and keep `margin` of what surrounds it there."""
    template = os.path.join(augly_utils.SCREENSHOT_TEMPLATES_DIR, str(rng.choice(["web.png", "mobile.png"])))
    page, box = get_template_and_bbox(template, augly_utils.BBOXES_PATH)
    left, top, right, bottom = box
    kept = (left * (1 - margin), top * (1 - margin), right + (page.width - right) * margin,
            bottom + (page.height - bottom) * margin)
    return imaugs.overlay_onto_screenshot(img, template_filepath=template).crop([round(side) for side in kept])


def encode_jpeg(img: Image.Image, quality: float, rng: np.random.Generator, donors: Donors) -> Image.Image:
    return imaugs.encoding_quality(img, quality=round(quality))


def random_color(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(0, 256, 3).tolist())


def contrast(img: Image.Image) -> float:
    """Standard deviation of the grey levels, 0..128."""
    return ImageStat.Stat(img.convert("L")).stddev[0]


GROUPS = {"shape": 2, "tone": 1, "detail": 1, "mark": 2, "frame": 1, "encoding": 1}  # in order: most edits of a query
STRENGTHS = {"mild": (1, 2), "medium": (1, 3), "hard": (2, 3)}  # fewest and most edits of a query
EDITS = {
    "crop": Edit("shape", crop, "fraction of the area kept", (0.6, 0.9), (0.4, 0.7), (0.25, 0.5)),
    "aspect": Edit("shape", change_aspect, "stretch of one side", (1.1, 1.3), (1.2, 1.5), (1.4, 1.9)),
    "rotate": Edit("shape", rotate, "degrees, either way", (2, 10), (5, 25), (15, 90)),
    "perspective": Edit("shape", perspective, "shift of corners / side", (0.05, 0.1), (0.1, 0.15), (0.15, 0.25)),
    "hflip": Edit("shape", lambda img, *_: ImageOps.mirror(img)),
    "vflip": Edit("shape", lambda img, *_: ImageOps.flip(img)),
    "color": Edit("tone", jitter_color, "jitter", (0.1, 0.25), (0.2, 0.4), (0.35, 0.6)),
    "gray": Edit("tone", lambda img, *_: img.convert("L").convert("RGB")),
    "brightness": Edit("tone", change_brightness, "factor or its inverse", (1.1, 1.3), (1.2, 1.6), (1.5, 2.1)),
    "filter": Edit("tone", apply_filter, "fraction of the filtered image", (0.2, 0.4), (0.3, 0.6), (0.5, 1)),
    "blur": Edit("detail", blur, "radius / shorter side", (0.005, 0.01), (0.01, 0.015), (0.01, 0.02)),
    "pixelize": Edit("detail", pixelize, "resolution kept", (0.4, 0.6), (0.3, 0.5), (0.2, 0.35)),
    "noise": Edit("detail", add_noise, "sigma / white", (0.02, 0.05), (0.04, 0.08), (0.06, 0.14)),
    "shuffle": Edit("detail", shuffle_pixels, "fraction of the pixels", (0.03, 0.08), (0.05, 0.12), (0.1, 0.25)),
    "text": Edit("mark", overlay_text, "letter height / shorter side", (0.05, 0.1), (0.08, 0.15), (0.12, 0.22)),
    "emoji": Edit("mark", overlay_emoji, "height / image height", (0.1, 0.2), (0.15, 0.3), (0.25, 0.4)),
    "stripes": Edit("mark", overlay_stripes, "opacity", (0.1, 0.3), (0.2, 0.5), (0.4, 0.7)),
    "blend": Edit("mark", blend, "opacity of another image", (0.1, 0.2), (0.15, 0.25), (0.2, 0.35)),
    "pad": Edit("frame", pad, "border / side", (0.05, 0.15), (0.1, 0.25), (0.25, 0.5)),
    "overlay": Edit("frame", overlay_onto_image, "height / other image's height", (0.7, 0.9), (0.55, 0.8), (0.4, 0.65)),
    "collage": Edit("frame", make_collage, "cells: 2, or 4 from 3 on", (2, 2.5), (2, 3), (2, 4)),
    "screenshot": Edit("frame", make_screenshot, "fraction of the page around it", (0, 0.3), (0.2, 0.6), (0.5, 1)),
    "jpeg": Edit("encoding", encode_jpeg, "quality", (40, 70), (15, 40), (8, 25)),
}
NEED_DONORS = ("blend", "overlay", "collage")


# ---------------------------------------------------------------------------------------------------------------------
# Queries


class Source(NamedTuple):
    """An image, or the tile of one."""
    path: str
    tile: Box | tuple[()] = ()

    def open(self) -> Image.Image:
        """The image or tile, as RGB."""
        img = open_image(self.path)
        return img.crop(self.tile) if self.tile else img


class Query(NamedTuple):
    """What one query is made of; `rng` is its own generator."""
    id: str
    source: Source
    reference_id: str
    edits: list[str]
    donors: list[Source]
    rng: np.random.Generator


def draw_edits(names: Sequence[str], strength: str, rng: np.random.Generator) -> list[str]:
    """Random edits out of `names`, in the order of GROUPS, so that a frame does not hide a later crop's content."""
    wanted = rng.integers(*STRENGTHS[strength], endpoint=True)
    chosen: list[str] = []
    for name in rng.permutation(names).tolist():
        group = EDITS[name].group
        if len(chosen) < wanted and sum(EDITS[other].group == group for other in chosen) < GROUPS[group]:
            chosen.append(name)
    return sorted(chosen, key=lambda name: list(GROUPS).index(EDITS[name].group))


def make_query(query: Query, strength: str, quality: int, folder: Path) -> dict[str, float | None]:
    """Edit an image, store it, and return the amounts: {edit: number, None for edits without amount}."""
    img = query.source.open()
    img.thumbnail((LARGEST, LARGEST))
    side = round(math.sqrt(img.width * img.height))  # donors about as large as the image, whatever their shape
    donors = (ImageOps.cover(donor.open(), (side, side)) for donor in itertools.cycle(query.donors))
    amounts = {}
    for name in query.edits:
        edit = EDITS[name]
        amount = round(query.rng.uniform(*getattr(edit, strength)), 4) if edit.amount else 0
        img = edit.apply(img, amount, query.rng, donors).convert("RGB")
        amounts[name] = amount if edit.amount else None
    img.thumbnail((LARGEST, LARGEST))
    img.save(Path(folder, query.id + ".jpg"), quality=quality)
    return amounts


def plan_copies(paths: Sequence[str], strength: str) -> list[Query]:
    """A query of each image, with edits of `strength` out of all, and others of the images as donors."""
    queries = []
    for i, path in enumerate(paths):
        rng = np.random.default_rng([0, i])
        others = [paths[j] for j in rng.permutation(len(paths))[:DONORS + 1] if j != i]
        names = draw_edits([name for name in EDITS if others or name not in NEED_DONORS], strength, rng)
        queries.append(Query(f"{i:08d}", Source(path), "", names, [Source(other) for other in others], rng))
    return queries


def make_copy(query: Query, strength: str, folder: Path) -> Path | None:
    """`make_query`, for images that may have changed since they were listed: the copy's file, None without."""
    try:
        make_query(query, strength, 90, folder)
    except (UnreadableImage, OSError, ValueError, RuntimeError, ZeroDivisionError):  # some are too small for some edits
        return None
    return folder / f"{query.id}.jpg"


def make_copies(queries: Sequence[Query], strength: str, folder: Path, workers: int) -> list[Path | None]:
    """The copies' files, made in `folder` by so many processes."""
    with ProcessPoolExecutor(workers, ProcessesApart()) as pool:
        return list(pool.map(partial(make_copy, strength=strength, folder=folder), queries, chunksize=8))
