#!/usr/bin/env python3
"""Find copies: from two folders of images to a page of answers.

    python scripts/find_copies.py QUERIES ARCHIVE -o report                  what of QUERIES is in ARCHIVE?
    python scripts/find_copies.py image.jpg ARCHIVE -o report                one picture
    python scripts/find_copies.py IMAGES -o report                           near-duplicates within one folder
    python scripts/find_copies.py QUERIES ARCHIVE -o report --exp v31        described by the experiment v31
    python scripts/find_copies.py queries.h5 archive.h5 -o report            descriptor files

Images are described by the network that comes with the project, exp/default.safetensors, unless --exp, --weight or
--backbone-weights names another. train.py does it, with flags of its own after `--`: -- --input-size 448 --device cpu.
What is described stays in the cache: the next run describes only images that are new or changed (size or time; --hash:
content), tries again those that it had no leave or memory to read, and forgets those that are gone. A run that was
killed goes on from its last chunk. --query-regions 7 looks at parts of each query too, for copies that fill a part.

The ten best answers to each query are then verified: local features of both images are compared, and geometry decides
whether the query shows the archive's image (copy), a part of it (shares a part: a logo, text, frame or texture), or
cannot tell (not verifiable: blank, tiny). Precision is measured on edited copies of some images of the archive, which
go the same way as the queries: once, and again when the archive has doubled.

The report is a folder that opens from disk: index.html with thumbnails, and the outline of the archive's image in the
query; pairs.csv; and skipped.csv, the images that could not be read. -o report.zip packs it too, as one file to send.
Within one collection duplicates.txt lists, of each group on the page, the files but for the largest, least compressed,
oldest one; nothing is ever deleted. Decisions made on the page stay in the browser, and are saved as decisions.csv
(query, reference, verdict, score): with --decisions FILE a later run leaves rejected pairs out, and prints how precise
the judged ones were. Search is exact. pairs.csv, best first:

    query_id, reference_id   paths, or ids of descriptor files
    score          above 0, up to 1, for verified copies; else minus the squared L2 distance of the descriptors, nearer
                   to 0 where the images share a part
    blank          yes where an image shows one flat colour: such images are as like to each other as copies are. Where
                   there is a threshold they are left out
    inliers, coverage_query, coverage_reference, verdict, outline   of verification, see verify.py
    precision      fraction of copies among pairs of this score and above
    group          within one collection: number of the group that verified copies link
    same_file      two names of one file, hard or symbolic links, are no copies: they stand last, without a score;
                   within one collection only one of the names is searched
"""
from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sqlite3
import sys
from pathlib import Path

from copydet.cache import Cache, Extraction
from copydet.checkpoints import ABOUT_DEFAULT, DEFAULT, newest_checkpoint
from copydet.common import ROOT, InputError, OutputFolder, check_output, database, is_page, run_main, shown
from copydet.copies import (Collection, calibrate, check_comparable, find_pairs, read_calibration, read_file,
                            read_folder, same_files, told, verify_pairs)
from copydet.decisions import read_decisions
from copydet.descriptors import Descriptors
from copydet.images import FOLDERS, IMAGE, what_is
from copydet.options import Parser, fraction, processes, score
from copydet.page import pack, write_report
from copydet.regions import WHOLE, parse_regions
from copydet.search import count_gpus

H5_ENDINGS = (".h5", ".hdf5", ".hdf")
MOST_PAIRS = 50_000  # what a page can be as high as in every browser
FILES = ("index.html", "pairs.csv", "skipped.csv", "duplicates.txt")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


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
    if args.topk < 1 or not 0 < args.pairs <= MOST_PAIRS:
        raise InputError(f"--topk is at least 1, --pairs from 1 to {MOST_PAIRS:,}")
    if args.images and not any((Path(args.images) / folder).is_dir() for folder in FOLDERS.values()):
        raise InputError(f"--images {args.images}: none of {', '.join(FOLDERS.values())} in it")
    ours = {"--mode", "--exp", "--target-set", "--weight", "--backbone-weights", "--dryrun", "--eval-subset"}
    if taken := ours & set(args.flags):
        raise InputError(f"{', '.join(sorted(taken))} cannot be given to train.py after --")
    if args.zip:
        check_output("-o", args.zip)
    args.ngpu = count_gpus(args.ngpu)
    args.decided = read_decisions(args.decisions) if args.decisions else {}
    if args.archive and os.path.realpath(args.archive) == os.path.realpath(args.queries):
        args.archive = None


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
    extraction = Extraction(weights, args.flags, folder, regions, args.no_verify and args.query_regions == "whole")
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
    same = same_files(queries, archive)
    links = told(queries, archive, same)
    if same and queries is archive:
        again = {i for i, _ in same}
        queries = archive = archive.only([i for i in range(len(archive.ids)) if i not in again])
    return queries, archive, links, None if any(isinstance(s, Descriptors) for s in sources) else caches.get(
        args.query_regions)


