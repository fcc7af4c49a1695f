#!/usr/bin/env python3
"""Find copies: from two folders of images to a page of answers.

    python scripts/find_copies.py QUERIES ARCHIVE -o report --exp v31        what of QUERIES is in ARCHIVE?
    python scripts/find_copies.py image.jpg ARCHIVE -o report --exp v31      one picture
    python scripts/find_copies.py IMAGES -o report --exp v31                 near-duplicates within one folder
    python scripts/find_copies.py queries.h5 archive.h5 -o report            descriptor files

Images are described by train.py, with flags of its own after `--`: -- --input-size 448 --device cpu. What is described
stays in the cache: the next run describes only images that are new or changed (size or time; --hash: content), tries
again those that it had no leave or memory to read, and forgets those that are gone. A run that was killed goes on from
its last chunk.

The report is a folder that opens from disk: index.html with thumbnails, pairs.csv (query_id, reference_id: paths, or
ids of descriptor files; score: minus the squared L2 distance; blank; precision, where the checkpoint carries a
calibration; group, within one collection; same_file), and skipped.csv, the images that could not be read. Search is
exact. Images of one flat colour are as like to each other as copies are: `blank` says yes where a pair has one, and
where there is a threshold such pairs are left out. Two names of one file, hard or symbolic links, are no copies: they
stand last, without a score, same_file says what they are, and within one collection only one of the names is searched.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import io
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
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

import copydet
from copydet.calibration import Calibration
from copydet.checkpoints import newest_checkpoint, weights_sha256
from copydet.common import ROOT, InputError, OutputFolder, WorkError, is_page, manifest_of, replacing, run_main, shown
from copydet.descriptors import COMPARABLE, BlockRows, Descriptors
from copydet.images import (BLANK, FOLDERS, IMAGE, IMAGE_ENDINGS, NOT_NOW, UnreadableImage, beside, id_of, list_images,
                            not_read, open_thumbnail, read_skipped, what_is, write_skipped)
from copydet.options import Parser, fraction, score
from copydet.search import count_gpus, search_topk

H5_ENDINGS = (".h5", ".hdf5", ".hdf")
CHUNKS = 2048, 65536  # least and most images per run of train.py; in between as many as are described already
THUMBNAIL = 256  # px
MOST_PAIRS = 50_000  # what a page can be as high as in every browser


# ---------------------------------------------------------------------------------------------------------------------
# Cache: what train.py described


@dataclass
class Stamp:
    """What tells that a file has changed."""
    size: int
    mtime: int  # nanoseconds, in 64 bits as SQLite has them: of a time after 2262 the lowest ones
    sha256: str | None = None  # with --hash
    inode: tuple | str | None = field(default=None, compare=False)  # equal for all names of a file

    @classmethod
    def of(cls, path: str, info: os.stat_result, with_hash: bool) -> Stamp:
        mtime = (info.st_mtime_ns + 2**63) % 2**64 - 2**63
        return cls(info.st_size, mtime, sha256_of(path) if with_hash else None, inode_of(path, info))

    def same(self, other: Stamp) -> bool:
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return (self.size, self.mtime) == (other.size, other.mtime)


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

    def store(self, root: str, images: list[tuple], attrs: dict) -> None:
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


def is_ours(path: str, written: Callable[[str], set]) -> bool:
    """Whether a report's manifest lists this file; `written`: folder -> what its manifest lists."""
    folder, name = os.path.split(path)
    above, below = os.path.split(folder)
    return name in written(folder) or f"{below}/{name}" in written(above)


def stamp_files(root: str, with_hash: bool,
                exclude: Sequence[str] = ()) -> tuple[dict[str, Stamp], list[tuple[str, str]]]:
    """Images of a folder, or one image: path -> Stamp, and [(path, reason)] of what cannot be one. Thumbnails and
    pictures of reports are left out."""
    single, written = os.path.isfile(root), functools.cache(manifest_of)
    paths, odd = ([root], []) if single else list_images(root, exclude)
    stamps, odd = {}, [(os.path.join(root, path), reason) for path, reason in odd]
    for path in tqdm(paths, desc=shown(root), unit="file", disable=None, leave=False, delay=1):
        path = os.path.join(root, path)
        if is_ours(path, written):
            continue
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
        described, attrs = extraction.describe(chunk, calibrate=len(chunk) > done)  # at each doubling
        done += len(chunk)
        failed = {path: reason for path, (row, reason) in zip(chunk, described)
                  if row is None and reason.startswith(NOT_NOW)}
        cache.forget(root, list(failed))
        cache.store(root, [(path, stamps[path], *found) for path, found in zip(chunk, described) if path not in failed],
                    attrs)
        passing += failed.items()
    return passing


