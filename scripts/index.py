#!/usr/bin/env python3
"""Search among more descriptors than one file or one machine holds.

    python scripts/index.py build --index INDEX --factory IVF4096,PQ32 refs-0.h5 refs-1.h5 ...
    python scripts/index.py add --index INDEX refs-7.h5 ...                          further shards
    python scripts/index.py search --index INDEX queries.h5 -o pairs.csv --params nprobe=32
    python scripts/index.py search --index INDEX queries.h5 -o part-3.npz --shard 3  one process per shard, anywhere
    python scripts/index.py merge --index INDEX part-*.npz -o pairs.csv
    python scripts/index.py curve INDEX OTHER_INDEX --queries queries.h5 --truth gt.csv -o curve.png
    python scripts/index.py build --milvus http://host:19530 refs-0.h5 ...           or --milvus FILE.db, embedded

Each descriptor file is a shard: its `reference` rows go into one faiss index on disk, made by an index_factory string
(https://github.com/facebookresearch/faiss/wiki/The-index-factory) and memory-mapped by searches. With `Flat`, the
default, search is exact and streams the descriptor files. Any other index only proposes candidates, which are scored
exactly from the descriptors: scores are minus squared L2 distances, comparable across queries, with what isolation and
score normalisation made of them; equal scores are in order of id.

build and add skip shards that are there already: a run that was killed goes on when it is repeated. pairs.csv holds
query_id, reference_id, score, as eval_metrics.py reads it.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from copydet.common import (InputError, OutputFolder, WorkError, check_file, check_output, first_three, locked,
                            read_json, replacing, run_main, shown)
from copydet.descriptors import BLOCK, COMPARABLE, Descriptors, Rows
from copydet.metrics import micro_ap, read_ground_truth, respell, sort_candidates
from copydet.options import positive
from copydet.regions import images_of
from copydet.search import count_gpus, search_topk, squared_distances

if TYPE_CHECKING:
    import faiss
    import pymilvus

MADE_BY = (*COMPARABLE, "steps")
TRIED_OUT = 1000  # rows that a trained index has to take before it is kept
MILVUS_BATCH, MILVUS_QUERIES = 1000, 64  # rows, queries per request
MILVUS_INSTALL = "pip install --no-deps -r requirements-scale.txt"


def made_by(attrs: dict) -> str:
    """Hash of what made descriptors: checkpoint, settings, post-processing. Equal where distances mean something."""
    said = [name for name in MADE_BY if name in attrs or name not in ("mean", "std")]  # those of other programs have
    return hashlib.sha256(json.dumps([str(attrs.get(name)) for name in said]).encode()).hexdigest()[:16]


def open_shard(path: str | Path) -> tuple[Descriptors, Rows]:
    """Open a descriptor file whose references are a shard. Raises InputError: none in it, not sorted by id."""
    file = Descriptors(path)
    rows = file["reference"]
    file.check_checkpoint()
    if len(moved := np.flatnonzero(rows.ids[:-1] > rows.ids[1:])):
        raise InputError(f"{path}: `reference` is not sorted by id, from {rows.ids[moved[0] + 1]}; "
                         "postprocess.py writes it sorted")
    return file, rows


# ---------------------------------------------------------------------------------------------------------------------
# Index folder: index.json lists the shards, trained.faiss is the index without rows, shard-0000.faiss ... with them


def is_index(about: Any) -> bool:
    """Whether index.json holds what an index needs, with values of the right types."""
    def has(thing: Any, **types: type) -> bool:
        return isinstance(thing, dict) and all(isinstance(thing.get(name), kind) for name, kind in types.items())
    return (has(about, factory=str, made_by=str, width=int, shards=list)
            and (about["factory"] == "Flat" or has(about, columns=int))
            and all(has(shard, descriptors=str, rows=int, file=str) for shard in about["shards"]))


class Index:
    """Folder of one faiss index per shard.

    Attributes: folder; about: factory, columns (those of the index: all but trailing zeros), width (all), made_by, and
    shards: [{descriptors: path relative to the folder, rows, file}].
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, file = Path(folder), Path(folder, "index.json")
        if not os.path.lexists(file):
            raise InputError(f"--index {folder}: no index.json in it; index.py build makes one")
        self.about = read_json(file)
        if not is_index(self.about):
            raise InputError(f"{file} is not of an index that index.py build made")
        self.shards = self.about["shards"]

    @classmethod
    def build(cls, folder: str | Path, factory: str, paths: list[str], sample_size: int) -> Index:
        """The index of a folder, trained on rows drawn from the shards; as it is if it was made with this factory."""
        folder = Path(folder)
        if (folder / "index.json").exists():
            index = cls(folder)
            if index.about["factory"] != factory:
                raise InputError(f"--index {folder} is {index.about['factory']}, not {factory}; give another folder")
            return index
        file, _ = open_shard(paths[0])
        with file:
            about = {"factory": factory, "made_by": made_by(file.attrs), "width": file["reference"].shape[1]}
        if factory != "Flat":
            sample = draw_sample(paths, sample_size)
            about["columns"] = int(np.flatnonzero(sample.any(axis=0)).max(initial=0)) + 1
            train(folder / "trained.faiss", factory, np.ascontiguousarray(sample[:, :about["columns"]]))
        with replacing(folder / "index.json") as temporary:
            temporary.write_text(json.dumps(about | {"shards": []}, indent=1), encoding="utf-8")
        return cls(folder)

    def add(self, path: str | Path) -> None:
        """Add the shard of a descriptor file, unless it is there."""
        relative = os.path.relpath(Path(path).resolve(), self.folder.resolve())
        if any(shard["descriptors"] == relative for shard in self.shards):
            return
        file, rows = open_shard(path)
        with file:
            if made_by(file.attrs) != self.about["made_by"] or rows.shape[1] != self.about["width"]:
                raise InputError(f"{path}: other checkpoint, settings, steps or dimensions than those of {self.folder}")
            name = f"shard-{len(self.shards):04d}.faiss"
            if self.about["factory"] != "Flat":
                trained = read_index(self.folder / "trained.faiss", self.about["columns"], mapped=False)
                with replacing(self.folder / name) as temporary, faiss_errors(f"{path}, {self.about['factory']}"):
                    fill(trained, rows, self.about["columns"], temporary)
        self.shards.append({"descriptors": relative, "rows": len(rows), "file": name})
        with replacing(self.folder / "index.json") as temporary:
            temporary.write_text(json.dumps(self.about, indent=1), encoding="utf-8")

    def check(self, number: int) -> None:
        """Raise InputError naming what is missing of a shard."""
        shard = self.shards[number]
        wanted = [self.folder / shard["descriptors"]]
        wanted += [self.folder / shard["file"]] if self.about["factory"] != "Flat" else []
        for file in wanted:
            if not file.is_file():
                raise InputError(f"shard {number} of {len(self.shards)} is missing: {os.path.normpath(file)}")

    def check_queries(self, path: str, maker: str, queries: np.ndarray) -> None:
        """Raise InputError unless queries [n, width] of the file `path` can be searched here."""
        if maker != self.about["made_by"] or queries.shape[1] != self.about["width"]:
            raise InputError(f"{path}: other checkpoint, settings, steps or dimensions than those of {self.folder}")
        self.check_filled()

    def check_filled(self) -> None:
        """Raise InputError where a build ended before its first shard."""
        if not self.shards:
            raise InputError(f"--index {self.folder}: no shard in it yet; index.py build or add brings them")

    def names(self) -> list[str]:
        """Descriptor files of the shards."""
        return [shard["descriptors"] for shard in self.shards]


