#!/usr/bin/env python3
"""Put the descriptor files of `train.py --mode extract --shard I/N` together.

    python scripts/merge_shards.py exp/v31/extract/fb-isc-submission.shard-*.h5 -o exp/v31/extract/fb-isc-submission.h5

All N shards have to be there, once each, with the same groups and made with the same settings. Rows are read in blocks.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path

import numpy as np

from copydet.common import InputError, check_output, run_main
from copydet.descriptors import Descriptors, Rows, write_descriptors

OWN = ("shard", "checkpoint")  # attributes that may differ: the part, and the checkpoint's path on that machine


class Concatenated:
    """Rows [n, dim] of several files, one after another, read as they are indexed."""

    def __init__(self, parts: list[Rows]) -> None:
        self.parts = [part.random_access() for part in parts]
        self.starts = np.cumsum([0, *map(len, self.parts)])
        self.shape = (self.starts[-1], self.parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), self.shape[1]), np.float32)
        which = np.searchsorted(self.starts, rows, "right") - 1
        for i, part in enumerate(self.parts):
            out[which == i] = part[rows[which == i] - self.starts[i]]
        return out


def check_shards(files: list[Descriptors]) -> dict:
    """Raise InputError unless `files` are all shards of one extraction, once each; returns their attributes."""
    shards = [file.attrs.get("shard", "") for file in files]
    for file, shard in zip(files, shards):
        if not shard:
            raise InputError(f"{file.path} is no shard: it has no attribute `shard`")
        if not re.fullmatch(r"\d+/[1-9]\d*", str(shard)):
            raise InputError(f"{file.path}: attribute `shard` should be I/N, is {shard!r}")
    count = int(shards[0].split("/")[1])
    wanted = [f"{i}/{count}" for i in range(count)]
    for shard in wanted:
        if shards.count(shard) != 1:
            raise InputError(f"shard {shard} is " + ("missing" if shard not in shards else "there twice: " + ", ".join(
                str(file.path) for file, other in zip(files, shards) if other == shard)))
    if odd := set(shards) - set(wanted):
        raise InputError(f"{files[shards.index(min(odd))].path} is shard {min(odd)}, {files[0].path} is {shards[0]}")
    first = settings(files[0])
    for file in files[1:]:
        differ = [name for name in first | settings(file) if first.get(name) != settings(file).get(name)]
        if differ:
            raise InputError(f"{file.path} and {files[0].path} differ in {', '.join(sorted(differ))}")
    return {name: value for name, value in files[0].attrs.items() if name != "shard"}


def settings(file: Descriptors) -> dict:
    """What has to agree: the groups and every attribute but those of the part."""
    return {"groups": sorted(file.groups)} | {name: json.dumps(value, default=str) for name, value in
                                              file.attrs.items() if name not in OWN}


def merge(shards: list[Path], output: Path) -> None:
    """Write the descriptor file `output` of the files `shards`. Raises InputError: as `check_shards`, or where `output`
    cannot be written."""
    check_output("-o", output, shards)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(Descriptors(path)) for path in shards]
        attrs, groups, regions = check_shards(files), {}, None
        for name in files[0].groups:
            parts = [file[name] for file in files]
            groups[name] = Concatenated(parts), np.concatenate([part.ids for part in parts])
            if parts[0].regions is not None:
                regions = np.concatenate([part.regions for part in parts])
        write_descriptors(output, groups, attrs, regions=regions)
    print(f"wrote {output}: " + ", ".join(f"{len(rows):,} {name}" for name, (rows, _) in groups.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARD.h5", nargs="+", type=Path)
    parser.add_argument("-o", "--output", metavar="OUT.h5", required=True, type=Path)
    args = parser.parse_args(argv)
    return run_main(lambda: merge(args.shards, args.output))


if __name__ == "__main__":
    sys.exit(main())