class Extraction:
    """Runs of `train.py --mode extract` with one checkpoint and one set of flags, in staging folders below `folder`."""

    def __init__(self, weights, flags, folder):
        self.weights, self.flags, self.folder = weights, flags, folder
        self.key = self.hash_settings(weights_sha256(weights[1]))
        self.prefix = f".chunk-{self.key}-"  # hidden, lest they are taken for images; no other cache has these

    def hash_settings(self, sha256: str) -> str:
        """Hash of all that descriptors depend on; flags that only say where and how fast to compute are left out."""
        neutral = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        neutral.add_argument("--multiprocessing-distributed", "--strict", "--allow-code", action="store_true")
        neutral.add_argument("-j", "--workers", "-b", "--batch-size", "--device", "--gpu", "--nproc", "--dist-url")
        flags = neutral.parse_known_args(self.flags)[1]
        return hashlib.sha256(json.dumps([self.weights[0], sha256, flags]).encode()).hexdigest()[:16]

    def describe(self, files, calibrate):
        """Images -> [(row float32 [d], None or BLANK) or (None, reason)] of each, and the descriptor file's attributes,
        with a calibration measured on these images if `calibrate`.

        train.py takes ids from file names: here they are numbers, the names of links, so that any name will do.
        """
        staging = Path(tempfile.mkdtemp(prefix=self.prefix, dir=self.folder))
        try:
            images, out = staging / "reference_images", staging / "extract"
            images.mkdir()
            for i, file in enumerate(files):
                os.symlink(file, images / f"{i:08d}.jpg")
            code = subprocess.run([sys.executable, ROOT / "train.py", "--mode", "extract", "--target-set", "r",
                                   "--exp", staging, "-b", "128", *self.weights, *self.flags,
                                   *([] if calibrate else ["--calibrate", "0"]), staging],
                                  stdout=subprocess.DEVNULL).returncode
            described = [None] * len(files)
            for path, reason in read_skipped(out / "skipped.csv"):
                described[int(Path(path).stem)] = None, reason
            if code and None in described:  # train.py also fails where no image of a chunk can be read
                self.fail(code)
            attrs = self.read_rows(out / "fb-isc-submission.h5", described) if None in described else {}
            return described, attrs
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def read_rows(self, file, described):
        """Put the rows of a descriptor file into `described`; returns the attributes to keep."""
        with Descriptors(file) as descriptors:
            rows = descriptors["reference"]
            blank = {int(id_of(path)) for path, _ in read_skipped(beside(file, "blank"))}
            for i, row in zip(rows.ids.astype(int), rows.read()):
                described[i] = row, BLANK if i in blank else None
            return {name: descriptors.attrs[name] if name == "calibration" else str(descriptors.attrs[name])
                    for name in ("calibration", *COMPARABLE) if name in descriptors.attrs}

    def fail(self, code):
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
    attributes of their descriptor file, [(path, reason)] of skipped images."""
    source: str
    ids: list
    names: list
    files: list
    inodes: list
    rows: BlockRows
    blank: np.ndarray
    attrs: dict
    skipped: list = field(default_factory=list)

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
    return Collection(source, ids, names, paths, [stamps[path].inode for path in paths],
                      ArrayRows(rows, np.array(ids)), blank, cache.attrs(root), skipped)


def read_file(file, preference, images):
    """Collection of the first group in `preference` that an open descriptor file holds; its images by id below the
    folder `images`, the blank ones from blank.csv beside it."""
    file.check_checkpoint()
    name = next(name for name in preference if name in file.groups)
    rows, by_id = file[name], {}
    if images:
        folder = Path(images).resolve() / f"{name}_images"
        by_id = {id_of(path): str(folder / path) for path in list_images(folder)[0]}
    ids = rows.ids.tolist()
    files = [by_id.get(name) for name in ids]
    inodes = [file and os.path.exists(file) and inode_of(file, os.stat(file)) or None for file in files]
    blank = [id_of(path) for path, _ in read_skipped(beside(Path(file.path), "blank"))
             if FOLDERS[name] in Path(path).parts]
    return Collection(file.path, ids, ids, files, inodes, rows, np.isin(rows.ids, blank), file.attrs)


def check_comparable(queries, archive):
    """InputError where the distances between two collections would mean nothing."""
    if queries.rows.shape[1] != archive.rows.shape[1]:
        raise InputError(f"{queries.source} has {queries.rows.shape[1]} dimensions, "
                         f"{archive.source} {archive.rows.shape[1]}")
    for name in COMPARABLE:
        a, b = (str(c.attrs.get(name, "unknown")) for c in (queries, archive))
        if a != b and "unknown" not in (a, b):
            raise InputError(f"{queries.source} and {archive.source} are of different {name}: {a[:12]}, {b[:12]}")


def read_calibration(args, queries, archive):
    """Calibration that one of the collections carries, or None, which is an error with --precision."""
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

PAIRS = np.dtype([("query", int), ("reference", int), ("score", float)])


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
    """The k nearest of each query, exactly: PAIRS, best first. An image is no copy of itself, under no name; within one
    collection a pair is listed once."""
    within = archive is queries
    shared = set(filter(None, queries.inodes)).intersection(archive.inodes)
    overlap = max(Counter(inode for inode in archive.inodes if inode in shared).values(), default=0)
    k_search = min(k + max(within, overlap), len(archive.rows))
    found = search_topk(queries.rows.read(), archive.rows, k_search, np.empty(0, np.int64), ngpu, progress=True)
    found = found.astype(PAIRS)[np.lexsort((found["reference"], -found["score"], found["query"]))]
    if within:
        found = found[found["query"] != found["reference"]]
    elif overlap:
        found = found[[queries.inodes[i] is None or queries.inodes[i] != archive.inodes[j]
                       for i, j, _ in found.tolist()]]
    found["score"] += 0.0  # no -0.0
    first = np.searchsorted(found["query"], found["query"])
    found = found[np.arange(len(found)) - first < k]
    if within:
        a, b = found["query"].copy(), found["reference"].copy()
        found["query"], found["reference"] = np.minimum(a, b), np.maximum(a, b)
        found = found[np.unique(found[["query", "reference"]], return_index=True)[1]]
    return found[np.lexsort((found["reference"], found["query"], -found["score"]))]


def group_numbers(pairs):
    """Number [n], from 1, of the connected component that each pair belongs to; that of the best pair is 1."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    n = int(max(pairs["reference"].max(initial=0), pairs["query"].max(initial=0))) + 1
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs["query"], pairs["reference"])), shape=(n, n))
    label = connected_components(graph, directed=False)[1][pairs["query"]]
    _, first, label = np.unique(label, return_index=True, return_inverse=True)
    return first.argsort().argsort()[label] + 1


