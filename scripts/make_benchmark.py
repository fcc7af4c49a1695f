#!/usr/bin/env python3
"""Build a copy-detection benchmark, shaped like DISC21, from any folder of images.

    python scripts/make_benchmark.py IMAGES OUT --strength hard
    python scripts/make_benchmark.py IMAGES OUT --training-images OTHER_IMAGES --edits crop,overlay,text
    python scripts/make_benchmark.py --list-edits

OUT then holds

    query_images/Q00000.jpg ...       edited copies of some references, and distractors: edited images without original
    reference_images/R000000.jpg ...  the images to be found
    training_images/T000000.jpg ...   other images, to train on
    public_ground_truth.csv           query_id,reference_id; reference_id is empty for distractors
    edits.csv                         query_id,reference_id,edits,amounts: names joined by +, amounts as JSON
    sources.csv                       id,path,tile: the file that each comes from, tile as left,top,right,bottom
    skipped.csv                       path,reason: images that could not be used; only if there are any

Where a number is not given: 40 % of the images are for training (none with --training-images: then all of those), half
of the rest are references, the other half distractors, and half of the references get a query. The same images, flags
and seed give the same bytes, whatever -j is.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import math
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, NoReturn

import faiss
import imagehash
import numpy as np
from augly import utils as augly_utils
from augly.image import functional as imaugs
from augly.image.utils import get_template_and_bbox
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, ImageStat
from tqdm import tqdm

from copydet.common import MANIFEST, InputError, WorkError, check_name, locked, make_folder, naming, run_main, shown
from copydet.images import (IMAGE_ENDINGS, UnreadableImage, kind_of, list_images, not_read, open_image, read_file,
                            write_skipped)
from copydet.options import MOST_PROCESSES

SMALLEST, LARGEST = 64, 1024  # pixels: shorter side of a usable image, longer side of a query
MOST_SLENDER = LARGEST // SMALLEST  # times longer than wide
DULL = 8  # standard deviation of grey levels (0..255) below which an image shows almost nothing
DONORS = 4  # other images that one query can need: three in a collage, one blended in


class Edit(NamedTuple):
    """One kind of edit: `apply(image, amount, generator, donors)` returns the edited image."""
    group: str
    apply: Callable
    amount: str = ""  # what the amount is; it is drawn uniformly from the range of the chosen strength
    mild: tuple = ()
    medium: tuple = ()
    hard: tuple = ()


class Source(NamedTuple):
    """An image, or the tile (left, top, right, bottom) of one."""
    path: str
    tile: tuple = ()

    def open(self) -> Image.Image:
        """The image or tile, as RGB."""
        img = open_image(self.path)
        return img.crop(self.tile) if self.tile else img


class Query(NamedTuple):
    """What one query is made of; `rng` is its own generator."""
    id: str
    source: Source
    reference_id: str
    edits: list
    donors: list
    rng: np.random.Generator


# ---------------------------------------------------------------------------------------------------------------------
# Edits. Every random choice comes from the generator given, never from a global one. AugLy's perspective, noise and
# pixel shuffling are not used: the first does not run on numpy 2, the others seed numpy's global generator.


def crop(img, area, rng, donors):
    """Cut out `area` of the image at a ratio near its own; where possible a part that shows something."""
    for _ in range(10):
        stretch = math.sqrt(math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))))
        w = min(img.width, round(img.width * math.sqrt(area) * stretch))
        h = min(img.height, round(img.height * math.sqrt(area) / stretch))
        left, top = rng.integers(img.width - w + 1), rng.integers(img.height - h + 1)
        part = img.crop((left, top, left + w, top + h))
        if contrast(part) >= 2 * DULL:
            break
    return part


def change_aspect(img, stretch, rng, donors):
    factor = math.sqrt(stretch) ** rng.choice([-1, 1])
    return img.resize((round(img.width * factor), round(img.height / factor)), Image.Resampling.BICUBIC)


def rotate(img, degrees, rng, donors):
    """Rotate and keep the largest upright rectangle without empty corners."""
    return imaugs.rotate(img, degrees=float(degrees * rng.choice([-1, 1])))


def perspective(img, shift, rng, donors):
    """Move each corner inwards by up to `shift` of the side; the outside gets a random colour."""
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
    moved = corners + rng.uniform(shift / 3, shift, (4, 2)) * (1 - 2 * corners)
    rows = [row for (x, y), (u, v) in zip(corners * img.size, moved * img.size)
            for row in ([u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v])]
    coefficients = np.linalg.solve(rows, (corners * img.size).ravel())
    return img.transform(img.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC,
                         fillcolor=random_color(rng))


def jitter_color(img, strength, rng, donors):
    """Brightness, contrast and saturation by factors of 1 +- strength, hue by +- strength / 4 of the circle."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    img = imaugs.color_jitter(img, brightness_factor=brightness, contrast_factor=contrast, saturation_factor=saturation)
    hue, s, v = img.convert("HSV").split()
    turn = round(256 * rng.uniform(-strength, strength) / 4)
    return Image.merge("HSV", (hue.point(lambda h: (h + turn) % 256), s, v)).convert("RGB")