def find_copies(args: argparse.Namespace) -> None:
    """Run the command line."""
    check_args(args)
    report = OutputFolder(args.output, "-o", older_report, besides=filter(None, (args.queries, args.archive)))
    report.check(*FILES)
    with contextlib.ExitStack() as stack:
        sources = open_sources(args, stack)
        stack.enter_context(report).add(*FILES)
        verify = not args.no_verify and all(isinstance(source, str) or args.images for source in sources)
        if not verify and (args.threshold or 0) > 0:
            raise InputError(f"--threshold {args.threshold:g} is above 0, which only verified copies reach")
        keeps = verify or any(isinstance(source, str) for source in sources)
        folder = open_cache_folder(args, stack) if keeps else None
        queries, archive, same, describer = read_collections(sources, folder, args, stack)
        check_comparable(queries, archive)
        measured = None
        if folder and describer and not describer[1].calibrates:
            measured = calibrate(archive, describer[0], describer[1], folder, args)
        calibration, threshold = read_calibration(args, queries, archive, measured), args.threshold
        if calibration and args.precision is not None:
            threshold = calibration.threshold(args.precision, "--precision")
        pairs, matches = find_pairs(queries, archive, args.topk, args.ngpu), None
        if folder and verify:
            pairs, matches = verify_pairs(queries, archive, pairs, folder, args.workers)
        write_report(report, queries, archive, pairs, same, matches, threshold, calibration, args.pairs,
                     args.decided, args.null)
        if args.zip:
            pack(report, args.zip)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="Flags after -- go to train.py.", allow_abbrev=False)
    parser.add_argument("queries", metavar="QUERIES", help="folder of images, image, or descriptor file")
    parser.add_argument("archive", metavar="ARCHIVE", nargs="?", help="the same; left out: QUERIES within itself, or "
                        "query against reference where a descriptor file holds both")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the report; "
                        "with a name that ends in .zip also that file, of the folder without the ending")
    g = parser.add_argument_group("what describes images")
    g.add_argument("--exp", metavar="NAME", help="the newest checkpoint of exp/NAME")
    g.add_argument("--weight", metavar="FILE", help="this checkpoint, or what else train.py takes: for ONNX or "
                   "TorchScript of other programs with -- --preset NAME, or -- --input-size PX ...")
    g.add_argument("--backbone-weights", metavar="FILE", help="raw features of these weights (with -- -a ARCH)")
    g.add_argument("--cache", metavar="DIR", help="what was described, for any number of reports; can be deleted any "
                   "time (default: cache in the report)")
    g.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave out images and folders of "
                   "this name, or of this path below the folder, such as '*_small.jpg'; can be given again")
    g.add_argument("--hash", action="store_true", help="tell changed images by their content, not by size and time")
    g.add_argument("--query-regions", default="whole", metavar="WHICH", help="describe each query in several regions, "
                   "for copies that fill a part of it: whole, 7, 19, or boxes as train.py takes them (default: whole)")
    g = parser.add_argument_group("pairs")
    g.add_argument("--topk", type=int, default=10, metavar="K", help="answers per query (default: %(default)s)")
    g.add_argument("--threshold", type=score, metavar="SCORE", help="pairs.csv holds pairs from this score on, the "
                   "page starts with it; 0: verified copies (default: all)")
    g.add_argument("--precision", type=fraction, metavar="P", help="the threshold that reaches this precision, as "
                   "measured on edited copies of the archive's images; of descriptor files by their calibration")
    g.add_argument("--copies-ratio", type=fraction, metavar="R", help="fraction of the queries that have a copy, for "
                   "the precision (default: the calibration's)")
    g.add_argument("--no-verify", action="store_true", help="do not compare the images of the best pairs by local "
                   "features and geometry")
    g.add_argument("-j", "--workers", type=processes, default=os.cpu_count(), metavar="N", help="processes that do so "
                   "(default: number of CPUs)")
    g.add_argument("--pairs", type=int, default=20_000, metavar="N", help="the best N pairs are on the page (default: "
                   "%(default)s)")
    g.add_argument("--images", "--photos", metavar="DIR", help="folder with query_images and reference_images, for "
                   "thumbnails of descriptor files")
    g.add_argument("--decisions", metavar="FILE", help="decisions.csv as the page saves it: rejected pairs are left "
                   "out, and the precision of the judged ones is printed beside what the calibration promised")
    g.add_argument("--null", action="store_true", help="end the paths in duplicates.txt with a NUL in place of a line "
                   "break, for xargs -0")
    g.add_argument("--ngpu", type=int, default=-1, metavar="N", help="GPUs to search on; 0: CPU; default: all")
    args = parser.parse_args(argv[:at])
    args.flags = argv[at + 1:]
    args.zip = Path(args.output) if Path(args.output).suffix.lower() == ".zip" else None
    args.output = str(args.zip.with_suffix("")) if args.zip else args.output
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def work() -> None:
        with database(args.cache or Path(args.output) / "cache", "what was described before is kept"):
            find_copies(args)

    return run_main(work, "stopped; what was described is kept")


if __name__ == "__main__":
    sys.exit(main())
