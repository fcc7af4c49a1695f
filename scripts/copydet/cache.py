"""What train.py described, kept for the next run: find_copies.py describes only images that are new or changed."""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from tqdm import tqdm

from copydet.checkpoints import weights_sha256
from copydet.common import HERE, InputError, WorkError, sha256_of, shown, time_of
from copydet.descriptors import COMPARABLE, Descriptors
from copydet.images import BLANK, FOLDERS, NOT_NOW, beside, id_of, list_images, read_skipped
from copydet.regions import parse_regions

CHUNKS = 2048, 65536  # least and most images per run of train.py; in between as many as are described already


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

    def attrs(self) -> dict:
        """Attributes of train.py's descriptor files, with the network's own calibration; empty before the first."""
        return {name: json.loads(value) for name, value in self.db.execute("SELECT name, value FROM attrs")}

    def store(self, root: str, images: list[tuple[str, Stamp, np.ndarray | None, str | None]], attrs: dict) -> None:
        """Write [(path, Stamp, row or None, reason or None)] in one transaction."""
        with self.db:
            self.db.executemany("INSERT OR REPLACE INTO photos VALUES (?, ?, ?, ?, ?, ?, ?)", [
                (os.fsencode(root), os.fsencode(path), stamp.size, stamp.mtime, stamp.sha256,
                 None if row is None else row.tobytes(), reason) for path, stamp, row, reason in images])
            self.db.executemany("INSERT OR REPLACE INTO attrs VALUES (?, ?)", [
                (name, json.dumps(value)) for name, value in attrs.items()])

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


def update(cache: Cache, root: str, stamps: dict[str, Stamp], odd: list[tuple[str, str]],
           extraction: Extraction) -> list[tuple[str, str]]:
    """Describe what is new or changed below `root`, chunk by chunk, and forget what is gone. Returns [(path, reason)]
    of what failed for a reason that may pass: it is not remembered.

    What cannot be looked at at the moment, what lies in a folder of that kind, and what is left out is not forgotten.
    """
    known = cache.stamps(root)
    same = {path for path, stamp in stamps.items() if path in known and stamp.same(known[path])}
    cache.touch(root, {path: stamps[path] for path in same if stamps[path] != known[path] and stamps[path].sha256})
    unseen = {path for path, _ in odd}
    below = tuple(os.path.join(path, "") for path in unseen)
    cache.forget(root, [path for path in known if path not in stamps.keys() | unseen and not path.startswith(below)
                        and not os.path.lexists(path)])
    new = [path for path in stamps if path not in same]
    least, most = CHUNKS
    passing: list[tuple[str, str]] = []
    while new:
        size = min(most, max(least, cache.count()))
        chunk, new = new[:size], new[size:]
        print(f"describing {len(chunk):,} of {len(chunk) + len(new):,} new images in {shown(root)}", file=sys.stderr)
        described, attrs = extraction.describe(chunk)
        failed = {path: reason for path, (row, reason) in zip(chunk, described)
                  if row is None and reason and reason.startswith(NOT_NOW)}
        cache.forget(root, list(failed))
        cache.store(root, [(path, stamps[path], *found) for path, found in zip(chunk, described) if path not in failed],
                    attrs)
        passing += failed.items()
    return passing


class Extraction:
    """Runs of extract.py, train.py --mode extract, with one checkpoint and one set of flags, in staging folders below
    `folder`.

    With several `regions`, as --query-regions has them, an image's row is the rows of its regions one after another.
    """

    def __init__(self, weights: tuple[str, str], flags: list[str], folder: Path, regions: str = "whole") -> None:
        self.weights, self.flags, self.folder, self.boxes = weights, flags, folder, parse_regions(regions)
        self.group = "reference" if len(self.boxes) == 1 else "query"
        if len(self.boxes) > 1:
            self.flags = [*flags, "--query-regions", regions]
        self.key = self.hash_settings(weights_sha256(weights[1]))
        self.prefix = f".chunk-{self.key}-"  # hidden, lest they are taken for images; no other cache has these

    def hash_settings(self, sha256: str) -> str:
        """Hash of all that descriptors depend on; flags that only say where and how fast to compute are left out."""
        neutral = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        neutral.add_argument("--multiprocessing-distributed", "--strict", "--allow-code", action="store_true")
        neutral.add_argument("-j", "--workers", "-b", "--batch-size", "--device", "--gpu", "--threads", "--nproc",
                             "--dist-url")
        flags = neutral.parse_known_args(self.flags)[1]
        return hashlib.sha256(json.dumps([self.weights[0], sha256, flags]).encode()).hexdigest()[:16]

    def describe(self, files: list[str]) -> tuple[list[Described], dict]:
        """What is known of each image, and the descriptor file's attributes. Raises InputError or WorkError, as
        extract.py ended.

        It takes ids from file names: here they are numbers, the names of links, so that any name will do.
        """
        staging = Path(tempfile.mkdtemp(prefix=self.prefix, dir=self.folder))
        try:
            images, out = staging / FOLDERS[self.group], staging / "extract"
            images.mkdir()
            for i, file in enumerate(files):
                os.symlink(file, images / f"{i:08d}.jpg")
            code = subprocess.run([sys.executable, HERE / "extract.py", "--target-set", self.group[0], "--exp", staging,
                                   "-b", "128", *self.weights, *self.flags, "--calibrate", "0", staging],
                                  stdout=subprocess.DEVNULL).returncode
            described = {int(Path(path).stem): Described(None, why) for path, why in read_skipped(out / "skipped.csv")}
            attrs: dict = {}
            if len(described) < len(files):  # extract.py also fails where no image of a chunk can be read
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
            return described, {name: str(descriptors.attrs[name]) for name in ("calibration", *COMPARABLE)
                               if name in descriptors.attrs}

    def fail(self, code: int) -> NoReturn:
        """Raise what extract.py's exit code means."""
        if shutil.disk_usage(self.folder).free < 2**20:
            raise WorkError(f"{self.folder}: no space left on device; what was described before is kept")
        error = InputError if code == 2 else WorkError
        raise error("the images could not be described, see above; what was described before is kept")
