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
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import faiss
import imagehash
import numpy as np
from tqdm import tqdm

from copydet.common import MANIFEST, InputError, WorkError, check_name, locked, make_folder, naming, run_main, shown
from copydet.edits import (DONORS, DULL, EDITS, LARGEST, NEED_DONORS, STRENGTHS, Box, Query, Source, contrast,
                           draw_edits, make_query)
from copydet.images import (IMAGE_ENDINGS, Odd, UnreadableImage, kind_of, list_images, not_read, open_image, read_file,
                            write_skipped)
from copydet.machine import count_cores
from copydet.options import MOST_PROCESSES

SMALLEST = 64  # pixels, shorter side of a usable image
MOST_SLENDER = LARGEST // SMALLEST  # times longer than wide

Item = TypeVar("Item")
Result = TypeVar("Result")


class Run(Protocol):
    """Results of function(item) for each of the items, in order, under a progress bar."""

    def __call__(self, function: Callable[[Item], Result], items: Sequence[Item], title: str) -> list[Result]: ...


# ---------------------------------------------------------------------------------------------------------------------
# Source images


def find_images(folder: str, sample_size: int | None, seed: int,
                exclude: Sequence[str] = ()) -> tuple[list[str], Odd]:
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


def examine(path: str, tile: int | None = None) -> tuple[list[tuple[Source, np.ndarray]], Odd]:
    """Find what of an image can be used: [(source, perceptual hash uint8 [8])] and [(path, reason)] for the rest."""
    try:
        img = open_image(path)
    except UnreadableImage as error:
        return [], [(path, error.reason)]
    smallest = tile or SMALLEST
    if min(img.size) < smallest:
        return [], [(path, f"{img.width} x {img.height} pixels: smaller than {smallest}")]
    if not tile and max(img.size) > MOST_SLENDER * min(img.size):
        return [], [(path, f"{img.width} x {img.height} pixels: more than {MOST_SLENDER} times longer than wide")]
    boxes: list[Box | tuple[()]] = [
        (x, y, x + tile, y + tile) for y in range(0, img.height - tile + 1, tile)
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


def collect(folders: Sequence[str], args: argparse.Namespace, run: Run) -> tuple[list[list[Source]], Odd]:
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
    usable: list[list[Source]] = [[] for _ in folders]
    hashes = np.array([h for _, _, h in found])
    earlier = near_duplicates(hashes, args.duplicate_bits) if found else np.empty(0, int)
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


def share_out(args: argparse.Namespace, images: int, others: int | None) -> tuple[int, int, int, int]:
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


def deal(args: argparse.Namespace, usable: list[list[Source]]) -> tuple[list[Source], list[Source], list[Source], int]:
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


def plan_queries(args: argparse.Namespace, training: list[Source], references: list[Source], distractors: list[Source],
                 queries: int) -> list[Query]:
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


def store(job: tuple[Source, Path], quality: int) -> None:
    """Write a source as JPEG; whole JPEG files are copied as they are."""
    source, file = job
    content = read_file(source.path)
    if kind_of(content) == "JPEG" and not source.tile:
        file.write_bytes(content)
    else:
        source.open().save(file, quality=quality)


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as out:
        csv.writer(out, lineterminator="\n").writerows([header, *rows])


def build(args: argparse.Namespace, out: Path, run: Run) -> None:
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


def number(smallest: int, largest: float = math.inf) -> Callable[[str], int]:
    """Type of a flag: a whole number from `smallest` to `largest`."""
    def parse(text: str) -> int:
        if not text.isdecimal() or not smallest <= int(text) <= largest:
            limits = f"from {smallest}" + ("" if largest == math.inf else f" to {largest}")
            raise argparse.ArgumentTypeError(f"{text}: not a whole number {limits}")
        return int(text)
    return parse


def edit_names(text: str) -> list[str]:
    """Type of a flag: names of edits, each once."""
    names = list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in EDITS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(EDITS)}")
    return names


class ListEdits(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
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
    p.add_argument("-j", "--workers", type=number(1, MOST_PROCESSES), default=count_cores(), metavar="N",
                   help="processes (default: number of cores)")
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
def progress_map(workers: int) -> Iterator[Run]:
    """A Run in `workers` processes."""
    with ProcessPoolExecutor(workers) if workers > 1 else contextlib.nullcontext() as pool:
        def run(function: Callable[[Item], Result], items: Sequence[Item], title: str) -> list[Result]:
            results = pool.map(function, items, chunksize=8) if pool else map(function, items)
            return list(tqdm(results, title, len(items), unit=" images", smoothing=0))
        yield run


def make_benchmark(args: argparse.Namespace) -> None:
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
