"""Collections of images, the pairs between them, verified by local features, and how precise their scores are."""
from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from copydet.cache import Cache, Extraction, inode_of, stamp_files, update
from copydet.calibration import DUPLICATE, Calibration, measure_answers
from copydet.common import InputError, shown, warn
from copydet.descriptors import COMPARABLE, BlockRows, Descriptors
from copydet.images import (FOLDERS, IMAGE_ENDINGS, Odd, beside, find_image, id_of, images_by_id, not_read,
                            read_skipped, write_skipped)
from copydet.options import LEAST_CALIBRATED
from copydet.search import nearest_rows, search_topk
from copydet.verification import COPY, PER_JOB, Match, Verifier, batches, pair_score

if TYPE_CHECKING:
    from copydet.edits import Source

COPIES = 500  # edited copies on which precision is measured
CANDIDATES = 10  # of a query, whose local features are compared
PAIRS = np.dtype([("query", int), ("reference", int), ("score", float), ("match", int)])


# ---------------------------------------------------------------------------------------------------------------------
# Collections: images with their descriptors


class ArrayRows(BlockRows):
    """Rows [n, dim] in memory."""

    def __init__(self, rows: np.ndarray, ids: np.ndarray) -> None:
        self.rows, self.ids, self.shape = rows, ids, rows.shape

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.rows[start:stop]


@dataclass
class Collection:
    """n images: ids [n] as pairs.csv has them, names [n] as people read them, files [n] or None where there is no image
    to show, what all names of a file have in common [n], or None, rows [n, dim], whether they are blank bool [n],
    attributes of their descriptor file, [(path, reason)] of skipped images; where rows are of regions, several of an
    image one after another, image_of: the image of each row, and regions [rows, 4], else None."""
    source: str
    ids: list
    names: list
    files: list
    inodes: list
    rows: BlockRows
    blank: np.ndarray
    attrs: dict
    skipped: Odd = field(default_factory=list)
    image_of: np.ndarray | None = None
    regions: np.ndarray | None = None

    def only(self, kept: list[int]) -> Collection:
        """Those of the images."""
        ids, names, files, inodes = ([values[i] for i in kept]
                                     for values in (self.ids, self.names, self.files, self.inodes))
        rows = ArrayRows(self.rows.read()[kept], np.array(ids))
        return replace(self, ids=ids, names=names, files=files, inodes=inodes, rows=rows, blank=self.blank[kept])


def read_folder(source: str, cache: Cache, extraction: Extraction, args: argparse.Namespace) -> Collection:
    """Collection of a folder, or of one image, through the cache. Raises InputError: no image, none readable."""
    root = os.path.realpath(source)
    stamps, odd = stamp_files(root, args.hash, args.exclude)
    if not stamps:
        raise InputError(f"no images in {shown(source)} ({', '.join(IMAGE_ENDINGS)}){not_read(odd)}"
                         + (f"; {shown(odd[0][0])}: {odd[0][1]}" if odd else ""))
    odd += update(cache, root, stamps, odd, extraction)
    paths, rows, blank, skipped = cache.read(root, set(stamps))
    skipped = [(shown(path), reason) for path, reason in odd + skipped]
    if not paths:
        write_skipped(Path(args.output) / "skipped.csv", skipped)
        raise InputError(f"none of the {len(stamps)} images in {shown(source)} can be read, see "
                         f"{Path(args.output) / 'skipped.csv'}")
    names = [shown(os.path.relpath(path, root) if path != root else os.path.basename(source)) for path in paths]
    ids = [shown(os.path.join(source, os.path.relpath(path, root)) if path != root else source) for path in paths]
    boxes = np.tile(np.array(extraction.boxes), (len(paths), 1))
    image_of = np.repeat(np.arange(len(paths)), len(extraction.boxes))
    several = len(extraction.boxes) > 1
    return Collection(source, ids, names, paths, [stamps[path].inode for path in paths],
                      ArrayRows(rows.reshape(len(image_of), -1), np.array(ids)[image_of]), blank, cache.attrs(),
                      skipped, image_of if several else None, boxes if several else None)