def change_brightness(img, factor, rng, donors):
    return ImageEnhance.Brightness(img).enhance(factor ** rng.choice([-1, 1]))


def apply_filter(img, fraction, rng, donors):
    """Blend in a filtered image: sharpened, edges, relief, few colours, inverted lights or stretched contrast."""
    filters = [lambda: img.filter(ImageFilter.UnsharpMask(4, 300, 0)),
               lambda: img.filter(ImageFilter.EDGE_ENHANCE_MORE),
               lambda: ImageOps.invert(img.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB"),
               lambda: img.filter(ImageFilter.EMBOSS),
               lambda: ImageOps.posterize(img, 2),
               lambda: ImageOps.solarize(img, 128),
               lambda: ImageOps.equalize(img)]
    return Image.blend(img, filters[rng.integers(len(filters))](), fraction)


def blur(img, fraction, rng, donors):
    return imaugs.blur(img, radius=fraction * min(img.size))


def pixelize(img, ratio, rng, donors):
    return imaugs.pixelization(img, ratio=max(ratio, 8 / min(img.size)))


def add_noise(img, sigma, rng, donors):
    noise = rng.normal(0, 255 * sigma, (img.height, img.width, 3))
    return Image.fromarray((np.asarray(img) + noise).clip(0, 255).astype(np.uint8))


def shuffle_pixels(img, fraction, rng, donors):
    """Permute a fraction of the pixels among themselves."""
    pixels = np.array(img).reshape(-1, 3)
    chosen = rng.choice(len(pixels), int(fraction * len(pixels)), replace=False)
    pixels[chosen] = pixels[rng.permutation(chosen)]
    return Image.fromarray(pixels.reshape(img.height, img.width, 3))


def overlay_text(img, size, rng, donors):
    """Write one to three lines of random letters of a random font of AugLy; its default font where that one fails."""
    fonts = sorted(Path(augly_utils.FONTS_DIR).rglob("*.ttf"))
    text = [rng.integers(1, 1000, rng.integers(4, 13)).tolist() for _ in range(rng.integers(1, 4))]
    options = dict(text=text, font_size=max(size, 10 / min(img.size)), color=random_color(rng),
                   x_pos=rng.uniform(0, 0.4), y_pos=rng.uniform(0, 0.7))
    try:
        return imaugs.overlay_text(img, font_file=str(fonts[rng.integers(len(fonts))]), **options)
    except (OSError, RuntimeError, ValueError):  # some fonts of AugLy cannot be drawn by every Pillow
        return imaugs.overlay_text(img, **options)


def overlay_emoji(img, size, rng, donors):
    emojis = sorted(Path(augly_utils.SMILEY_EMOJI_DIR).glob("*.png"))
    x_pos, y_pos = rng.uniform(0, 1 - size, 2)
    return imaugs.overlay_emoji(img, emoji_path=str(emojis[rng.integers(len(emojis))]), emoji_size=size, x_pos=x_pos,
                                y_pos=y_pos)


def overlay_stripes(img, opacity, rng, donors):
    return imaugs.overlay_stripes(img, line_width=rng.uniform(0.2, 0.5), line_color=random_color(rng),
                                  line_angle=rng.uniform(-90, 90), line_density=rng.uniform(0.3, 0.8),
                                  line_type=str(rng.choice(["solid", "dashed", "dotted"])), line_opacity=opacity)


def blend(img, opacity, rng, donors):
    """Show another image through."""
    return Image.blend(img, next(donors).resize(img.size), opacity)


def pad(img, fraction, rng, donors):
    """Add a border in one colour: on all sides, beside, or above and below."""
    sides = [(fraction, fraction), (fraction, 0), (0, fraction)][rng.integers(3)]
    return imaugs.pad(img, w_factor=sides[0], h_factor=sides[1], color=random_color(rng))


def overlay_onto_image(img, size, rng, donors):
    """Paste the image onto another image: the query then mostly shows that one."""
    background = next(donors)
    stretch = img.width / img.height * background.height / background.width
    size = min(size, 0.95 / stretch)  # not wider than the background
    return imaugs.overlay_image(background, overlay=img, overlay_size=size, x_pos=rng.uniform(0, 1 - size * stretch),
                                y_pos=rng.uniform(0, 1 - size))


def make_collage(img, cells, rng, donors):
    """Put the image beside one other image or two by two with three, all cut to the same size."""
    columns, rows = (2, 2) if cells >= 3 else [(2, 1), (1, 2)][rng.integers(2)]
    own = rng.integers(columns * rows)
    canvas = Image.new("RGB", (columns * img.width, rows * img.height))
    for i in range(columns * rows):
        image = img if i == own else ImageOps.fit(next(donors), img.size)
        canvas.paste(image, (i % columns * img.width, i // columns * img.height))
    return canvas


def make_screenshot(img, margin, rng, donors):
    """Show the image in a web page or phone app of AugLy and keep `margin` of what surrounds it there."""
    template = os.path.join(augly_utils.SCREENSHOT_TEMPLATES_DIR, str(rng.choice(["web.png", "mobile.png"])))
    page, box = get_template_and_bbox(template, augly_utils.BBOXES_PATH)
    left, top, right, bottom = box
    kept = (left * (1 - margin), top * (1 - margin), right + (page.width - right) * margin,
            bottom + (page.height - bottom) * margin)
    return imaugs.overlay_onto_screenshot(img, template_filepath=template).crop([round(side) for side in kept])


def encode_jpeg(img, quality, rng, donors):
    return imaugs.encoding_quality(img, quality=round(quality))


def random_color(rng):
    return tuple(rng.integers(0, 256, 3).tolist())


def contrast(img):
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
# Source images


def find_images(folder, sample_size, seed, exclude=()):
    """Paths of the images below `folder`, at most `sample_size` if given, and [(path, reason)] of what is none.

    Raises InputError where the folder does not exist or holds no image.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    paths, odd = list_images(folder, exclude)
    if not paths:
        raise InputError(f"{folder}: holds no image ({', '.join(IMAGE_ENDINGS)}){not_read(odd)}")
    if sample_size and sample_size < len(paths):
        drawn = np.random.default_rng([seed, 2]).choice(len(paths), sample_size, replace=False)
        paths = [paths[i] for i in sorted(drawn)]
    return [os.path.join(folder, path) for path in paths], [(os.path.join(folder, path), why) for path, why in odd]


def examine(path, tile=None):
    """Find what of an image can be used: [(source, perceptual hash as 8 bytes)] and [(path, reason)] for the rest."""
    try:
        img = open_image(path)
    except UnreadableImage as error:
        return [], [(path, error.reason)]
    smallest = tile or SMALLEST
    if min(img.size) < smallest:
        return [], [(path, f"{img.width} x {img.height} pixels: smaller than {smallest}")]
    if not tile and max(img.size) > MOST_SLENDER * min(img.size):
        return [], [(path, f"{img.width} x {img.height} pixels: more than {MOST_SLENDER} times longer than wide")]
    boxes = [(x, y, x + tile, y + tile) for y in range(0, img.height - tile + 1, tile)
             for x in range(0, img.width - tile + 1, tile)] if tile else [()]
    found, dull = [], []
    for box in boxes:
        part = img.crop(box) if box else img
        if contrast(part) < DULL:
            dull.append((path, f"{f'tile {box} ' if box else ''}shows almost nothing"))
        else:
            found.append((Source(path, box), np.packbits(imagehash.phash(part).hash)))
    return found, dull


def near_duplicates(hashes: np.ndarray, bits: int) -> np.ndarray:
    """For every hash, uint8 [n, 8], the index [n] of an earlier row at most `bits` bits away, or -1."""
    distinct, first, back = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    index = faiss.IndexBinaryFlat(64)
    index.add(distinct)
    limits, _, neighbours = index.range_search(distinct, bits + 1)
    earliest = np.minimum.reduceat(first[neighbours], limits[:-1].astype(int))[back.ravel()]
    return np.where(earliest < np.arange(len(hashes)), earliest, -1)


def collect(folders, args, run):
    """Usable sources of each folder, without near-duplicates in or across folders, and [(path, reason)] of the rest.

    Prints the counts. Raises InputError where a folder has none.
    """
    found, skipped = [], []
    for number, folder in enumerate(folders):
        paths, odd = find_images(folder, args.sample_size, args.seed, args.exclude)
        skipped += odd
        for parts, rest in run(partial(examine, tile=args.tile), paths, f"reading {folder}"):
            found += [(number, *part) for part in parts]
            skipped += rest
    unusable = len(skipped)
    usable = [[] for _ in folders]
    earlier = near_duplicates(np.array([h for _, _, h in found]), args.duplicate_bits) if found else []
    for (number, source, _), twin in zip(found, earlier):
        if twin < 0:
            usable[number].append(source)
        else:
            skipped.append((source.path, f"near-duplicate of {found[twin][1].path}"))
    for folder, sources in zip(folders, usable):
        if not sources:
            raise InputError(f"{folder}: no usable image; first of {len(skipped)} left out: {': '.join(skipped[0])}")
        print(f"{folder}: {len(sources)} usable {'tiles' if args.tile else 'images'}")
    print(f"left out: {unusable} unreadable, too small or empty{not_read(skipped)}, {len(skipped) - unusable} "
          "near-duplicates")
    return usable, skipped


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark


def share_out(args, images, others):
    """Numbers of training images, references, distractors and queries with an original, from flags and defaults.

    `images`: usable ones in IMAGES; `others`: usable ones in --training-images, None without. Raises InputError where
    they do not suffice, with the sum.
    """
    taken = (args.references or 0) + (args.distractors or 0)
    if others is None:
        training = max(0, min(images * 2 // 5, images - taken)) if args.training is None else args.training
        rest = images - training
    else:
        training, rest = others if args.training is None else args.training, images
        if training > others:
            raise InputError(f"--training {training}: {args.training_images} has only {others} usable images")
    default = rest // 2 if args.distractors is None else rest - args.distractors
    references = default if args.references is None else args.references
    distractors = rest - references if args.distractors is None else args.distractors
    queries = references // 2 if args.queries is None else args.queries
    if references < 1 or queries < 1 or distractors < 0 or references + distractors > rest:
        terms = f"{references} references + {max(distractors, 0)} distractors"
        terms += f" + {training} training images" if others is None else ""
        raise InputError(f"too few images: {args.images} has {images} usable ones, for {terms}, and at least 2 are "
                         "needed for 1 reference and 1 query")
    if queries > references:
        raise InputError(f"--queries {queries}: more than the {references} references, each of which has one at most")
    return training, references, distractors, queries


def deal(args, usable):
    """Deal the sources out at random: (training, references, distractors, number of queries with an original)."""
    images, *others = usable
    rng = np.random.default_rng(args.seed)
    training, references, distractors, queries = share_out(args, len(images), len(others[0]) if others else None)
    dealt = [images[i] for i in rng.permutation(len(images))]
    refs, rest = dealt[:references], dealt[references:]
    if others:
        pool, spare = [others[0][i] for i in rng.permutation(len(others[0]))], rest
    else:
        pool, spare = rest[:training], rest[training:]
    return pool[:training], refs, spare[:distractors], queries


def draw_edits(names, strength, rng):
    """Random edits out of `names`, in the order of GROUPS, so that a frame does not hide a later crop's content."""
    wanted, chosen = rng.integers(*STRENGTHS[strength], endpoint=True), []
    for name in rng.permutation(names).tolist():
        group = EDITS[name].group
        if len(chosen) < wanted and sum(EDITS[other].group == group for other in chosen) < GROUPS[group]:
            chosen.append(name)
    return sorted(chosen, key=lambda name: list(GROUPS).index(EDITS[name].group))


def plan_queries(args, training, references, distractors, queries):
    """Queries of the first `queries` references and of all distractors, under shuffled ids."""
    donors = training or distractors
    names = [name for name in args.edits if name not in NEED_DONORS or len(donors) > 1]
    if not names:
        raise InputError(f"--edits {','.join(args.edits)}: need training images or distractors to put the image on")
    sources = references[:queries] + distractors
    plan = []
    for i, k in enumerate(np.random.default_rng([args.seed, len(sources)]).permutation(len(sources))):
        rng = np.random.default_rng([args.seed, 1, i])
        chosen = draw_edits(names, args.strength, rng)
        some = rng.choice(len(donors), min(DONORS + 1, len(donors)), replace=False)
        others = [donors[j] for j in some if donors[j] != sources[k]]
        plan.append(Query(f"Q{i:05d}", sources[k], f"R{k:06d}" if k < queries else "", chosen, others, rng))
    return plan


def make_query(query: Query, strength: str, quality: int, folder: Path) -> dict[str, float | None]:
    """Edit an image, store it, and return the amounts: {edit: number, None for edits without amount}."""
    img = query.source.open()
    img.thumbnail((LARGEST, LARGEST))
    side = round(math.sqrt(img.width * img.height))  # donors about as large as the image, whatever their shape
    donors = (ImageOps.cover(donor.open(), (side, side)) for donor in itertools.cycle(query.donors))
    amounts = {}
    for name in query.edits:
        edit = EDITS[name]
        amounts[name] = round(query.rng.uniform(*getattr(edit, strength)), 4) if edit.amount else None
        img = edit.apply(img, amounts[name], query.rng, donors).convert("RGB")
    img.thumbnail((LARGEST, LARGEST))
    img.save(Path(folder, query.id + ".jpg"), quality=quality)
    return amounts


def store(job, quality):
    """Write a source as JPEG; whole JPEG files are copied as they are."""
    source, file = job
    content = read_file(source.path)
    if kind_of(content) == "JPEG" and not source.tile:
        Path(file).write_bytes(content)
    else:
        source.open().save(file, quality=quality)


def write_csv(file, header, rows):
    with open(file, "w", newline="", encoding="utf-8") as out:
        csv.writer(out, lineterminator="\n").writerows([header, *rows])


def build(args, out, run):
    """Make the whole benchmark in the new folder `out`. Raises InputError before anything is written."""
    folders = [args.images] + ([args.training_images] if args.training_images else [])
    usable, skipped = collect(folders, args, run)
    training, references, distractors, queries = deal(args, usable)
    plan = plan_queries(args, training, references, distractors, queries)
    make_partial(out)
    for name in ("query_images", "reference_images", "training_images"):
        (out / name).mkdir()
    named = [(f"R{i:06d}", source) for i, source in enumerate(references)]
    named += [(f"T{i:06d}", source) for i, source in enumerate(training)]
    places = {"R": out / "reference_images", "T": out / "training_images"}
    run(partial(store, quality=args.quality), [(source, places[name[0]] / f"{name}.jpg") for name, source in named],
        "storing images")
    amounts = run(partial(make_query, strength=args.strength, quality=args.quality, folder=out / "query_images"), plan,
                  "making queries")
    write_csv(out / "public_ground_truth.csv", ("query_id", "reference_id"), [(q.id, q.reference_id) for q in plan])
    write_csv(out / "edits.csv", ("query_id", "reference_id", "edits", "amounts"),
              [(q.id, q.reference_id, "+".join(q.edits), json.dumps(a)) for q, a in zip(plan, amounts)])
    write_csv(out / "sources.csv", ("id", "path", "tile"),
              [(name, shown(source.path), ",".join(map(str, source.tile)))
               for name, source in [(q.id, q.source) for q in plan] + named])
    write_skipped(out / "skipped.csv", skipped)
    print(f"{args.out}: {len(references)} references, {queries} queries with and {len(distractors)} without an "
          f"original, {len(training)} training images, {args.strength} edits")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def number(smallest, largest=math.inf):
    """Type of a flag: a whole number from `smallest` to `largest`."""
    def parse(text):
        if not text.isdecimal() or not smallest <= int(text) <= largest:
            limits = f"from {smallest}" + ("" if largest == math.inf else f" to {largest}")
            raise argparse.ArgumentTypeError(f"{text}: not a whole number {limits}")
        return int(text)
    return parse


def edit_names(text):
    names = list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in EDITS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(EDITS)}")
    return names


class ListEdits(argparse.Action):
    def __call__(self, parser, *_):
        print(f"{'edit':<12}{'group':<10}{'mild':<14}{'medium':<14}{'hard':<14}amount")
        for name, edit in EDITS.items():
            ranges = [f"{r[0]:g} .. {r[1]:g}" if r else "-" for r in (edit.mild, edit.medium, edit.hard)]
            print(f"{name:<12}{edit.group:<10}" + "".join(f"{r:<14}" for r in ranges) + edit.amount)
        for name, (low, high) in STRENGTHS.items():
            print(f"{name}: {low} to {high} edits per query")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", metavar="IMAGES", help="folder of images, nested or not: " + " ".join(IMAGE_ENDINGS))
    p.add_argument("out", metavar="OUT", help="folder to make; must not exist or be empty")
    p.add_argument("--strength", choices=STRENGTHS, default="medium", help="number of edits per query and their ranges "
                   "(default: %(default)s)")
    p.add_argument("--edits", type=edit_names, default=list(EDITS), metavar="A,B,C", help="only these (default: all)")
    p.add_argument("--list-edits", action=ListEdits, nargs=0, help="show edits and their ranges, and leave")
    p.add_argument("--queries", type=number(1), metavar="N", help="queries with an original (default: references / 2)")
    p.add_argument("--distractors", type=number(0), metavar="N", help="queries without (default: what remains)")
    p.add_argument("--references", type=number(1), metavar="N", help="(default: half of what training leaves)")
    p.add_argument("--training", type=number(0), metavar="N", help="training images (default: 40 %% of IMAGES, or all "
                   "of --training-images)")
    p.add_argument("--training-images", "--training-photos", metavar="DIR", help="take training images from this "
                   "folder, not from IMAGES")
    p.add_argument("--sample-size", type=number(2), metavar="N", help="use N images of each folder, drawn at random "
                   "(default: all)")
    p.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave out images and folders of "
                   "this name, or of this path below the folder, such as '*_small.jpg'; can be given again")
    p.add_argument("--tile", type=number(SMALLEST), metavar="PX", help="cut every image into disjoint squares of this "
                   "side first and take each as an image: for a handful of large images")
    p.add_argument("--duplicate-bits", type=number(0, 64), default=6, metavar="N", help="images whose 64-bit "
                   "perceptual hashes differ in at most N bits count as near-duplicates; all but one are left out "
                   "(default: %(default)s)")
    p.add_argument("--quality", type=number(1, 100), default=95, metavar="Q", help="JPEG quality of what is encoded "
                   "anew: queries, tiles, images that are not JPEG (default: %(default)s)")
    p.add_argument("--seed", type=number(0), default=0, metavar="N", help="(default: %(default)s)")
    p.add_argument("-j", "--workers", type=number(1, MOST_PROCESSES), default=os.cpu_count(), metavar="N",
                   help="processes (default: number of CPUs)")
    return p


def make_partial(folder: Path) -> None:
    """Make the folder that becomes OUT; what a killed run left of it goes."""
    ours = folder.is_dir() and ((folder / MANIFEST).is_file() or not os.listdir(folder))
    if os.path.lexists(folder) and not ours:
        raise InputError(f"{folder}: is in the way, and not of this program; rename it")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MANIFEST).touch()


