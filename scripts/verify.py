#!/usr/bin/env python3
"""Verify answers: do the images nearest to each query by descriptor show the same? Local features and geometry decide.

    python scripts/verify.py exp/v31/extract/fb-isc-submission.h5 input -o pairs.csv
    python scripts/verify.py sub.h5 input -o pairs.csv --candidates 20 -j 8 --cache features
    python scripts/eval_metrics.py pairs.csv input/public_ground_truth.csv

The images are those of DIR/query_images and DIR/reference_images, by id. pairs.csv holds a row for each candidate:

    query_id, reference_id
    score                    above 0, up to 1, where local features say copy; else minus the squared distance of the
                             descriptors, nearer to 0 where a part is shared. Comparable between queries
    inliers                  pairs of local features that agree with one affine transform
    coverage_query, coverage_reference   the part of each image that overlaps and is alike there
    verdict                  copy; shares a part (a logo, text, frame or texture); none; not verifiable (blank, tiny,
                             unreadable)
    outline                  the reference's corners in the query: x y of top left, top right, bottom right, bottom left

Only images that are asked for are opened. References' features are kept in --cache, and computed again if an image's
file changes. A run that was killed goes on where it was, in OUTPUT.blocks; the result is the same, whatever -j is.
Images that cannot be read are listed beside the output, in pairs.skipped.csv; pairs.run.json tells the run.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from copydet.common import (InputError, OutputFolder, check_file, check_output, database, first_three, locked,
                            open_folder, read_json, replacing, run_main, settings_in)
from copydet.descriptors import Descriptors
from copydet.images import IMAGE_ENDINGS, Odd, find_image, images_by_id, read_skipped, write_skipped
from copydet.machine import count_cores
from copydet.options import positive, processes
from copydet.record import check_record, record
from copydet.search import search_topk
from copydet.verification import PER_JOB, Match, Verifier, pair_score, stamp

COLUMNS = ("query_id", "reference_id", "score", "inliers", "coverage_query", "coverage_reference", "verdict", "outline")
MEMORY = 2**27  # bytes for the search


@dataclass(frozen=True)
class Candidates:
    """The references nearest to each query, nearest first: query ids [n], reference ids [n, k], scores [n, k]."""
    queries: np.ndarray
    references: np.ndarray
    scores: np.ndarray


def find_candidates(path: str, k: int) -> Candidates:
    """The `k` references nearest to each query of a descriptor file, exactly."""
    with Descriptors(path) as file:
        file.check_checkpoint()
        queries, references = file["query"], file["reference"]
        k = min(k, len(references))
        found = search_topk(queries.read(), references, k, np.empty(0, np.int64), memory=MEMORY,
                            image_of=queries.image_of)
        found = found[np.lexsort((found["reference"], -found["score"], found["query"]))].reshape(-1, k)
        return Candidates(queries.images, references.ids[found["reference"]], found["score"])


def find_images(folder: Path, ids: Iterable[str]) -> dict[str, str]:
    """Path of the image of each id. Subfolders are walked only for those that are not on top.

    Raises InputError: no such folder, ids without an image.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    def on_top(name: str) -> str | None:
        paths = (f"{folder}/{name}{ending}" for ending in IMAGE_ENDINGS)
        return next((path for path in paths if os.path.exists(path) and not os.path.isdir(path)), None)

    found = {name: on_top(name) for name in ids}
    if None in found.values():
        below = images_by_id(folder)
        found |= {name: find_image(below, name) for name, path in found.items() if path is None}
    if absent := [name for name, path in found.items() if path is None]:
        raise InputError(f"{folder}: no image of {first_three(absent)}")
    return {name: os.path.realpath(path) for name, path in found.items() if path}


def rows_of(query: str, references: Sequence[str], nearness: Sequence[float], matches: Sequence[Match]) -> list[tuple]:
    """Rows of the CSV of one query's candidates, best first."""
    rows = []
    for reference, near, match in zip(references, nearness, matches):
        rows.append((query, reference, round(pair_score(match, near), 6), match.inliers, round(match.coverage_query, 3),
                     round(match.coverage_reference, 3), match.verdict, match.outline_text))
    return sorted(rows, key=lambda row: (-row[2], row[1]))