# ---------------------------------------------------------------------------------------------------------------------
# Report


def are_blank(queries: Collection, archive: Collection, pairs: np.ndarray) -> np.ndarray:
    """bool [n]: pairs with an image that shows one flat colour. Their scores tell nothing."""
    return queries.blank[pairs["query"]] | archive.blank[pairs["reference"]]


def write_pairs(file: Path, queries: Collection, archive: Collection, pairs: np.ndarray, same: list[tuple],
                calibration: Calibration | None, grouped: bool) -> None:
    """pairs.csv: the pairs, then those of `same`, which `told` made, with nothing to act on."""
    blank = are_blank(queries, archive, pairs)
    columns = {"query_id": [queries.ids[i] for i in pairs["query"]],
               "reference_id": [archive.ids[j] for j in pairs["reference"]],
               "score": map(repr, pairs["score"].tolist()), "blank": np.where(blank, "yes", "").tolist()}
    if calibration:
        columns["precision"] = ["" if b else f"{p:.4f}" for b, p in zip(blank, calibration.at(pairs["score"]))]
    if grouped:
        columns["group"] = group_numbers(pairs).tolist()
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


def image_table(queries: Collection, archive: Collection, pairs: np.ndarray, report: OutputFolder) -> tuple[list, list]:
    """What the page shows of the images in pairs: [[name, URI or None, thumbnail or None, 1 if blank]], and pairs as
    rows of it: [[query, reference, score]]."""
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
    return images, [[rows[id(queries), i], rows[id(archive), j], score] for i, j, score in pairs.tolist()]


def write_report(report: OutputFolder, queries: Collection, archive: Collection, pairs: np.ndarray, same: list[tuple],
                 threshold: float | None, calibration: Calibration | None, most: int) -> None:
    """thumbs/, pairs.csv, skipped.csv and, last, index.html, each under its final name only when it is whole."""
    within, skipped = archive is queries, queries.skipped + (archive.skipped if archive is not queries else [])
    kept, folder = pairs if threshold is None else pairs[pairs["score"] >= threshold], report.path
    blank = are_blank(queries, archive, kept)
    kept = kept if threshold is None else kept[~blank]
    images, on_page = image_table(queries, archive, pairs[:most], report)
    data = {"queries": shown(queries.source), "archive": None if within else shown(archive.source),
            "count": [len(queries.ids), len(archive.ids)], "skipped": len(skipped), "same_files": len(same),
            "threshold": threshold,
            "left_out": len(pairs) - len(on_page), "images": images, "pairs": on_page,
            "calibration": calibration and {"scores": calibration.scores.tolist(),
                                            "precision": calibration.precision.tolist(),
                                            "copies_ratio": calibration.copies_ratio}}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no name can close the script element
    page = (Path(copydet.__file__).with_name("page.html")).read_text(encoding="utf-8").replace("{{data}}", text)
    write_pairs(folder / "pairs.csv", queries, archive, kept, same, calibration, within and threshold is not None)
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


