#!/usr/bin/env python3
"""Find copies: from two folders of images to a page of answers.

    python scripts/find_copies.py QUERIES ARCHIVE -o report --exp v31        what of QUERIES is in ARCHIVE?
    python scripts/find_copies.py image.jpg ARCHIVE -o report --exp v31      one picture
    python scripts/find_copies.py IMAGES -o report --exp v31                 near-duplicates within one folder
    python scripts/find_copies.py queries.h5 archive.h5 -o report            descriptor files

Images are described by train.py, with flags of its own after `--`: -- --input-size 448 --device cpu. What is described
stays in the cache: the next run describes only images that are new or changed (size or time; --hash: content), tries
again those that it had no leave or memory to read, and forgets those that are gone. A run that was killed goes on from
its last chunk. --query-regions 7 looks at parts of each query too, for copies that fill a part of it.

The ten best answers to each query are then verified: local features of both images are compared, and geometry decides
whether the query shows the archive's image (copy), a part of it (shares a part: a logo, text, frame or texture), or
cannot tell (not verifiable: blank, tiny). Precision is measured on edited copies of some images of the archive, which
go the same way as the queries: once, and again when the archive has doubled.

The report is a folder that opens from disk: index.html with thumbnails, and the outline of the archive's image in the
query; pairs.csv; and skipped.csv, the images that could not be read. Search is exact. pairs.csv, best first:

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
import csv
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

import copydet
from copydet.calibration import DUPLICATE, Calibration, measure_answers
from copydet.checkpoints import newest_checkpoint, weights_sha256
from copydet.common import (ROOT, InputError, OutputFolder, WorkError, is_page, manifest_of, replacing, run_main, shown,
                            time_of)
from copydet.descriptors import COMPARABLE, BlockRows, Descriptors
from copydet.edits import Source, make_copies, plan_copies
from copydet.images import (BLANK, FOLDERS, IMAGE, IMAGE_ENDINGS, NOT_NOW, Odd, UnreadableImage, beside, find_image,
                            id_of, images_by_id, list_images, not_read, open_thumbnail, read_skipped, what_is,
                            write_skipped)
from copydet.options import LEAST_CALIBRATED, Parser, fraction, processes, score
from copydet.regions import WHOLE, parse_regions
from copydet.search import count_gpus, search_topk
from copydet.verification import ABSTAIN, COPY, PER_JOB, Match, Verifier, batches, pair_score

H5_ENDINGS = (".h5", ".hdf5", ".hdf")
CHUNKS = 2048, 65536  # least and most images per run of train.py; in between as many as are described already
THUMBNAIL = 256  # px
COPIES = 500  # edited copies on which precision is measured
CANDIDATES = 10  # of a query, whose local features are compared
POINTS = 60  # of a match, that the page shows
MOST_PAIRS = 50_000  # what a page can be as high as in every browser


# ---------------------------------------------------------------------------------------------------------------------
# Cache: what train.py described


@dataclass
class Stamp:
    """What tells that a file has changed."""
    size: int
    mtime: int  # nanoseconds
    sha256: str | None = None  # with --hash
    inode: tuple | str | None = field(default=None, compare=False)  # equal for all names of a file

    @classmethod
    def of(cls, path: str, info: os.stat_result, with_hash: bool) -> Stamp:
        return cls(info.st_size, time_of(info), sha256_of(path) if with_hash else None, inode_of(path, info))

    def same(self, other: Stamp) -> bool:
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return (self.size, self.mtime) == (other.size, other.mtime)


class Described(NamedTuple):
    """What is known of an image: its descriptor, float32 [d], and BLANK or nothing; or none, and why."""
    row: np.ndarray | None
    reason: str | None


class Cache:
    """SQLite file of the descriptors of one checkpoint with one set of flags, for any number of roots.

    One row per image: root and path (absolute, bytes), stamp, descriptor (float32) or the reason why there is none;
    with the descriptor of a blank image the reason is BLANK.
    Only one process at a time can have it open.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.db = sqlite3.connect(file, timeout=0)
        self.db.executescript("""
            PRAGMA locking_mode = EXCLUSIVE;
            BEGIN EXCLUSIVE;
            CREATE TABLE IF NOT EXISTS photos (root BLOB, path BLOB, size INTEGER, mtime INTEGER, sha256 TEXT, row BLOB,
                                               reason TEXT, PRIMARY KEY (root, path));
            CREATE TABLE IF NOT EXISTS attrs (name TEXT PRIMARY KEY, value TEXT);
            CREATE TABLE IF NOT EXISTS calibrations (root BLOB PRIMARY KEY, value TEXT);
            COMMIT;""")

    def stamps(self, root: str) -> dict[str, Stamp]:
        """path -> Stamp of what is known below the root."""
        rows = self.db.execute("SELECT path, size, mtime, sha256 FROM photos WHERE root = ? AND (reason IS NULL OR "
                               "reason NOT LIKE '%[Errno %')", (os.fsencode(root),))  # older versions kept these too
        return {os.fsdecode(path): Stamp(*stamp) for path, *stamp in rows}

    def count(self) -> int:
        """Number of images."""
        return self.db.execute("SELECT count(*) FROM photos").fetchone()[0]

    def attrs(self, root: str) -> dict:
        """Attributes of train.py's descriptor files, the calibration measured on this root's images if there is one;
        empty before the first."""
        rows = self.db.execute("SELECT name, value FROM attrs UNION ALL SELECT 'calibration', value FROM calibrations "
                               "WHERE root = ?", (os.fsencode(root),))
        return {name: json.loads(value) for name, value in rows}

    def store(self, root: str, images: list[tuple[str, Stamp, np.ndarray | None, str | None]], attrs: dict) -> None:
        """Write [(path, Stamp, row or None, reason or None)] in one transaction."""
        with self.db:
            self.db.executemany("INSERT OR REPLACE INTO photos VALUES (?, ?, ?, ?, ?, ?, ?)", [
                (os.fsencode(root), os.fsencode(path), stamp.size, stamp.mtime, stamp.sha256,
                 None if row is None else row.tobytes(), reason) for path, stamp, row, reason in images])
            for name, value in attrs.items():
                if name == "calibration" and json.loads(value).get("photos") == "references":
                    self.db.execute("INSERT OR REPLACE INTO calibrations VALUES (?, ?)",
                                    (os.fsencode(root), json.dumps(value)))
                else:
                    self.db.execute("INSERT OR REPLACE INTO attrs VALUES (?, ?)", (name, json.dumps(value)))

    def measured(self, root: str, settings: str) -> dict | None:
        """The calibration of the answers found with these settings in this root, if there is one."""
        row = self.db.execute("SELECT value FROM calibrations WHERE root = ?",
                              (os.fsencode(root) + f"\0{settings}".encode(),)).fetchone()
        return row and json.loads(row[0])

    def keep_measured(self, root: str, settings: str, calibration: dict) -> None:
        """Write such a calibration."""
        with self.db:
            self.db.execute("INSERT OR REPLACE INTO calibrations VALUES (?, ?)",
                            (os.fsencode(root) + f"\0{settings}".encode(), json.dumps(calibration)))

    def touch(self, root: str, stamps: dict[str, Stamp]) -> None:
        """Write new stamps, path -> Stamp, of images whose content is still the same."""
        with self.db:
            self.db.executemany("UPDATE photos SET size = ?, mtime = ?, sha256 = ? WHERE root = ? AND path = ?", [
                (stamp.size, stamp.mtime, stamp.sha256, os.fsencode(root), os.fsencode(path))
                for path, stamp in stamps.items()])

    def forget(self, root: str, paths: list[str]) -> None:
        """Remove what is known of images."""
        with self.db:
            self.db.executemany("DELETE FROM photos WHERE root = ? AND path = ?",
                                [(os.fsencode(root), os.fsencode(path)) for path in paths])

    def read(self, root: str, wanted: set[str]) -> tuple[list[str], np.ndarray, np.ndarray, list[tuple[str, str]]]:
        """Of the `wanted` paths (a set): paths [n] sorted, rows float32 [n, d], whether blank bool [n]; and of the
        others [(path, reason)]."""
        paths, rows, blank, skipped = [], [], [], []
        for path, row, reason in self.db.execute(
                "SELECT path, row, reason FROM photos WHERE root = ? ORDER BY path", (os.fsencode(root),)):
            path = os.fsdecode(path)
            if path in wanted and row is None:
                skipped.append((path, reason))
            elif path in wanted:
                paths.append(path)
                rows.append(np.frombuffer(row, np.float32))
                blank.append(reason == BLANK)
        return paths, np.array(rows), np.array(blank, bool), skipped