def verify_blocks(candidates: Candidates, query_paths: dict[str, str], reference_paths: dict[str, str],
                  verifier: Verifier, folder: Path) -> list[Path]:
    """Verify what is not finished, in blocks: -> their files, JSON, each rows of the CSV and unreadable queries."""
    blocks = [range(i, min(i + PER_JOB, len(candidates.queries))) for i in range(0, len(candidates.queries), PER_JOB)]
    todo = [block for block in blocks if not block_file(folder, block).is_file()]
    jobs = ([(query_paths[candidates.queries[i]], [reference_paths[name] for name in candidates.references[i]])
             for i in block] for block in todo)
    bar = tqdm(total=len(candidates.queries), desc="verifying", unit=" queries", disable=None)
    bar.update(len(candidates.queries) - sum(map(len, todo)))
    for block, done in zip(todo, verifier.verify(jobs)):
        rows = [row for i, verified in zip(block, done) for row in rows_of(
            candidates.queries[i], candidates.references[i], candidates.scores[i], verified.matches)]
        skipped = [(query_paths[candidates.queries[i]], verified.reason) for i, verified in zip(block, done)
                   if verified.reason]
        with replacing(block_file(folder, block)) as temporary:
            temporary.write_text(json.dumps([rows, skipped]), encoding="utf-8")
        bar.update(len(block))
    bar.close()
    return [block_file(folder, block) for block in blocks]


def block_file(folder: Path, block: range) -> Path:
    return folder / f"{block.start}-{block.stop}.json"


def write_results(output: Path, files: list[Path], skipped: Odd) -> Odd:
    """pairs.csv and pairs.skipped.csv from the finished blocks; `skipped`: unreadable references. Returns all that is
    in the second."""
    with replacing(output) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for file in files:
            rows, unreadable = read_json(file)
            writer.writerows(rows)
            skipped += [(path, reason) for path, reason in unreadable]
    write_skipped(skipped_file(output), skipped)
    return skipped


def record_file(output: Path) -> Path:
    """Where the run is told."""
    return output.with_name(f"{output.stem}.run.json")


def skipped_file(output: Path) -> Path:
    """Where what could not be read is listed."""
    return output.with_name(f"{output.stem}.skipped.csv")


def older_cache(folder: Path) -> list[str]:
    """What a version that listed nothing wrote in a folder: OutputFolder's `older`."""
    return [name for name in os.listdir(folder) if re.fullmatch(r"features-[0-9a-f]{12}\.sqlite", name)]


def verify_submission(args: argparse.Namespace) -> None:
    """Run the command line."""
    check_file(args.submission)
    output = Path(args.output)
    for file in (output, skipped_file(output)):
        check_output("-o", file, [args.submission])
    read_skipped(skipped_file(output))  # where it is there it is ours
    check_record("-o", record_file(output))
    cache = OutputFolder(args.cache, "--cache", older_cache, shared=True) if args.cache else contextlib.nullcontext()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # what the search takes of memory goes with its process
        candidates = pool.submit(find_candidates, args.submission, args.candidates).result()
    queries = find_images(Path(args.dir, "query_images"), candidates.queries.tolist())
    references = find_images(Path(args.dir, "reference_images"), np.unique(candidates.references).tolist())
    folder = output.with_name(f"{output.name}.blocks")
    settings = {"submission": os.path.realpath(args.submission), "stamp": list(stamp(args.submission)),
                "dir": os.path.realpath(args.dir), "candidates": args.candidates}
    with locked(output.with_name(f".{output.name}.lock"), f"-o {output}"), cache:
        open_folder(folder, settings, settings_in(folder) == settings)
        with record(record_file(output), args) as run, Verifier(args.workers, args.cache or folder) as verifier:
            run.counts |= {"queries": len(queries), "references": len(references), "pairs": candidates.references.size}
            with run.stage("describe"):
                passing = verifier.describe(list(references.values()))
            with run.stage("verify"):
                files = verify_blocks(candidates, queries, references, verifier, folder)
            skipped = write_results(output, files, verifier.cache.unreadable(references.values()) + passing)
            run.counts["skipped"] = len(skipped)
        shutil.rmtree(folder)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submission", metavar="SUB.h5", help="descriptors of queries and references")
    parser.add_argument("dir", metavar="DIR", help="folder with query_images and reference_images")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="CSV to write")
    parser.add_argument("--candidates", type=positive, default=10, metavar="K", help="nearest references of each query "
                        "that are verified (default: %(default)s)")
    parser.add_argument("--cache", metavar="DIR", help="keep the references' features in this folder for the next run")
    parser.add_argument("-j", "--workers", type=processes, default=count_cores(), metavar="N", help="processes "
                        "(default: number of cores)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)

    def work() -> None:
        with database(args.cache or f"{args.output}.blocks", "what was verified before is kept"):
            verify_submission(args)

    return run_main(work, "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
