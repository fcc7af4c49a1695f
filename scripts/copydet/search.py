"""Exact search: float32 search by faiss finds what could be among the candidates, rounding errors allowed for, and
float64 distances decide. References are read in blocks, so that memory does not grow with them."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from copydet.common import InputError, warn

if TYPE_CHECKING:
    from copydet.descriptors import BlockRows


PAIR = np.dtype([("query", np.int32), ("reference", np.int64), ("score", np.float64)])  # rows, -(squared L2)
QUERIES_AT_ONCE = 1024  # of those that need a range search
BYTES_PER_PAIR = 64  # of memory where a whole block turns out to be candidates, measured
NEIGHBOURS = 32  # per query and block; queries with more candidates than that need a range search


def count_gpus(wanted: int) -> int:
    """Number of GPUs to use, -1: all; faiss on CPUs alone lacks what is needed to use one. Raises InputError: more than
    there are."""
    if not wanted:
        return 0
    import faiss
    there = faiss.get_num_gpus() if hasattr(faiss, "index_cpu_to_all_gpus") else 0
    if wanted > there:
        raise InputError(f"--ngpu {wanted}: faiss sees {there} GPUs")
    return there if wanted < 0 else wanted


def squared_distances(queries: np.ndarray, references: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """|q_i - r_j|^2 [n] in float64, as a sum of squared differences, of rows i, j [n] of float32 [nq, d], [nr, d]."""
    result = np.empty(len(i))
    for start in range(0, len(i), 1024):  # rows that fit the cache
        part = slice(start, start + 1024)
        difference = queries[i[part]].astype(np.float64)
        difference -= references[j[part]]
        result[part] = np.square(difference, out=difference).sum(axis=1)
    return result


def longest(rows: np.ndarray) -> float:
    """Largest norm of rows [n, d]."""
    return float(np.sqrt(np.einsum("ij,ij->i", rows, rows).max()))


def rounding_error(dim: int, query_norm: float, reference_norm: float) -> float:
    """Bound of the error of |q|^2 + |r|^2 - 2 q.r in float32: (d + 8) u (|q| + |r|)^2, u = 2^-24 (Higham, 3.1)."""
    return (dim + 8) * 2.0**-24 * (query_norm + reference_norm)**2


def knn(queries: np.ndarray, block: np.ndarray, k: int, ngpu: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances, in float32, and rows [n, k] of the k nearest of block [m, d] to each query [n, d], nearest
    first."""
    import faiss
    if not ngpu:
        return faiss.knn(queries, block, k)
    index = faiss.IndexFlatL2(block.shape[1])
    index.add(block)
    return faiss.index_cpu_to_all_gpus(index, ngpu=ngpu).search(queries, k)