def inode_of(path: str, info: os.stat_result) -> tuple | str:
    """What all names of a file have in common, links among them; some file systems number none."""
    return (info.st_dev, info.st_ino) if info.st_ino else os.path.realpath(path)


def stamp_files(root: str, with_hash: bool,
                exclude: Sequence[str] = ()) -> tuple[dict[str, Stamp], list[tuple[str, str]]]:
    """Images of a folder, or one image: path -> Stamp, and [(path, reason)] of what cannot be one."""
    paths, odd = ([root], []) if os.path.isfile(root) else list_images(root, exclude)
    stamps, odd = {}, [(os.path.join(root, path), reason) for path, reason in odd]
    for path in tqdm(paths, desc=shown(root), unit="file", disable=None, leave=False, delay=1):
        path = os.path.join(root, path)
        try:
            info = os.stat(path)
            if not stat.S_ISREG(info.st_mode):
                odd.append((path, "is not a file"))
                continue
            stamps[path] = Stamp.of(path, info, with_hash)
        except OSError as error:
            odd.append((path, error.strerror or str(error)))
    return stamps, odd


def sha256_of(path: str) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def update(cache: Cache, root: str, stamps: dict[str, Stamp], odd: list[tuple[str, str]],
           extraction: Extraction) -> list[tuple[str, str]]:
    """Describe what is new or changed below `root`, chunk by chunk, and forget what is gone. Returns [(path, reason)]
    of what failed for a reason that may pass: it is not remembered.

    What cannot be looked at at the moment, and what lies in a folder of that kind, is not forgotten.
    """
    known = cache.stamps(root)
    same = {path for path, stamp in stamps.items() if path in known and stamp.same(known[path])}
    cache.touch(root, {path: stamps[path] for path in same if stamps[path] != known[path] and stamps[path].sha256})
    unseen = {path for path, _ in odd}
    below = tuple(os.path.join(path, "") for path in unseen)
    cache.forget(root, [path for path in known if path not in stamps.keys() | unseen and not path.startswith(below)])
    new = [path for path in stamps if path not in same]
    least, most = CHUNKS
    done = len(same)
    passing: list[tuple[str, str]] = []
    while new:
        size = min(most, max(least, cache.count()))
        chunk, new = new[:size], new[size:]
        print(f"describing {len(chunk):,} of {len(chunk) + len(new):,} new images in {shown(root)}", file=sys.stderr)
        described, attrs = extraction.describe(chunk, extraction.calibrates and len(chunk) > done)  # at each doubling
        done += len(chunk)
        failed = {path: reason for path, (row, reason) in zip(chunk, described)
                  if row is None and reason and reason.startswith(NOT_NOW)}
        cache.forget(root, list(failed))
        cache.store(root, [(path, stamps[path], *found) for path, found in zip(chunk, described) if path not in failed],
                    attrs)
        passing += failed.items()
    return passing