def read_file(file: Descriptors, preference: Sequence[str], images: str | None) -> Collection:
    """Collection of the first group in `preference` that an open descriptor file holds; its images by id below the
    folder `images`, the blank ones from blank.csv beside it."""
    file.check_checkpoint()
    name = next(name for name in preference if name in file.groups)
    rows, by_id = file[name], {}
    if images:
        by_id = images_by_id(Path(images).resolve() / FOLDERS[name])
    ids = rows.images.tolist()
    files = [find_image(by_id, name) for name in ids]
    inodes = [file and os.path.exists(file) and inode_of(file, os.stat(file)) or None for file in files]
    blank = [id_of(path) for path, _ in read_skipped(beside(Path(file.path), "blank"))
             if FOLDERS[name] in Path(path).parts]
    return Collection(str(file.path), ids, ids, files, inodes, rows, np.isin(ids, blank), file.attrs,
                      image_of=rows.image_of, regions=rows.regions)


def check_comparable(queries: Collection, archive: Collection) -> None:
    """InputError where the distances between two collections would mean nothing."""
    if queries.rows.shape[1] != archive.rows.shape[1]:
        raise InputError(f"{queries.source} has {queries.rows.shape[1]} dimensions, "
                         f"{archive.source} {archive.rows.shape[1]}")
    for name in COMPARABLE:
        a, b = (str(c.attrs.get(name, "unknown")) for c in (queries, archive))
        if a != b and "unknown" not in (a, b):
            raise InputError(f"{queries.source} and {archive.source} are of different {name}: {a[:12]}, {b[:12]}")


def read_calibration(args: argparse.Namespace, queries: Collection, archive: Collection, measured: str | None,
                     verified: bool) -> Calibration | None:
    """Calibration that was measured; else that of the descriptors, which says nothing of images that are verified or
    described in regions; or None, which is an error with --precision."""
    if measured:
        return Calibration(measured, archive.source, len(archive.ids), args.copies_ratio)
    images = all(isinstance(collection.rows, ArrayRows) for collection in (queries, archive))
    otherwise_found = images and (verified or queries.image_of is not None)
    for collection in (archive, queries):
        if not otherwise_found and "calibration" in collection.attrs:
            return Calibration(collection.attrs["calibration"], collection.source, len(archive.ids), args.copies_ratio)
    why = (f"{2 * LEAST_CALIBRATED} usable images are the least on which precision is measured" if images else
           f"the descriptors of {shown(archive.source)} carry no calibration (train.py --calibrate)")
    if args.precision is not None:
        raise InputError(f"--precision: {why}; --threshold takes a score, 0: verified copies")
    warn(f"{why}: scores only")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Search


def same_files(queries: Collection, archive: Collection) -> list[tuple[int, int]]:
    """[(query, reference)] that are one file under two names. Within one collection: each further name of a file, and
    the one that is no link, or comes first."""
    names: dict = {}
    for j, inode in enumerate(archive.inodes):
        if inode is not None:
            names.setdefault(inode, []).append(j)
    if archive is not queries:
        return [(i, j) for i, inode in enumerate(queries.inodes) for j in names.get(inode, ())
                if os.path.abspath(queries.ids[i]) != os.path.abspath(archive.ids[j])]
    pairs = []
    for several in names.values():
        first = min(several, key=lambda i: os.path.islink(archive.files[i])) if len(several) > 1 else None
        pairs += [(i, first) for i in several if first not in (i, None)]
    return sorted(pairs)


def told(queries: Collection, archive: Collection, same: list[tuple[int, int]]) -> list[tuple[str, str, str]]:
    """Those pairs as [(query id, reference id, what the second name is)]."""
    def kind(a: str, b: str) -> str:
        links = os.path.islink(a) or os.path.islink(b) or os.path.realpath(a) == os.path.realpath(b)
        return "symbolic link" if links else "hard link"

    return [(queries.ids[i], archive.ids[j], kind(queries.files[i], archive.files[j])) for i, j in same]


