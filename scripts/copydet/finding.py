"""find_copies.py as a function: from folders of images to a report, and its pairs."""
from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from copydet.cache import Cache, Extraction
from copydet.checkpoints import ABOUT_DEFAULT, DEFAULT, newest_checkpoint
from copydet.common import ROOT, InputError, OutputFolder, check_output, database, is_page, shown
from copydet.copies import (Collection, calibrate, check_comparable, find_pairs, read_calibration, read_file,
                            read_folder, same_files, told, verify_pairs)
from copydet.decisions import read_decisions
from copydet.descriptors import Descriptors
from copydet.images import FOLDERS, IMAGE, what_is
from copydet.machine import count_cores
from copydet.options import MOST_PROCESSES
from copydet.page import pack, write_report
from copydet.record import record
from copydet.regions import WHOLE, parse_regions
from copydet.search import count_gpus
from copydet.verification import COPY

H5_ENDINGS = (".h5", ".hdf5", ".hdf")
MOST_PAIRS = 50_000  # what a page can be as high as in every browser
FILES = ("index.html", "pairs.csv", "skipped.csv", "duplicates.txt", "run.json")
TOPK, ON_PAGE = 10, 20_000  # answers per query, pairs on the page, unless told


def pick_weights(args: argparse.Namespace) -> tuple[str, str]:
    """The flag and file of what describes the images, DEFAULT where none is given. Raises InputError: several, no such
    file."""
    given = [(flag, file) for flag, file in (("--weight", args.weight), ("--backbone-weights", args.backbone_weights))
             if file]
    if args.exp:
        newest = newest_checkpoint(ROOT / "exp" / args.exp / "train")
        if not newest:
            raise InputError(f"--exp {args.exp}: no checkpoint in {ROOT / 'exp' / args.exp / 'train'}")
        given.append(("--weight", newest))
    if not given and DEFAULT.is_file():
        print(ABOUT_DEFAULT, file=sys.stderr)
        given.append(("--weight", DEFAULT))
    if len(given) != 1:
        raise InputError("a folder of images needs one of --exp NAME, --weight FILE, --backbone-weights FILE")
    flag, file = given[0]
    if not os.path.isfile(file):
        raise InputError(f"{flag}: no such file: {file}")
    return flag, os.path.realpath(file)


def is_file_of_descriptors(source: str) -> bool:
    return source.lower().endswith(H5_ENDINGS) and not os.path.isdir(source)


def check_args(args: argparse.Namespace) -> None:
    """Everything about the flags that can be wrong, before any work."""
    if "" in (args.queries, args.archive):
        raise InputError(f"{'ARCHIVE' if args.queries else 'QUERIES'} is empty")
    if args.archive and os.path.realpath(args.archive) == os.path.realpath(args.queries):
        args.archive = None
    for source in filter(None, (args.queries, args.archive)):
        if not os.path.exists(source):
            raise InputError(f"no such file or folder: {shown(source)}")
        if os.path.isfile(source) and not is_file_of_descriptors(source) and (what := what_is(Path(source))) != IMAGE:
            neither = f"neither an image nor a descriptor file ({', '.join(H5_ENDINGS)})"
            raise InputError(f"{shown(source)}: {what or neither}")
    if args.threshold is not None and args.precision is not None:
        raise InputError("--threshold and --precision: give one")
    if parse_regions(args.query_regions) != [WHOLE] and not args.archive:
        raise InputError("--query-regions: within one collection whole images are compared")
    if args.topk < 1 or not 0 < args.pairs <= MOST_PAIRS or not 0 < args.workers <= MOST_PROCESSES:
        raise InputError(f"--topk is at least 1, --pairs from 1 to {MOST_PAIRS:,}, --workers to {MOST_PROCESSES:,}")
    for name, value in (("precision", args.precision), ("copies-ratio", args.copies_ratio)):
        if value is not None and not 0 < value <= 1:
            raise InputError(f"--{name} {value:g}: is not between 0 and 1")
    if args.images and not any((Path(args.images) / folder).is_dir() for folder in FOLDERS.values()):
        raise InputError(f"--images {args.images}: none of {', '.join(FOLDERS.values())} in it")
    ours = {"--mode", "--exp", "--target-set", "--weight", "--backbone-weights", "--dryrun", "--eval-subset",
            "--calibrate"}
    if taken := ours & set(args.flags):
        raise InputError(f"{', '.join(sorted(taken))} cannot be given to train.py after --")
    if args.zip:
        check_output("-o", args.zip)
    if args.null and args.archive:
        raise InputError("--null: duplicates.txt is written within one collection only")
    args.ngpu = count_gpus(args.ngpu)