class Extraction:
    """Runs of `train.py --mode extract` with one checkpoint and one set of flags, in staging folders below `folder`.

    With several `regions`, as --query-regions has them, an image's row is the rows of its regions one after another.
    """

    def __init__(self, weights: tuple[str, str], flags: list[str], folder: Path, regions: str = "whole") -> None:
        self.weights, self.flags, self.folder, self.regions = weights, flags, folder, len(parse_regions(regions))
        self.group = "reference" if self.regions == 1 else "query"
        self.calibrates = True  # on the images it describes, as train.py does
        if self.regions > 1:
            self.flags = [*flags, "--query-regions", regions]
        self.key = self.hash_settings(weights_sha256(weights[1]))
        self.prefix = f".chunk-{self.key}-"  # hidden, lest they are taken for images; no other cache has these

    def hash_settings(self, sha256: str) -> str:
        """Hash of all that descriptors depend on; flags that only say where and how fast to compute are left out."""
        neutral = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        neutral.add_argument("--multiprocessing-distributed", "--strict", "--allow-code", action="store_true")
        neutral.add_argument("-j", "--workers", "-b", "--batch-size", "--device", "--gpu", "--nproc", "--dist-url")
        flags = neutral.parse_known_args(self.flags)[1]
        return hashlib.sha256(json.dumps([self.weights[0], sha256, flags]).encode()).hexdigest()[:16]

    def describe(self, files: list[str], calibrate: bool) -> tuple[list[Described], dict]:
        """What is known of each image, and the descriptor file's attributes, with a calibration measured on these
        images if `calibrate`. Raises InputError or WorkError, as train.py ended.

        train.py takes ids from file names: here they are numbers, the names of links, so that any name will do.
        """
        staging = Path(tempfile.mkdtemp(prefix=self.prefix, dir=self.folder))
        try:
            images, out = staging / FOLDERS[self.group], staging / "extract"
            images.mkdir()
            for i, file in enumerate(files):
                os.symlink(file, images / f"{i:08d}.jpg")
            code = subprocess.run([sys.executable, ROOT / "train.py", "--mode", "extract", "--target-set",
                                   self.group[0], "--exp", staging, "-b", "128", *self.weights, *self.flags,
                                   *([] if calibrate else ["--calibrate", "0"]), staging],
                                  stdout=subprocess.DEVNULL).returncode
            described = {int(Path(path).stem): Described(None, why) for path, why in read_skipped(out / "skipped.csv")}
            attrs: dict = {}
            if len(described) < len(files):  # train.py also fails where no image of a chunk can be read
                if code:
                    self.fail(code)
                rows, attrs = self.read_rows(out / "fb-isc-submission.h5")
                described |= rows
            return [described[i] for i in range(len(files))], attrs
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def read_rows(self, file: Path) -> tuple[dict[int, Described], dict]:
        """The rows of a descriptor file by number of the image, and the attributes to keep."""
        with Descriptors(file) as descriptors:
            rows = descriptors[self.group]
            blank = {int(id_of(path)) for path, _ in read_skipped(beside(file, "blank"))}
            described = {i: Described(row, BLANK if i in blank else None)
                         for i, row in zip(rows.images.astype(int).tolist(),
                                           rows.read().reshape(len(rows.images), -1))}
            return described, {name: descriptors.attrs[name] if name == "calibration" else str(descriptors.attrs[name])
                               for name in ("calibration", *COMPARABLE) if name in descriptors.attrs}

    def fail(self, code: int) -> NoReturn:
        """Raise what train.py's exit code means."""
        if shutil.disk_usage(self.folder).free < 2**20:
            raise WorkError(f"{self.folder}: no space left on device; what was described before is kept")
        error = InputError if code == 2 else WorkError
        raise error("train.py could not describe the images, see above; what was described before is kept")


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
    attributes of their descriptor file, [(path, reason)] of skipped images; image_of: the image of each row where they
    are of regions, several of an image one after another, else None."""
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
    names = [shown(os.path.relpath(path, root) if path != root else os.path.basename(path)) for path in paths]
    ids = [shown(os.path.join(source, os.path.relpath(path, root)) if path != root else source) for path in paths]
    image_of = np.repeat(np.arange(len(paths)), extraction.regions)
    return Collection(source, ids, names, paths, [stamps[path].inode for path in paths],
                      ArrayRows(rows.reshape(len(image_of), -1), np.array(ids)[image_of]), blank, cache.attrs(root),
                      skipped, image_of if extraction.regions > 1 else None)


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
                      image_of=rows.image_of)


def check_comparable(queries: Collection, archive: Collection) -> None:
    """InputError where the distances between two collections would mean nothing."""
    if queries.rows.shape[1] != archive.rows.shape[1]:
        raise InputError(f"{queries.source} has {queries.rows.shape[1]} dimensions, "
                         f"{archive.source} {archive.rows.shape[1]}")
    for name in COMPARABLE:
        a, b = (str(c.attrs.get(name, "unknown")) for c in (queries, archive))
        if a != b and "unknown" not in (a, b):
            raise InputError(f"{queries.source} and {archive.source} are of different {name}: {a[:12]}, {b[:12]}")


def read_calibration(args: argparse.Namespace, queries: Collection, archive: Collection,
                     measured: str | None) -> Calibration | None:
    """Calibration that was measured, or one of the collections carries, or None, which is an error with --precision."""
    if measured:
        return Calibration(measured, archive.source, len(archive.ids), args.copies_ratio)
    for collection in (archive, queries):
        if "calibration" in collection.attrs:
            return Calibration(collection.attrs["calibration"], collection.source, len(archive.ids), args.copies_ratio)
    if args.precision is not None:
        raise InputError(f"--precision: the descriptors of {shown(archive.source)} carry no calibration; "
                         "--threshold takes a score")
    print("no calibration (train.py --calibrate): scores only", file=sys.stderr)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Search

PAIRS = np.dtype([("query", int), ("reference", int), ("score", float), ("match", int)])


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
        described = extraction.describe([str(files[k]) for k in made], False)[0]
        rows = [(k, row) for k, (row, _) in zip(made, described) if row is not None]
        queries = of_copies([(str(files[k]), row) for k, row in rows], extraction.regions)
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


def group_numbers(pairs: np.ndarray) -> np.ndarray:
    """Number [n], from 1, of the connected component that each of the PAIRS [n] belongs to; the best pair's is 1."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    n = int(max(pairs["reference"].max(initial=0), pairs["query"].max(initial=0))) + 1
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs["query"], pairs["reference"])), shape=(n, n))
    label = connected_components(graph, directed=False)[1][pairs["query"]]
    _, first, label = np.unique(label, return_index=True, return_inverse=True)
    return first.argsort().argsort()[label] + 1


