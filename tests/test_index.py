"""index.py: shards, exact and approximate search, Milvus."""
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata

import faiss
import numpy as np
import pandas as pd
import pytest

import index as ix
from copydet.descriptors import Descriptors, write_descriptors
from copydet.search import search_topk
from helpers import ROOT, WITH_PACKAGE

faiss.omp_set_num_threads(1)  # threads only wait for each other here
MAKER = {"checkpoint_sha256": "a" * 64}


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(folder, n=20_000, dim=256, centres=400, queries=200, spread=0.7, noise=1.5, seed=0, maker=MAKER):
    """Write refs.h5, queries.h5 and gt.csv: n unit vectors around `centres` random directions; half of the queries are
    noisy copies of some of them, half are further draws. What is added to a unit vector has the length `spread`, or up
    to `noise` for copies: exact search finds most of them, not all.
    """
    rng = np.random.default_rng(seed)
    direction = lambda rows: unit(rng.standard_normal((rows, dim), np.float32))
    centre = direction(centres)
    draw = lambda rows: unit(centre[rng.integers(centres, size=rows)] + spread * direction(rows))
    references, copied = draw(n), rng.choice(n, queries // 2, replace=False)
    lengths = rng.uniform(0, noise, (len(copied), 1)).astype(np.float32)
    query = np.concatenate([unit(references[copied] + lengths * direction(len(copied))), draw(queries - len(copied))])
    ids = np.char.mod("R%07d", np.arange(n))
    write_descriptors(folder / "refs.h5", {"reference": (references, ids)}, maker)
    write_descriptors(folder / "queries.h5", {"query": (query, np.char.mod("Q%05d", np.arange(queries)))}, maker)
    lines = [f"Q{i:05d},{ids[j]}" for i, j in enumerate(copied)] + [f"Q{i:05d}," for i in range(len(copied), queries)]
    (folder / "gt.csv").write_text("query_id,reference_id\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return clustered(tmp_path_factory.mktemp("data"))


def split(data, folder, n, twins=0):
    """The references of `data` in n files; the first `twins` rows are repeated at the end, as equal scores."""
    with Descriptors(data / "refs.h5") as file:
        rows, ids = file["reference"].read(), file["reference"].ids
    rows[len(rows) - twins:] = rows[:twins]
    edges = np.linspace(0, len(rows), n + 1).astype(int) + np.r_[0, np.full(n - 1, 7, int), 0]
    files = []
    for i, (start, stop) in enumerate(zip(edges, edges[1:])):
        files.append(folder / f"part-{n}-{i}.h5")
        write_descriptors(files[-1], {"reference": (rows[start:stop], ids[start:stop])}, MAKER)
    return files


def run(*args, code=0):
    assert ix.main([str(arg) for arg in args]) == code


def test_sharded_exact_search_is_one_search_row_by_row(data, tmp_path, capsys):
    outputs = []
    for n in (1, 3, 7):
        files = split(data, tmp_path, n, twins=3000)
        run("build", "--index", tmp_path / f"i{n}", *files)
        run("search", "--index", tmp_path / f"i{n}", data / "queries.h5", "-o", tmp_path / f"{n}.csv", "--ngpu", 0)
        for i in range(n):
            run("search", "--index", tmp_path / f"i{n}", data / "queries.h5", "-o", tmp_path / f"p{n}-{i}", "--shard",
                i, "--ngpu", 0)
        parts = [tmp_path / f"p{n}-{i}" for i in reversed(range(n))]
        run("merge", "--index", tmp_path / f"i{n}", *parts, "-o", tmp_path / f"{n}m.csv")
        outputs += [(tmp_path / f"{n}.csv").read_bytes(), (tmp_path / f"{n}m.csv").read_bytes()]
    assert len(set(outputs)) == 1 and outputs[0].count(b"\n") == 2001
    run("merge", "--index", tmp_path / "i7", *parts[:4], *parts[5:], "-o", tmp_path / "none.csv", code=2)
    assert "shard 2 of 7 is missing: no part of" in capsys.readouterr().err
    files[5].unlink()
    run("search", "--index", tmp_path / "i7", data / "queries.h5", "-o", tmp_path / "none.csv", code=2)
    assert "shard 5 of 7 is missing:" in capsys.readouterr().err and not (tmp_path / "none.csv").exists()


def test_exact_search_agrees_with_brute_force(data, tmp_path):
    run("build", "--index", tmp_path / "i", *split(data, tmp_path, 3))
    run("search", "--index", tmp_path / "i", data / "queries.h5", "-o", tmp_path / "o.csv", "--topk", 3, "--ngpu", 0)
    with Descriptors(data / "refs.h5") as refs, Descriptors(data / "queries.h5") as queries:
        r, q = refs["reference"].read().astype(float), queries["query"].read().astype(float)
    distance = np.square(q[:5, None] - r[None]).sum(axis=2)
    found = pd.read_csv(tmp_path / "o.csv").head(15)
    assert found.reference_id.tolist() == [f"R{j:07d}" for j in np.argsort(distance, axis=1)[:, :3].ravel()]
    assert np.allclose(found.score, -np.sort(distance, axis=1)[:, :3].ravel(), atol=1e-12)


@pytest.mark.parametrize("factory, params, recall", [
    ("IVF64,Flat", "nprobe=16", 0.9), ("IVF64,PQ32x4", "nprobe=16", 0.5), ("PCA64,IVF64,Flat", "nprobe=16", 0.3),
    ("IVF64,SQ8", "nprobe=16", 0.9), ("HNSW16", "efSearch=64", 0.8)])
def test_candidates_of_any_index_are_scored_exactly(data, tmp_path, factory, params, recall):
    files = split(data, tmp_path, 2)
    run("build", "--index", tmp_path / "i", "--factory", factory, "--sample", 5000, *files)
    run("search", "--index", tmp_path / "i", data / "queries.h5", "-o", tmp_path / "o.csv", "--params", params)
    found = pd.read_csv(tmp_path / "o.csv")
    with Descriptors(data / "refs.h5") as refs, Descriptors(data / "queries.h5") as queries:
        q, r = queries["query"].read(), refs["reference"]
        exact = search_topk(q, r, 10, np.empty(0, np.int64))
        j = found.reference_id.str[1:].astype(int).to_numpy()
        i = found.query_id.str[1:].astype(int).to_numpy()
        assert (found.score.to_numpy() == -ix.squared_distances(q, r.read(), i, j)).all()
    there = set(zip(i, j)) & set(zip(exact["query"], exact["reference"]))
    assert len(there) / len(exact) >= recall


def test_a_killed_build_goes_on_and_nothing_is_added_twice(data, tmp_path, monkeypatch):
    files = split(data, tmp_path, 3)
    flags = ["build", "--index", tmp_path / "i", "--factory", "IVF32,SQ8", "--sample", 5000]
    run(*flags, *files[:2])
    before = (tmp_path / "i" / "trained.faiss").stat().st_mtime_ns
    monkeypatch.setattr(ix, "fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    run(*flags, *files, code=130)
    monkeypatch.undo()
    assert [shard["rows"] for shard in ix.Index(tmp_path / "i").shards] == [6673, 6667]
    run(*flags, *files)
    assert (tmp_path / "i" / "trained.faiss").stat().st_mtime_ns == before
    assert sum(shard["rows"] for shard in ix.Index(tmp_path / "i").shards) == 20_000
    run("add", "--index", tmp_path / "i", *files)
    assert len(ix.Index(tmp_path / "i").shards) == 3 and not list((tmp_path / "i").glob(".*.tmp"))


def test_score_normalisation_column_is_part_of_the_score(data, tmp_path):
    """What postprocess.py's norm adds: a column that is zero in references and differs between queries."""
    column = np.random.default_rng(1).random(200).astype(np.float32)
    with Descriptors(data / "refs.h5") as refs, Descriptors(data / "queries.h5") as queries:
        reference = np.pad(refs["reference"].read(), ((0, 0), (0, 1)))
        query = np.column_stack([queries["query"].read(), column])
        write_descriptors(tmp_path / "r.h5", {"reference": (reference, refs["reference"].ids)}, MAKER)
        write_descriptors(tmp_path / "q.h5", {"query": (query, queries["query"].ids)}, MAKER)
    for name, flags in (("flat", []), ("pq", ["--factory", "IVF16,PQ32x4", "--sample", 2000])):  # 257 is no 32 x n
        run("build", "--index", tmp_path / name, *flags, tmp_path / "r.h5")
        run("search", "--index", tmp_path / name, tmp_path / "q.h5", "-o", tmp_path / f"{name}.csv", "--params",
            "nprobe=16", "--topk", 1, "--candidates", 500)
    assert (tmp_path / "flat.csv").read_bytes() == (tmp_path / "pq.csv").read_bytes()


@pytest.mark.parametrize("command, message", [
    (["search", "--index", "none", "q", "-o", "o.csv"], "no index.json in it"),
    (["build", "--index", "i2", "--factory", "IVF", "r"], "--factory IVF with"),
    (["build", "--index", "i2", "--factory", "IVF9000,Flat", "--sample", "100", "r"], "100 training rows"),
    (["build", "--index", "none/i", "r"], "no such folder"),
    (["build", "--index", "i", "--factory", "HNSW32", "r"], "is IVF32,Flat, not HNSW32"),
    (["add", "--index", "i", "other"], "other checkpoint"),
    (["search", "--index", "i", "other", "-o", "o.csv"], "other checkpoint"),
    (["search", "--index", "i", "q", "-o", "o.csv", "--params", "nprobe=x"], "--params nprobe=x"),
    (["search", "--index", "i", "q", "-o", "o.csv", "--shard", "4"], "has shards 0 to 0"),
    (["search", "--index", "i", "q", "-o", "none/o.csv"], "no such folder"),
    (["merge", "--index", "i", "gt", "-o", "o.csv"], "is not a part"),
    (["add", "--index", "i", "unsorted"], "not sorted by id"),
])
def test_what_is_wrong_is_said_in_a_line(data, tmp_path, capsys, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    files = {"q": data / "queries.h5", "r": data / "refs.h5", "gt": data / "gt.csv", "other": tmp_path / "other.h5",
             "unsorted": tmp_path / "unsorted.h5"}
    rows = unit(np.random.default_rng(0).standard_normal((50, 256)))
    ids = np.char.mod("%d", np.arange(100, 150))
    write_descriptors(files["other"], {"query": (rows, ids), "reference": (rows, ids)}, {"checkpoint_sha256": "b"})
    with ix.Descriptors(files["other"]) as other:
        import h5py
        with h5py.File(files["unsorted"], "w") as out:
            out["reference"], out["reference_ids"] = other["reference"].read(), ids[::-1].astype("S")
    run("build", "--index", "i", "--factory", "IVF32,Flat", "--sample", 2000, data / "refs.h5")
    capsys.readouterr()
    run(*[files.get(word, word) for word in command], code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "o.csv").exists()


def test_an_id_in_two_shards_is_an_error(data, tmp_path, capsys):
    run("build", "--index", tmp_path / "i", data / "refs.h5", *split(data, tmp_path, 2)[:1])
    run("search", "--index", tmp_path / "i", data / "queries.h5", "-o", tmp_path / "o.csv", code=2)
    assert re.search(r"id R\d+ lies in two shards: .*refs.h5, .*part-2-0.h5", capsys.readouterr().err)


def test_curve_shows_time_against_recall(data, tmp_path, capsys):
    for name, factory in (("a", "IVF32,Flat"), ("b", "HNSW16")):
        run("build", "--index", tmp_path / name, "--factory", factory, "--sample", 2000, *split(data, tmp_path, 2))
    run("curve", tmp_path / "a", tmp_path / "b", "--queries", data / "queries.h5", "--truth", data / "gt.csv", "-o",
        tmp_path / "curve.png", "--ngpu", 0)
    table = pd.read_csv(tmp_path / "curve.csv", keep_default_na=False)
    ivf = table[table["index"] == "IVF32,Flat"]
    assert ivf.params.tolist()[:3] == ["nprobe=1", "nprobe=2", "nprobe=4"] and ivf.recall.is_monotonic_increasing
    assert table.iloc[0]["index"] == "exact" and table.average_precision.max() <= table.average_precision[0] + 0.02
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Milvus: in a file, or where MILVUS_URI says


def test_one_faiss_is_installed_and_the_extra_brings_no_other():
    assert sum(dist.name in ("faiss-gpu", "faiss-cpu") for dist in metadata.distributions()) == 1
    lines = (ROOT / "requirements-scale.txt").read_text().splitlines()
    names = {re.match(r"[\w-]+", line)[0].lower() for line in lines if line and line[0] not in "#-"}
    assert {"pymilvus", "milvus-lite"} <= names and not any(name.startswith("faiss") for name in names)
    for name in ("pymilvus", "milvus-lite"):  # installed without dependencies: the file must name them all
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        wanted = {re.match(r"[\w-]+", text)[0].lower() for text in requires if "extra ==" not in text}
        have = names | {dist.name.lower() for dist in metadata.distributions()}
        assert wanted - have - {"tomli"} <= {"faiss-cpu"}


KILLED = """
import os, signal, sys, threading
import index, pymilvus
sent, upsert = [], pymilvus.MilvusClient.upsert
def dying(*args, **kwargs):
    sent.append(1)
    if len(sent) == 15:
        threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return upsert(*args, **kwargs)
pymilvus.MilvusClient.upsert = dying
sys.exit(index.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("where", ["file", "server"])
def test_milvus_holds_every_id_once_after_kills_and_scores_are_exact(tmp_path, where):
    pytest.importorskip("pymilvus")
    uri = str(tmp_path / "m.db") if where == "file" else os.environ.get("MILVUS_URI")
    if not uri:
        pytest.skip("MILVUS_URI names no server")
    maker = MAKER | {"checkpoint_sha256": f"{time.time_ns():064d}"}  # a collection of its own
    data = clustered(tmp_path, 100_000, centres=2000, queries=100, maker=maker)
    command = ["build", "--milvus", uri, str(data / "refs.h5")]
    for _ in range(5):
        assert subprocess.run([sys.executable, "-c", KILLED, *command], cwd=ROOT,
                              env=WITH_PACKAGE).returncode == -signal.SIGKILL
    run(*command)
    run("search", "--milvus", uri, data / "queries.h5", "-o", tmp_path / "milvus.csv")
    store = ix.Milvus(uri, ix.made_by(maker))
    try:
        assert store.count() == 100_000
        ids = [f"R{i:07d}" for i in range(100_000)]
        for i in range(0, len(ids), 5000):
            rows = store.client.query(store.name, ids=ids[i:i + 5000], output_fields=["id"])
            assert sorted(row["id"] for row in rows) == ids[i:i + 5000]
    finally:
        store.client.drop_collection(store.name)
    run("build", "--index", tmp_path / "i", data / "refs.h5")
    run("search", "--index", tmp_path / "i", data / "queries.h5", "-o", tmp_path / "exact.csv", "--ngpu", 0)
    assert (tmp_path / "milvus.csv").read_bytes() == (tmp_path / "exact.csv").read_bytes()


def test_a_missing_milvus_is_said_in_words(data, tmp_path, capsys):
    pytest.importorskip("pymilvus")
    run("search", "--milvus", "http://localhost:1", data / "queries.h5", "-o", tmp_path / "o.csv", code=2)
    assert "no server answers there" in capsys.readouterr().err
    run("search", "--milvus", "name", data / "queries.h5", "-o", tmp_path / "o.csv", code=2)
    assert "neither a URI" in capsys.readouterr().err
    run("search", "--milvus", tmp_path / "m.db", data / "queries.h5", "-o", tmp_path / "o.csv", code=2)
    assert "holds no references made like the queries" in capsys.readouterr().err
