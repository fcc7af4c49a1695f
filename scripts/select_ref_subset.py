#!/usr/bin/env python3
"""Choose the reference subset for quick evaluations: the references of all true pairs, and a seeded draw of others.

    python scripts/select_ref_subset.py input/public_ground_truth.csv -o input/rids_subset.txt

writes one reference id per line, sorted. `train.py --mode extract --eval-subset` then extracts these alone. Scores on a
subset are higher than those on all references, and comparable only between runs with the same subset. The notes drew
100,000 of the million ids with replacement, without a seed, which left about 95,200 distinct ones (--replacement).
"""
from __future__ import annotations

import argparse
import os
import re
import sys

import numpy as np

from copydet.common import InputError, check_output, first_three, replacing, run_main, warn
from copydet.descriptors import Descriptors
from copydet.images import id_of, list_images, not_read
from copydet.metrics import read_ground_truth, respell
from copydet.options import natural, positive

DISC21 = 1_000_000  # references R000000 to R999999


def reference_ids(source: str) -> np.ndarray:
    """Ids [n], sorted, from a number (of DISC21's ids), a folder of images, or a descriptor file."""
    if re.fullmatch(r"\d{1,10}", source, re.ASCII):
        return np.char.mod("R%06d", np.arange(int(source)))
    if os.path.isdir(source):
        paths, odd = list_images(source)
        if odd:
            warn(f"{len(odd):,} files in {source} look like images and are none that can be used{not_read(odd)}")
        return np.unique([id_of(name) for name in paths])
    with Descriptors(source) as file:
        return np.sort(file["reference"].ids)


def select(positives: np.ndarray, ids: np.ndarray, size: int, seed: int, replacement: bool = False) -> np.ndarray:
    """Sorted union of the ids of the true pairs [p] and `size` draws from ids [n]."""
    if size > len(ids) and not replacement:
        raise InputError(f"--size {size}: there are {len(ids)} references")
    if len(unknown := np.setdiff1d(positives, ids)):
        raise InputError(f"references of true pairs that --references lacks: {first_three(unknown)}")
    return np.union1d(positives, np.random.default_rng(seed).choice(ids, size, replace=replacement))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ground_truth", help="CSV query_id, reference_id")
    parser.add_argument("-o", "--output", default="input/rids_subset.txt", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--references", default=str(DISC21), metavar="N|DIR|FILE", help="draw from R000000 ... (N ids, "
                        "default: %(default)s), the images in a folder, or the references of a descriptor file")
    parser.add_argument("--size", type=positive, default=100_000, metavar="N", help="draws (default: %(default)s)")
    parser.add_argument("--replacement", action="store_true", help="draw with replacement, as in the notes")
    parser.add_argument("--seed", type=natural, default=0, help="default: %(default)s")
    return parser


def write_subset(args: argparse.Namespace) -> None:
    """Run the command line."""
    check_output("-o", args.output, (args.ground_truth, args.references))
    positives, ids = read_ground_truth(args.ground_truth)[1].reference_id.to_numpy(str), reference_ids(args.references)
    positives, = respell(args.ground_truth, (positives, ids.tolist()))
    if len(broken := positives[np.char.find(positives, "\n") >= 0]):
        raise InputError(f"{args.ground_truth}: an id with a line break fits into no list of lines: {broken[0]!r}")
    subset = select(positives, ids[np.char.find(ids, "\n") < 0], args.size, args.seed, args.replacement)
    with replacing(args.output) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in subset), encoding="utf-8")
    print(f"{args.output}: {len(subset):,} references, {len(np.unique(positives)):,} of them of true pairs")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run_main(lambda: write_subset(args))


if __name__ == "__main__":
    sys.exit(main())