def pairs_within(queries: np.ndarray, block: np.ndarray, radius: float, error: float, limit: int,
                 ngpu: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows (i [n], j [n]) of the pairs of queries [nq, d] and block [m, d] that may be among the `limit` nearest
    and have a squared distance up to `radius`.

    A few neighbours of every query are enough for most; the others go through range search. float32 distances are off
    by at most `error`.
    """
    import faiss
    distances, neighbours = knn(queries, block, min(NEIGHBOURS, len(block)), ngpu)
    if distances.size > limit:
        radius = min(radius, np.partition(distances, limit, axis=None)[limit] + error)
    full = distances[:, -1] <= radius + error if len(block) > NEIGHBOURS else np.zeros(len(queries), bool)
    i, rank = np.nonzero((distances <= radius + error) & ~full[:, None])
    yield i, neighbours[i, rank]
    if not full.any():
        return
    index, more = faiss.IndexFlatL2(block.shape[1]), np.flatnonzero(full)
    index.add(block)
    for start in range(0, len(more), QUERIES_AT_ONCE):
        part = more[start:start + QUERIES_AT_ONCE]
        limits, _, j = index.range_search(queries[part], float(np.nextafter(np.float32(radius + error), np.inf)))
        counts: np.ndarray = np.diff(limits.astype(np.int64))
        yield np.repeat(part, counts), j


def best(pairs: np.ndarray, limit: int, positives: np.ndarray, n_references: int) -> np.ndarray:
    """The `limit` PAIRs of highest score; among those tied at the limit false ones first, then by row.

    Args:
        pairs: PAIR [n].
        positives: sorted query row * n_references + reference row of the true pairs, int64.
    """
    if len(pairs) <= limit:
        return pairs
    cut = np.partition(pairs["score"], len(pairs) - limit)[len(pairs) - limit]
    sure, tied = pairs[pairs["score"] > cut], pairs[pairs["score"] == cut]
    key = tied["query"] * np.int64(n_references) + tied["reference"]
    order = np.lexsort((key, np.isin(key, positives)))
    return np.concatenate([sure, tied[order[:limit - len(sure)]]])


def progress_bar(references: BlockRows, shown: bool) -> tqdm:
    """Of the references that were searched; none where it is not `shown` or stderr is no terminal."""
    return tqdm(total=len(references), unit=" references", unit_scale=True, disable=None if shown else True)


def block_rows(memory: int) -> int:
    """Rows of a block of references in `memory` bytes: a whole batch of queries may be tied with all of it."""
    return max(1, memory // BYTES_PER_PAIR // QUERIES_AT_ONCE)


def best_regions(pairs: np.ndarray, image_of: np.ndarray) -> np.ndarray:
    """PAIRs of rows [n], each a region of the image image_of[row] -> the best PAIR of each image and reference, with
    the image as its query."""
    pairs = pairs.copy()
    pairs["query"] = image_of[pairs["query"]]
    pairs = pairs[np.lexsort((-pairs["score"], pairs["reference"], pairs["query"]))]
    same = (pairs["query"][1:] == pairs["query"][:-1]) & (pairs["reference"][1:] == pairs["reference"][:-1])
    return pairs[np.append(True, ~same)[:len(pairs)]]


def of_rows(positives: np.ndarray, image_of: np.ndarray, n_references: int) -> np.ndarray:
    """Keys of true pairs, as `best` takes them, of images -> those of their rows."""
    first, last = (np.searchsorted(positives, (image_of + end) * n_references) for end in (0, 1))
    rows, count = np.repeat(np.arange(len(image_of)), last - first), np.arange((last - first).sum())
    keys = positives[count + np.repeat(first - np.cumsum(last - first) + last - first, last - first)]
    return keys % n_references + rows * np.int64(n_references)


def search(queries: np.ndarray, references: BlockRows, limit: int, positives: np.ndarray, ngpu: int = 0,
           memory: int = 2**31, progress: bool = False, image_of: np.ndarray | None = None) -> np.ndarray:
    """The `limit` pairs of smallest distance over all queries together, exactly.

    References come in blocks. The worst of the best `limit` pairs so far bounds the radius of the next search, so the
    b-th block adds about limit / b pairs.

    Args:
        queries: float32 [nq, d].
        references: [nr, d]; blocks are read as they are needed.
        limit, positives: as in `best`.
        ngpu: GPUs to search on; 0: CPU.
        memory: bytes; sets the size of the blocks. It does not change the result.
        image_of: [nq], the image that a row of queries is a region of: then pairs are of images, each with the score of
            its best region, and so are the positives.

    Returns: PAIR [min(limit, nq * nr)], sorted by query row and reference row.
    """
    if image_of is not None:
        rows = search(queries, references, limit * np.bincount(image_of).max(),
                      of_rows(positives, image_of, len(references)), ngpu, memory, progress)
        pairs = best(best_regions(rows, image_of), limit, positives, len(references))
        return pairs[np.lexsort((pairs["reference"], pairs["query"]))]
    found, n_found, radius, query_norm = [np.empty(0, PAIR)], 0, np.inf, longest(queries)
    bar = progress_bar(references, progress)
    for start, block in references.blocks(block_rows(memory)):
        error = rounding_error(block.shape[1], query_norm, longest(block))
        for i, j in pairs_within(queries, block, radius, error, limit, ngpu):
            new = np.empty(len(i), PAIR)
            new["query"], new["reference"], new["score"] = i, start + j, -squared_distances(queries, block, i, j)
            found.append(new[new["score"] >= -radius])
            n_found += len(found[-1])
            if n_found > limit + limit // 2:
                found, n_found = [best(np.concatenate(found), limit, positives, len(references))], limit
                radius = -found[0]["score"].min()
        bar.update(len(block))
    bar.close()
    pairs = best(np.concatenate(found), limit, positives, len(references))
    return pairs[np.lexsort((pairs["reference"], pairs["query"]))]


def search_topk(queries: np.ndarray, references: BlockRows, k: int, positives: np.ndarray, ngpu: int = 0,
                memory: int = 2**31, progress: bool = False, image_of: np.ndarray | None = None) -> np.ndarray:
    """The `k` references of smallest distance of each query, exactly. Arguments and result as in `search`.

    float32 search finds somewhat more than k. Queries for which rounding errors could hide a better one, because of
    many ties or near-duplicates, are searched one by one.
    """
    if image_of is not None:
        keys = of_rows(positives, image_of, len(references))
        rows = search_topk(queries, references, k, keys, ngpu, memory, progress)
        pairs = best_regions(rows, image_of)
        parts = np.split(pairs, np.flatnonzero(np.diff(pairs["query"])) + 1)
        return np.concatenate([np.sort(best(part, k, positives, len(references)), order=["reference"])
                               for part in parts])
    spare = k + 16
    near, rows, norm = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), 0.0
    bar = progress_bar(references, progress)
    for start, block in references.blocks(max(spare, block_rows(memory))):
        d, j = knn(queries, block, min(spare, len(block)), ngpu)
        near, rows = np.hstack([near, d]), np.hstack([rows, j + start])
        order = np.argsort(near, axis=1, kind="stable")[:, :spare]
        near, rows = np.take_along_axis(near, order, 1), np.take_along_axis(rows, order, 1)
        norm = max(norm, longest(block))
        bar.update(len(block))
    bar.close()
    found = np.empty(rows.size, PAIR)
    found["query"], found["reference"] = np.repeat(np.arange(len(queries)), rows.shape[1]), rows.ravel()
    found["score"] = -exact_distances(queries, references, found)
    result, error = [], rounding_error(queries.shape[1], longest(queries), norm)
    for i, pairs in enumerate(found.reshape(rows.shape)):
        kept = best(pairs, k, positives, len(references))
        if rows.shape[1] < len(references) and near[i, -1] - error <= -kept["score"].min():
            true = positives[positives // len(references) == i] - i * len(references)
            kept = search(queries[i:i + 1], references, k, true, 0, memory)
            kept["query"] = i
        result.append(np.sort(kept, order=["reference"]))
    return np.concatenate(result)


def exact_distances(queries: np.ndarray, references: BlockRows, pairs: np.ndarray,
                    image_of: np.ndarray | None = None) -> np.ndarray:
    """Squared distances [n] of the PAIRs [n], in float64; references are read once, in blocks. With `image_of`, sorted,
    the pairs are of images, and the distance is that of the nearest region."""
    if image_of is not None and len(pairs):
        rows, starts = pairs_of_rows(pairs, image_of)
        return np.minimum.reduceat(exact_distances(queries, references, rows), starts)
    result, order = np.empty(len(pairs)), np.argsort(pairs["reference"], kind="stable")
    rows = pairs["reference"][order]
    for start, block in references.blocks(16384):
        part = order[slice(*np.searchsorted(rows, [start, start + len(block)]))]
        result[part] = squared_distances(queries, block, pairs["query"][part], pairs["reference"][part] - start)
    return result


def pairs_of_rows(pairs: np.ndarray, image_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs [n] of images -> those of all their regions [m], of a pair one after another, and where each begins [n]."""
    counts = np.bincount(image_of)[pairs["query"]]
    starts = np.cumsum(counts) - counts
    rows = np.repeat(pairs, counts)
    rows["query"] = np.repeat(np.searchsorted(image_of, pairs["query"]) - starts, counts) + np.arange(len(rows))
    return rows, starts


def nearest_rows(queries: np.ndarray, references: BlockRows, pairs: np.ndarray, image_of: np.ndarray) -> np.ndarray:
    """Of each of the pairs [n] of images the row of queries, a region, that is nearest to the reference; of equal ones
    the first. Arguments as in `exact_distances`."""
    rows, starts = pairs_of_rows(pairs, image_of)
    of_pair = np.repeat(np.arange(len(pairs)), np.diff(starts, append=len(rows)))
    order = np.lexsort((exact_distances(queries, references, rows), of_pair))
    return rows["query"][order[starts]]


def rows_of(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Row in `ids` [n] of each of `wanted` [m], -1 where it is not there."""
    order = np.argsort(ids)
    rows = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return np.where(ids[rows] == wanted, rows, -1)


def warn_if_collapsed(path: str | Path, queries: np.ndarray, references: BlockRows) -> None:
    """Say so where all queries [n, d], or the first references, are one vector: every pair is tied then."""
    for name, rows in (("query", queries), ("reference", references.read(0, 1024))):
        if len(rows) > 1 and np.ptp(rows, axis=0).max() < 1e-5:
            warn(f"{path}: collapsed descriptors: all of `{name}` are the same vector")