class Shard:
    """A shard opened for searching: descriptors and, unless the factory is Flat, its memory-mapped faiss index."""

    def __init__(self, index: Index, number: int) -> None:
        index.check(number)
        about = index.shards[number]
        self.file, self.rows = open_shard(index.folder / about["descriptors"])
        self.columns, self.faiss = index.about.get("columns"), None
        if len(self.rows) != about["rows"]:
            raise InputError(f"{self.file.path}: {len(self.rows)} rows, the index has {about['rows']}")
        if index.about["factory"] != "Flat":
            self.faiss = read_index(index.folder / about["file"], self.columns)
            if self.faiss.ntotal != len(self.rows):
                raise InputError(f"{index.folder / about['file']}: {self.faiss.ntotal:,} rows, {self.file.path} has "
                                 f"{len(self.rows):,}; build another index")

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.__exit__()

    def set(self, params: str) -> Shard:
        """Set search parameters of the faiss index: "nprobe=32,quantizer_efSearch=64"."""
        import faiss
        if params and self.faiss:
            with faiss_errors(f"--params {params}"):
                faiss.ParameterSpace().set_index_parameters(self.faiss, params)
        return self

    def search(self, queries: np.ndarray, k: int, candidates: int | None = None, ngpu: int = 0) -> pd.DataFrame:
        """The k best references of each of the queries [n, width]: answers; `candidates` of each are scored exactly.

        Without candidates, or without a faiss index, all references are.
        """
        k = min(k, len(self.rows))
        if not (self.faiss and candidates):
            found = search_topk(queries, self.rows, k, np.empty(0, np.int64), ngpu, progress=True)
            i, j, scores = found["query"], found["reference"], found["score"]
        else:
            with faiss_errors(f"{self.file.path}: search"):
                i, j = propose(self.faiss, queries[:, :self.columns], candidates)
            i, j, scores = score(queries, self.rows.random_access(), i, j, k)
        return answers(i, self.rows.ids[j], scores)


