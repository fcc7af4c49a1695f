"""eval_metrics against a brute-force reading of the protocol, and its command line on right and wrong inputs."""
import json
import shutil
import subprocess

import faiss
import h5py
import numpy as np
import pytest
from PIL import Image

import eval_metrics
from copydet import search
from copydet.common import MANIFEST
from copydet.descriptors import Descriptors, write_descriptors
from copydet.metrics import read_ground_truth
from eval_metrics import main
from helpers import run


def unit(n, d=8, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def brute_force(pairs, truth, limit):
    """The protocol read literally: pairs (query, reference, score), truth (query, reference) or (query, "")."""
    true = {pair for pair in truth if pair[1]}
    ranked = sorted(pairs, key=lambda p: (-p[2], (p[0], p[1]) in true))[:limit]
    ap = recall = best_recall = hits = 0
    threshold = None
    for k, (q, r, score) in enumerate(ranked, 1):
        hits += (q, r) in true
        ap += (hits / len(true) - recall) * hits / k
        recall = hits / len(true)
        if hits / k >= 0.9 and recall > best_recall:
            best_recall, threshold = recall, score
    return ap, best_recall, threshold


def all_pairs(q, r):
    """Scores of all pairs in float64, as differences."""
    return [(f"Q{i}", f"R{j}", -d) for i, a in enumerate(q)
            for j, d in enumerate(((a.astype(float) - r) ** 2).sum(axis=1).tolist())]


def write_truth(path, truth, header=True):
    path.write_text("query_id,reference_id\n" * header + "".join(f"{q},{r}\n" for q, r in truth))
    return path


def save(path, q, r, **attrs):
    write_descriptors(path, {"query": (q, [f"Q{i}" for i in range(len(q))]),
                             "reference": (r, [f"R{j}" for j in range(len(r))])}, attrs)
    return path


def scores(capsys, *args, code=0):
    assert main([*map(str, args)]) == code
    captured = capsys.readouterr()
    return (json.loads(captured.out) if code == 0 else captured.out), captured.err


def descriptors_with_ties(rng):
    """Few distinct vectors, copies, near-duplicates a rounding apart, some cases not normalised."""
    d, nq, nr = rng.integers(2, 6), rng.integers(1, 9), rng.integers(1, 60)
    pool = rng.integers(-1, 2, (6, d)) if rng.random() < 0.4 else rng.standard_normal((20, d))
    q, r = (pool[rng.integers(len(pool), size=n)].astype(np.float32) for n in (nq, nr))
    if rng.random() < 0.5:
        q, r = (x + (1e-6 * rng.integers(0, 3, x.shape)).astype(np.float32) for x in (q, r))
    return (q, r) if rng.random() < 0.5 else (1000 + q, 1000 + r)


@pytest.mark.parametrize("seed", range(0, 200, 20))
def test_descriptors_equal_brute_force(tmp_path, capsys, seed, monkeypatch):
    for case in range(seed, seed + 20):
        rng = np.random.default_rng(case)
        monkeypatch.setattr(search, "NEIGHBOURS", int(rng.integers(1, 20)))
        monkeypatch.setattr(search, "BYTES_PER_PAIR", 2**31 // int(rng.integers(10, 200)))
        monkeypatch.setattr(search, "QUERIES_AT_ONCE", int(rng.integers(1, 10)))
        q, r = descriptors_with_ties(rng)
        truth = [(f"Q{i}", f"R{rng.integers(len(r) + 2)}" if i == 0 or rng.random() < 0.6 else "")
                 for i in range(len(q) + 2) if i == 0 or rng.random() < 0.8]
        searched = [i for i in range(len(q)) if any(t[0] == f"Q{i}" for t in truth)]
        pairs = [p for p in all_pairs(q, r) if int(p[0][1:]) in searched]
        file = save(tmp_path / "a.h5", q, r)
        gt = write_truth(tmp_path / "gt.csv", truth, header=case % 2)
        for flags, limit in (([], 10 * len(searched)), (["--topk", "3"], None)):
            chosen = pairs if limit else topk_pairs(pairs, truth, 3)
            ap, recall, threshold = brute_force(chosen, truth, limit)
            result, _ = scores(capsys, file, gt, *flags)
            assert result["average_precision"] == pytest.approx(ap, abs=1e-9), case
            assert result["recall_p90"] == pytest.approx(recall, abs=1e-9), case
            assert result["threshold_p90"] == (threshold and pytest.approx(threshold, abs=1e-9)), case
            assert result.get("topk") == (None if limit else 3)
            assert result["n_candidates"] == min(len(chosen), limit or len(chosen))
            assert result["n_positives"] == sum(bool(t[1]) for t in truth) and result["n_queries"] == len(searched)


def topk_pairs(pairs, truth, k):
    ranked = sorted(pairs, key=lambda p: (p[0], -p[2], p[:2] in truth))
    return [p for n, p in enumerate(ranked) if n < k or ranked[n - k][0] != p[0]]


def test_csv_equals_brute_force(tmp_path, capsys):
    for case in range(50):
        rng = np.random.default_rng(case)
        truth = [(f"Q{i}", f"R{rng.integers(4)}" if i == 0 or rng.random() < 0.6 else "") for i in range(6)]
        pairs = [(f"Q{i}", f"R{j}", rng.integers(5) / 4) for i in range(5) for j in range(4) if rng.random() < 0.5]
        (tmp_path / "p.csv").write_text("query_id,reference_id,score\n" * (case % 2 or not pairs)
                                        + "".join(f"{q},{r},{s}\n" for q, r, s in pairs))
        result, _ = scores(capsys, tmp_path / "p.csv", write_truth(tmp_path / "gt.csv", truth))
        ap, recall, threshold = brute_force(pairs, truth, None)
        assert (result["average_precision"], result["recall_p90"]) == pytest.approx((ap, recall), abs=1e-9)
        assert result["threshold_p90"] == threshold and result["rule"] == "all"


@pytest.fixture
def larger(tmp_path):
    """300 queries (some outside the ground truth), 2,000 references, a copy each, many exact and near ties."""
    rng = np.random.default_rng(5)
    r = unit(2000, 32, 1)
    r[500:600] = r[0]
    r[600:700] = r[0] + rng.standard_normal((100, 32)).astype(np.float32) * 1e-7
    q = unit(300, 32, 2)
    q[:100] = r[rng.permutation(2000)[:100]]
    q[100:105] = r[0]
    truth = [(f"Q{i}", f"R{rng.integers(2000)}" if i % 3 else "") for i in range(280)]
    truth[:100] = [(f"Q{i}", f"R{np.flatnonzero((r == q[i]).all(1))[-1]}") for i in range(100)]
    truth[100:105] = [(f"Q{i}", f"R{500 + i}") for i in range(100, 105)]
    return save(tmp_path / "a.h5", q, r), write_truth(tmp_path / "gt.csv", truth), q, r, truth


def test_same_output_for_any_block_size_and_thread_count(larger, tmp_path, capsys, monkeypatch):
    file, gt, q, r, truth = larger
    outputs = set()
    for neighbours, at_once, memory, threads in [(16, 1024, "1G", 2), (1, 7, "1M", 1), (3000, 300, "1G", 2),
                                                 (9, 64, "2M", 3)]:
        monkeypatch.setattr(search, "NEIGHBOURS", neighbours)
        monkeypatch.setattr(search, "QUERIES_AT_ONCE", at_once)
        faiss.omp_set_num_threads(threads)
        for topk in ([], ["--topk", "5"]):
            result, _ = scores(capsys, file, gt, "--memory", memory, "--candidates", tmp_path / "c.csv", *topk)
            outputs.add((json.dumps(result), (tmp_path / "c.csv").read_text()))
    faiss.omp_set_num_threads(2)
    assert len(outputs) == 2
    pairs = [p for p in all_pairs(q, r) if int(p[0][1:]) < 280]
    for chosen, limit, rule in ((pairs, 2800, "global"), (topk_pairs(pairs, set(truth), 5), None, "topk")):
        result = next(json.loads(o) for o, _ in outputs if json.loads(o)["rule"] == rule)
        ap, recall, _ = brute_force(chosen, truth, limit)
        assert (result["average_precision"], result["recall_p90"]) == pytest.approx((ap, recall), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_search_allows_for_the_rounding_of_float32(tmp_path, monkeypatch, seed):
    """Far from the origin |q|^2 + |r|^2 - 2 q.r is off by more than the distances differ."""
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", 1)  # small searches take differences
    q = 300 + unit(64, 16, seed)
    with Descriptors(save(tmp_path / "a.h5", q, 300 + unit(500, 16, seed + 10))) as d:
        distances = ((q[:, None].astype(float) - d["reference"].read()) ** 2).sum(axis=2).ravel()
        for neighbours in (3, 500):
            monkeypatch.setattr(search, "NEIGHBOURS", neighbours)
            monkeypatch.setattr(search, "BYTES_PER_PAIR", 2**31 // 1024 // 100)
            found = search.search(q, d["reference"], 200, np.empty(0, np.int64))
            nearest = np.sort(np.argsort(distances)[:200])
            np.testing.assert_array_equal(found["query"] * 500 + found["reference"], nearest)
            np.testing.assert_allclose(-found["score"], distances[nearest], atol=1e-9)


def test_search_through_the_index_of_a_gpu(larger, monkeypatch):
    file, *_ = larger
    with Descriptors(file) as d:
        q, none = d["query"].read(), np.empty(0, np.int64)
        monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index, ngpu: index, raising=False)
        monkeypatch.setattr(search, "NEIGHBOURS", 5)
        for find, n in ((search.search, 3000), (search.search_topk, 7)):
            expected = find(q, d["reference"], n, none)
            np.testing.assert_array_equal(find(q, d["reference"], n, none, ngpu=1), expected)


def test_candidates_score_the_same_as_csv(larger, tmp_path, capsys):
    file, gt, *_ = larger
    result, _ = scores(capsys, file, gt, "--candidates", tmp_path / "c.csv")
    again, _ = scores(capsys, tmp_path / "c.csv", gt)
    for key in ("average_precision", "recall_p90", "threshold_p90", "n_candidates"):
        assert again[key] == result[key]
    assert list(result)[:2] == ["average_precision", "recall_p90"] and result["rule"] == "global"
    assert result["queries_dropped"] == 20 and result["queries_missing"] == 0


def test_bootstrap_and_compare(tmp_path, capsys):
    r = unit(400, 32)
    q, noise = r[:200].copy(), unit(200, 32, 1)
    q[100:] = unit(100, 32, 2)
    gt = write_truth(tmp_path / "gt.csv", [(f"Q{i}", f"R{i}" if i < 120 else "") for i in range(200)])
    file, other = save(tmp_path / "a.h5", q, r), save(tmp_path / "b.h5", q + 2 * noise, r)
    result, _ = scores(capsys, file, gt, "--bootstrap", 200, "--compare", other)
    low, high = result["average_precision_interval"]
    assert low < result["average_precision"] < high and high - low < 0.3
    compare = result["compare"]
    assert compare["average_precision_difference"] == result["average_precision"] - compare["average_precision"] > 0
    low, high = compare["average_precision_difference_interval"]
    assert 0 < low < compare["average_precision_difference"] < high
    same = scores(capsys, file, gt, "--compare", file)[0]["compare"]
    assert same["average_precision_difference_interval"] == [0, 0]


def test_bootstrap_is_the_metric_of_the_resampled_queries(larger, capsys):
    file, gt, *_ = larger
    args = eval_metrics.parse_args([str(file), str(gt)])
    args.ngpu = 0
    e = eval_metrics.Evaluation(file, read_ground_truth(gt), args)
    sample = eval_metrics.bootstrap([e], 1, seed=3)[0, 0]
    drawn = e.queries[np.random.default_rng(3).integers(len(e.queries), size=len(e.queries))]
    pairs, truth = [], []
    by_query = dict(list(e.pairs.groupby("query_id")))
    for copy, query in enumerate(drawn):
        found = by_query.get(query, e.pairs[:0])
        pairs += [((query, copy), row.reference_id, row.score) for row in found.itertuples()]
        truth += [((query, copy), ref) for ref in e.positives.reference_id[e.positives.query_id == query]]
    assert sample == pytest.approx(brute_force(pairs, truth, None)[:2], abs=1e-9)


def test_contaminated_is_refused_or_marked(tmp_path, capsys):
    file = save(tmp_path / "a.h5", unit(3), unit(3), contaminated="public_ground_truth.csv", steps=["l2"])
    gt = write_truth(tmp_path / "gt.csv", [("Q0", "R0")])
    _, err = scores(capsys, file, gt, code=2)
    assert "trained on public_ground_truth.csv" in err
    result, _ = scores(capsys, file, gt, "--allow-contaminated")
    assert list(result)[:3] == ["average_precision", "recall_p90", "contaminated"]
    assert result["contaminated"] == "public_ground_truth.csv" and result["steps"] == ["l2"]


def test_contaminated_other_file_and_report(tmp_path, capsys, monkeypatch):
    clean, tainted = save(tmp_path / "a.h5", unit(3), unit(3)), tmp_path / "b.h5"
    save(tainted, unit(3), unit(3), contaminated="public_ground_truth.csv")
    gt = write_truth(tmp_path / "gt.csv", [("Q0", "R0"), ("Q1", "R1")])
    with monkeypatch.context() as patch:
        patch.setattr(eval_metrics, "search", None)  # it is refused before any search
        assert f"{tainted}: its checkpoint was trained" in scores(capsys, clean, gt, "--compare", tainted, code=2)[1]
    result, _ = scores(capsys, clean, gt, "--compare", tainted, "--bootstrap", 5, "--allow-contaminated")
    assert "contaminated" not in result and result["compare"]["contaminated"] == "public_ground_truth.csv"
    scores(capsys, tainted, gt, "--allow-contaminated", "--report", tmp_path / "report")
    page = (tmp_path / "report/index.html").read_text()
    for tag in ("title", "h1"):
        assert f"<{tag}>Copy detection: b.h5 (contaminated: trained on public_ground_truth.csv)</{tag}>" in page


def test_compare_says_what_cannot_be_compared(tmp_path, capsys):
    a, b = save(tmp_path / "a.h5", unit(4), unit(9)), save(tmp_path / "b.h5", unit(3), unit(7))
    gt = write_truth(tmp_path / "gt.csv", [("Q0", "R0"), ("Q3", "R8")])
    _, err = scores(capsys, a, gt, "--compare", b, "--bootstrap", 5)
    assert f"n_references is 9 in {a}, 7 in {b}" in err and f"1 queries of the ground truth are not in {b}" in err


def test_t4_wrong_predictions(tmp_path, capsys):
    gt = write_truth(tmp_path / "gt.csv", [("Q0", "R0"), ("Q1", "")])
    file = tmp_path / "p.csv"
    header = "query_id,reference_id,score\n"
    for text, message in [(header + "Q0,R0,1\nQ1,R1,.5\nQ0,R0,.9\n", r"pair given twice: line 4 (Q0, R0)"),
                          ("query_id,score\nQ0,1\n", "missing column reference_id"),
                          ("Q0,R0\n", "missing column score"),
                          ("Q0,R0,1\nQ7,R0,1\n", "query not in the ground truth (--drop-unknown leaves such rows out): "
                           "line 2 (Q7, R0)"),
                          ("Q0,R0,nan\n", "score is not a finite number: line 1 (Q0, R0)"), ("", "is empty")]:
        file.write_text(text)
        out, err = scores(capsys, file, gt, code=2)
        assert out == "" and message in err and err.count("\n") == 1
    file.write_text("Q0,R0,1\nQ7,R0,2\n")
    result, _ = scores(capsys, file, gt, "--drop-unknown")
    assert result["average_precision"] == 1 and result["predictions_dropped"] == 1
    file.write_text(header + "Q0,R0,1\nQ0,R0,1\n")
    assert "twice" in run("scripts/eval_metrics.py", file, gt, code=2).stderr


def test_t5_ground_truths(tmp_path, capsys):
    file = save(tmp_path / "a.h5", unit(2), unit(2))
    _, err = scores(capsys, file, write_truth(tmp_path / "gt.csv", [("Q0", ""), ("Q1", "")]), code=2)
    assert "no positive pair" in err
    twice = write_truth(tmp_path / "gt.csv", [("Q0", "R0")] * 2)
    assert "given twice: line 3" in scores(capsys, file, twice, code=2)[1]
    assert "no such file" in scores(capsys, file, tmp_path / "none.csv", code=2)[1]
    truth = [("Q0", "R0"), ("Q1", "R1"), ("Q5", "R1"), ("Q6", "")]
    result, err = scores(capsys, file, write_truth(tmp_path / "gt.csv", truth, header=False))
    assert result["average_precision"] == pytest.approx(2 / 3) and result["queries_missing"] == 2
    assert "2 queries of the ground truth" in err
    _, err = scores(capsys, file, write_truth(tmp_path / "gt.csv", [("X1", "R0")]), code=2)
    assert "no query of the ground truth is in it" in err


def replace(file, key, data):
    """Put `data` (None: nothing; a function: what it makes of the present data) in the place of a dataset."""
    with h5py.File(file, "r+") as f:
        data = data(f[key][:]) if callable(data) else data
        del f[key]
        if data is not None:
            f[key] = data


def test_t6_t8_t10_wrong_descriptors(tmp_path, capsys):
    gt = write_truth(tmp_path / "gt.csv", [("Q0", "R0"), ("Q1", "")])
    nan = unit(3)
    nan[1, 2] = np.nan
    for key, data, message in [
            ("query", nan, "NaN or infinity in `query`, ids Q1"), ("reference", nan, "`reference`, ids R1"),
            ("reference", np.full((3, 8), np.inf, np.float32), "ids R0, R1, R2"),
            ("reference", unit(3, 4), "`query` (3, 8), `reference` (3, 4)"),
            ("reference", None, "`reference` is missing"),
            ("query_ids", np.array(["Q0", "Q1"], "S"), "(3, 8) with 2 ids"), ("query", unit(0), "(0, 8) with 3 ids"),
            ("query_ids", np.array(["Q0", "Q1", "Q1"], "S"), "duplicate ids: Q1"),
            ("reference_ids", np.array(["R0", "R0", "R1"], "S"), "duplicate ids: R0")]:
        file = save(tmp_path / "a.h5", unit(3), unit(3))
        replace(file, key, data)
        out, err = scores(capsys, file, gt, code=2)
        assert out == "" and message in err.splitlines()[-1], (key, err)
    assert "ids R0, R0" not in run("scripts/eval_metrics.py", file, gt, code=2).stderr


def test_t6_t8_accepted_with_a_word(tmp_path, capsys):
    q, r = unit(20), unit(100, seed=1)
    q[:10] = r[:10] + 0.2 * unit(10, seed=2)
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    gt = write_truth(tmp_path / "gt.csv", [(f"Q{i}", f"R{i}" if i < 10 else "") for i in range(20)])
    file = save(tmp_path / "a.h5", q, r)
    exact = scores(capsys, file, gt)[0]["average_precision"]
    replace(file, "query", lambda rows: rows.astype(np.float16))
    result, err = scores(capsys, file, gt)
    assert "float16" in err and result["average_precision"] == pytest.approx(exact, abs=1e-3)
    replace(file, "query", lambda rows: 2 * rows)
    assert "not of unit length, largest deviation 1" in scores(capsys, file, gt)[1]


@pytest.mark.parametrize("n", [3, 200])
def test_t7_collapsed_descriptors_score_the_worst_case(tmp_path, capsys, n):
    same = np.ones((n, 4), np.float32) / 2
    truth = [(f"Q{i}", f"R{i}") for i in range(n)]
    file = save(tmp_path / "a.h5", same, same)
    result, err = scores(capsys, file, write_truth(tmp_path / "gt.csv", truth))
    pairs = [(f"Q{i}", f"R{j}", 0.0) for i in range(n) for j in range(n)]
    assert "collapsed descriptors" in err
    assert result["average_precision"] == pytest.approx(brute_force(pairs, truth, 10 * n)[0], abs=1e-9)


def test_wrong_flags(tmp_path, capsys):
    file, gt = save(tmp_path / "a.h5", unit(2), unit(2)), write_truth(tmp_path / "gt.csv", [("Q0", "R0")])
    for flags, message in [(["--picture", "p.png"], "--picture needs --images"),
                           (["--ngpu", 9], "--ngpu 9: faiss sees"),
                           (["--images", tmp_path], "no folder query_images"),
                           (["--report", tmp_path / "x/y"], "no such folder")]:
        assert message in scores(capsys, file, gt, *flags, code=2)[1]
    shutil.copy(file, tmp_path / "a.bin")
    assert "--descriptor" in scores(capsys, tmp_path / "a.bin", gt, code=2)[1]
    assert scores(capsys, tmp_path / "a.bin", gt, "--descriptor")[0]["rule"] == "global"


@pytest.fixture
def images(tmp_path):
    """A DISC-shaped folder with edits.csv beside its ground truth, and descriptors: right, wrong and missed queries."""
    rng = np.random.default_rng(0)
    for kind, letter, n in (("query", "Q", 12), ("reference", "R", 150)):
        (tmp_path / f"{kind}_images").mkdir()
        for i in range(n):
            size = (90, 60) if i % 2 else (60, 90)
            image = Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
            image.save(tmp_path / f"{kind}_images/{letter}{i}.jpg")
    r = unit(150, seed=3)
    q = r[:12] + 0.02 * unit(12, seed=4)
    q[6:9] = -r[6:9]
    truth = [(f"Q{i}", f"R{i}" if i < 9 else "") for i in range(12)]
    (tmp_path / "edits.csv").write_text("query_id,edits\n" + "".join(f"Q{i},{'crop+text' if i % 2 else 'blur'}\n"
                                                                     for i in range(12)))
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    return save(tmp_path / "a.h5", q, r), write_truth(tmp_path / "gt.csv", truth)


def test_report_and_picture(images, tmp_path, capsys):
    file, gt = images
    assert "is not a folder" in scores(capsys, file, gt, "--report", gt, code=2)[1]
    scores(capsys, file, gt, "--report", tmp_path / "report", "--images", tmp_path, "--picture", tmp_path / "p.png")
    page = (tmp_path / "report/index.html").read_text()
    files = sorted(file.name for file in (tmp_path / "report").iterdir())
    assert files == [MANIFEST, "index.html", "precision_recall.png", "recall.png", "scores.png"]
    for text in ("average precision", "crop", "blur", "Worst misses", "Most confident errors", "Q7"):
        assert text in page
    assert "http" not in page and page.count("data:image/png") == 3 and page.count("data:image/jpeg") > 20
    assert Image.open(tmp_path / "p.png").size[0] == 900


def test_edit_table_is_the_metric_of_the_queries_with_that_edit(images, tmp_path, capsys):
    file, gt = images
    args = eval_metrics.parse_args([str(file), str(gt)])
    args.ngpu = 0
    e = eval_metrics.Evaluation(file, read_ground_truth(gt), args)
    table = {row[0]: row[1:] for row in eval_metrics.metrics_per_edit(e, tmp_path / "edits.csv")}
    assert set(table) == {"crop", "text", "blur"} and table["crop"] == table["text"]
    chosen = [(p.query_id, p.reference_id, p.score) for p in e.pairs.itertuples() if int(p.query_id[1:]) % 2 == 0]
    ap, recall, _ = brute_force(chosen, [(f"Q{i}", f"R{i}") for i in range(0, 9, 2)], None)
    assert table["blur"] == (6, 5, pytest.approx(ap, abs=1e-9), pytest.approx(recall, abs=1e-9))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_report_in_a_browser(images, tmp_path, capsys, width):
    """Nothing is wider than the window, every image is shown, nothing is logged to the console."""
    file, gt = images
    scores(capsys, file, gt, "--report", tmp_path / "report", "--images", tmp_path)
    page = tmp_path / "report/index.html"
    probe = ("<script>onload=()=>{const w=document.documentElement.clientWidth;document.title=JSON.stringify({"
             "wide:[...document.querySelectorAll('body *')].filter(e=>e.getBoundingClientRect().right>w+1).length,"
             "blank:[...document.images].filter(i=>!i.naturalWidth).length,images:document.images.length,width:w})}"
             "</script>")
    # headless windows are at least 500 px wide, so the page is looked at through a frame of the wanted width
    (tmp_path / "framed.html").write_text(page.read_text().replace("</body>", probe + "</body>"))
    (tmp_path / "outer.html").write_text(
        f"<iframe src=framed.html width={width} height=800 style='border:0'></iframe><script>onload=()=>setTimeout("
        "()=>document.title=document.querySelector('iframe').contentDocument.title,200)</script>")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                           "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
                           "--enable-logging=stderr", "--allow-file-access-from-files", f"--window-size={width},900",
                           "--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path / 'outer.html'}"],
                          capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(done.stdout.split("<title>")[1].split("</title>")[0])
    assert seen["wide"] == 0 and seen["blank"] == 0 and seen["images"] > 20 and seen["width"] <= width