def pick_weights(args):
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


def is_file_of_descriptors(source):
    return source.lower().endswith(H5_ENDINGS) and not os.path.isdir(source)


def check_args(args):
    """Everything about the flags that can be wrong, before any work."""
    for source in filter(None, (args.queries, args.archive)):
        if not os.path.exists(source):
            raise InputError(f"no such file or folder: {shown(source)}")
        if os.path.isfile(source) and not is_file_of_descriptors(source) and (what := what_is(Path(source))) != IMAGE:
            neither = f"neither an image nor a descriptor file ({', '.join(H5_ENDINGS)})"
            raise InputError(f"{shown(source)}: {what or neither}")
    if args.threshold is not None and args.precision is not None:
        raise InputError("--threshold and --precision: give one")
    if args.topk < 1 or not 0 < args.pairs <= MOST_PAIRS:
        raise InputError(f"--topk is at least 1, --pairs from 1 to {MOST_PAIRS:,}")
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


def open_cache(args: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Cache, Extraction]:
    """What describes the folders on the command line, and where that is kept. What a killed run with the same flags
    left there is removed."""
    weights, folder = pick_weights(args), Path(args.cache or Path(args.output) / "cache").resolve()
    stack.enter_context(OutputFolder(folder, "--cache", older_cache, parents=True, shared=True))
    extraction = Extraction(weights, args.flags, folder)
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


def read_collections(sources: list, args: argparse.Namespace, stack: contextlib.ExitStack) -> tuple:
    """Collections of QUERIES and ARCHIVE: the same one twice where a collection is searched within itself; and what
    is one file under two names."""
    if any(isinstance(source, str) for source in sources):
        through = open_cache(args, stack)
    elif len(sources) == 1 and {"query", "reference"} <= set(sources[0].groups):
        sources = sources * 2
    preferences = ("query", "reference", "train"), ("reference", "query", "train")
    collections = [read_folder(source, *through, args) if isinstance(source, str) else
                   read_file(source, names, args.images) for source, names in zip(sources, preferences)]
    queries, archive = collections[0], collections[-1]
    same = same_files(queries, archive)
    names = told(queries, archive, same)
    if same and queries is archive:
        again = {i for i, _ in same}
        queries = archive = archive.only([i for i in range(len(archive.ids)) if i not in again])
    return queries, archive, names


def find_copies(args: argparse.Namespace) -> None:
    """Run the command line."""
    check_args(args)
    report = OutputFolder(args.output, "-o", older_report, besides=filter(None, (args.queries, args.archive)))
    report.check("index.html", "pairs.csv", "skipped.csv")
    with contextlib.ExitStack() as stack:
        sources = open_sources(args, stack)
        stack.enter_context(report).add("index.html", "pairs.csv", "skipped.csv")
        queries, archive, same = read_collections(sources, args, stack)
        check_comparable(queries, archive)
        calibration, threshold = read_calibration(args, queries, archive), args.threshold
        if args.precision is not None:
            threshold = calibration.threshold(args.precision, "--precision")
        pairs = find_pairs(queries, archive, args.topk, args.ngpu)
        write_report(report, queries, archive, pairs, same, threshold, calibration, args.pairs)


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
    g = parser.add_argument_group("pairs")
    g.add_argument("--topk", type=int, default=10, metavar="K", help="answers per query (default: %(default)s)")
    g.add_argument("--threshold", type=score, metavar="SCORE", help="pairs.csv holds pairs from this score on, 0 "
                   "at most, the page starts with it (default: all)")
    g.add_argument("--precision", type=fraction, metavar="P", help="the threshold that reaches this precision, by the "
                   "checkpoint's calibration for an archive of this size")
    g.add_argument("--copies-ratio", type=fraction, metavar="R", help="fraction of the queries that have a copy, for "
                   "the precision (default: the calibration's)")
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

    def work():
        try:
            find_copies(args)
        except sqlite3.Error as error:
            raise WorkError(f"{args.cache or Path(args.output) / 'cache'}: {error}; what was described before is "
                            "kept") from None

    return run_main(work, "stopped; what was described is kept")


if __name__ == "__main__":
    sys.exit(main())