# ---------------------------------------------------------------------------------------------------------------------
# Report


def are_linked(pairs: np.ndarray, matches: list[Match] | None, threshold: float | None) -> np.ndarray:
    """bool [n]: pairs that make a group: all of them, or, where local features were compared, those that show a copy
    and, at or above a threshold, those of which they cannot tell."""
    if matches is None:
        return np.ones(len(pairs), bool)
    verdicts = [ABSTAIN if n < 0 else matches[n].verdict for n in pairs["match"].tolist()]
    return np.array([verdict == COPY or threshold is not None and verdict == ABSTAIN for verdict in verdicts], bool)


def are_blank(queries: Collection, archive: Collection, pairs: np.ndarray) -> np.ndarray:
    """bool [n]: pairs with an image that shows one flat colour. Their scores tell nothing."""
    return queries.blank[pairs["query"]] | archive.blank[pairs["reference"]]


def match_columns(matches: Sequence[Match | None]) -> dict[str, list]:
    """Columns of pairs.csv: what local features say of each pair, nothing where they were not compared."""
    def text(value: Callable[[Match], object]) -> list:
        return ["" if match is None else value(match) for match in matches]

    return {"inliers": text(lambda m: m.inliers), "coverage_query": text(lambda m: f"{m.coverage_query:.3f}"),
            "coverage_reference": text(lambda m: f"{m.coverage_reference:.3f}"), "verdict": text(lambda m: m.verdict),
            "outline": text(lambda m: "" if m.outline is None else " ".join(f"{x:.1f}" for x in m.outline.ravel()))}


