"""Descriptor files (HDF5): the one place that writes, opens and checks them.

A file holds up to three groups, `query`, `reference` and `train`: float32 [rows, dim], with their ids, row by row, in
`query_ids`, `reference_ids`, `train_ids`. Where queries are described in several regions, a query has a row for each,
one after another, with the same id, and `query_regions`, float32 [rows, 4], says which: left, top, right, bottom as
fractions of the image. Also read: the competition's files (the same keys, ids of type S6, S7), the
older form with `vectors` and `image_names` (Q..., R..., T...), and float16 rows.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from copydet.common import InputError, check_file, error_number, first_three, parse_json, replacing, warn
from copydet.regions import images_of

GROUPS = ("query", "reference", "train")
BLOCK = 65536  # rows read or written at a time: 64 MiB at 256 dimensions
COMPARABLE = ("checkpoint_sha256", "input_size", "resize", "gem_eval_p", "mean", "std")  # what distances depend on
UNIT_TOLERANCE = 1e-3  # float16 rows deviate from unit length by up to 5e-4


def duplicates(ids: np.ndarray) -> np.ndarray:
    """Those of the ids [n] that occur more than once, each once, sorted."""
    names, counts = np.unique(ids, return_counts=True)
    return names[counts > 1]


def check_finite(path: str | Path, name: str, block: np.ndarray, ids: np.ndarray) -> None:
    """Raise InputError naming the ids [n] of the rows in block [n, d] that hold NaN or infinity."""
    if not np.isfinite(block).all():
        bad = ids[~np.isfinite(block).all(axis=1)]
        raise InputError(f"{path}: NaN or infinity in `{name}`, ids {first_three(bad)}")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_descriptors(path: str | Path, groups: Mapping[str, tuple[Any, Sequence[str] | np.ndarray]],
                      attrs: Mapping[str, Any], keep: Iterable[str] = (), regions: np.ndarray | None = None) -> None:
    """Write a descriptor file, sorted by id, under a temporary name that replaces `path` when it is complete.

    Args:
        path: file to write.
        groups: name -> (vectors [n, d], ids [n] of str); vectors are an array or memmap of any float type, or rows that
            are read in blocks; names are those of GROUPS.
        attrs: attributes of the file; dicts and lists become JSON. `checkpoint_sha256` is also set on each group.
        keep: names of groups to copy, as they are, from the file that is already at `path`.
        regions: of the rows of `query` [n, 4], whose ids may then occur several times.

    Rows are sorted and written in blocks of BLOCK: memory stays bounded if `vectors` is no array.

    Raises:
        InputError: ids that occur twice, as many ids as rows not given, other dimensions than the rest, rows with NaN
            or infinity, no group to keep.
    """
    with replacing(path) as temporary, h5py.File(temporary, "w") as out:
        if keep:
            with open_h5(path) as old:
                for name in keep:
                    for key in (name, f"{name}_ids", *(f"{name}_regions",) * (f"{name}_regions" in old)):
                        if key not in old:
                            raise InputError(f"{path} has no `{key}` to keep")
                        old.copy(key, out)
        for name, (vectors, ids) in groups.items():
            write_group(path, out, name, vectors, np.asarray(ids, dtype=str), regions if name == "query" else None)
            if "checkpoint_sha256" in attrs:
                out[name].attrs["checkpoint_sha256"] = attrs["checkpoint_sha256"]
        check_dims(path, {name: out[name].shape for name in GROUPS if name in out})
        for key, value in attrs.items():
            out.attrs[key] = json.dumps(value) if isinstance(value, (dict, list, tuple)) else value


def write_group(path: str | Path, out: h5py.File, name: str, vectors: Any, ids: np.ndarray,
                regions: np.ndarray | None = None) -> None:
    """Write vectors [n, d] as `name`, ids [n] as `name`_ids and regions [n, 4], if given, to the open file `out`,
    sorted by id. Raises InputError as `write_descriptors` does, naming `path`."""
    if len(vectors.shape) != 2 or len(vectors) != len(ids):
        raise InputError(f"{path}: `{name}` of shape {vectors.shape} with {len(ids)} ids")
    if regions is None and len(twice := duplicates(ids)):
        raise InputError(f"{path}: duplicate ids in `{name}`: {first_three(twice)}")
    order = np.argsort(ids, kind="stable")
    rows = out.create_dataset(name, vectors.shape, np.float32)
    for start in range(0, len(ids), BLOCK):
        part = order[start:start + BLOCK]
        block = np.asarray(vectors[part], dtype=np.float32)
        check_finite(path, name, block, ids[part])
        rows[start:start + len(part)] = block
    if regions is not None:
        out[f"{name}_regions"] = np.asarray(regions, np.float32)[order]
    ids = ids[order]
    if all(map(str.isascii, ids)):
        out[f"{name}_ids"] = ids.astype(np.bytes_)
    else:
        out.create_dataset(f"{name}_ids", data=ids.astype(object), dtype=h5py.string_dtype())


def check_dims(path: str | Path, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise InputError if the shapes (name -> (rows, dim)) of the groups of one file differ in dim."""
    if len({dim for _, dim in shapes.values()}) > 1:
        raise InputError(f"{path}: dimensions differ: " + ", ".join(f"`{name}` {s}" for name, s in shapes.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@contextlib.contextmanager
def reading(path: str | Path, name: str = "") -> Iterator[None]:
    """What h5py raises in here, of many types and in many words, becomes an InputError of one line: the file, the
    dataset `name` if one is read, the cause."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, BlockingIOError):
            why = "is locked: another process is writing it"
        elif cut := re.search(r"truncated file: eof = (\d+), .*stored_eof = (\d+)", str(error)):
            why = f"is cut short: {int(cut[1]):,} bytes of {int(cut[2]):,}"
        elif "file signature not found" in str(error):
            why = "not an HDF5 file" if Path(path).stat().st_size else "is empty"
        elif number := error_number(error):
            why = os.strerror(number)
        else:
            cause = re.search(r"synchronously .*?[(](.+)[)]", str(error))  # "Unable to synchronously open it (cause)"
            why = f"cannot be read: {cause[1] if cause else error}"
        raise InputError(f"{path}: {f'`{name}` ' * bool(name)}{why}") from None


def open_h5(path: str | Path) -> h5py.File:
    """Open an HDF5 file for reading. Raises InputError that tells why not: no such file, a folder, no permission,
    locked by a process that writes it, cut short, empty, something else."""
    check_file(path)
    with reading(path):
        return h5py.File(path, "r")


def open_dataset(file: h5py.File, path: str | Path, name: str) -> h5py.Dataset:
    """A dataset of an open file. Raises InputError: a link to nothing, no dataset, broken."""
    with reading(path, name):
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset):
            raise InputError(f"{path}: `{name}` is no dataset")
        dataset.dtype  # not every type is one that numpy has
        for source in dataset.virtual_sources() if dataset.is_virtual else ():  # without its file it reads as zeros
            if source.file_name != "." and not (Path(path).parent / source.file_name).is_file():
                raise InputError(f"{path}: `{name}` is made of {source.file_name}, which is not there")
        return dataset


def read_ids(file: h5py.File, path: str | Path, name: str) -> np.ndarray:
    """Ids of any stored form (fixed width or variable, ASCII or UTF-8) -> array [n] of str. Raises InputError: not a
    list of strings, not UTF-8, an empty one, broken."""
    dataset = open_dataset(file, path, name)
    if h5py.check_string_dtype(dataset.dtype) is None:
        raise InputError(f"{path}: `{name}` holds {dataset.dtype}, not strings")
    if dataset.ndim != 1:
        raise InputError(f"{path}: `{name}` should be a list of strings, is of shape {dataset.shape}")
    with reading(path, name):
        ids = dataset[:]
    try:
        ids = np.char.decode(ids.astype(np.bytes_) if ids.dtype == object else ids, "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: `{name}` is not UTF-8: {error.object!r}") from None
    if len(empty := np.flatnonzero(ids == "")):
        raise InputError(f"{path}: `{name}` has an empty id, row {empty[0]}")
    return ids


def read_attrs(thing: h5py.File | h5py.Dataset, path: str | Path) -> dict[str, Any]:
    """Attributes of a file or dataset; text is str, however it is stored. Raises InputError: broken."""
    with reading(path):
        return {name: value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
                for name, value in thing.attrs.items()}


class BlockRows(ABC):
    """Rows [n, dim] that are read in blocks: what has `ids` [n], `shape` and `read(start, stop)`."""
    ids: np.ndarray
    shape: tuple[int, int]

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop as float32 [n, dim]."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows of an index array [n] -> [n, dim]; what lies between the first and the last of them is read."""
        first = rows.min()
        return self.read(first, rows.max() + 1)[rows - first]

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
        """Iterate over (start, float32 [up to size, dim])."""
        for start in range(0, len(self), size):
            yield start, self.read(start, start + size)


class Rows(BlockRows):
    """One group of an open descriptor file. Nothing but the ids is in memory; rows are read, and checked, in blocks.

    Attributes: ids [n] of str, regions [n, 4] or None, images [m]: the ids, each once, image_of [n]: the image that a
    row is a region of, or None where each row is an image; shape (n, dim), deviation: largest | |row| - 1 | of the rows
    read so far, checkpoint: sha256 of the checkpoint that made them, or None.
    """

    def __init__(self, name: str, dataset: h5py.Dataset, ids: np.ndarray, rows: np.ndarray | None = None,
                 regions: np.ndarray | None = None) -> None:
        self.name, self.dataset, self.ids, self.rows, self.regions = name, dataset, ids, rows, regions
        self.images: np.ndarray = ids
        self.image_of: np.ndarray | None = None
        if regions is not None:
            self.images, self.image_of = images_of(ids)
        self.path, self.deviation = dataset.file.filename, 0.0
        self.checkpoint = read_attrs(dataset, self.path).get("checkpoint_sha256")
        self.check()
        self.shape = (len(ids), dataset.shape[1])

    def check(self) -> None:
        """Raise InputError for a wrong shape or type, a wrong number of ids, duplicate ids, no rows."""
        data, where = self.dataset, f"{self.path}: `{self.name}`"
        if data.ndim != 2 or data.dtype.kind != "f" or not data.shape[1]:
            raise InputError(f"{where} should be a matrix of floats, is {data.dtype} of shape {data.shape}")
        if self.rows is None and len(self.ids) != len(data):
            raise InputError(f"{where} of shape {data.shape} with {len(self.ids)} ids")
        if not len(self.ids):
            raise InputError(f"{where} of shape {data.shape} is empty")
        if len(twice := duplicates(self.images)):
            raise InputError(f"{where} has duplicate ids: {first_three(twice)}")
        if self.regions is not None and self.regions.shape != (len(self.ids), 4):
            raise InputError(f"{where} of shape {data.shape} with regions of shape {self.regions.shape}")
        if data.dtype != np.float32:
            print(f"{where} is {data.dtype}, read as float32", file=sys.stderr)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop as float32 [n, dim]. Raises InputError naming the ids of rows with NaN or infinity."""
        stop = len(self) if stop is None else min(stop, len(self))
        with reading(self.path, self.name):
            if self.rows is None:
                block = self.dataset[start:stop]
            else:
                rows = self.rows[start:stop]
                block = self.dataset[rows[0]:rows[-1] + 1][rows - rows[0]]
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, and is told as that
            block = block.astype(np.float32, copy=False)
        check_finite(self.path, self.name, block, self.ids[start:stop])
        norms = np.sqrt(np.einsum("ij,ij->i", block, block))
        self.deviation = max(self.deviation, float(np.abs(norms - 1).max(initial=0)))
        return block

    def random_access(self) -> np.ndarray:
        """Rows [n, dim] to index at random: a memory map where the file allows it, else in memory."""
        offset = self.dataset.id.get_offset()  # None where rows are stored in chunks
        if self.rows is not None or offset is None or self.dataset.dtype != np.dtype("<f4"):
            return self.read()
        return np.memmap(self.path, "<f4", "r", offset, self.shape)


class Descriptors:
    """Open a descriptor file for reading; a context manager. `descriptors["query"]` is a Rows.

    Attributes: path, attrs (dict), groups: name -> Rows of the groups it holds.

    Raises:
        InputError: no such file, not HDF5, none of the known keys, ids missing or wrong in number, duplicate ids, empty
            groups, dimensions that differ between groups; on access: the group is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.file = path, open_h5(path)
        try:
            self.attrs = read_attrs(self.file, path)
            self.groups = self.find_groups()
            check_dims(path, {name: rows.shape for name, rows in self.groups.items()})
        except BaseException:
            self.file.close()
            raise

    def find_groups(self) -> dict[str, Rows]:
        """name -> Rows, in either form. Raises InputError: none of the known keys, ids missing or wrong in number."""
        file, path, groups = self.file, self.path, {}
        with reading(path):
            keys = set(file)
        if {"vectors", "image_names"} <= keys:
            names, vectors = read_ids(file, path, "image_names"), open_dataset(file, path, "vectors")
            if vectors.shape[:1] != names.shape:
                raise InputError(f"{path}: `vectors` of shape {vectors.shape} with {len(names)} names")
            letters = names.astype("U1")
            for name in GROUPS:
                rows = np.flatnonzero(letters == name[0].upper())
                if len(rows):
                    groups[name] = Rows(name, vectors, names[rows], rows)
            return groups
        found = [name for name in GROUPS if name in keys]
        if not found:
            raise InputError(f"{path}: holds none of {', '.join(GROUPS)}")
        for name in found:
            if f"{name}_ids" not in keys:
                raise InputError(f"{path}: `{name}_ids` is missing")
        regions = open_dataset(file, path, "query_regions")[:] if "query_regions" in keys else None
        return {name: Rows(name, open_dataset(file, path, name), read_ids(file, path, f"{name}_ids"),
                           regions=regions if name == "query" else None) for name in found}

    def __getitem__(self, name: str) -> Rows:
        if name not in self.groups:
            raise InputError(f"{self.path}: `{name}` is missing, it holds {', '.join(self.groups) or 'no rows'}")
        return self.groups[name]

    def steps(self) -> list[str]:
        """The steps of post-processing that made it. Raises InputError: attribute `steps` is no list of words."""
        what = f"{self.path}: attribute `steps` cannot be read"
        steps = parse_json(self.attrs.get("steps", "[]"), what)
        if isinstance(steps, list) and all(isinstance(step, str) for step in steps):
            return steps
        raise InputError(what)

    @property
    def contaminated(self) -> str:
        """The ground truth that the checkpoint was trained on, "" where it was not."""
        return str(self.attrs.get("contaminated", ""))

    def check_checkpoint(self) -> None:
        """Raise InputError if the groups come from more than one checkpoint: their distances would mean nothing."""
        made_by = {name: str(rows.checkpoint) for name, rows in self.groups.items() if rows.checkpoint is not None}
        if len(set(made_by.values())) > 1:
            raise InputError(f"{self.path}: groups of different checkpoints: "
                             + ", ".join(f"`{name}` {sha[:12]}" for name, sha in made_by.items()))

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        """Close, and warn of rows read that are not of unit length, unless post-processing left them so."""
        for name, rows in self.groups.items():
            if rows.deviation > UNIT_TOLERANCE and "steps" not in self.attrs:
                warn(f"{self.path}: `{name}` is not of unit length, largest deviation {rows.deviation:.3g}")
        self.file.close()
