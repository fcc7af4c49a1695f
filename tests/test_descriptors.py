"""Descriptor files: written sorted and whole, read in every accepted form, wrong ones refused in words."""
import h5py
import numpy as np
import pytest
from copydet.common import InputError
from copydet.descriptors import Descriptors, write_descriptors


def unit(n, d=8, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def raw(path, **datasets):
    with h5py.File(path, "w") as f:
        for key, value in datasets.items():
            f[key] = value
    return path


def pair(**changes):
    """Datasets of a small, right file, with changes; None removes."""
    data = {"query": unit(3), "reference": unit(4, seed=1), "query_ids": np.array(["Q0", "Q1", "Q2"], "S6"),
            "reference_ids": np.array(["R0", "R1", "R2", "R3"], "S7")} | changes
    return {key: value for key, value in data.items() if value is not None}


@pytest.mark.parametrize("names", [["b", "a", "c"], ["É'日本", "x" * 40, "a"]])
def test_written_sorted_and_never_truncated(tmp_path, names, monkeypatch):
    monkeypatch.setattr("copydet.descriptors.BLOCK", 2)
    x, file = unit(3), tmp_path / "a.h5"
    write_descriptors(file, {"query": (x, names), "train": (x[::-1], names)},
                      {"arch": "net", "checkpoint_sha256": "ab", "args": {"dim": 8}})
    with Descriptors(file) as d:
        order = np.argsort(names)
        assert list(d["query"].ids) == sorted(names)
        np.testing.assert_array_equal(d["query"].read(), x[order])
        np.testing.assert_array_equal(d["train"].read(), x[::-1][order])
        assert d.attrs["args"] == '{"dim": 8}' and d["train"].checkpoint == "ab"
        assert d.file["query"].dtype == np.float32
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_keep_copies_groups_unchanged(tmp_path):
    file, x = tmp_path / "a.h5", unit(3)
    write_descriptors(file, {"query": (x, list("abc")), "train": (x, list("def"))}, {"checkpoint_sha256": "old"})
    write_descriptors(file, {"query": (-x, list("abc"))}, {"checkpoint_sha256": "new"}, keep=["train"])
    with Descriptors(file) as d:
        np.testing.assert_array_equal(d["train"].read(), x)
        np.testing.assert_array_equal(d["query"].read(), -x)
        with pytest.raises(InputError, match="`query` new, `train` old"):
            d.check_checkpoint()
    with pytest.raises(InputError, match="no `reference` to keep"):
        write_descriptors(file, {}, {}, keep=["reference"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_writer_refuses_and_leaves_the_old_file(tmp_path, value):
    file, x = tmp_path / "a.h5", unit(3)
    write_descriptors(file, {"query": (x, list("abc"))}, {})
    before, bad = file.read_bytes(), x.copy()
    bad[1, 2] = value
    for groups, message in [({"query": (bad, list("abc"))}, "ids b$"), ({"query": (x, list("aab"))}, "duplicate.* a$"),
                            ({"query": (x, list("ab"))}, "2 ids"),
                            ({"query": (x, list("abc")), "train": (unit(2, 4), list("ab"))}, r"\(3, 8\).*\(2, 4\)")]:
        with pytest.raises(InputError, match=message):
            write_descriptors(file, groups, {})
        assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_reads_vectors_and_image_names(tmp_path):
    x, names = unit(5), ["R1", "Q0", "T3", "R0", "Q9"]
    for ids in (np.array(names, "S"), np.array(names, object)):
        with Descriptors(raw(tmp_path / "v.h5", vectors=x, image_names=ids)) as d:
            assert {n: list(r.ids) for n, r in d.groups.items()} == {"query": ["Q0", "Q9"], "reference": ["R1", "R0"],
                                                                     "train": ["T3"]}
            np.testing.assert_array_equal(d["query"].read(), x[[1, 4]])
            np.testing.assert_array_equal(np.vstack([b for _, b in d["reference"].blocks(1)]), x[[0, 3]])


def test_reads_float16_and_says_so(tmp_path, capsys):
    with Descriptors(raw(tmp_path / "h.h5", **pair(query=unit(3).astype(np.float16)))) as d:
        assert d["query"].read().dtype == np.float32
        np.testing.assert_allclose(d["query"].read(), unit(3), atol=1e-3)
    assert "`query` is float16" in capsys.readouterr().err


def test_warns_of_rows_not_of_unit_length(tmp_path, capsys):
    with Descriptors(raw(tmp_path / "n.h5", **pair(query=2 * unit(3)))) as d:
        d["query"].read()
        d["reference"].read()
    assert "`query` is not of unit length, largest deviation 1" in (err := capsys.readouterr().err)
    assert "reference" not in err


@pytest.mark.parametrize("changes, message", [
    ({"reference": unit(4, 4)}, r"`query` \(3, 8\), `reference` \(4, 4\)"),
    ({"query_ids": np.array(["Q0"], "S6")}, r"`query` of shape \(3, 8\) with 1 ids"),
    ({"query": unit(0), "query_ids": np.array([], "S6")}, r"`query` of shape \(0, 8\) is empty"),
    ({"query_ids": None}, "`query_ids` is missing"),
    ({"query": None, "query_ids": None}, "`query` is missing"),
    ({"query": None, "reference": None}, "holds none of query, reference, train"),
    ({"query_ids": np.array(["Q0", "Q1", "Q1"], "S6")}, "`query` has duplicate ids: Q1"),
    ({"reference_ids": np.array(["R3"] * 4, "S7")}, "`reference` has duplicate ids: R3"),
    ({"query_ids": np.arange(3)}, "not strings"),
    ({"query_ids": np.array([b"Q0", b"Q1", b"\xff"])}, "not UTF-8"),
    ({"query": np.where(np.arange(3)[:, None] == 1, np.nan, unit(3))}, "NaN or infinity in `query`, ids Q1$"),
    ({"query": np.full((3, 8), np.inf, np.float32)}, "ids Q0, Q1, Q2$"),
    ({"query": np.zeros((3, 8), int)}, "matrix of floats"),
])
def test_refuses_in_words(tmp_path, changes, message):
    file = raw(tmp_path / "x.h5", **pair(**changes))
    with pytest.raises(InputError, match=message) as error, Descriptors(file) as d:
        d["query"].read()
    assert "\n" not in str(error.value) and "x.h5" in str(error.value)


def test_refuses_what_is_no_descriptor_file(tmp_path):
    with pytest.raises(InputError, match="no such file: .*none.h5"):
        Descriptors(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(InputError, match="text.h5: not an HDF5 file"):
        Descriptors(tmp_path / "text.h5")