def find_pairs(queries: Collection, archive: Collection, k: int, ngpu: int) -> np.ndarray:
    """The k nearest of each query, exactly: PAIRS, best first, their match -1: none yet. An image is no copy of itself,
    under no name; within one collection a pair is listed once."""
    within = archive is queries
    shared = set(filter(None, queries.inodes)).intersection(archive.inodes)
    overlap = max(Counter(inode for inode in archive.inodes if inode in shared).values(), default=0)
    k_search = min(k + max(within, overlap), len(archive.rows))
    found = search_topk(queries.rows.read(), archive.rows, k_search, np.empty(0, np.int64), ngpu, progress=True,
                        image_of=queries.image_of)
    found = found[np.lexsort((found["reference"], -found["score"], found["query"]))]
    found = np.rec.fromarrays([found["query"], found["reference"], found["score"], np.full(len(found), -1)], PAIRS)
    if within:
        found = found[found["query"] != found["reference"]]
    elif overlap:
        found = found[[queries.inodes[i] is None or queries.inodes[i] != archive.inodes[j]
                       for i, j in found[["query", "reference"]].tolist()]]
    found["score"] += 0.0  # no -0.0
    first = np.searchsorted(found["query"], found["query"])
    found = found[np.arange(len(found)) - first < k]
    if within:
        a, b = found["query"].copy(), found["reference"].copy()
        found["query"], found["reference"] = np.minimum(a, b), np.maximum(a, b)
        found = found[np.unique(found[["query", "reference"]], return_index=True)[1]]
    return found[np.lexsort((found["reference"], found["query"], -found["score"]))]


def nearest_regions(queries: Collection, archive: Collection, pairs: np.ndarray) -> np.ndarray | None:
    """The region of the query that is nearest to the reference, of each of the PAIRS [n, 4]; None where queries are
    described as a whole."""
    if queries.image_of is None or queries.regions is None:
        return None
    return queries.regions[nearest_rows(queries.rows.read(), archive.rows, pairs, queries.image_of)]


def verify_pairs(queries: Collection, archive: Collection, pairs: np.ndarray, folder: Path,
                 workers: int) -> tuple[np.ndarray, list[Match]]:
    """Compare the images of the CANDIDATES best pairs of each query -> PAIRS with their new scores and the numbers of
    their matches, best first; and the matches. Local features of the archive are kept in `folder`."""
    pairs = pairs[np.lexsort((pairs["reference"], -pairs["score"], pairs["query"]))]
    rank = np.arange(len(pairs)) - np.searchsorted(pairs["query"], pairs["query"])
    chosen = [n for n in np.flatnonzero(rank < CANDIDATES).tolist()
              if queries.files[pairs["query"][n]] and archive.files[pairs["reference"][n]]]
    by_query = [list(part) for _, part in itertools.groupby(chosen, lambda n: pairs["query"][n])]
    matches: list[Match] = []
    with Verifier(workers, folder) as verifier:
        verifier.describe(sorted({archive.files[j] for j in pairs["reference"][chosen]}))
        jobs = ([(queries.files[pairs["query"][part[0]]], [archive.files[j] for j in pairs["reference"][part]])
                 for part in block] for block in batches(by_query, PER_JOB))
        with tqdm(total=len(by_query), desc="verifying", unit=" queries", disable=None, delay=1) as bar:
            for done in verifier.verify(jobs):
                matches += [match for query in done for match in query.matches]
                bar.update(len(done))
    pairs["match"][chosen] = np.arange(len(chosen))
    pairs["score"][chosen] = [pair_score(match, near) for match, near in zip(matches, pairs["score"][chosen])]
    return pairs[np.lexsort((pairs["reference"], pairs["query"], -pairs["score"]))], matches


