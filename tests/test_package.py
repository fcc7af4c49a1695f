"""`pip install .`: the package and its commands from any folder; find_copies as a function."""
import inspect
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

import find_copies as command
from copydet import cache as cached
from copydet import finding
from copydet.common import InputError
from copydet.descriptors import write_descriptors
from helpers import ROOT, WITH_PACKAGE, draw_images, fake_describe, photo, run


def test_importing_the_package_is_light():
    code = ("import sys, copydet; print({'torch', 'numpy', 'cv2', 'copydet.common'} & set(sys.modules), "
            "copydet.find_copies.__module__)")
    assert run("-c", code, env=WITH_PACKAGE).stdout.split() == ["set()", "copydet.finding"]


def test_what_pip_installs_works_in_any_folder(tmp_path):
    """The commands and README's Python lines, with the network that comes along. Nothing is downloaded."""
    pytest.importorskip("setuptools", "77")
    source, place, work = (tmp_path / name for name in ("source", "venv", "work"))
    shutil.copytree(ROOT / "scripts", source / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "exp/default.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    venv.create(place)
    here = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    (here / "others.pth").write_text(sysconfig.get_path("purelib"))  # what requirements.txt asks for, and pip
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(name, *words):
        done = subprocess.run([place / "bin" / name, *map(str, words)], cwd=work, env=env, capture_output=True,
                              text=True)
        assert not done.returncode, done.stdout + done.stderr
        return done.stdout

    (work / "queries").mkdir(parents=True)
    (work / "archive").symlink_to("queries")  # one folder, so that PyTorch starts once less
    photo("astronaut").save(work / "queries" / "astronaut.jpg")
    photo("coffee").save(work / "queries" / "coffee.jpg")
    photo("coffee").crop((40, 40, 400, 300)).save(work / "queries" / "crop.jpg", quality=60)
    for name in ("a.jpg", "b.png"):
        photo("coffee", (64, 64)).save(work / name)
    call("python", "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", source)
    lines = re.search(r"```\n(from copydet import .*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    (work / "find_copies.py").write_text(
        f"{lines}\nprint(vectors.shape, *pairs[0][:4])\n")  # a name that must not get in the way
    told = call("python", "find_copies.py")
    assert re.search(r"^\(2, 256\) queries/coffee.jpg queries/crop.jpg 0\.\d+ copy$", told, re.M)
    assert "3 pairs of 3 images" in call("copydet-find", "queries", "-o", "report")
    (work / "gt.csv").write_text("query_id,reference_id\nqueries/coffee.jpg,queries/crop.jpg\nqueries/astronaut.jpg,\n")
    assert '"average_precision": 1.0' in call("copydet-eval", "report/pairs.csv", "gt.csv")
    assert "--target-set" in call("copydet-extract", "--help")


def test_the_function_has_the_flags_of_the_command():
    flags = vars(command.parse_args(["QUERIES", "-o", "report"]))
    parameters = inspect.signature(finding.find_copies).parameters
    assert flags.keys() == parameters.keys()
    for name, parameter in parameters.items():
        if name not in ("queries", "output", "workers"):
            assert flags[name] == parameter.default or not (flags[name] or parameter.default), name


def test_pairs_are_those_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(cached.Extraction, "describe", fake_describe)
    archive = draw_images(tmp_path / "archive", 4, 128)
    shutil.copy(archive / "0000.jpg", tmp_path / "query.jpg")
    pairs = finding.find_copies(tmp_path / "query.jpg", archive, output=tmp_path / "report", weight=ROOT / "train.py",
                                workers=1)
    assert [Path(pair.reference).name for pair in pairs][0] == "0000.jpg" and len(pairs) == 4
    best, last = pairs[0], pairs[-1]
    assert (best.query, best.verdict, best.precision) == (str(tmp_path / "query.jpg"), "copy", None)
    assert 0 < best.score <= 1 and best.coverage_query > 0.9 and len(best.outline) == 8 and best.inliers > 10
    assert last.score < 0 and last.verdict == "none" and last.outline is None and not (best.blank or last.blank)


def test_wrong_arguments_raise(tmp_path):
    rows = np.eye(3, dtype=np.float32)
    write_descriptors(tmp_path / "a.h5", {"query": (rows, list("abc")), "reference": (rows, list("def"))}, {})
    for words, keywords in (("no such file or folder: nowhere", {"queries": "nowhere"}),
                            ("--precision 2: is not between 0 and 1", {"precision": 2}),
                            ("--workers to 1,024", {"workers": 5000}), ("--topk is at least 1", {"topk": 0}),
                            ("topk='some': not a number", {"topk": "some"}), ("QUERIES is empty", {"queries": ""}),
                            ("--null: duplicates.txt", {"archive": tmp_path, "null": True}),
                            ("--query-regions: '8'", {"query_regions": 8})):
        with pytest.raises(InputError, match=words):
            finding.find_copies(**{"queries": tmp_path / "a.h5", "output": tmp_path / "report"} | keywords)
    assert not (tmp_path / "report").exists()
