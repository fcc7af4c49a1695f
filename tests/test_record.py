"""run.json: what a script reads of a run, however it ended."""
import json

import numpy as np
import pytest

import copydet
from copydet import finding
from copydet.common import InputError, WorkError
from copydet.descriptors import write_descriptors


@pytest.fixture
def find(tmp_path):
    """Search descriptors in this process: find(flags) -> run.json."""
    rows = np.eye(4, dtype=np.float32)
    write_descriptors(tmp_path / "a.h5", {"query": (rows[:3], list("abc")), "reference": (rows, list("defg"))}, {})

    def call(**flags):
        try:
            copydet.find_copies(tmp_path / "a.h5", output=tmp_path / "report", **flags)
        except (WorkError, KeyboardInterrupt, InputError):
            pass
        return json.loads((tmp_path / "report" / "run.json").read_text())
    return call


def test_it_tells_what_people_are_told(find):
    told = find(topk=2)
    assert (told["outcome"], told["error"]) == ("done", None)
    assert told["counts"] == {"queries": 3, "references": 4, "same_files": 0, "skipped": 0, "pairs": 6, "copies": 0}
    assert told["warnings"] == ["no calibration (train.py --calibrate): scores only"]
    assert {"describe", "search", "write", "total"} == told["seconds"].keys() and told["settings"]["topk"] == 2
    assert told["versions"]["copydet"] == copydet.__version__ and told["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize("error, outcome", [(WorkError("no space left"), "failed"), (KeyboardInterrupt(), "stopped")])
def test_it_is_there_when_a_run_ends_early(find, monkeypatch, error, outcome):
    find()
    with monkeypatch.context() as patch:
        def fail(*_):
            raise error
        patch.setattr(finding, "find_pairs", fail)
        told = find()
    assert told["outcome"] == outcome and told["error"] == (str(error) or None) and "pairs" not in told["counts"]
    assert find(precision=0.9) == told  # a wrong input is no run
    assert find()["outcome"] == "done"