def read_index(file: Path, columns: int, mapped: bool = True) -> faiss.Index:
    """faiss index for rows of so many columns, memory-mapped to be searched or in memory to be added to. Raises
    InputError: no such file, broken, other columns."""
    import faiss
    check_file(file)
    with faiss_errors(file):
        index = faiss.read_index(faiss_name(file), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    if index.d != columns:
        raise InputError(f"{file}: an index of {index.d} dimensions, not {columns}")
    return index


def faiss_name(file: Path) -> str:
    """The name of a file as faiss opens it. Raises InputError: not UTF-8."""
    if shown(file) != str(file):
        raise InputError(f"{shown(file)}: faiss opens no file with a path that is not UTF-8")
    return str(file)


@contextlib.contextmanager
def faiss_errors(what: object) -> Iterator[None]:
    """What faiss raises becomes an InputError of one line, after `what` went wrong. faiss tells "Error in FUNCTION at
    FILE:LINE: why"."""
    try:
        yield
    except RuntimeError as error:
        why = re.sub(r".* at \S+:\d+: (Error: )?", "", " ".join(str(error).split()))
        if found := re.search(r"write error in .*[(](.+)[)]", why):
            raise WorkError(f"{what}: cannot be written: {found[1]}") from None
        raise InputError(f"{what}: {why}") from None


def draw_sample(paths: Sequence[str], size: int) -> np.ndarray:
    """Up to `size` rows [n, width], drawn from all shards at random, the same each time."""
    rng, sample, counts = np.random.default_rng(0), [], []
    for path in paths:
        file, rows = open_shard(path)
        with file:
            counts.append(len(rows))
    for path, count in zip(paths, rng.multivariate_hypergeometric(counts, min(size, sum(counts)), method="marginals")):
        file, rows = open_shard(path)
        with file:
            sample.append(rows.random_access()[np.sort(rng.choice(len(rows), count, replace=False))])
    return np.concatenate(sample)


def train(file: Path, factory: str, sample: np.ndarray) -> None:
    """Write the index of a factory string, trained on rows [n, d]."""
    import faiss
    start = time.monotonic()
    if re.search(r"(?<!\d)0(?!\d)", factory):
        raise InputError(f"--factory {factory}: 0 of something")  # faiss ends the process, or fails when it searches
    faiss_name(file)
    what = f"--factory {factory} with {len(sample):,} training rows of {sample.shape[1]} dimensions"
    with replacing(file) as temporary, faiss_errors(what):
        index = faiss.index_factory(sample.shape[1], factory)
        index.train(sample)
        faiss.write_index(index, str(temporary))
        try_out(temporary, sample[:TRIED_OUT])
    print(f"trained {factory} on {len(sample):,} rows in {time.monotonic() - start:.0f} s", file=sys.stderr)


def try_out(file: Path, rows: np.ndarray) -> None:
    """Raise RuntimeError unless the index of a file can take rows [n, d], be stored with them, and then be searched."""
    import faiss
    index = faiss.read_index(str(file))
    index.add(rows)
    faiss.deserialize_index(faiss.serialize_index(index)).search(rows[:1], 1)


def fill(index: faiss.Index, rows: Rows, columns: int, output: Path) -> None:
    """Add rows [n, width], of which only the first columns are not zero, to a trained index and write it."""
    import faiss
    with tqdm(total=len(rows), desc=str(rows.path), unit=" rows", unit_scale=True, disable=None) as bar:
        for _, block in rows.blocks(BLOCK):
            if block[:, columns:].any():
                raise InputError(f"{rows.path}: columns from {columns} on are not zero as in the training sample")
            index.add(np.ascontiguousarray(block[:, :columns]))
            bar.update(len(block))
    faiss.write_index(index, str(output))


def propose(index: faiss.Index, queries: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that an index takes for the n nearest of each of the queries [q, d]: rows i [m] of queries, j [m] of the
    index."""
    labels = index.search(np.ascontiguousarray(queries), min(n, index.ntotal))[1]
    i, rank = np.nonzero(labels >= 0)  # fewer than n where the lists that were looked at hold less
    return i, labels[i, rank]


def score(queries: np.ndarray, references: np.ndarray, i: np.ndarray, j: np.ndarray,
          k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of rows i [m] of queries, j [m] of references -> the k of each query with the best exact scores: i, j,
    scores."""
    scores = -squared_distances(queries, references, i, j)
    order = np.lexsort((j, -scores, i))
    i, j, scores = i[order], j[order], scores[order]
    kept = np.arange(len(i)) - np.searchsorted(i, i) < k
    return i[kept], j[kept], scores[kept]


# ---------------------------------------------------------------------------------------------------------------------
# Milvus


class Milvus:
    """Collection of a Milvus server, or of a file through Milvus Lite: one for each way to make descriptors.

    Rows are upserted by id, in batches; what is there already is not sent again, so that a killed run goes on.
    """

    def __init__(self, uri: str, made_by: str) -> None:
        self.uri, self.name = uri, f"descriptors_{made_by}"
        if "://" not in uri and not uri.endswith(".db"):
            raise InputError(f"--milvus {uri}: neither a URI (http://host:19530) nor a FILE.db")
        MilvusClient = import_milvus()
        with milvus_errors(uri, "no server answers there" if "://" in uri else
                           "it cannot be opened; is another process using it?"):
            self.client = MilvusClient(uri, timeout=10)
            self.exists = self.client.has_collection(self.name)
            if self.exists:
                self.client.load_collection(self.name)

    def create(self, dim: int, index_type: str) -> None:
        """Make the collection for rows of `dim` dimensions, unless it is there."""
        from pymilvus import DataType
        if self.exists:
            return
        schema = self.client.create_schema(auto_id=False)
        schema.add_field("id", DataType.VARCHAR, max_length=1024, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        params = self.client.prepare_index_params()
        params.add_index("vector", index_type=index_type, metric_type="L2")
        self.client.create_collection(self.name, schema=schema, index_params=params)

    def add(self, rows: Rows) -> None:
        """Upsert rows, but for those whose id is there."""
        with tqdm(total=len(rows), desc=str(rows.path), unit=" rows", unit_scale=True, disable=None) as bar:
            for start, block in rows.blocks(MILVUS_BATCH):
                ids = rows.ids[start:start + len(block)].tolist()
                there = {row["id"] for row in self.client.query(self.name, ids=ids, output_fields=["id"])}
                new = [{"id": name, "vector": row} for name, row in zip(ids, block) if name not in there]
                if new:
                    self.client.upsert(self.name, new)
                bar.update(len(block))
        self.client.flush(self.name)

    def count(self) -> int:
        """Number of rows."""
        return self.client.query(self.name, output_fields=["count(*)"])[0]["count(*)"]

    def search(self, queries: np.ndarray, args: argparse.Namespace) -> pd.DataFrame:
        """As Shard.search: Milvus proposes, its stored rows are scored here."""
        if not self.exists:
            raise InputError(f"--milvus {self.uri}: holds no references made like the queries (checkpoint, settings, "
                             "steps); index.py build sends them")
        found = []
        for start in tqdm(range(0, len(queries), MILVUS_QUERIES), unit=f" x {MILVUS_QUERIES} queries", disable=None):
            batch = queries[start:start + MILVUS_QUERIES]
            hits = self.client.search(self.name, batch, limit=args.candidates, output_fields=["vector"],
                                      search_params={"params": milvus_params(args.params)}, consistency_level="Strong")
            i = np.repeat(np.arange(len(batch)), [len(row) for row in hits])
            ids = [hit["id"] for row in hits for hit in row]
            rows = np.array([hit["entity"]["vector"] for row in hits for hit in row], np.float32)
            scores = -squared_distances(batch, rows, i, np.arange(len(i)))
            found.append(best(answers(start + i, ids, scores), args.topk))
        return pd.concat(found)


@contextlib.contextmanager
def milvus_errors(uri: str, what: str = "failed") -> Iterator[None]:
    """Milvus's exceptions become InputErrors of one line."""
    from pymilvus.exceptions import MilvusException
    try:
        yield
    except MilvusException as error:
        raise InputError(f"--milvus {uri}: {what} ({' '.join(error.message.split())})") from None


def import_milvus() -> type[pymilvus.MilvusClient]:
    """MilvusClient. Raises InputError where pymilvus is missing, or where two packages have written faiss's files."""
    both = [dist.name for dist in metadata.distributions() if dist.name in ("faiss-gpu", "faiss-cpu")]
    if len(both) > 1:
        raise InputError("faiss-cpu and faiss-gpu overwrite each other's files: pip uninstall -y faiss-cpu faiss-gpu, "
                         f"then pip install -r requirements.txt, and for Milvus {MILVUS_INSTALL}")
    try:
        from pymilvus import MilvusClient
    except ImportError:
        raise InputError(f"--milvus needs pymilvus: {MILVUS_INSTALL}") from None
    for name in ("pymilvus", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # tracebacks of what is an error in words here
    return MilvusClient


def milvus_params(text: str) -> dict[str, int]:
    """"nprobe=32,ef=64" -> {"nprobe": 32, "ef": 64}."""
    try:
        return {name: int(value) for name, _, value in (part.partition("=") for part in filter(None, text.split(",")))}
    except ValueError:
        raise InputError(f"--params {text}: give whole numbers, such as nprobe=32,ef=64") from None


# ---------------------------------------------------------------------------------------------------------------------
# Answers: DataFrames query (row number), reference_id, score


def answers(queries: np.ndarray, ids: Sequence[str] | np.ndarray, scores: np.ndarray) -> pd.DataFrame:
    """Of row numbers, ids and scores [n]."""
    return pd.DataFrame({"query": queries, "reference_id": ids, "score": scores})


def best(found: pd.DataFrame, k: int) -> pd.DataFrame:
    """The k best answers of each query, in order of query, falling score, id."""
    found = found.sort_values(["query", "score", "reference_id"], ascending=[True, False, True])
    return found.groupby("query").head(k)


def merge(found: Sequence[pd.DataFrame], k: int, names: Sequence[str]) -> pd.DataFrame:
    """Answers of shards -> the k best of each query. Raises InputError if an id lies in two shards.

    Args:
        found: one DataFrame per shard.
        names: name of each shard.
    """
    together = pd.concat([part.assign(shard=i) for i, part in enumerate(found)])
    twice = together[together.duplicated(["query", "reference_id"], keep=False)]
    if len(twice):
        first = twice[twice.reference_id == twice.reference_id.iloc[0]]
        raise InputError(f"id {first.reference_id.iloc[0]} lies in two shards: "
                         + first_three([names[i] for i in sorted(set(first.shard))]))
    return best(together, k)[["query", "reference_id", "score"]]


def of_images(found: pd.DataFrame, image_of: np.ndarray, k: int) -> pd.DataFrame:
    """Answers to rows, each a region of the image image_of[row] -> the k best of each image."""
    found = found.assign(query=image_of[found["query"]]).sort_values("score", ascending=False, kind="stable")
    return best(found.drop_duplicates(["query", "reference_id"]), k)


def write_pairs(output: str, row_ids: np.ndarray, found: pd.DataFrame, k: int) -> None:
    """CSV of the k best answers to each query, of answers to rows of these ids [n]."""
    query_ids, image_of = images_of(row_ids)
    found = of_images(found, image_of, k)
    found = found.assign(query_id=query_ids[found["query"]])
    with replacing(output) as temporary:
        found[["query_id", "reference_id", "score"]].to_csv(temporary, index=False)
    print(f"{len(found):,} pairs of {len(query_ids):,} queries: {output}")


def part_key(index: Index, query_ids: np.ndarray, queries: np.ndarray, args: argparse.Namespace) -> str:
    """What parts must agree in to be merged."""
    digest = hashlib.sha256(json.dumps([index.about, args.topk, args.candidates, args.params]).encode())
    digest.update("\n".join(query_ids).encode())
    digest.update(queries.tobytes())
    return digest.hexdigest()


@dataclass
class Part:
    """The answers of one shard, for merge; key: what all parts must agree in."""
    key: str
    shard: int
    topk: int
    query_ids: np.ndarray
    found: pd.DataFrame

    def write(self, output: str) -> None:
        columns = {name: self.found[name].to_numpy(str if name == "reference_id" else None) for name in self.found}
        with replacing(output) as temporary, open(temporary, "wb") as out:
            np.savez(out, key=self.key, shard=self.shard, topk=self.topk, query_ids=self.query_ids, **columns)
        print(f"{len(self.found):,} pairs of shard {self.shard}: {output}")

    @classmethod
    def read(cls, path: str) -> Part:
        """Raises InputError: not what `write` wrote."""
        check_file(path)
        try:
            with np.load(path) as part:
                return cls(str(part["key"]), int(part["shard"]), int(part["topk"]), part["query_ids"],
                           answers(part["query"], part["reference_id"], part["score"]))
        except Exception:  # numpy and zipfile raise many kinds
            raise InputError(f"{path} is not a part written by search --shard") from None


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def build(args: argparse.Namespace) -> None:
    """index.py build and add."""
    if args.milvus:
        return build_milvus(args)
    for path in args.shards:
        open_shard(path)[0].__exit__()
    if args.command == "add":
        Index(args.index)  # it has to be there
    with OutputFolder(args.index, "--index", older_index):
        index = Index.build(args.index, args.factory, args.shards, args.sample) if args.command == "build" else \
            Index(args.index)
        for path in args.shards:
            index.add(path)
    print(f"{args.index}: {index.about['factory']}, {sum(shard['rows'] for shard in index.shards):,} rows in "
          f"{len(index.shards)} shards")


def older_index(folder: Path) -> list[str]:
    """What a version that listed nothing wrote in a folder: OutputFolder's `older`."""
    names = os.listdir(folder)
    return names if "index.json" in names or names == ["trained.faiss"] else []


def build_milvus(args: argparse.Namespace) -> None:
    """Send descriptor files to Milvus."""
    for path in args.shards:
        file, rows = open_shard(path)
        with file:
            store = Milvus(args.milvus, made_by(file.attrs))
            with milvus_errors(args.milvus):
                store.create(rows.shape[1], args.factory.upper())
                store.add(rows)
    print(f"{args.milvus}: {store.count():,} rows")


def search(args: argparse.Namespace) -> None:
    """index.py search: all shards, one of them, or Milvus."""
    with Descriptors(args.queries) as file:
        rows, maker = file["query"], made_by(file.attrs)
        query_ids, queries = rows.ids, rows.read()
    if args.milvus:
        store = Milvus(args.milvus, maker)
        with milvus_errors(args.milvus):
            return write_pairs(args.output, query_ids, store.search(queries, args), args.topk)
    index = Index(args.index)
    index.check_queries(args.queries, maker, queries)
    if args.shard is None and str(args.output).endswith(".npz"):
        raise InputError(f"-o {args.output}: answers of one shard; give --shard N, or a name that ends in .csv")
    if args.shard is not None and not 0 <= args.shard < len(index.shards):
        raise InputError(f"--shard {args.shard}: {args.index} has shards 0 to {len(index.shards) - 1}")
    numbers = range(len(index.shards)) if args.shard is None else [args.shard]
    for number in numbers:
        index.check(number)
    found = []
    for number in numbers:
        with Shard(index, number).set(args.params) as shard:
            found.append(shard.search(queries, args.topk, args.candidates, args.ngpu))
    if args.shard is not None:
        key = part_key(index, query_ids, queries, args)
        return Part(key, args.shard, args.topk, query_ids, found[0]).write(args.output)
    write_pairs(args.output, query_ids, merge(found, args.topk, index.names()), args.topk)


def merge_parts(args: argparse.Namespace) -> None:
    """index.py merge."""
    index, parts, first = Index(args.index), {}, Part.read(args.parts[0])
    index.check_filled()
    for path in args.parts:
        part = Part.read(path)
        if part.key != first.key:
            raise InputError(f"{path} and {args.parts[0]} are of different queries, indexes or flags")
        parts[part.shard] = part
    for number, name in enumerate(index.names()):
        if number not in parts:
            raise InputError(f"shard {number} of {len(index.shards)} is missing: no part of {name}")
    found = [parts[number].found for number in range(len(index.shards))]
    write_pairs(args.output, first.query_ids, merge(found, first.topk, index.names()), first.topk)


# ---------------------------------------------------------------------------------------------------------------------
# Curve: what speed costs


def parameter_range(index: faiss.Index) -> list[str]:
    """The settings of a faiss index that trade time for recall: ["nprobe=1", "nprobe=2", ...]."""
    import faiss
    space = faiss.ParameterSpace()
    space.initialize(index)
    ranges = {r.name: faiss.vector_to_array(r.values) for r in
              (space.parameter_ranges.at(i) for i in range(space.parameter_ranges.size()))}
    name = next((name for name in ("nprobe", "efSearch") if name in ranges), None)
    return [f"{name}={value:g}" for value in ranges[name]] if name else [""]


def average_precision(query_ids: np.ndarray, found: pd.DataFrame, positives: pd.DataFrame) -> float:
    """micro-AP of answers to queries of these ids [n] against positive pairs (DataFrame query_id, reference_id)."""
    pairs = pd.MultiIndex.from_arrays([query_ids[found["query"]], found["reference_id"]])
    is_true = pairs.isin(pd.MultiIndex.from_frame(positives))
    return micro_ap(is_true[sort_candidates(found["score"].to_numpy(), is_true)], len(positives))


def spelled_as(path: str, positives: pd.DataFrame, query_ids: np.ndarray, shards: list[Shard]) -> pd.DataFrame:
    """Positive pairs of the ground truth `path`, with ids as the descriptor files spell them."""
    references = [name for shard in shards for name in shard.rows.ids.tolist()]
    query_ids, reference_ids = respell(path, (positives.query_id, query_ids), (positives.reference_id, references))
    return pd.DataFrame({"query_id": query_ids, "reference_id": reference_ids})


def timed(shards: Sequence[Shard], queries: np.ndarray, image_of: np.ndarray, args: argparse.Namespace,
          params: str | None = None) -> tuple[float, pd.DataFrame]:
    """(seconds, answers) of one search in open shards of queries [n, width], regions of the images image_of [n]; with
    params=None an exact one."""
    seconds, found = 0.0, []
    for shard in shards:
        shard.set(params or "")
        how = (args.topk, None if params is None else args.candidates, args.ngpu)
        shard.search(queries[:1], *how)  # what happens once: pages read, threads started
        start = time.monotonic()
        found.append(shard.search(queries, *how))
        seconds += time.monotonic() - start
    found = merge(found, args.topk, [str(i) for i in range(len(shards))])
    return seconds, of_images(found, image_of, args.topk)


def curve(args: argparse.Namespace) -> None:
    """index.py curve: table and picture of time against AP and recall of the exact answers, over search settings."""
    _, positives = read_ground_truth(args.truth)
    with Descriptors(args.queries) as file:
        queries, maker = file["query"].read(), made_by(file.attrs)
        query_ids, image_of = images_of(file["query"].ids)
    exact: tuple[float, pd.DataFrame] | None = None
    rows: list[tuple[str, str, float, float, float]] = []
    for folder in args.indexes:
        index = Index(folder)
        index.check_queries(args.queries, maker, queries)
        with contextlib.ExitStack() as stack:
            shards = [stack.enter_context(Shard(index, number)) for number in range(len(index.shards))]
            exact = exact or timed(shards, queries, image_of, args)
            if not rows:
                positives = spelled_as(args.truth, positives, query_ids, shards)
                rows.append(("exact", "", exact[0], 1.0, average_precision(query_ids, exact[1], positives)))
            for params in parameter_range(shards[0].faiss) if shards[0].faiss else []:
                seconds, found = timed(shards, queries, image_of, args, params)
                recall = len(found.merge(exact[1], on=["query", "reference_id"])) / len(exact[1])
                rows.append((index.about["factory"], params, seconds, recall,
                             average_precision(query_ids, found, positives)))
                print(*rows[-1], file=sys.stderr)
                if seconds > exact[0]:
                    break
    table = pd.DataFrame(rows, columns=["index", "params", "seconds", "recall", "average_precision"])
    output = Path(args.output)
    with locked(output.with_name(f".{output.name}.lock"), output, wait=True):  # picture and table are a pair
        draw(table, output)
        with replacing(output.with_suffix(".csv")) as temporary:
            table.to_csv(temporary, index=False, float_format="%.5g")
    print(table.to_string(index=False, float_format="%.4g"))


def draw(table: pd.DataFrame, output: Path) -> None:
    """PNG: fraction of exact search's AP against how many times faster than exact search."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(7, 4.5), layout="constrained", dpi=100)
    axes = fig.subplots()
    exact = table.iloc[0]
    for name, part in table.iloc[1:].groupby("index", sort=False):
        axes.plot(exact.seconds / part.seconds, part.average_precision / exact.average_precision, "o-", label=name)
    axes.axhline(0.98, color="grey", linestyle=":")
    axes.axvline(10, color="grey", linestyle=":")
    axes.set(xscale="log", xlabel="times faster than exact search", ylabel="fraction of exact search's AP")
    axes.grid(alpha=0.3)
    if len(table) > 1:
        axes.legend()
    with replacing(output) as temporary:
        fig.savefig(temporary, format="png")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="build|add|search|merge|curve")

    def command(name: str, text: str, milvus: bool = True) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        where = p.add_mutually_exclusive_group(required=True) if milvus else p
        where.add_argument("--index", required=not milvus, metavar="DIR", help="folder of the index")
        if milvus:
            where.add_argument("--milvus", metavar="URI", help="http://host:19530, or FILE.db (Milvus Lite)")
        return p

    def how(p: argparse.ArgumentParser) -> None:
        p.add_argument("--topk", type=positive, default=10, metavar="K", help="answers per query (default: 10)")
        p.add_argument("--candidates", type=positive, default=100, metavar="N", help="of each query and shard, to be "
                       "scored exactly (default: 100)")
        p.add_argument("--ngpu", type=int, default=-1, metavar="N", help="GPUs for exact search; 0: CPU; default: all")

    for name, text in (("build", "train an index, then add"), ("add", "add shards that are not there yet")):
        p = command(name, text)
        p.add_argument("shards", nargs="+", metavar="FILE.h5", help="descriptor files: `reference`, sorted by id")
        p.add_argument("--factory", default="Flat", metavar="STRING", help="index_factory string; Milvus: its index "
                       "type (default: Flat)")
        p.add_argument("--sample", type=positive, default=200_000, metavar="N", help="rows to train on (default: "
                       "200,000)")
    p = command("search", "best references of each query")
    p.add_argument("queries", metavar="QUERIES.h5", help="descriptor file: `query`")
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="pairs as CSV; with --shard a part for merge")
    p.add_argument("--params", default="", metavar="P", help="search parameters: nprobe=32, efSearch=64")
    p.add_argument("--shard", type=int, metavar="I", help="search this shard only, counted from 0")
    how(p)
    p = command("merge", "put parts of all shards together", milvus=False)
    p.add_argument("parts", nargs="+", metavar="PART", help="what search --shard wrote")
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="pairs as CSV")
    p = commands.add_parser("curve", help="time against recall of indexes of the same descriptors")
    p.add_argument("indexes", nargs="+", metavar="INDEX", help="folders; the first one's descriptors are searched "
                   "exactly too")
    p.add_argument("--queries", required=True, metavar="FILE.h5", help="descriptor file: `query`")
    p.add_argument("--truth", required=True, metavar="CSV", help="query_id, reference_id")
    p.add_argument("-o", "--output", required=True, metavar="FILE.png", help="picture; the table goes beside it, .csv")
    how(p)
    return parser.parse_args(argv)


COMMANDS = {"build": build, "add": build, "search": search, "merge": merge_parts, "curve": curve}


def check_args(args: argparse.Namespace) -> None:
    """What can be wrong before any work; --ngpu becomes the number of GPUs there are."""
    inputs = [getattr(args, "queries", None), getattr(args, "truth", None), *getattr(args, "parts", ())]
    if output := getattr(args, "output", None):
        if args.command == "curve" and Path(output).suffix == ".csv":
            raise InputError(f"-o {output}: the table's name; give the picture's, such as "
                             f"{Path(output).with_suffix('.png')}")
        for file in [output] + [Path(output).with_suffix(".csv")] * (args.command == "curve"):
            check_output("-o", file, filter(None, inputs))
    if hasattr(args, "ngpu"):
        args.ngpu = count_gpus(args.ngpu)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def work() -> None:
        check_args(args)
        COMMANDS[args.command](args)

    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())