def write_pairs(file: Path, queries: Collection, archive: Collection, pairs: np.ndarray, matches: list[Match] | None,
                same: list[tuple], calibration: Calibration | None, linked: np.ndarray | None) -> None:
    """pairs.csv: the pairs, then those of `same`, which `told` made, with nothing to act on. `linked`: bool [n], pairs
    that make a group, if there are groups."""
    blank = are_blank(queries, archive, pairs)
    columns = {"query_id": [queries.ids[i] for i in pairs["query"]],
               "reference_id": [archive.ids[j] for j in pairs["reference"]],
               "score": map(repr, pairs["score"].tolist()), "blank": np.where(blank, "yes", "").tolist()}
    if matches is not None:
        columns |= match_columns([None if n < 0 else matches[n] for n in pairs["match"].tolist()])
    if calibration:
        columns["precision"] = ["" if b else f"{p:.4f}" for b, p in zip(blank, calibration.at(pairs["score"]))]
    if linked is not None:
        columns["group"] = [""] * len(pairs)
        for i, number in zip(np.flatnonzero(linked).tolist(), group_numbers(pairs[linked]).tolist()):
            columns["group"][i] = number
    columns["same_file"] = [""] * len(pairs)
    nothing = [""] * (len(columns) - 3)
    with replacing(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([columns, *zip(*columns.values()),
                                   *([query, reference, *nothing, what] for query, reference, what in same)])


def thumbnail(path: str) -> bytes | None:
    """JPEG bytes of an image, upright, at most THUMBNAIL px; None where it cannot be read."""
    try:
        img = open_thumbnail(path, THUMBNAIL)
    except UnreadableImage:
        return None
    buffer = io.BytesIO()
    img.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def thumbnail_name(path: str | None) -> str | None:
    """Of the thumbnail of an image as it is now; None where there is no image."""
    if not path:
        return None
    try:
        info = os.stat(path)
    except OSError:
        return None
    key = os.fsencode(path) + f"/{info.st_size}/{info.st_mtime_ns}".encode()
    return hashlib.blake2b(key, digest_size=12).hexdigest() + ".jpg"


def write_thumbnail(path: str, file: Path | None) -> str | None:
    """Make an image's thumbnail, unless it is there -> its name; None where there is no image."""
    if file is None:
        return None
    if not file.exists():
        content = thumbnail(path)
        if content is None:
            return None
        with replacing(file) as temporary:
            temporary.write_bytes(content)
    return file.name


def match_on_page(match: Match) -> dict:
    """What the page shows of a match; places are whole thousandths of the images' sides."""
    shown_match = {"verdict": match.verdict, "inliers": match.inliers}
    if match.sizes is None or match.outline is None or match.points is None:
        return shown_match
    thousandths = lambda points, sizes: (1000 * points / np.ravel(sizes)).round().astype(int).ravel().tolist()
    outlines = [thousandths(corners, size) for corners, size in zip((match.outline, match.part), match.sizes)]
    return shown_match | {"outlines": outlines, "points": thousandths(match.points[:POINTS], match.sizes)}


def image_table(queries: Collection, archive: Collection, pairs: np.ndarray, matches: list[Match] | None,
                report: OutputFolder) -> tuple[list, list]:
    """What the page shows of the images in pairs: [[name, URI or None, thumbnail or None, 1 if blank]], and pairs as
    rows of it: [[query, reference, score, match or None]]."""
    rows: dict[tuple[int, int], int] = {}
    entries: list[tuple[str, str | None, int]] = []
    for collection, column in ((queries, "query"), (archive, "reference")):
        for i in pairs[column].tolist():
            if (id(collection), i) not in rows:
                rows[id(collection), i] = len(entries)
                entries.append((collection.names[i], collection.files[i], int(collection.blank[i])))
    folder, files = report.path / "thumbs", [file for _, file, _ in entries]
    folder.mkdir(exist_ok=True)
    names = list(map(thumbnail_name, files))
    report.add(*(f"thumbs/{name}" for name in names if name))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        thumbs = list(tqdm(pool.map(write_thumbnail, files, [name and folder / name for name in names]),
                           total=len(entries), desc="thumbnails", unit="image", disable=None, delay=1))
    images = [[name, file and "file://" + quote(os.fsencode(file)), thumb, blank]
              for (name, file, blank), thumb in zip(entries, thumbs)]
    on_page = [None if matches is None or n < 0 else match_on_page(matches[n]) for n in pairs["match"].tolist()]
    return images, [[rows[id(queries), i], rows[id(archive), j], score, match]
                    for (i, j, score, _), match in zip(pairs.tolist(), on_page)]


def write_report(report: OutputFolder, queries: Collection, archive: Collection, pairs: np.ndarray, same: list[tuple],
                 matches: list[Match] | None, threshold: float | None, calibration: Calibration | None,
                 most: int) -> None:
    """thumbs/, pairs.csv, skipped.csv and, last, index.html, each under its final name only when it is whole."""
    within, skipped = archive is queries, queries.skipped + (archive.skipped if archive is not queries else [])
    kept, folder = pairs if threshold is None else pairs[pairs["score"] >= threshold], report.path
    blank = are_blank(queries, archive, kept)
    kept = kept if threshold is None else kept[~blank]
    images, on_page = image_table(queries, archive, pairs[:most], matches, report)
    data = {"queries": shown(queries.source), "archive": None if within else shown(archive.source),
            "count": [len(queries.ids), len(archive.ids)], "skipped": len(skipped), "same_files": len(same),
            "threshold": threshold,
            "left_out": len(pairs) - len(on_page), "images": images, "pairs": on_page,
            "calibration": calibration and {"scores": calibration.scores.tolist(),
                                            "precision": calibration.precision.tolist(),
                                            "copies_ratio": calibration.copies_ratio}}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no name can close the script element
    page = (Path(copydet.__file__).with_name("page.html")).read_text(encoding="utf-8").replace("{{data}}", text)
    grouped = within and (threshold is not None or matches is not None)
    write_pairs(folder / "pairs.csv", queries, archive, kept, matches, same, calibration,
                are_linked(kept, matches, threshold) if grouped else None)
    write_skipped(folder / "skipped.csv", skipped)
    with replacing(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    shown_now = {f"thumbs/{thumb}" for _, _, thumb, _ in images}
    report.remove(*(name for name in manifest_of(folder) if name.startswith("thumbs/") and name not in shown_now))
    what = f"{len(queries.ids):,} images" if within else f"{len(queries.ids):,} queries and {len(archive.ids):,} images"
    print(f"{len(kept):,} pairs of {what}: {folder / 'index.html'}"
          + (f"; {len(same):,} more names of the same files" if same else "")
          + (f"; {blank.sum():,} pairs with an image of one flat colour "
             f"{'marked' if threshold is None else 'left out'}" if blank.any() else "")
          + (f"; {len(skipped):,} skipped{not_read(skipped)}, see {folder / 'skipped.csv'}" if skipped else ""))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def pick_weights(args: argparse.Namespace) -> tuple[str, str]:
    """The flag and file of what describes the images. Raises InputError: none given, no such file."""
    given = [(flag, file) for flag, file in (("--weight", args.weight), ("--backbone-weights", args.backbone_weights))
             if file]
    if args.exp:
        newest = newest_checkpoint(ROOT / "exp" / args.exp / "train")
        if not newest:
            raise InputError(f"--exp {args.exp}: no checkpoint in {ROOT / 'exp' / args.exp / 'train'}")
        given.append(("--weight", newest))
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
    args.ngpu = count_gpus(args.ngpu)
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


def open_cache(folder: Path, args: argparse.Namespace, regions: str,
               stack: contextlib.ExitStack) -> tuple[Cache, Extraction]:
    """What describes the folders on the command line, and where in `folder` that is kept. What a killed run with the
    same flags left there is removed."""
    extraction = Extraction(pick_weights(args), args.flags, folder, regions)
    extraction.calibrates = args.no_verify and args.query_regions == "whole"
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
    caches: dict[str, Describer] = {}
    collections, preferences = [], (("query", "reference", "train"), ("reference", "query", "train"))
    for source, names, regions in zip(sources, preferences, (args.query_regions, "whole")):
        if isinstance(source, str) and folder:
            if regions not in caches:
                caches[regions] = open_cache(folder, args, regions, stack)
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
    report.check("index.html", "pairs.csv", "skipped.csv")
    with contextlib.ExitStack() as stack:
        sources = open_sources(args, stack)
        stack.enter_context(report).add("index.html", "pairs.csv", "skipped.csv")
        verify = not args.no_verify and all(isinstance(source, str) or args.images for source in sources)
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
        write_report(report, queries, archive, pairs, same, matches, threshold, calibration, args.pairs)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="Flags after -- go to train.py.", allow_abbrev=False)
    parser.add_argument("queries", metavar="QUERIES", help="folder of images, image, or descriptor file")
    parser.add_argument("archive", metavar="ARCHIVE", nargs="?", help="the same; left out: QUERIES within itself, or "
                        "query against reference where a descriptor file holds both")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the report")
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
    g.add_argument("--precision", type=fraction, metavar="P", help="the threshold that reaches this precision, by the "
                   "checkpoint's calibration for an archive of this size")
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
    g.add_argument("--ngpu", type=int, default=-1, metavar="N", help="GPUs to search on; 0: CPU; default: all")
    args = parser.parse_args(argv[:at])
    args.flags = argv[at + 1:]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def work() -> None:
        try:
            find_copies(args)
        except sqlite3.Error as error:
            raise WorkError(f"{args.cache or Path(args.output) / 'cache'}: {error}; what was described before is "
                            "kept") from None

    return run_main(work, "stopped; what was described is kept")


if __name__ == "__main__":
    sys.exit(main())
