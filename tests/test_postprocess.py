"""Each post-processing step against a literal transcription of its formula, and the command line."""
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import postprocess
import pytest
from copydet.common import InputError
from copydet.descriptors import Descriptors, write_descriptors
from eval_metrics import main as eval_main
from helpers import ROOT, run

D = 6


def unit(n, d=D, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def save(path, seed=0, train=True, **attrs):
    rows = {"query": unit(20, seed=seed + 1), "reference": unit(30, seed=seed + 2), "train": unit(50, seed=seed + 3)}
    ids = {name: [f"{name[0].upper()}{i:02d}" for i in range(len(x))] for name, x in rows.items()}
    write_descriptors(path, {n: (x, ids[n]) for n, x in rows.items() if train or n != "train"}, attrs)
    return path


def load(path):
    with Descriptors(path) as file:
        return {name: rows.read().astype(np.float64) for name, rows in file.groups.items()}


def process(tmp_path, *words, inputs=None, code=0, output="out.h5"):
    inputs = inputs or [save(tmp_path / "in.h5")]
    assert postprocess.main([*map(str, inputs), "-o", str(tmp_path / output), *words]) == code
    return load(tmp_path / output) if code == 0 and output.endswith(".h5") else None


def l2(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(postprocess, "BLOCK", 7)


@pytest.fixture
def raw(tmp_path):
    return load(save(tmp_path / "in.h5"))


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-6)


def nearest(pool, x, k):
    order = np.argsort(-(pool @ x), kind="stable")[:k]
    return order, (pool @ x)[order]


def isolated(x, pool, beta=0.35, k=10, times=3, threshold=-1, alpha=0):
    for _ in range(times):
        rows, sim = nearest(pool, x, k)
        w = np.where(sim > threshold, sim ** alpha, 0)
        x = x - beta * (w[:, None] * pool[rows]).sum(axis=0) / (w.sum() + 1e-9)
        x = x / np.linalg.norm(x)
    return x


def test_l2_and_center(tmp_path, raw):
    mean = raw["train"].mean(axis=0)
    same(process(tmp_path, "center"), {name: x - mean for name, x in raw.items()})
    same(process(tmp_path, "center", "l2"), {name: l2(x - mean) for name, x in raw.items()})


def test_whiten_is_pca(tmp_path, raw):
    out = process(tmp_path, "whiten:dim=4")
    covariance = np.cov(raw["train"].T, bias=True)
    np.testing.assert_allclose(np.cov(out["train"].T, bias=True), np.eye(4), atol=1e-6)
    values, vectors = np.linalg.eigh(covariance)
    for name, x in raw.items():
        expected = (x - raw["train"].mean(axis=0)) @ vectors[:, ::-1][:, :4] / np.sqrt(values[::-1][:4])
        np.testing.assert_allclose(abs(out[name]), abs(expected), atol=1e-6)


def test_svd_keeps_the_best_approximation(tmp_path, raw):
    out = process(tmp_path, "svd:dim=3")
    _, _, vt = np.linalg.svd(raw["train"], full_matrices=False)
    for name, x in raw.items():
        np.testing.assert_allclose(out[name] @ out[name].T, x @ vt[:3].T @ vt[:3] @ x.T, atol=1e-6)


def test_dba(tmp_path, raw):
    expected = []
    for t in raw["train"]:
        rows, sim = nearest(raw["train"], t, 10)
        expected.append(l2((raw["train"][rows] * sim[:, None] ** 3).sum(axis=0)))
    same(process(tmp_path, "dba:k=10,alpha=3"), raw | {"train": np.array(expected)})


@pytest.mark.parametrize("text, options", [
    ("isolate", [{}, {}]), ("isolate:q=1,r=0", [{"times": 1}, {"times": 0}]),
    ("isolate:beta=0.5,k=4,q=2,r=1,threshold=0.4", [dict(beta=0.5, k=4, times=t, threshold=0.4) for t in (2, 1)]),
    ("isolate:k=5,q=1,r=2,alpha=2", [dict(k=5, times=t, alpha=2) for t in (1, 2)])])
def test_isolate(tmp_path, raw, text, options):
    expected = {name: np.array([isolated(x, raw["train"], **o) for x in raw[name]])
                for name, o in zip(("query", "reference"), options)}
    same(process(tmp_path, text), raw | expected)


def test_isolate_with_smoothed_pool_and_centroids(tmp_path, raw):
    pool = process(tmp_path, "dba:k=3")["train"]
    out = process(tmp_path, "dba:k=3", "isolate:q=1,r=1")
    np.testing.assert_allclose(out["query"], [isolated(x, pool, times=1) for x in raw["query"]], atol=1e-6)
    out = process(tmp_path, "isolate:centroids=8,k=3,q=1,r=1")
    pool = postprocess.centroids(raw["train"].astype(np.float32), 8, "train")
    np.testing.assert_allclose(np.linalg.norm(pool, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(out["query"], [isolated(x, pool, k=3, times=1) for x in raw["query"]], atol=1e-6)


def test_isolate_among_the_references(tmp_path, raw):
    """Each reference moves away from the others, never from itself; training rows are not needed."""
    expected = []
    for i, x in enumerate(raw["reference"]):
        expected.append(isolated(x, np.delete(raw["reference"], i, axis=0)))
    out = process(tmp_path, "--preset", "archive-isolation", inputs=[save(tmp_path / "q.h5", train=False)])
    same(out, {"query": raw["query"], "reference": np.array(expected)})
    out = process(tmp_path, "isolate:among=reference,k=4,q=1,r=0")
    same(out, raw | {"query": np.array([isolated(x, raw["reference"], k=4, times=1) for x in raw["query"]])})
    twice = np.vstack([raw["reference"][:5], raw["reference"][:5]]).astype(np.float32)  # the same image under two ids
    write_descriptors(tmp_path / "d.h5", {"reference": (twice, [f"R{i}" for i in range(10)])}, {})
    out = process(tmp_path, "--preset", "archive-isolation", inputs=[tmp_path / "d.h5"])["reference"]
    np.testing.assert_allclose(out[:5], out[5:], atol=1e-6)


def test_isolate_keeps_what_would_become_zero(tmp_path, capsys):
    """k=1, beta=1: a query that is in the pool loses all of itself."""
    file, train = tmp_path / "in.h5", unit(9)
    write_descriptors(file, {"query": (train[:3], list("abc")), "reference": (unit(4, seed=9), list("defg")),
                             "train": (train, list("hijklmnop"))}, {})
    out = process(tmp_path, "isolate:beta=1,k=1,q=2,r=1", inputs=[file])
    np.testing.assert_allclose(out["query"], train[:3], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(out["reference"], axis=1), 1, atol=1e-6)
    assert "6 of `query` would have become zero" in capsys.readouterr().err


@pytest.mark.parametrize("level", ["similarity", "distance"])
def test_norm_makes_plain_search_give_the_normalised_score(tmp_path, raw, level):
    out = process(tmp_path, f"norm:beta=0.5,k=3,level={level}")
    d2 = ((out["query"][:, None] - out["reference"]) ** 2).sum(axis=2)
    expected = ((raw["query"][:, None] - raw["reference"]) ** 2).sum(axis=2)
    for i, x in enumerate(raw["query"]):
        nearest3 = nearest(raw["train"], x, 3)[1]
        expected[i] += 0.5 * (nearest3.mean() if level == "similarity" else -(2 - 2 * nearest3).mean())
    constant = d2 - expected
    np.testing.assert_allclose(constant, 0.5 if level == "similarity" else 2, atol=1e-6)
    assert out["query"].shape[1] == D + 1 and not out["reference"][:, -1].any()


def test_csv_holds_the_normalised_scores(tmp_path, raw):
    process(tmp_path, "norm:beta=0.5,k=3", output="out.csv")
    lines = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()]
    assert lines[0] == ["query_id", "reference_id", "score"] and len(lines) == 1 + 20 * 10
    for i, x in enumerate(raw["query"]):
        score = -((x - raw["reference"]) ** 2).sum(axis=1) - 0.5 * nearest(raw["train"], x, 3)[1].mean()
        best = np.argsort(-score)[:10]
        mine = lines[1 + 10 * i:11 + 10 * i]
        assert [(q, r) for q, r, _ in mine] == [(f"Q{i:02d}", f"R{j:02d}") for j in best]
        np.testing.assert_allclose([float(s) for *_, s in mine], score[best], atol=1e-6)


def test_ensemble(tmp_path):
    files = [save(tmp_path / f"{i}.h5", seed=10 * i, checkpoint_sha256=f"sha{i}") for i in range(2)]
    a, b = map(load, files)
    same(process(tmp_path, "concat", "l2", inputs=files), {n: l2(np.hstack([a[n], b[n]])) for n in a})
    with Descriptors(tmp_path / "out.h5") as out:
        assert out.attrs["checkpoint_sha256"] == "sha0+sha1" and out.attrs["steps"] == '["concat", "l2"]'
    process(tmp_path, "--preset", "v72-v75-ensemble", inputs=files, code=2)  # dim=256 of 12


@pytest.mark.parametrize("tainted", [0, 1])
@pytest.mark.parametrize("steps", ["concat", "concat l2 center l2", "concat whiten:dim=4", "concat svd:dim=4 l2",
                                   "concat l2 dba:k=3", "concat l2 isolate:k=3,q=1,r=1", "concat l2 norm"])
def test_the_mark_of_contamination_survives(tmp_path, capsys, tainted, steps):
    files = [save(tmp_path / f"{i}.h5", seed=i, **({"contaminated": "gt.csv"} if i == tainted else {})) for i in (0, 1)]
    process(tmp_path, *steps.split(), inputs=files)
    with Descriptors(tmp_path / "out.h5") as out:
        assert out.attrs["contaminated"] == "gt.csv"
    process(tmp_path, *steps.split(), inputs=files, output="out.csv", code=2)
    assert "cannot say that the checkpoint was trained on gt.csv" in capsys.readouterr().err
    process(tmp_path, *steps.split(), "--allow-contaminated", inputs=files, output="out.csv")


def test_presets_are_steps():
    for text in postprocess.PRESETS.values():
        steps = [postprocess.parse_step(step) for step in text.split()]
        assert [postprocess.parse_step(postprocess.step_text(*step)) for step in steps] == steps


def test_steps_and_taint_reach_the_evaluation(tmp_path, capsys):
    file = save(tmp_path / "in.h5", contaminated="gt.csv", arch="net")
    before = file.read_bytes()
    process(tmp_path, "isolate:q=1,r=1", inputs=[file])
    process(tmp_path, "l2", inputs=[tmp_path / "out.h5"], output="again.h5")
    assert file.read_bytes() == before
    with Descriptors(tmp_path / "again.h5") as out:
        assert out.attrs["steps"] == (
            '["isolate:beta=0.35,k=10,q=1,r=1,threshold=-1,alpha=0,centroids=0,among=train", "l2"]')
        assert out.attrs["contaminated"] == "gt.csv" and out.attrs["arch"] == "net"
    (tmp_path / "gt.csv").write_text("Q00,R00\n")
    assert eval_main([str(tmp_path / "again.h5"), str(tmp_path / "gt.csv")]) == 2
    assert eval_main([str(tmp_path / "again.h5"), str(tmp_path / "gt.csv"), "--allow-contaminated"]) == 0
    assert '"isolate:beta=0.35' in capsys.readouterr().out


def damaged(path, name, change, seed=5):
    """A second ensemble member whose rows of one group are changed by change(vectors, ids)."""
    rows, first = load(save(path, seed)), name[0].upper()
    groups = {n: (x.astype(np.float32), [f"{n[0].upper()}{i:02d}" for i in range(len(x))]) for n, x in rows.items()}
    x, ids = change(*groups[name])
    write_descriptors(path, groups | {name: (x, ids)}, {})
    return path, first


@pytest.mark.parametrize("change, message", [
    (lambda x, ids: (x[1:], ids[1:]), "lacks ids of .*: Q00$"),
    (lambda x, ids: (np.vstack([x, x[:1]]), ids + ["Q99"]), "0.h5: `query` lacks ids of .*: Q99$"),
    (lambda x, ids: (x, ["Q7" + i[1:] for i in ids]), "Q00, Q01, Q02 and 17 more")])
def test_ensemble_members_must_match(tmp_path, capsys, change, message):
    other, _ = damaged(tmp_path / "1.h5", "query", change)
    process(tmp_path, "concat", inputs=[save(tmp_path / "0.h5"), other], code=2)
    assert re.search(message, capsys.readouterr().err)


def test_ensemble_of_other_order_or_dimension(tmp_path, capsys):
    import h5py
    a, b = save(tmp_path / "0.h5"), save(tmp_path / "1.h5")
    with h5py.File(b, "r+") as f:
        f["reference_ids"][:2] = f["reference_ids"][:2][::-1]
    process(tmp_path, "concat", inputs=[a, b], code=2)
    assert "`reference` in another order, from id R00, R01" in capsys.readouterr().err
    write_descriptors(b, {n: (unit(len(x), 4), [f"{n[0].upper()}{i:02d}" for i in range(len(x))])
                          for n, x in load(a).items()}, {})
    process(tmp_path, "concat", inputs=[a, b], code=2)
    assert "`query` is (20, 6) in" in (err := capsys.readouterr().err) and "(20, 4)" in err


@pytest.mark.parametrize("words, message", [
    (["isolate:gamma=1"], "isolate has no parameter 'gamma', but beta, k"),
    (["isolate:k=x"], "k should be int, is 'x'"),
    (["dba:k=0"], "k=0 is too small"), (["norm:level=loud"], "level is similarity or distance"),
    (["smooth"], "smooth: neither a file nor a step"), ([], "no step given"), (["concat"], "only there"),
    (["svd:dim=7"], "span 6 dimensions"), (["isolate:centroids=99"], "`train` has 50 rows"),
    (["isolate:among=query"], "among is train or reference"),
    (["center", "norm"], "not of unit length")])
def test_wrong_steps(tmp_path, capsys, words, message):
    process(tmp_path, *words, code=2)
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not list(tmp_path.glob("*out.h5*"))


def test_wrong_inputs(tmp_path, capsys):
    no_train = save(tmp_path / "q.h5", train=False)
    process(tmp_path, "isolate", inputs=[no_train], code=2)
    assert "`train` is missing, which isolate learns from; python train.py --mode extract" in capsys.readouterr().err
    process(tmp_path, "l2", inputs=[no_train])
    process(tmp_path, "l2", inputs=[tmp_path / "out.h5"], code=2)
    assert "is an input" in capsys.readouterr().err
    file = save(tmp_path / "m.h5", checkpoint_sha256="first")
    rows = load(file)["query"].astype(np.float32)
    write_descriptors(file, {"query": (rows, [f"Q{i:02d}" for i in range(20)])}, {"checkpoint_sha256": "second"},
                      keep=["reference", "train"])
    process(tmp_path, "l2", inputs=[file], code=2)
    assert "different checkpoints: `query` second, `reference` first, `train` first" in capsys.readouterr().err
    done = run("scripts/postprocess.py", "nothing.h5", "-o", "x.h5", code=2)
    assert "nothing.h5: neither a file nor a step" in done.stderr


def test_a_killed_run_continues_from_its_last_block(tmp_path, monkeypatch):
    """Stopped in each block in turn, with half a block written: the same file, and no block is computed twice."""
    steps = ["dba:k=4", "isolate:q=2,r=1", "norm"]
    expected, calls, total = process(tmp_path, *steps), [], 0
    search = postprocess.Pool.search

    def counting(pool, x, k):
        if len(x) > 1:  # not what finds the dimension of the result
            calls.append(len(x))
        if len(calls) == 6:
            for file in tmp_path.glob(".out.h5.*.partial/*-*"):  # what a block cut short leaves
                with open(file, "ab") as out:
                    out.write(b"half")
            raise KeyboardInterrupt
        return search(pool, x, k)

    monkeypatch.setattr(postprocess.Pool, "search", counting)
    (tmp_path / "out.h5").unlink()
    for attempt in range(20):
        total += len(calls)
        calls.clear()
        if not (code := postprocess.main([str(tmp_path / "in.h5"), "-o", str(tmp_path / "out.h5"), *steps])):
            break
        assert code == 130 and not (tmp_path / "out.h5").exists()
    searches = 7 + 2 * 3 + 5 + 3  # of blocks: training rows, queries twice, references, queries
    assert attempt > 2 and searches <= total + len(calls) <= searches + 2 * attempt
    for name, x in load(tmp_path / "out.h5").items():
        np.testing.assert_array_equal(x, expected[name])
    assert not list(tmp_path.glob(".out*"))


def test_killed_with_sigkill(tmp_path):
    """A process killed in the middle leaves no output; the next one goes on from its blocks."""
    file = tmp_path / "in.h5"
    write_descriptors(file, {name: (unit(30000, 64, i), [f"{name[0]}{j:05d}" for j in range(30000)])
                             for i, name in enumerate(("query", "reference", "train"))}, {})
    command = ["scripts/postprocess.py", file, "-o", tmp_path / "out.h5", "isolate:q=1,r=1,k=3"]
    process_ = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process_.poll() is None and not any(f.stat().st_size for f in tmp_path.glob(".out.h5.*/0-query")):
        time.sleep(0.01)
    process_.send_signal(signal.SIGKILL)
    process_.wait()
    assert not (tmp_path / "out.h5").exists() and (partial := list(tmp_path.glob(".out.h5.*.partial")))
    first = (partial[0] / "0-query").read_bytes()[:8192 * 64 * 4]
    run(*command)
    out = load(tmp_path / "out.h5")
    assert np.array_equal(out["query"][:8192], np.frombuffer(first, np.float32).reshape(-1, 64))
    rows = load(file)
    for i in (0, 8191, 8192, 29999):
        np.testing.assert_allclose(out["query"][i], isolated(rows["query"][i], rows["train"], k=3, times=1), atol=1e-6)


def test_stale_partial_work_is_not_used(tmp_path):
    steps = [postprocess.step_text(*postprocess.parse_step("dba"))]
    file = save(tmp_path / "in.h5")
    old = postprocess.work_folder(tmp_path / "out.h5", [file], steps)
    assert postprocess.work_folder(tmp_path / "out.h5", [file], steps) == old and old.exists()
    save(file, seed=7)
    assert postprocess.work_folder(tmp_path / "out.h5", [file], steps) != old and not old.exists()


def test_parse_step_fills_in_defaults():
    assert postprocess.parse_step("dba:alpha=2") == ("dba", {"k": 10, "alpha": 2.0})
    with pytest.raises(InputError, match="'k' is not key=value"):
        postprocess.parse_step("dba:k")