def check_out(args: argparse.Namespace) -> Path:
    """OUT, links followed. Raises InputError where it is in use or inside a source folder."""
    check_name(args.out, "OUT")
    out = Path(os.path.realpath(args.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{args.out}: exists already; give a new folder or remove it")
    if out.is_dir() and out.is_mount():
        raise InputError(f"{args.out}: a disk is mounted there; give a new folder in it")
    for folder in filter(None, (args.images, args.training_images)):
        if Path(folder).resolve() in [out.resolve(), *out.resolve().parents]:
            raise InputError(f"{out}: lies inside the images of {folder}; give a folder outside")
    return out


@contextlib.contextmanager
def progress_map(workers):
    """A function (function, items, title) -> results in order, computed by `workers` processes under a progress bar."""
    with ProcessPoolExecutor(workers) if workers > 1 else contextlib.nullcontext() as pool:
        def run(function, items, title):
            results = pool.map(function, items, chunksize=8) if pool else map(function, items)
            return list(tqdm(results, title, len(items), unit=" images", smoothing=0))
        yield run


def make_benchmark(args):
    """Run the command line: OUT appears when it is whole."""
    out = check_out(args)
    partial_out = out.with_name(out.name + ".partial")
    make_folder(out.parent)
    with locked(out.with_name(f".{out.name}.lock"), args.out):
        check_out(args)  # another run may have made it in the meantime
        try:
            with naming(args.out), progress_map(args.workers) as run:
                build(args, partial_out, run)
        except BrokenProcessPool as error:
            raise WorkError(str(error)) from None
        (partial_out / MANIFEST).unlink()
        partial_out.rename(out)


def main(argv: list[str] | None = None) -> int:
    return run_main(lambda: make_benchmark(build_parser().parse_args(argv)), "stopped; nothing was made")


if __name__ == "__main__":
    sys.exit(main())
