"""The reference subset: all positives and a seeded draw, both ways of drawing."""
import numpy as np
import pytest
from copydet.descriptors import write_descriptors
from helpers import run
from select_ref_subset import main


@pytest.fixture
def truth(tmp_path):
    file = tmp_path / "gt.csv"
    rows = [f"Q{i:05d},{f'R{7 * i:06d}' if i % 2 else ''}\n" for i in range(40)]
    file.write_text("query_id,reference_id\n" + "".join(rows))
    return file


def subset(tmp_path, truth, *args):
    file = tmp_path / "ids.txt"
    assert main([str(truth), "-o", str(file), *map(str, args)]) == 0
    return file.read_text().splitlines()


def test_positives_and_a_draw_without_replacement(tmp_path, truth):
    ids = subset(tmp_path, truth, "--size", 500, "--references", 1000)
    positives = {f"R{7 * i:06d}" for i in range(1, 40, 2)}
    assert positives <= set(ids) and ids == sorted(set(ids))
    assert 500 <= len(ids) <= 500 + len(positives) and set(ids) <= {f"R{i:06d}" for i in range(1000)}
    assert subset(tmp_path, truth, "--size", 500, "--references", 1000) == ids
    assert subset(tmp_path, truth, "--size", 500, "--references", 1000, "--seed", 1) != ids


def test_with_replacement_as_in_the_notes(tmp_path, truth):
    """100,000 draws of a million leave 1 - (1 - 1e-6)^1e5 of them: 95,163."""
    ids = subset(tmp_path, truth, "--replacement")
    assert abs(len(ids) - 95163) < 300 and all(len(i) == 7 for i in ids)


def test_ids_from_a_folder_or_a_file(tmp_path, truth):
    names = [f"R{7 * i:06d}" for i in range(1, 40)]
    (tmp_path / "photos/a").mkdir(parents=True)
    for name in names:
        (tmp_path / f"photos/a/{name}.jpg").touch()
    write_descriptors(tmp_path / "a.h5", {"reference": (np.ones((39, 1)), names)}, {})
    for source in ("photos", "a.h5"):
        assert subset(tmp_path, truth, "--references", tmp_path / source, "--size", 39) == names


def test_wrong_input(tmp_path, truth, capsys):
    for args, message in [(["--references", "5", "--size", "9"], "--size 9: there are 5 references"),
                          (["--references", "100", "--size", "9"], "lacks: R000105, R000119, R000133 and 10 more"),
                          (["-o", str(tmp_path / "no/ids.txt")], "no such folder")]:
        assert main([str(truth), "-o", str(tmp_path / "ids.txt"), *args]) == 2
        assert message in capsys.readouterr().err
    assert "no such file" in run("scripts/select_ref_subset.py", tmp_path / "none.csv", code=2).stderr