def calibrate(archive: Collection, cache: Cache, extraction: Extraction, folder: Path,
              args: argparse.Namespace) -> str | None:
    """The calibration of answers in an archive, JSON: as it was measured when the archive was at least half as large,
    or measured now, on edited copies of some of its images that go the way of all queries. None for too small an
    archive."""
    from copydet.edits import make_copies, plan_copies  # AugLy takes a second
    settings = f"{args.query_regions}{', local features' * (not args.no_verify)}"
    root, n_references = os.path.realpath(archive.source), len(archive.ids)
    known = cache.measured(root, settings)
    if known and n_references <= 2 * known["references"]:
        return json.dumps(known)
    usable = [i for i in range(n_references) if archive.files[i] and not archive.blank[i]]
    n = min(COPIES, len(usable) // 2)
    if n < LEAST_CALIBRATED:
        return None
    print(f"measuring precision on {n} edited copies of images in {shown(archive.source)}", file=sys.stderr)
    chosen = np.sort(np.random.default_rng(0).choice(usable, n, replace=False))
    plan = plan_copies([archive.files[i] for i in chosen], "hard")
    with tempfile.TemporaryDirectory(prefix=extraction.prefix, dir=folder) as copies:
        files = make_copies(plan, "hard", Path(copies), args.workers)
        made = [k for k, file in enumerate(files) if file]
        described = extraction.describe([str(files[k]) for k in made])[0]
        rows = [(k, row) for k, (row, _) in zip(made, described) if row is not None]
        queries = of_copies([(str(files[k]), row) for k, row in rows], len(extraction.boxes))
        pairs = find_pairs(queries, archive, CANDIDATES, args.ngpu)
        if not args.no_verify:
            pairs, _ = verify_pairs(queries, archive, pairs, folder, args.workers)
    made = [k for k, _ in rows]
    is_true, counted = judge(pairs, archive, queries, chosen[made], [plan[k].donors for k in made])
    doubtful = np.flatnonzero(~is_true & counted & (pairs["score"] > 0))  # what local features took for a copy
    counted[doubtful] = ~are_copies(archive, chosen[made][pairs["query"][doubtful]], pairs["reference"][doubtful],
                                    folder, args.workers)
    measured = measure_answers(pairs["score"][counted], is_true[counted], len(made), n_references)
    cache.keep_measured(root, settings, measured | {"references": n_references})
    return json.dumps(measured)


def are_copies(archive: Collection, i: np.ndarray, j: np.ndarray, folder: Path, workers: int) -> np.ndarray:
    """bool [n]: whether images i [n] and j [n] of the archive are copies of each other, by their local features."""
    with Verifier(workers, folder) as verifier:
        verifier.describe([archive.files[k] for k in j])
        jobs = batches([(archive.files[a], [archive.files[b]]) for a, b in zip(i, j)], PER_JOB)
        return np.array([query.matches[0].verdict == COPY for done in verifier.verify(jobs) for query in done], bool)


def of_copies(copies: Sequence[tuple[str, np.ndarray]], regions: int) -> Collection:
    """Collection of copies [(file, row of all its regions)]."""
    names, image_of = [file for file, _ in copies], np.repeat(np.arange(len(copies)), regions)
    rows = np.array([row for _, row in copies]).reshape(len(image_of), -1)
    return Collection("copies", names, names, names, [None] * len(names), ArrayRows(rows, np.array(names)[image_of]),
                      np.zeros(len(names), bool), {}, [], image_of if regions > 1 else None)


def judge(pairs: np.ndarray, archive: Collection, queries: Collection, originals: np.ndarray,
          donors: Sequence[Sequence[Source]]) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of the PAIRS [n] is of a copy and its original, and whether it counts: not with an image that an
    edit may have pasted in, nor with one as near to the original as the nearest tenth of the copies are, its duplicate.

    `originals`: of the queries, as rows of the archive [m]; `donors`: of the edits of each.
    """
    rows, found = archive.rows.read(), pairs["reference"]
    source = originals[pairs["query"]]
    is_true = found == source
    image_of = np.arange(len(originals)) if queries.image_of is None else queries.image_of
    near = np.einsum("ij,ij->i", queries.rows.read(), rows[originals[image_of]])
    nearest = np.maximum.reduceat(near, np.searchsorted(image_of, np.arange(len(originals))))
    duplicate = np.einsum("ij,ij->i", rows[source], rows[found]) >= np.quantile(nearest, DUPLICATE)
    pasted = np.array([any(archive.files[j] == donor.path for donor in donors[i])
                       for i, j in pairs[["query", "reference"]].tolist()], bool)
    return is_true, is_true | ~(duplicate | pasted)
