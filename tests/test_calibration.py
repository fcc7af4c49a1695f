"""calibration.py: precision at a score, measured and promised; eval_metrics.py --threshold-precision."""
import json

import numpy as np
import pytest

from copydet.calibration import TAIL, Calibration, false_rates, measure, measure_answers
from copydet.common import InputError
from copydet.descriptors import write_descriptors
from helpers import run

CURVE = {"scores": [-1.0, -0.5, -0.1], "recall": [0.8, 0.4, 0.2], "false_rate": [0.008, 0.00025, 0.0],
         "copies_ratio": 0.25}


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def copies_and_archive(rng, n, others, noise):
    archive = unit(rng.standard_normal((n + others, 16)))
    return unit(archive[:n] + noise * rng.standard_normal((n, 16))), archive


def test_measured_rates_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    copies, archive = copies_and_archive(rng, 60, 140, 0.3)
    whole = measure(copies, archive[:60], [archive[60:]], "training")
    found = measure(copies, archive[:60], np.array_split(archive[60:], 3), "training")
    assert found == whole and found["photos"] == "training"
    scores = -np.square(copies[:, None].astype(float) - archive[None]).sum(2)
    true, false = np.diag(scores[:, :60]), scores[:, 60:]
    assert np.all(np.diff(found["scores"]) > 0)
    for score, recall, false_rate in list(zip(found["scores"], found["recall"], found["false_rate"]))[1::20]:
        assert recall == pytest.approx((true >= score - 1e-6).mean(), abs=1 / 60 + 1e-9)
        if score < np.sort(false.ravel())[-TAIL]:
            assert false_rate * false.size == pytest.approx((false >= score).sum(), abs=1)


def test_false_rates_beyond_the_scores_seen_follow_an_exponential_tail():
    """500 samples of 20,000 scores whose rate above s is exp(-10 s)."""
    rng, at = np.random.default_rng(0), np.array([0.5, 1.0, 1.5])
    found = np.array([false_rates(np.sort(rng.exponential(0.1, 20_000))[::-1], 20_000, at) for _ in range(500)])
    ratio = found / np.exp(-10 * at)
    assert np.median(ratio, 0) == pytest.approx([1, 1, 1], rel=0.25)
    assert 0.2 < np.quantile(ratio[:, 1], 0.05) and np.quantile(ratio[:, 1], 0.95) < 4  # at 0.9 scores
    below = np.sort(rng.exponential(0.1, 20_000))[::-1]
    assert false_rates(below, 20_000, below[[99]])[0] == 100 / 20_000


def test_duplicates_in_the_archive_are_not_false():
    """A fifth of the originals has a second image in the archive, re-encoded."""
    rng = np.random.default_rng(2)
    copies, archive = copies_and_archive(rng, 100, 900, 0.2)
    twins = unit(archive[:20] + 0.01 * rng.standard_normal((20, 16)))
    without = measure(copies, archive[:100], [archive[100:]], "references")
    found = measure(copies, archive[:100], [archive[100:], twins], "references")
    assert found["recall"] == without["recall"]
    assert Calibration(json.dumps(found), "x", 900).threshold(0.9, "x") == pytest.approx(
        Calibration(json.dumps(without), "x", 900).threshold(0.9, "x"), abs=0.02)
    assert measure(copies, archive[:100], [np.repeat(archive[:1], 5, 0)], "references") is not None
    same = np.repeat(archive[:1], 100, 0)
    assert measure(same, same, [same], "references") is None  # a collapsed network


def test_precision_follows_archive_and_copies_ratio():
    small = Calibration(json.dumps(CURVE), "x", references=100)
    assert small.at([-2, -0.75, -0.3, 0]).tolist() == pytest.approx([0.2, 0.5, 0.9, 1])
    assert small.threshold(0.9, "--precision") == pytest.approx(-0.3)
    assert small.threshold(0.1, "--precision") == -1
    large = Calibration(json.dumps(CURVE), "x", references=400)
    assert large.at([-0.5])[0] == pytest.approx(0.1 / (0.1 + 0.1))
    rare = Calibration(json.dumps(CURVE), "x", references=100, copies_ratio=0.025)
    assert rare.at([-0.5])[0] == pytest.approx(0.01 / (0.01 + 0.025)) and rare.copies_ratio == 0.025


@pytest.mark.parametrize("change", [{"scores": [0, -1, 1]}, {"recall": [1.5, 0.4, 0.2]}, {"false_rate": [-1, 0, 0]},
                                    {"recall": [0.4]}, {"copies_ratio": "few"}])
def test_what_is_no_calibration_is_refused(change):
    with pytest.raises(InputError, match="x.h5: attribute `calibration`"):
        Calibration(json.dumps(CURVE | change), "x.h5", 100)


def test_the_promise_holds_on_data_of_the_same_kind(tmp_path):
    """Another 1,000 images, 250 copies among 1,000 queries: at least about the precision promised."""
    rng = np.random.default_rng(1)
    copies, archive = copies_and_archive(rng, 500, 1500, 0.16)
    calibration = measure(copies, archive[:500], [archive[500:]], "training") | {"copies_ratio": 0.25}
    copies, archive = copies_and_archive(rng, 250, 750, 0.16)
    queries = np.concatenate([copies, unit(rng.standard_normal((750, 16)))])
    ids = [f"Q{i:04d}" for i in range(1000)], [f"R{i:04d}" for i in range(1000)]
    write_descriptors(tmp_path / "a.h5", {"query": (queries, ids[0]), "reference": (archive, ids[1])},
                      {"calibration": calibration})
    (tmp_path / "gt.csv").write_text("query_id,reference_id\n" + "".join(
        f"Q{i:04d},{f'R{i:04d}' if i < 250 else ''}\n" for i in range(1000)))
    command = ["scripts/eval_metrics.py", tmp_path / "a.h5", tmp_path / "gt.csv", "--threshold-precision"]
    found = json.loads(run(*command, 0.9).stdout)["at_precision"]
    assert 0.88 < found["precision"] < 0.99 and found["promised"] == 0.9
    assert found["recall"] > 0.2 and found["pairs"] > 50
    stricter = json.loads(run(*command, 0.95).stdout)["at_precision"]
    assert stricter["threshold"] > found["threshold"] and stricter["precision"] > found["precision"]
    run("scripts/postprocess.py", tmp_path / "a.h5", "-o", tmp_path / "b.h5", "l2")
    command[1] = tmp_path / "b.h5"
    assert "carries no calibration" in run(*command, 0.9, code=2).stderr


def test_the_curve_of_answers_has_a_point_at_each_of_the_best_false_ones():
    """A high precision lies there; hundredths of all false answers are too far from each other."""
    rng = np.random.default_rng(0)
    true, false = rng.normal(0.5, 0.1, 300), -rng.exponential(1, 5000) - 0.2
    measured = measure_answers(np.concatenate([true, false]), np.arange(5300) < 300, 500, 1000)
    at = np.array(measured["scores"])
    rates = np.array(measured["false_rate"]) * 500 * 1000 - 0.5
    for rank, score in enumerate(np.sort(false)[::-1][:50], 1):
        assert rates[np.flatnonzero(at == score)[0]] == pytest.approx(rank)