def older_report(folder: Path) -> list[str]:
    """What a version that listed nothing wrote in a folder: OutputFolder's `older`."""
    page, rest = folder / "index.html", set(os.listdir(folder)) - {"skipped.csv", "thumbs", "pairs.csv"}
    if not (is_page(page, "Copies<") and (folder / "pairs.csv").is_file()
            or rest == {"cache"} and older_cache(folder / "cache")):
        return []
    thumbs = os.listdir(folder / "thumbs") if (folder / "thumbs").is_dir() else []
    return ["index.html", "pairs.csv", "skipped.csv",
            *(f"thumbs/{name}" for name in thumbs if re.fullmatch(r"[0-9a-f]{24}\.jpg", name))]


def older_cache(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if re.fullmatch(r"[0-9a-f]{16}\.sqlite", name)]


def open_cache_folder(args: argparse.Namespace, stack: contextlib.ExitStack) -> Path:
    """The folder of what is kept for later runs."""
    folder = Path(args.cache or Path(args.output) / "cache").resolve()
    stack.enter_context(OutputFolder(folder, "--cache", older_cache, parents=True, shared=True))
    return folder


def open_cache(folder: Path, weights: tuple[str, str], args: argparse.Namespace, regions: str,
               stack: contextlib.ExitStack) -> tuple[Cache, Extraction]:
    """What describes the folders on the command line, and where in `folder` that is kept. What a killed run with the
    same flags left there is removed."""
    extraction = Extraction(weights, args.flags, folder, regions)
    file = folder / f"{extraction.key}.sqlite"
    try:
        cache = Cache(file)
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            raise InputError(f"{file} is in use by another run") from None
        raise InputError(f"{file}: {error}; it can be deleted, then images are described again") from None
    stack.callback(cache.db.close)
    for left in folder.glob(f"{extraction.prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    return cache, extraction


def open_sources(args: argparse.Namespace, stack: contextlib.ExitStack) -> list[str | Descriptors]:
    """QUERIES and ARCHIVE: folders, images, and descriptor files, which are opened."""
    return [stack.enter_context(Descriptors(source)) if is_file_of_descriptors(source) else source
            for source in (args.queries, args.archive) if source]


Describer = tuple[Cache, Extraction]


def read_collections(sources: list[str | Descriptors], folder: Path | None, args: argparse.Namespace,
                     stack: contextlib.ExitStack) -> tuple[Collection, Collection, list, Describer | None]:
    """Collections of QUERIES and ARCHIVE: the same one twice where a collection is searched within itself; what is one
    file under two names; and, where both are folders, what describes queries. It is kept in `folder`."""
    if len(sources) == 1 and isinstance(sources[0], Descriptors) and {"query", "reference"} <= set(sources[0].groups):
        sources = sources * 2
    weights = pick_weights(args) if any(isinstance(source, str) for source in sources) else None
    caches: dict[str, Describer] = {}
    collections, preferences = [], (("query", "reference", "train"), ("reference", "query", "train"))
    for source, names, regions in zip(sources, preferences, (args.query_regions, "whole")):
        if isinstance(source, str) and folder and weights:
            if regions not in caches:
                caches[regions] = open_cache(folder, weights, args, regions, stack)
            collections.append(read_folder(source, *caches[regions], args))
        elif isinstance(source, Descriptors):
            collections.append(read_file(source, names, args.images))
    queries, archive = collections[0], collections[-1]
    if archive.image_of is not None:
        raise InputError(f"{shown(archive.source)}: `query` is described in regions, which an archive is not; extract "
                         "it without --query-regions")
    same = same_files(queries, archive)
    links = told(queries, archive, same)
    if same and queries is archive:
        again = {i for i, _ in same}
        queries = archive = archive.only([i for i in range(len(archive.ids)) if i not in again])
    return queries, archive, links, None if any(isinstance(s, Descriptors) for s in sources) else caches.get(
        args.query_regions)


def write_found(args: argparse.Namespace) -> list[Pair]:
    """Run the command line: the report, and its pairs."""
    check_args(args)
    decided = read_decisions(args.decisions) if args.decisions else {}
    report = OutputFolder(args.output, "-o", older_report, besides=filter(None, (args.queries, args.archive)))
    report.check(*FILES)
    with contextlib.ExitStack() as stack:
        sources = open_sources(args, stack)
        stack.enter_context(report).add(*FILES)
        run = stack.enter_context(record(report.path / "run.json", args))
        verify = not args.no_verify and all(isinstance(source, str) or args.images for source in sources)
        if not verify and (args.threshold or 0) > 0:
            raise InputError(f"--threshold {args.threshold:g} is above 0, which only verified copies reach")
        keeps = verify or any(isinstance(source, str) for source in sources)
        folder = open_cache_folder(args, stack) if keeps else None
        with run.stage("describe"):
            queries, archive, same, describer = read_collections(sources, folder, args, stack)
        check_comparable(queries, archive)
        run.counts |= {"queries": len(queries.ids), "references": len(archive.ids), "same_files": len(same),
                       "skipped": len(queries.skipped) + len(archive.skipped) * (archive is not queries)}
        measured = None
        if folder and describer:
            with run.stage("measure precision"):
                measured = calibrate(archive, describer[0], describer[1], folder, args)
        calibration, threshold = read_calibration(args, queries, archive, measured, verify), args.threshold
        if calibration and args.precision is not None:
            advice = "; --threshold 0 takes what local features verify" if verify and measured else ""
            threshold = calibration.threshold(args.precision, "--precision", advice)
        with run.stage("search"):
            pairs, matches = find_pairs(queries, archive, args.topk, args.ngpu), None
        if folder and verify:
            with run.stage("verify"):
                pairs, matches = verify_pairs(queries, archive, pairs, folder, args.workers)
        with run.stage("write"):
            write_report(report, queries, archive, pairs, same, matches, threshold, calibration, args.pairs,
                         decided, args.null)
            found = read_pairs(report.path / "pairs.csv")
        run.counts |= {"pairs": len(found), "copies": sum(pair.verdict == COPY for pair in found)}
        if args.zip:
            with run.stage("pack"):
                pack(report, args.zip)
            print(f"packed: {args.zip}")
    return found


class Pair(NamedTuple):
    """A row of pairs.csv; None where it says nothing."""
    query: str  # path, or id of a descriptor file
    reference: str
    score: float | None  # above 0, up to 1: a verified copy; else minus the squared distance of the descriptors
    verdict: str | None  # copy, shares a part, none, not verifiable
    precision: float | None  # fraction of copies among pairs of this score and above
    blank: bool  # an image of one flat colour, whose scores tell nothing
    inliers: int | None  # local features that agree
    coverage_query: float | None  # part of the image that both show
    coverage_reference: float | None
    outline: list[float] | None  # corners of the reference in the query, px: x y of top left, then clockwise
    region: list[float] | None  # of the query, nearest to the reference: left, top, right, bottom; None: the whole
    group: int | None  # within one collection: of images that verified copies link
    same_file: str | None  # the two are names of one file: what kind of link


def read_pairs(file: Path) -> list[Pair]:
    """The rows of a pairs.csv, best first."""
    kinds: dict[str, Callable[[str], Any]] = {
        "score": float, "verdict": str, "precision": float, "inliers": int, "coverage_query": float,
        "coverage_reference": float, "outline": lambda text: list(map(float, text.split())),
        "region": lambda text: list(map(float, text.split(","))), "group": int, "same_file": str}
    with open(file, newline="", encoding="utf-8") as lines:
        return [Pair(row["query_id"], row["reference_id"], blank=bool(row["blank"]),
                     **{name: kind(row[name]) if row.get(name) else None for name, kind in kinds.items()})
                for row in csv.DictReader(lines)]


def find_copies(queries: str | Path, archive: str | Path | None = None, *, output: str | Path,
                exp: str | None = None, weight: str | Path | None = None, backbone_weights: str | Path | None = None,
                cache: str | Path | None = None, exclude: str | Sequence[str] = (), hash: bool = False,
                query_regions: str | int = "whole", topk: int = TOPK, threshold: float | None = None,
                precision: float | None = None, copies_ratio: float | None = None, no_verify: bool = False,
                workers: int | None = None, pairs: int = ON_PAGE, images: str | Path | None = None,
                decisions: str | Path | None = None, null: bool = False, ngpu: int = -1,
                flags: Sequence[str] = ()) -> list[Pair]:
    """Which of `queries` are copies of images in `archive`; without an archive, which images of `queries` are copies of
    each other. Writes the report of find_copies.py to the folder `output`, which is packed too where it ends in .zip,
    and returns its pairs, best first.

        from copydet import find_copies
        for pair in find_copies("queries", "archive", output="report", precision=0.9):
            print(pair.query, pair.reference, pair.score, pair.verdict)

    The other arguments are the command's flags, which find_copies.py --help tells; `flags` are those after `--`. What
    cannot be read is in skipped.csv of the report.

    Raises InputError for a wrong input, before any work; WorkError or OSError for what failed while working: what was
    described is kept, and the same call goes on.
    """
    args = argparse.Namespace(**locals())
    for name, kind in (("threshold", float), ("precision", float), ("copies_ratio", float), ("topk", int),
                       ("pairs", int), ("workers", int), ("ngpu", int), ("query_regions", str)):
        value = getattr(args, name)
        try:
            setattr(args, name, value if value is None else kind(value))
        except (TypeError, ValueError):
            raise InputError(f"{name}={value!r}: not a number") from None
    for name in ("queries", "archive", "output", "weight", "backbone_weights", "cache", "images",
                 "decisions"):
        if getattr(args, name) is not None:
            setattr(args, name, os.fspath(getattr(args, name)))
    args.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    args.flags, args.workers = list(map(str, flags)), args.workers or count_cores()
    args.zip = Path(args.output) if Path(args.output).suffix.lower() == ".zip" else None
    args.output = str(args.zip.with_suffix("")) if args.zip else args.output
    with database(cache or Path(args.output) / "cache", "what was described before is kept"):
        return write_found(args)
