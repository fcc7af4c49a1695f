#!/usr/bin/env python3
"""Post-process descriptors: centring, whitening, embedding isolation, score normalisation, ensembles.

    python scripts/postprocess.py raw.h5 -o isolated.h5 isolate:beta=0.35,k=10,q=3,r=1
    python scripts/postprocess.py raw.h5 -o final.h5 --preset v107-final
    python scripts/postprocess.py a.h5 b.h5 -o ensemble.h5 concat l2 svd:dim=256 l2
    python scripts/postprocess.py raw.h5 -o pairs.csv --preset v36-isolation-norm

Steps are applied in the order given; a step is NAME or NAME:key=value,key=value. What a step learns, it learns from the
training rows alone (`train` in the file: train.py --mode extract --target-set qrt). Steps and defaults:

    l2         unit length
    center     minus the mean of the training rows
    whiten     PCA of the training rows: dim=256; each component is divided by its standard deviation
    dba        training rows become the mean of their k neighbours, weighted by similarity^alpha: k=10,alpha=3
    isolate    minus beta x the mean of the k nearest training rows, then unit length, q and r times for queries and
               references: beta=0.35,k=10,q=3,r=3; only neighbours more similar than threshold=-1, weighted by
               similarity^alpha=0; centroids=0: of that many k-means centroids instead of the training rows;
               among=reference: of the nearest other references, which needs no training rows; then q=0 keeps queries
               as they are, as their originals are among these
    norm       score normalisation: score = -(squared L2) - beta x level, level = mean similarity of the query to its k
               nearest training rows, or with level=distance minus their mean squared L2: beta=0.5,k=3,level=similarity.
               It is one more column, so that plain search gives this score less a constant
    concat     several files side by side, which need the same ids; always the first step
    svd        truncated SVD of the training rows, not centred: dim=256

Where the output is a .csv it holds 10 pairs per query, query_id, reference_id and score, without the constant.
A run that was killed continues from its last finished block. Inputs are never changed.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from copydet.common import (InputError, check_file, check_output, first_three, locked, naming, read_json, replacing,
                            run_main)
from copydet.descriptors import BlockRows, Descriptors, Rows, write_descriptors
from copydet.options import split_settings
from copydet.regions import images_of
from copydet.search import count_gpus, search_topk

BLOCK = 8192  # rows between two points from which a killed run can continue
PRESETS = {  # the notes' results; each with the state of the notes' script that gave it
    "v23-isolation": "isolate:beta=0.35,k=10,q=3,r=3",  # 7cc692d
    "v23-norm": "norm:beta=1,k=3,level=distance",  # d920aad, on raw descriptors
    "v23-isolation-norm": "isolate:beta=0.35,k=10,q=3,r=3 norm:beta=1,k=3",  # 7cc692d: the other reading of "w/ norm"
    "v36-isolation-norm": "isolate:beta=0.35,k=10,q=3,r=3 norm:beta=0.5,k=3",  # d61e3b1
    "v72-v75-ensemble": "concat l2 svd:dim=256 l2 isolate:beta=0.35,k=10,q=3,r=3",  # ea65c07
    "archive-isolation": "isolate:among=reference,q=0,r=3",  # not of the notes
    "v107-final": "dba:k=10,alpha=3 isolate:beta=0.35,k=10,q=1,r=1",  # 4d950c9
}


# ---------------------------------------------------------------------------------------------------------------------
# Rows: read in blocks from the inputs and from what earlier steps wrote


class StoredRows(BlockRows):
    """Rows that a step wrote: float32 [n, d] in a plain binary file."""

    def __init__(self, file: Path, ids: np.ndarray, dim: int) -> None:
        self.file, self.ids, self.shape = file, ids, (len(ids), dim)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop = len(self) if stop is None else min(stop, len(self))
        dim = self.shape[1]
        return np.fromfile(self.file, np.float32, (stop - start) * dim, offset=start * dim * 4).reshape(-1, dim)


class JoinedRows(BlockRows):
    """The same rows of several files side by side."""

    def __init__(self, members: list[Rows]) -> None:
        self.members, self.ids = members, members[0].ids
        self.shape = (len(self.ids), sum(member.shape[1] for member in members))

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return np.hstack([member.read(start, stop) for member in self.members])


def join(files: Sequence[Descriptors]) -> dict[str, JoinedRows]:
    """Open files -> name -> JoinedRows. InputError where groups, ids, their order or dimensions differ."""
    first, groups = files[0], {}
    for other in files[1:]:
        if set(other.groups) != set(first.groups):
            raise InputError(f"{first.path} holds {', '.join(first.groups)}, {other.path} {', '.join(other.groups)}")
        for name, rows in first.groups.items():
            check_same_ids(rows, other[name])
            if rows.shape[1] != other[name].shape[1]:
                raise InputError(f"`{name}` is {rows.shape} in {first.path}, {other[name].shape} in {other.path}")
    for name in first.groups:
        groups[name] = JoinedRows([file[name] for file in files])
    return groups


def check_same_ids(a: Rows, b: Rows) -> None:
    """Raise InputError unless two Rows have the same ids in the same order; it names those that differ."""
    for rows, other in ((a, b), (b, a)):
        if len(missing := np.setdiff1d(rows.ids, other.ids)):
            raise InputError(f"{other.path}: `{a.name}` lacks ids of {rows.path}: {first_three(missing)}")
    here, there = (np.zeros(0) if rows.regions is None else rows.regions for rows in (a, b))
    if not np.array_equal(here, there):
        raise InputError(f"{a.path} and {b.path}: `{a.name}` in other regions")
    if len(moved := a.ids[a.ids != b.ids]):
        raise InputError(f"{a.path} and {b.path}: `{a.name}` in another order, from id {first_three(moved)}")


# ---------------------------------------------------------------------------------------------------------------------
# Steps: what they give changes the groups that it names; the others stay as they are

Groups = Mapping[str, BlockRows]
Parameters = dict[str, Any]  # numbers and words, of the types of their defaults in STEPS
# A block [n, d] -> new rows [n, d'], and how many of them kept their direction because they would have become zero
Change = Callable[[np.ndarray], tuple[np.ndarray, int]]
Step = Callable[[Groups, Parameters, int], dict[str, Change]]  # the int: GPUs to search on


class Pool:
    """Exact search by inner product in rows [n, d] that are held in memory."""

    def __init__(self, rows: np.ndarray, ngpu: int) -> None:
        self.rows, self.index = np.ascontiguousarray(rows), None
        if ngpu:
            self.index = faiss.IndexFlatIP(rows.shape[1])
            self.index.add(self.rows)
            self.index = faiss.index_cpu_to_all_gpus(self.index, ngpu=ngpu)

    def search(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and rows [n, k] of the k most similar to each of x [n, d]; fewer if the pool is smaller."""
        k = min(k, len(self.rows))
        if self.index:
            return self.index.search(x, k)
        return faiss.knn(x, self.rows, k, metric=faiss.METRIC_INNER_PRODUCT)

    def weighted_sum(self, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """sum_j weights[i, j] * pool[rows[i, j]], of weights and rows [n, k] -> [n, d]."""
        total = np.zeros((len(rows), self.rows.shape[1]), np.float32)
        for weight, row in zip(weights.T, rows.T):
            total += weight[:, None] * self.rows[row]
        return total


def power(similarity: np.ndarray, alpha: float) -> np.ndarray:
    """similarity^alpha; negative similarities count as 0 where alpha is no whole number."""
    return np.power(similarity if alpha == int(alpha) else similarity.clip(0), alpha)


def normalize(x: np.ndarray, former: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """Rows of x [n, d] to unit length, and the number of those that have none: they become `former`, if given."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    zero = norm[:, 0] < 1e-6  # what a difference of unit vectors leaves at this length is rounding
    x = x / np.where(norm < 1e-6, 1, norm)
    if former is not None and zero.any():
        x[zero] = normalize(former[zero])[0]
    return x, int(zero.sum())


def second_moment(rows: BlockRows) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and mean of x x^T [d, d] of all rows, in float64, read in blocks."""
    dim = rows.shape[1]
    total, outer = np.zeros(dim), np.zeros((dim, dim))
    for _, block in rows.blocks(BLOCK):
        block = block.astype(np.float64)
        total, outer = total + block.sum(axis=0), outer + block.T @ block
    return total / len(rows), outer / len(rows)


def largest_eigenvectors(matrix: np.ndarray, dim: int, step: str) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [dim] and eigenvectors [d, dim] of a symmetric matrix [d, d], largest first."""
    values, vectors = np.linalg.eigh(matrix)
    rank = int((values > values[-1] * 1e-10).sum())
    if dim > rank:
        raise InputError(f"{step}:dim={dim}: the training rows span {rank} dimensions")
    return values[::-1][:dim], vectors[:, ::-1][:, :dim]


def l2(groups: Groups, p: Parameters, ngpu: int) -> dict[str, Change]:
    return dict.fromkeys(groups, normalize)


def center(groups: Groups, p: Parameters, ngpu: int) -> dict[str, Change]:
    mean, _ = second_moment(groups["train"])
    return dict.fromkeys(groups, lambda x: (x - mean, 0))


def whiten(groups: Groups, p: Parameters, ngpu: int) -> dict[str, Change]:
    """x -> diag(l)^(-1/2) V^T (x - mean), with eigenvalues l and eigenvectors V of the covariance (divided by n)."""
    mean, outer = second_moment(groups["train"])
    values, vectors = largest_eigenvectors(outer - np.outer(mean, mean), p["dim"], "whiten")
    matrix = vectors / np.sqrt(values)
    return dict.fromkeys(groups, lambda x: ((x - mean) @ matrix, 0))


def svd(groups: Groups, p: Parameters, ngpu: int) -> dict[str, Change]:
    """Onto the right singular vectors of the training rows (notes, ea65c07; there a randomised solver)."""
    _, outer = second_moment(groups["train"])
    _, vectors = largest_eigenvectors(outer, p["dim"], "svd")
    return dict.fromkeys(groups, lambda x: (x.astype(np.float64) @ vectors, 0))


def dba(groups: Groups, p: Parameters, ngpu: int) -> dict[str, Change]:
    """t_i <- normalise(sum of t_j <t_i, t_j>^alpha over the k nearest, itself included) (notes, 2d06c76)."""
    pool = Pool(groups["train"].read(), ngpu)

    def smooth(x: np.ndarray) -> tuple[np.ndarray, int]:
        similarity, rows = pool.search(x, p["k"])
        return normalize(pool.weighted_sum(power(similarity, p["alpha"]), rows), x)

    return {"train": smooth}


def isolate(groups: Groups, p: Parameters, ngpu: int) -> dict[str, Change]:
    """x <- normalise(x - beta * n), n the weighted mean of the nearest training rows (notes, 7cc692d).

    Weights are similarity^alpha above the threshold, else 0; their sum is guarded by 1e-9 as in the notes. A row that
    the subtraction makes zero keeps its direction and is counted. Among the references no row counts for itself.
    """
    rows = groups[p["among"]].read()
    pool = Pool(centroids(rows, p["centroids"], p["among"]) if p["centroids"] else rows, ngpu)

    def iterate(iterations: int, x: np.ndarray) -> tuple[np.ndarray, int]:
        kept, first = 0, x
        for _ in range(iterations):
            similarity, near = pool.search(x, p["k"] + (p["among"] == "reference"))
            weights = power(similarity, p["alpha"]) * (similarity > p["threshold"])
            if p["among"] == "reference":
                weights *= others(first, pool.rows, near)
            mean = pool.weighted_sum(weights / (weights.sum(axis=1, keepdims=True) + 1e-9), near)
            x, zero = normalize(x - np.float32(p["beta"]) * mean, x)
            kept += zero
        return x, kept

    return {name: partial(iterate, p[name[0]]) for name in ("query", "reference") if p[name[0]]}


def others(x: np.ndarray, pool: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Rows `near` [n, k + 1] of a pool [m, d], nearest first -> bool [n, k + 1]: the first k that are not x [n, d]."""
    own = np.stack([(pool[column] == x).all(1) for column in near.T], 1)
    own[~own.any(1), -1] = True
    return ~own


def centroids(rows: np.ndarray, n: int, name: str) -> np.ndarray:
    """n k-means centroids of rows [m, d], of unit length (notes, 7cc692d: 20 iterations, 10,000 rows a centroid)."""
    if n > len(rows):
        raise InputError(f"isolate:centroids={n}: `{name}` has {len(rows)} rows")
    kmeans = faiss.Kmeans(rows.shape[1], n, niter=20, max_points_per_centroid=10000, min_points_per_centroid=1, seed=0)
    kmeans.train(rows)
    return normalize(kmeans.centroids)[0]


def norm(groups: Groups, p: Parameters, ngpu: int) -> dict[str, Change]:
    """Squared L2 becomes squared L2 + beta * level + norm_constant (notes, d61e3b1; level=distance: d920aad)."""
    pool = Pool(groups["train"].read(), ngpu)

    def with_level(x: np.ndarray) -> tuple[np.ndarray, int]:
        if abs(np.linalg.norm(x, axis=1) - 1).max() > 1e-3:
            raise InputError("norm: the queries are not of unit length; put l2 before it")
        level = pool.search(x, p["k"])[0].mean(axis=1, dtype=np.float64)
        if p["level"] == "distance":
            level = 2 * level - 2
        column = np.sqrt((p["beta"] * level + norm_constant(p)).clip(0))
        return np.column_stack([x, column.astype(np.float32)]), 0

    def with_zero(x: np.ndarray) -> tuple[np.ndarray, int]:
        return np.pad(x, ((0, 0), (0, 1))), 0

    return dict.fromkeys(groups, with_zero) | {"query": with_level}


def norm_constant(p: Parameters) -> float:
    """What makes beta * level positive: the least similarity is -1, the largest squared distance 4."""
    return p["beta"] * (4 if p["level"] == "distance" else 1)


STEPS: dict[str, tuple[Step, Parameters]] = {  # name -> (step, parameters with their defaults)
    "l2": (l2, {}), "center": (center, {}), "whiten": (whiten, {"dim": 256}), "svd": (svd, {"dim": 256}),
    "dba": (dba, {"k": 10, "alpha": 3.0}),
    "isolate": (isolate, {"beta": 0.35, "k": 10, "q": 3, "r": 3, "threshold": -1.0, "alpha": 0.0, "centroids": 0,
                          "among": "train"}),
    "norm": (norm, {"beta": 0.5, "k": 3, "level": "similarity"}),
    "concat": (lambda groups, p, ngpu: {}, {}),  # `join` has put the files side by side
}


def parse_step(text: str) -> tuple[str, Parameters]:
    """"isolate:beta=0.35,k=10" -> (name, parameters, defaults filled in). InputError names what is wrong."""
    name, settings = split_settings(text)
    parameters = dict(STEPS[name][1])
    for key, value in settings.items():
        if key not in parameters:
            raise InputError(f"{text}: {name} has no parameter {key!r}, but {', '.join(parameters) or 'none at all'}")
        try:
            parameters[key] = type(parameters[key])(value)
        except ValueError:
            raise InputError(f"{text}: {key} should be {type(parameters[key]).__name__}, is {value!r}") from None
        if isinstance(parameters[key], float) and not math.isfinite(parameters[key]):
            raise InputError(f"{text}: {key}={value} is not a number")
        if key in ("k", "dim") and parameters[key] < 1 or key in ("q", "r", "centroids") and parameters[key] < 0:
            raise InputError(f"{text}: {key}={value} is too small")
    if parameters.get("level") not in (None, "similarity", "distance"):
        raise InputError(f"{text}: level is similarity or distance")
    if parameters.get("among") not in (None, "train", "reference"):
        raise InputError(f"{text}: among is train or reference")
    return name, parameters


def step_text(name: str, parameters: Parameters) -> str:
    """The inverse of parse_step, every parameter named."""
    settings = ",".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                        for key, value in parameters.items())
    return f"{name}:{settings}" if settings else name


# ---------------------------------------------------------------------------------------------------------------------
# Running


def work_folder(output: Path, inputs: list[str], steps: list[str]) -> Path:
    """Folder beside the output for what steps have finished: another one for other inputs, or other steps. Call it
    where no other run writes the output: those of earlier runs go."""
    stamps = [(str(Path(file).resolve()), Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in inputs]
    key = hashlib.sha256(json.dumps([stamps, steps, BLOCK]).encode()).hexdigest()[:16]
    folder = output.with_name(f".{output.name}.{key}.partial")
    for other in output.parent.iterdir():
        if other != folder and re.fullmatch(rf"\.{re.escape(output.name)}\.[0-9a-f]{{16}}\.partial", other.name):
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    return folder


def apply(change: Change, rows: BlockRows, file: Path, title: str) -> tuple[StoredRows, int]:
    """Apply `change` to all rows, in blocks, into `file`; continue after the last whole block that is in it.

    Returns StoredRows, and the number of rows that could not be changed.
    """
    dim = change(rows.read(0, 1))[0].shape[1]
    kept_file = file.with_suffix(".kept.json")
    kept = read_json(kept_file) if kept_file.exists() else {}
    with naming(file), open(file, "ab") as out:
        done = out.tell() // (4 * dim)
        done = done if done == len(rows) else done // BLOCK * BLOCK
        out.truncate(done * 4 * dim)
        with tqdm(total=len(rows), initial=done, desc=title, unit=" rows", disable=None) as bar:
            for start in range(done, len(rows), BLOCK):
                block, unchanged = change(rows.read(start, start + BLOCK))
                if unchanged:
                    kept[str(start)] = unchanged
                    with replacing(kept_file) as temporary:
                        temporary.write_text(json.dumps(kept))
                out.write(np.ascontiguousarray(block, np.float32).data)  # tofile would not tell why it could not
                out.flush()
                bar.update(len(block))
    return StoredRows(file, rows.ids, dim), sum(kept.values())


def run_steps(groups: Groups, steps: Sequence[tuple[str, Parameters]], folder: Path, ngpu: int) -> Groups:
    """Apply steps [(name, parameters)] to name -> rows; returns name -> rows."""
    for number, (name, parameters) in enumerate(steps):
        after = dict(groups)
        for group, change in STEPS[name][0](groups, parameters, ngpu).items():
            if group not in groups:
                continue
            title = f"step {number + 1}/{len(steps)} {name} {group}"
            after[group], kept = apply(change, groups[group], folder / f"{number}-{group}", title)
            if kept:
                print(f"{name}: {kept:,} of `{group}` would have become zero and kept their direction", file=sys.stderr)
        groups = after
    return groups


def output_attrs(files: Sequence[Descriptors], steps: Sequence[tuple[str, Parameters]]) -> dict:
    """Attributes of the output: those of the first input, the steps, where it all came from, and what taints it."""
    attrs = files[0].attrs | {"steps": files[0].steps() + [step_text(*step) for step in steps]}
    attrs.pop("calibration", None)  # scores have another meaning now
    if len(files) > 1:
        attrs["inputs"] = [str(file.path) for file in files]
        hashes = [str(file.attrs["checkpoint_sha256"]) for file in files if "checkpoint_sha256" in file.attrs]
        if hashes:
            attrs["checkpoint_sha256"] = "+".join(hashes)
    tainted = sorted({file.contaminated for file in files if file.contaminated})
    return attrs | ({"contaminated": ", ".join(tainted)} if tainted else {})


def write_pairs(output: Path, groups: Groups, regions: np.ndarray | None, constant: float, ngpu: int,
                n: int = 10) -> None:
    """CSV of the n best references of each query, by squared L2; score = -(squared L2) + constant. `regions` of the
    queries' rows, or None."""
    query, reference = groups["query"], groups["reference"]
    images, image_of = (query.ids, None) if regions is None else images_of(query.ids)
    found = search_topk(query.read(), reference, min(n, len(reference)), np.empty(0, np.int64), ngpu,
                        image_of=image_of)
    found = found[np.lexsort((found["reference"], -found["score"], found["query"]))]
    with replacing(output) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["query_id", "reference_id", "score"])
        rows.writerows([images[i], reference.ids[j], score + constant] for i, j, score in found.tolist())


def check_steps(steps: Sequence[tuple[str, Parameters]], files: Sequence[Descriptors]) -> None:
    """InputError where steps do not fit each other, or the inputs."""
    names = [name for name, _ in steps]
    if not steps:
        raise InputError(f"no step given: {', '.join(STEPS)}, or --preset")
    if (len(files) > 1) != ("concat" in names) or "concat" in names[1:]:
        raise InputError("concat is the first step where there are several inputs, and only there")
    for name, parameters in steps:
        group = parameters.get("among", "train")
        for file in files if name not in ("l2", "concat") else ():
            if group not in file.groups:
                letters = "qrt" if group == "train" else "qr"
                raise InputError(f"{file.path}: `{group}` is missing, which {name} learns from; "
                                 f"python train.py --mode extract --target-set {letters} writes it")
    for file in files:
        file.check_checkpoint()


def write_output(output: Path, groups: Groups, regions: np.ndarray | None, steps: Sequence[tuple[str, Parameters]],
                 attrs: dict, inputs: list[str], ngpu: int) -> None:
    """Do the steps, and write descriptors or pairs. `regions`: of the queries' rows."""
    folder = work_folder(output, inputs, [step_text(*step) for step in steps])
    try:
        groups = run_steps(groups, steps, folder, ngpu)
        if output.suffix == ".csv":
            write_pairs(output, groups, regions, sum(norm_constant(p) for name, p in steps if name == "norm"), ngpu)
        else:
            write_descriptors(output, {name: (rows, rows.ids) for name, rows in groups.items()}, attrs, regions=regions)
    except InputError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def postprocess(args: argparse.Namespace) -> None:
    """Run the command line."""
    steps = [parse_step(text) for text in args.steps]
    output = Path(args.output)
    if output.suffix not in (".h5", ".hdf5", ".hdf", ".csv"):
        raise InputError(f"-o {output}: neither .h5 nor .csv")
    check_output("-o", output, args.inputs)
    ngpu = count_gpus(args.ngpu)
    files = []
    try:
        for file in args.inputs:
            files.append(Descriptors(file))
        check_steps(steps, files)
        attrs = output_attrs(files, steps)
        if output.suffix == ".csv" and "contaminated" in attrs and not args.allow_contaminated:
            raise InputError(f"-o {output}: a CSV cannot say that the checkpoint was trained on "
                             f"{attrs['contaminated']} (write .h5, or --allow-contaminated)")
        groups: Groups = join(files) if len(files) > 1 else files[0].groups
        if output.suffix == ".csv" and not {"query", "reference"} <= set(groups):
            raise InputError(f"{args.inputs[0]}: pairs need `query` and `reference`")
        with locked(output.with_name(f".{output.name}.lock"), f"-o {output}"):
            regions = files[0]["query"].regions if "query" in groups else None
            write_output(output, groups, regions, steps, attrs, args.inputs, ngpu)
    finally:
        for file in files:
            file.__exit__()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="IN.h5|STEP", help="descriptor files, and steps in their order")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help=".h5: descriptors; .csv: pairs")
    parser.add_argument("--preset", choices=PRESETS, help="; ".join(f"{k}: {v}" for k, v in PRESETS.items()))
    parser.add_argument("--ngpu", type=int, default=-1, metavar="N", help="GPUs to search on; 0: CPU; default: all")
    parser.add_argument("--allow-contaminated", action="store_true", help="write a CSV, which cannot carry that mark, "
                        "of descriptors of a checkpoint that was trained on the ground truth")
    args = parser.parse_intermixed_args(argv)
    is_step = [word.partition(":")[0] in STEPS for word in args.words]
    args.steps = [word for word, step in zip(args.words, is_step) if step]
    args.inputs = [word for word, step in zip(args.words, is_step) if not step]
    return args


def check_args(args: argparse.Namespace) -> None:
    """What can be wrong before any work; the steps of a preset become --steps."""
    if args.preset and args.steps:
        raise InputError(f"--preset {args.preset} and steps: {', '.join(args.steps)}")
    args.steps = PRESETS[args.preset].split() if args.preset else args.steps
    for word in args.inputs:
        if not os.path.exists(word):
            raise InputError(f"{word}: neither a file nor a step ({', '.join(STEPS)})")
        check_file(word)
    if not args.inputs:
        raise InputError("no input file given")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def work() -> None:
        check_args(args)
        postprocess(args)

    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())
