"""run.json: what a script reads of a run, however it ended."""
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import copydet
from copydet import finding
from copydet.common import InputError, WorkError, read_text
from copydet.descriptors import write_descriptors
from helpers import ROOT, children_of, draw_images


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
    warning, = told["warnings"]
    assert warning.endswith("a.h5 carry no calibration (train.py --calibrate): scores only")
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


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_run_that_is_ended_leaves_no_process_and_says_so(tmp_path, weights):
    """SIGTERM, as batch systems and `timeout` send it, while another process describes images."""
    report = tmp_path / "report" / "run.json"
    process = subprocess.Popen([sys.executable, "scripts/find_copies.py", draw_images(tmp_path / "images", 3), "-o",
                                report.parent, "--weight", weights], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (children := children_of(process.pid, "extract.py")):
        assert process.poll() is None
        time.sleep(0.02)
    assert json.loads(report.read_text())["outcome"] == "running"
    process.send_signal(signal.SIGTERM)
    assert "stopped; what was described is kept" in process.communicate(timeout=60)[1]
    assert process.returncode == 130 and json.loads(report.read_text())["outcome"] == "stopped"
    deadline = time.time() + 60
    while any(read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] not in ([], ["Z"]) for pid in children):
        assert time.time() < deadline  # it was killed, which takes a moment
        time.sleep(0.02)
