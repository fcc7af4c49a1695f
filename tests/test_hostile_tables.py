"""Tables, descriptor files, indexes, recipes and folders as people have them: right results, or one line that tells why
not. Each row of a table is an input, what reads it and what it comes to."""
import errno
import fcntl
import gzip
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import faiss
import h5py
import numpy as np
import pandas as pd
import pytest
import torch

import bench
import eval_metrics
import find_copies
import index
import ladder
import merge_shards
import postprocess
import select_ref_subset
from copydet.checkpoints import read_checkpoint, take_source
from copydet.common import InputError, in_a_line, replacing, run_main
from copydet.descriptors import Descriptors, write_descriptors
from copydet.images import list_group, list_pairs, read_subset
from copydet.metrics import read_ground_truth, read_predictions
from copydet.network import build_net, read_backbone_weights
from copydet.options import parse_args
from copydet.report import Thumbnails
from copydet.views import parse_ops
from helpers import ROOT, WITH_PACKAGE, draw_images

faiss.omp_set_num_threads(1)
MADE_BY = {"checkpoint_sha256": "a" * 64, "shard": "0/1"}
TRUTH = "query_id,reference_id\nQ0,R0\nQ1,R1\nQ2,\n"
PAIRS = "query_id,reference_id,score\nQ0,R0,0.9\nQ1,R1,0.8\n"


def unit(n, d=8, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def write_h5(file, queries=("Q0", "Q1", "Q2"), references=("R0", "R1", "R2", "R3"), **attrs):
    """The first two queries are the first two references."""
    rows = unit(max(len(queries), len(references)))
    rows_of_queries = np.concatenate([rows[:2], unit(len(queries), seed=2)])[:len(queries)]
    write_descriptors(file, {"query": (rows_of_queries, list(queries)), "train": (unit(9, seed=1), list("abcdefghi")),
                             "reference": (rows[:len(references)], list(references))}, MADE_BY | attrs)
    return file


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder: a.h5, a ground truth and pairs that are all right."""
    monkeypatch.chdir(tmp_path)
    write_h5(tmp_path / "a.h5")
    (tmp_path / "gt.csv").write_text(TRUTH)
    (tmp_path / "pairs.csv").write_text(PAIRS)
    return tmp_path


@pytest.fixture
def told(capsys, monkeypatch):
    """Run a command in this process; returns what it printed to either stream. Where it fails, the last line tells it,
    and no other does."""
    def call(command, *words, code=2):
        monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py"])
        capsys.readouterr()
        found = command.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert found == code, err
        if code:
            start, last = f"{command.__name__}.py: ", err.splitlines()[-1]
            assert last.startswith(start) and err.count(start) == 1 and "Traceback" not in err, err
        return out, err
    return call


# ---------------------------------------------------------------------------------------------------------------------
# Descriptor files

READERS = {  # what opens x.h5
    "eval": (eval_metrics, "x.h5", "gt.csv"), "compare": (eval_metrics, "a.h5", "gt.csv", "--compare", "x.h5"),
    "postprocess": (postprocess, "x.h5", "-o", "out.h5", "l2"), "merge": (merge_shards, "x.h5", "-o", "out.h5"),
    "build": (index, "build", "--index", "j", "x.h5"), "search": (index, "search", "--index", "i", "x.h5", "-o", "o"),
    "find_copies": (find_copies, "x.h5", "-o", "report", "--ngpu", "0"),
    "subset": (select_ref_subset, "gt.csv", "--references", "x.h5", "-o", "out.txt", "--size", "1")}


def instead(name, value):
    """What puts an array, a link or what `value` makes of the open file in the place of the dataset `name`."""
    def spoil(file):
        with h5py.File(file, "a") as f:
            del f[name]
            if callable(value):
                value(f)
            else:
                f[name] = value
    return spoil


def cut_chunk(file):
    """Zeros in the place of a compressed chunk."""
    rows = unit(4)
    instead("reference", lambda f: f.create_dataset("reference", data=rows, compression="gzip", fletcher32=True))(file)
    with h5py.File(file) as f:
        chunk = f["reference"].id.get_chunk_info(0)
    with open(file, "r+b") as out:
        out.seek(chunk.byte_offset)
        out.write(bytes(chunk.size))


def virtual(f):
    layout = h5py.VirtualLayout((4, 8), "f4")
    layout[:] = h5py.VirtualSource("none.h5", "reference", (4, 8))
    f.create_virtual_dataset("reference", layout)


UNREAD = "x.h5: `reference` cannot be read"
SPOILED = {  # kind -> (what is done to x.h5, what is told)
    "cut short": (lambda file: os.truncate(file, 3000), "x.h5: is cut short: 3,000 bytes of"),
    "empty": (lambda file: os.truncate(file, 0), "x.h5: is empty"),
    "text": (lambda file: file.write_text(PAIRS), "x.h5: not an HDF5 file"),
    "folder": (lambda file: (file.unlink(), file.mkdir()), "x.h5: is a folder, not a file"),
    "device": (lambda file: (file.unlink(), file.symlink_to("/dev/null")), "x.h5: is no regular file"),
    "gone": (lambda file: file.unlink(), "no such file: x.h5"),
    "link to itself": (lambda file: (file.unlink(), file.symlink_to("x.h5")), os.strerror(errno.ELOOP)),
    "group": (instead("reference", lambda f: f.create_group("reference")), "x.h5: `reference` is no dataset"),
    "group of ids": (instead("query_ids", lambda f: f.create_group("query_ids")), "x.h5: `query_ids` is no dataset"),
    "link to nothing": (instead("reference", h5py.SoftLink("/none")), UNREAD),
    "link to no file": (instead("reference", h5py.ExternalLink("none.h5", "/reference")), UNREAD),
    "stored elsewhere": (instead("reference", lambda f: f.create_dataset(
        "reference", (4, 8), "f4", external=[("none.raw", 0, 128)])), UNREAD),
    "broken chunk": (cut_chunk, UNREAD),
    "made of no file": (instead("reference", virtual), "`reference` is made of none.h5, which is not there"),
    "compound": (instead("reference", np.zeros(4, [("a", "f4"), ("b", "f4")])), "should be a matrix of floats"),
    "complex": (instead("reference", np.zeros((4, 8), "c8")), "should be a matrix of floats"),
    "no columns": (instead("reference", np.zeros((4, 0), "f4")), "of shape (4, 0)"),
    "too large for float32": (instead("reference", np.full((4, 8), 1e300)), "NaN or infinity in `reference`"),
    "one id": (instead("reference_ids", b"R0"), "`reference_ids` should be a list of strings, is of shape ()"),
    "ids in a matrix": (instead("reference_ids", np.full((4, 1), b"R")), "is of shape (4, 1)"),
    "empty id": (instead("reference_ids", np.array([b"R", b"", b"S", b"T"])), "x.h5: `reference_ids` has an empty id"),
    "more ids than memory": (instead("reference_ids", lambda f: f.create_dataset(
        "reference_ids", (10**14,), "S9", chunks=(99,))), "x.h5: `reference_ids` cannot be read: Unable to allocate")}
ROWS = ("stored elsewhere", "broken chunk", "too large for float32")  # of no matter to what reads no reference's row
NO_FILES = ("gone", "folder", "device", "link to itself")  # what takes a folder of images as well tells it its own way
TOLD_OTHERWISE = {"build": ROWS, "search": ROWS, "subset": ROWS + NO_FILES, "find_copies": NO_FILES}


@pytest.mark.parametrize("reader, kind", [(reader, kind) for reader in READERS for kind in SPOILED
                                          if kind not in TOLD_OTHERWISE.get(reader, ())])
def test_a_spoiled_descriptor_file_is_told_by_its_cause(here, told, reader, kind):
    command, *words = READERS[reader]
    spoil, message = SPOILED[kind]
    told(index, "build", "--index", "i", "a.h5", code=0)
    shutil.copy("a.h5", "x.h5")
    spoil(here / "x.h5")
    if reader == "postprocess" and kind in ("gone", "link to itself"):
        message = "x.h5: neither a file nor a step"
    assert message in told(command, *words)[1]
    assert not {"out.h5", "out.txt", "o"} & set(os.listdir()) and not [name for name in os.listdir() if "tmp" in name]


@pytest.mark.parametrize("reader", READERS)
def test_a_descriptor_file_that_is_being_written_is_told(here, told, reader):
    command, *words = READERS[reader]
    told(index, "build", "--index", "i", "a.h5", code=0)
    shutil.copy("a.h5", "x.h5")
    with open("x.h5", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "x.h5: is locked: another process is writing it" in told(command, *words)[1]
    told(command, *words, code=0)


def test_no_damage_to_a_descriptor_file_is_a_traceback(here):
    """500 mutations: what is read is read, all else is told in a line that names the file. (Without attributes: HDF5
    itself never returns from some damaged strings.)"""
    write_descriptors("a.h5", {"query": (unit(3), list("abc")), "reference": (unit(4), list("defg"))}, {})
    rng, data, told = np.random.default_rng(0), Path("a.h5").read_bytes(), 0
    for _ in range(500):
        mutated = bytearray(data)
        for _ in range(rng.integers(1, 9)):
            mutated[rng.integers(len(data))] = rng.integers(256)
        Path("x.h5").write_bytes(mutated)
        try:
            with Descriptors("x.h5") as file:
                file["query"].read()
                file["reference"].random_access()[:2]
                file.check_checkpoint()
                file.steps()
        except InputError as error:
            told += 1
            assert "x.h5" in str(error) and "\n" not in str(error)
    assert told > 100


PROMISED, CURVE = (*READERS["eval"], "--threshold-precision", "0.9"), '"scores":[-1],"recall":[1],"false_rate":[0]'


@pytest.mark.parametrize("name, value, command, message", [
    ("steps", "[" * 60000, READERS["eval"], "x.h5: attribute `steps` cannot be read: maximum recursion"),
    ("calibration", "[" * 60000, PROMISED, "x.h5: attribute `calibration` cannot be read: maximum recursion"),
    ("calibration", "[]", PROMISED, "x.h5: attribute `calibration` cannot be read"),
    ("calibration", f'{{{CURVE},"copies_ratio":NaN}}', PROMISED, "`copies_ratio` be from 0 to 1"),
    ("contaminated", np.arange(2), READERS["eval"], "its checkpoint was trained on [0 1]"),
    ("contaminated", "", READERS["eval"], None), ("comment", np.bytes_(b"caf\xe9"), READERS["eval"], None),
    ("steps", 3, READERS["eval"], "x.h5: attribute `steps` cannot be read"),
    ("steps", "[", READERS["postprocess"], "x.h5: attribute `steps` cannot be read"),
    ("shard", "first", READERS["merge"], "x.h5: attribute `shard` should be I/N, is 'first'"),
    ("shard", "0/0", READERS["merge"], "x.h5: attribute `shard` should be I/N, is '0/0'"),
    ("shard", np.bytes_(b"0/1"), READERS["merge"], None), ("steps", np.bytes_(b'["l2"]'), READERS["eval"], None),
    ("checkpoint_sha256", np.arange(2), READERS["eval"], None)])
def test_attributes_of_other_programs(here, told, name, value, command, message):
    shutil.copy("a.h5", "x.h5")
    with h5py.File("x.h5", "a") as file:
        file.attrs[name] = value
        if name == "checkpoint_sha256":
            file["query"].attrs[name] = file["reference"].attrs[name] = file["train"].attrs[name] = value
    _, err = told(*command, code=2 if message else 0)
    assert not message or message in err


@pytest.mark.parametrize("kind", ["f2", "f4", ">f4", "f8", "longdouble"])
def test_rows_of_any_float_are_read(here, told, kind):
    shutil.copy("a.h5", "x.h5")
    instead("reference", unit(4).astype(kind))("x.h5")
    assert json.loads(told(*READERS["eval"], code=0)[0])["average_precision"] == 1


@pytest.mark.parametrize("content", [b"", b"query_id,reference_id\nQ0,R0\n", b"path;reason\na;b\n", b"caf\xe9",
                                     b"path,reason\na,b,c\n"])
def test_a_list_of_blank_images_that_is_another_file_is_told(here, told, content):
    Path("blank.csv").write_bytes(content)
    assert "blank.csv: not as this program writes it" in told(find_copies, "a.h5", "-o", "report", "--ngpu", "0")[1]
    assert Path("blank.csv").read_bytes() == content
    Path("blank.csv").write_bytes(b"\xef\xbb\xbfpath,reason\r\nreference_images/R0.jpg,shows one flat colour\r\n")
    told(find_copies, "a.h5", "-o", "report", "--ngpu", "0", code=0)


# ---------------------------------------------------------------------------------------------------------------------
# Tables

ACCEPTED = {  # ground truths that say what TRUTH does
    "other case": TRUTH.replace("query_id,reference_id", "Query_ID,Reference_ID"),
    "other words": TRUTH.replace("query_id,reference_id", "QueryID,Reference"),
    "byte order mark": "\ufeff" + TRUTH,
    "byte order mark, quotes": '\ufeff"query_id","reference_id"\n"Q0","R0"\n"Q1","R1"\n"Q2",""\n',
    "byte order mark, no header": "\ufeffQ0,R0\nQ1,R1\nQ2,\n",
    "CRLF": TRUTH.replace("\n", "\r\n"),
    "CR": TRUTH.replace("\n", "\r"),
    "semicolons": TRUTH.replace(",", ";"),
    "semicolons, no header": "Q0;R0\nQ1;R1\nQ2;\n",
    "tabs": TRUTH.replace(",", "\t"),
    "spaces": TRUTH.replace(",", " , "),
    "no-break spaces": TRUTH.replace("\n", "\u00a0\n"),
    "empty lines": "\n\n" + TRUTH.replace("\n", "\n\n"),
    "no last comma": TRUTH.replace("Q2,", "Q2"),
    "numbered rows": ",query_id,reference_id\n0,Q0,R0\n1,Q1,R1\n2,Q2,\n",
    "more columns": "reference_id,x,query_id\nR0,,Q0\nR1,,Q1\n,,Q2",
    "comma at the end": TRUTH.replace("\n", ",\n"),
    "no line end": TRUTH.rstrip("\n")}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_ground_truth_is_read_in_any_common_form(here, kind):
    Path("gt.csv").write_bytes(ACCEPTED[kind].encode())
    queries, positives = read_ground_truth("gt.csv")
    assert queries.tolist() == ["Q0", "Q1", "Q2"] and positives.to_numpy().tolist() == [["Q0", "R0"], ["Q1", "R1"]]


def test_names_that_look_like_nothing_are_names(here):
    names = ["NA", "nan", "null", "None", "-inf", "1e3", "007", 'a"b', "a,b", "#1", "Q\u200b"]
    pd.DataFrame({"query_id": names, "reference_id": "R"}).to_csv("gt.csv", index=False)
    assert sorted(names) == read_ground_truth("gt.csv")[0].tolist()


HEADER, LONG = b"query_id,reference_id\n", b"Q" * 10**6 + b",R0\n"
REFUSED = {  # ground truth -> what is told
    b"\n\n": "gt.csv is empty",
    b"query_id\nQ0\n": "gt.csv: missing column reference_id",
    TRUTH.encode("utf-16"): "gt.csv is UTF-16, not a CSV",
    gzip.compress(TRUTH.encode()): "gt.csv is gzip, not a CSV",
    b"PK\x03\x04...": "gt.csv is a ZIP file or a spreadsheet, not a CSV",
    HEADER + b"Q\xe9,R0\n": "gt.csv is no text: line 2 is not UTF-8",
    HEADER + b"Q0,R0\nQ\0,R0\n": "gt.csv is no text: line 3 holds a NUL byte",
    b"query_id,reference_id,query_id\nQ0,R0,Q1\n": "gt.csv: column query_id twice",
    TRUTH.encode() * 2: "gt.csv: line 5 is the header of line 1 again",
    HEADER + b"\n,R0\n": "gt.csv: empty query_id: line 3 (, R0)",
    HEADER + b"\nQ0,R0\nQ0,\n": "gt.csv: without a match here, with one in another line: line 4 (Q0, )",
    b"\n\n" + HEADER + b"\n\nQ0,R0\nQ0,R0\n": "gt.csv: pair given twice: line 7 (Q0, R0)",
    HEADER + b'"Q0,R0\nQ1,R1\n': "gt.csv: EOF inside string",
    HEADER + b"Q0,R0,x,y\n": "gt.csv: Expected 2 fields in line 2, saw 4",
    HEADER + LONG + LONG: "QQQ..."}


@pytest.mark.parametrize("content", REFUSED, ids=REFUSED.values())
@pytest.mark.parametrize("command", [(eval_metrics, "a.h5", "gt.csv"), (select_ref_subset, "gt.csv", "-o", "out.txt")],
                         ids=["eval", "subset"])
def test_a_wrong_ground_truth_is_told_by_its_cause(here, told, content, command):
    Path("gt.csv").write_bytes(content)
    err = told(*command)[1]
    assert REFUSED[content] in err and len(err) < 1000


@pytest.mark.parametrize("table, message", [
    ("query_id;reference_id;score\nQ0;R0;0,5\n", "score is not a finite number: line 2 (Q0, R0): 0,5"),
    ("Q0;R0;0,5\n", "missing column score"),
    ("Q0,R0,90%\n", "score is not a finite number: line 1 (Q0, R0): 90%"),
    ("Q0,R0,1e400\n", "score is not a finite number: line 1 (Q0, R0): 1e400"),
    ("Q0,,0.5\n", "empty reference_id: line 1 (Q0, )"),
    (",R0,0.5\n", "empty query_id: line 1 (, R0)"),
    ("Q0,R0,0.5\nQ0 ,R0,0.4\n", "pair given twice: line 2 (Q0, R0)"),
    (PAIRS * 2, "line 4 is the header of line 1 again")])
def test_wrong_pairs_are_told_by_their_cause(here, told, table, message):
    Path("pairs.csv").write_text(table)
    assert f"pairs.csv: {message}" in told(eval_metrics, "pairs.csv", "gt.csv")[1]


@pytest.mark.parametrize("table", [
    PAIRS.replace("query_id,reference_id,score", "Query_ID,Reference_ID,Score"), PAIRS.replace(",", "\t"),
    PAIRS.replace(",", ";"), PAIRS.replace(",", ", "), PAIRS.replace("query_id,reference_id", "Query,Reference ID"),
    "\ufeff" + PAIRS])
def test_pairs_in_other_forms_score_the_same(here, told, table):
    Path("pairs.csv").write_text(table)
    assert json.loads(told(eval_metrics, "pairs.csv", "gt.csv", code=0)[0])["average_precision"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Ids that print alike: NFD, as macOS stores names, against NFC, and spaces around them

NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("known, ids", [(NFC, NFD), (NFD, NFC), (NFC, f"{NFD} "), ("a", "a "), (NFC, NFC)])
def test_ids_that_print_alike_are_matched_and_told_once(here, told, known, ids):
    Path("gt.csv").write_text(f"query_id,reference_id\nQ{known},R{known}\nQ1,R1\n")
    write_h5("x.h5", (f"Q{ids}", "Q1"), (f"R{ids}", "R1", "R2"))
    Path("pairs.csv").write_text(f'query_id,reference_id,score\n"Q{ids}","R{ids}",0.9\nQ1,R1,0.8\n')
    for file in ("x.h5", "pairs.csv"):
        out, err = told(eval_metrics, file, "gt.csv", code=0)
        assert json.loads(out)["average_precision"] == 1
        assert err.count("in another form of Unicode") == (known != ids.strip() or (file == "x.h5" and known != ids))
    Path("pairs.csv").unlink()
    told(select_ref_subset, "gt.csv", "--references", "x.h5", "--size", "1", "-o", "out.txt", code=0)
    assert f"R{ids}" in Path("out.txt").read_text().split("\n")  # as the images are named
    told(index, "build", "--index", "i", "x.h5", code=0)
    told(index, "curve", "i", "--queries", "x.h5", "--truth", "gt.csv", "-o", "c.png", "--ngpu", "0", code=0)
    assert pd.read_csv("c.csv").average_precision.tolist() == [1]


def test_two_ids_never_become_one(here, told):
    """A folder can hold both forms, as two images."""
    Path("gt.csv").write_text(f"query_id,reference_id\nQ0,{NFC}\nQ1,{NFD}\n")
    write_h5("x.h5", ("Q0", "Q1"), (NFC, NFD))
    out, err = told(eval_metrics, "x.h5", "gt.csv", code=0)
    assert json.loads(out)["average_precision"] == 1 and "Unicode" not in err
    Path("gt.csv").write_text(f"query_id,reference_id\nQ0,{NFC} x\n")
    write_h5("x.h5", ("Q0", "Q1"), (f"{NFD} x", f"{NFD} x "))
    assert "Unicode" not in told(eval_metrics, "x.h5", "gt.csv", code=0)[1]


def test_another_file_of_edits_ends_no_report(here, told):
    Path("edits.csv").write_text("author\nx\n")
    assert "edits.csv: missing column" in told(eval_metrics, "a.h5", "gt.csv", "--report", "r", code=0)[1]
    Path("gt.csv").write_text(f"query_id,reference_id\n{NFC},R0\n")
    Path("edits.csv").write_text(f"query_id,edits\n{NFD},crop+blur\n")
    write_h5("x.h5", (NFC, "Q1"))
    told(eval_metrics, "x.h5", "gt.csv", "--report", "r", code=0)
    assert "<td>crop</td>" in Path("r/index.html").read_text()


def test_thumbnails_are_found_in_any_form(tmp_path):
    draw_images(tmp_path / "query_images" / "nested", 1, name=f"{NFD}{{}}.png")
    images = Thumbnails(tmp_path)
    assert images.open("query", f"{NFC}0") and not images.open("query", "x" * 300) and not images.open("query", "a\0b")


def test_pairs_of_names_with_commas_are_read_again(here, told):
    write_h5("x.h5", ('a,"b', "Q1"), ("c, d", "R1"))
    told(postprocess, "x.h5", "-o", "out.csv", "l2", code=0)
    pairs, _ = read_predictions("out.csv", ['a,"b', "Q1"], ["c, d"])
    assert set(map(tuple, pairs.to_numpy()[:, :2])) == {(q, r) for q in ('a,"b', "Q1") for r in ("c, d", "R1")}


# ---------------------------------------------------------------------------------------------------------------------
# Indexes


@pytest.mark.parametrize("factory, message", [
    ("IDMap,Flat", "add does not make sense with IndexIDMap"), ("IDMap2,Flat", "add does not make sense"),
    ("ZnLattice2x4_4", "Lattice"), ("HNSW0", "--factory HNSW0: 0 of something"), ("IVF0,Flat", "0 of something"),
    ("flat", "could not parse index string flat"), ("", "could not parse index string"),
    ("PQ3", "--factory PQ3 with 4 training rows of 8 dimensions")])
def test_a_factory_that_cannot_work_is_refused_at_once(here, told, factory, message):
    assert message in told(index, "build", "--index", "i", "--factory", factory, "a.h5")[1]
    assert not os.path.exists("i")
    told(index, "build", "--index", "i", "--factory", "HNSW4", "a.h5", code=0)


BROKEN_INDEX = {  # kind -> (what is done to the folder, what is told)
    "half written": (lambda i: (i / "index.json").write_text('{"factory": "IVF'), "i/index.json is broken"),
    "empty": (lambda i: (i / "index.json").write_text(""), "i/index.json is broken"),
    "not UTF-8": (lambda i: (i / "index.json").write_bytes(b'{"factory": "\xff"}'), "i/index.json is broken"),
    "deep": (lambda i: (i / "index.json").write_text("[" * 10**5), "i/index.json is broken"),
    "a folder": (lambda i: ((i / "index.json").unlink(), (i / "index.json").mkdir()), "i/index.json: is a folder"),
    "of another project": (lambda i: (i / "index.json").write_text('{"name": "x", "shards": 5}'), "not of an index"),
    "a list": (lambda i: (i / "index.json").write_text("[]"), "i/index.json is not of an index"),
    "shards of another form": (lambda i: change(i, shards=["a.h5"]), "i/index.json is not of an index"),
    "no columns": (lambda i: change(i, columns=None), "i/index.json is not of an index"),
    "no shard yet": (lambda i: change(i, shards=[]), "no shard in it yet; index.py build or add brings them")}
BROKEN_SHARD = {
    "gone": (lambda i: (i / "shard-0000.faiss").unlink(), "shard 0 of 1 is missing: i/shard-0000.faiss"),
    "cut short": (lambda i: os.truncate(i / "shard-0000.faiss", 60), "i/shard-0000.faiss: "),
    "of other dimensions": (lambda i: faiss.write_index(filled(5), str(i / "shard-0000.faiss")),
                            "i/shard-0000.faiss: an index of 5 dimensions, not 8"),
    "of other rows": (lambda i: faiss.write_index(filled(8), str(i / "shard-0000.faiss")),
                      "i/shard-0000.faiss: 7 rows, i/../a.h5 has 4"),
    "descriptors gone": (lambda i: change(i, shards=[{"descriptors": "../none.h5", "rows": 4, "file": "f"}]),
                         "shard 0 of 1 is missing: none.h5")}
SEARCH = ["search", "--index", "i", "a.h5", "-o", "out"]
INDEX_READERS = {  # those that open shards, and that which does not
    "search": SEARCH, "one shard": [*SEARCH, "--shard", "0"],
    "curve": ["curve", "i", "--queries", "a.h5", "--truth", "gt.csv", "-o", "out", "--ngpu", "0"],
    "merge": ["merge", "--index", "i", "part", "-o", "out"]}


def change(folder, **values):
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(about | values))


def filled(columns):
    found = faiss.IndexHNSWFlat(columns, 4)
    found.add(unit(7, columns))
    return found


@pytest.mark.parametrize("reader, kind", [(reader, kind) for reader in INDEX_READERS for kind in
                                          BROKEN_INDEX | (BROKEN_SHARD if reader != "merge" else {})])
def test_a_broken_index_is_told_by_its_cause(here, told, reader, kind):
    told(index, "build", "--index", "i", "--factory", "HNSW4", "a.h5", code=0)
    told(index, *SEARCH[:-1], "part", "--shard", "0", code=0)
    spoil, message = (BROKEN_INDEX | BROKEN_SHARD)[kind]
    spoil(here / "i")
    assert message in told(index, *INDEX_READERS[reader])[1]
    assert not Path("out").exists()


@pytest.mark.parametrize("spoil, message", [
    (lambda i: faiss.write_index(filled(5), str(i / "trained.faiss")), "trained.faiss: an index of 5 dimensions"),
    (lambda i: (i / "trained.faiss").unlink(), "no such file: i/trained.faiss"),
    (lambda i: (i / "trained.faiss").write_bytes(b"x"), "i/trained.faiss: ")])
def test_a_shard_is_added_to_nothing_but_its_own_index(here, told, spoil, message):
    told(index, "build", "--index", "i", "--factory", "HNSW4", "a.h5", code=0)
    shutil.copy("a.h5", "b.h5")
    spoil(here / "i")
    for command in ("add", "build"):
        flags = ["--factory", "HNSW4"] if command == "build" else []
        assert message in told(index, command, "--index", "i", *flags, "b.h5")[1]
    assert set(os.listdir("i")) <= {"index.json", "shard-0000.faiss", "trained.faiss", ".written.txt"}


def test_a_path_that_faiss_cannot_open_is_told(here, told):
    folder = "caf\udce9"
    assert "not UTF-8" in told(index, "build", "--index", folder, "--factory", "HNSW4", "a.h5")[1]
    assert not os.path.exists(folder)
    told(index, "build", "--index", folder, "a.h5", code=0)
    told(index, "search", "--index", folder, "a.h5", "-o", "out", code=0)


def test_a_build_that_was_killed_before_its_first_shard_goes_on(here, told, monkeypatch):
    monkeypatch.setattr(index, "fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    build = ["build", "--index", "i", "--factory", "HNSW4", "a.h5"]
    told(index, *build, code=130)
    monkeypatch.undo()
    os.chdir(here)
    assert "no shard in it yet" in told(index, "search", "--index", "i", "a.h5", "-o", "out")[1]
    told(index, *build, code=0)
    told(index, "search", "--index", "i", "a.h5", "-o", "out", code=0)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04x", b"\x93NUMPY\x01\x00"])
def test_a_part_that_is_none_is_told(here, told, content):
    told(index, "build", "--index", "i", "a.h5", code=0)
    Path("part").write_bytes(content)
    assert "part is not a part written by" in told(index, "merge", "--index", "i", "part", "-o", "out")[1]


def test_an_array_is_no_part_and_no_shard_lies_before_the_first(here, told):
    told(index, "build", "--index", "i", "a.h5", code=0)
    np.save("part.npy", np.zeros(3))
    assert "is not a part written by" in told(index, "merge", "--index", "i", "part.npy", "-o", "out")[1]
    assert "has shards 0 to 0" in told(index, "search", "--index", "i", "a.h5", "-o", "out", "--shard", "-1")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Recipes and settings


@pytest.mark.parametrize("content, message", [
    (b"\xef\xbb\xbf--dim 3\n", None), (b"--dim 3\r\n", None), (b"# it's a comment\n--dim 3", None),
    (b'--view1 "crop blur\n', "r.args is no recipe: No closing quotation"), (b"@r.args\n", "unrecognized"),
    (b"# caf\xe9\n--dim 3\n", "r.args is no recipe: 'utf-8'"), (None, "r.args: is a folder"),
    ("--dim 3\n".encode("utf-16"), "r.args is no recipe: 'utf-8'")])
def test_recipes(here, capsys, content, message):
    Path("r.args").mkdir() if content is None else Path("r.args").write_bytes(content)
    if message is None:
        assert parse_args(["@r.args", "x"]).dim == 3
        return
    with pytest.raises(SystemExit) as error:
        parse_args(["@r.args", "x"])
    err = capsys.readouterr().err
    assert error.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("form", ["{}", "\ufeff{}", "{}\r\n", "{}, ", "\n{}\n"])
def test_pairs_and_subsets_name_images_in_any_form(here, capsys, form):
    for group, letter in (("query", "Q"), ("reference", "R")):
        draw_images(here / f"{group}_images", 1, name=f"{letter}{NFD}.jpg")
    Path("rids_subset.txt").write_text(form.replace(", ", " ").format(f"R{NFC}"))
    Path("pairs.csv").write_text(form.format(f"Q{NFC},R{NFC}"))
    group = list_group(parse_args(["--mode", "extract", "--eval-subset", "."]), "reference")
    assert group.ids == [f"R{NFD}"] and "in another form of Unicode" in capsys.readouterr().err
    assert list_pairs(parse_args(["--pairs", "pairs.csv", "."]))[0] == [
        (f"query_images/Q{NFD}.jpg", f"reference_images/R{NFD}.jpg")]


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe", b"\x80\x04", b"\x80\x04}.", b"\x80\x04]q\x00(K\x01e.", b"\x80\x04h\x05.",
    b"\x80\x02cposix\nsystem\n.", b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f."])
def test_a_subset_that_is_none_is_told(here, content):
    Path("subset").write_bytes(content)
    with pytest.raises(InputError, match="subset: (neither one id per line|holds no list)"):
        read_subset(Path("subset"))


@pytest.mark.parametrize("words, message", [
    ([postprocess, "a.h5", "-o", "o.h5", "isolate:alpha=nan"], "isolate:alpha=nan: alpha=nan is not a number"),
    ([postprocess, "a.h5", "-o", "o.h5", "dba:alpha=1e400"], "alpha=1e400 is not a number"),
    ([postprocess, "a.h5", "-o", "o.h5", "isolate:beta=1e39"], "o.h5: NaN or infinity in `query`"),
    ([select_ref_subset, "gt.csv", "--references", "9" * 5000, "-o", "o"], "File name too long"),
    ([index, "curve", "i", "--queries", "a.h5", "--truth", "gt.csv", "-o", "c.csv"], "such as c.png"),
    ([find_copies, "a.h5", "-o", "r", "--images", "none"], "--images none: none of query_images, reference_images"),
    ([merge_shards, "a.h5", "-o", "x" * 300], "...: File name too long"),
    ([merge_shards, "a.h5", "-o", "x" * 240], "...: a name of more than 225 bytes"),
    ([postprocess, "a.h5", "l2", "-o", "\u00e9" * 120 + ".h5"], ": a name of more than 225 bytes"),
    ([eval_metrics, "a.h5", "gt.csv", "--report", "x" * 300], "...: File name too long"),
    ([index, "build", "--index", "gt.csv/i", "a.h5"], "--index gt.csv/i: no such folder: gt.csv"),
    ([ladder, ".", "--recipes", "./a.args"], "a.args: continues itself (--weight), by way of"),
    ([ladder, ".", "--recipes", "./none.args"], "no such recipe: none.args"),
    ([ladder, ".", "--recipes", "./c.args"], "c.args: --epochs 1e3: not a positive number"),
    ([ladder, ".", "--recipes", "v5", "--batch-size", "0"], "train.py's flags: --batch-size 0: not a positive number"),
    ([bench, "decode", "--images", "none"], "no images in none"),
    ([bench, "decode", "--images", ".", "--recipe", "none"], "no images in ."),
    ([bench, "search", "--compare", "gt.csv"], "--compare gt.csv: not written by -o")])
def test_what_cannot_be_meant_is_told_before_work(here, told, words, message):
    for name, parent in (("a", "b"), ("b", "a")):
        Path(f"{name}.args").write_text(f"--epochs 1 --batch-size 4 --weight exp/{parent}/train/x")
    Path("c.args").write_text("--epochs 1e3 --batch-size 4")
    before = {path.name for path in here.iterdir()}
    assert message in told(*words)[1]
    assert {path.name for path in here.iterdir()} == before


@pytest.mark.parametrize("words", [
    ["select_ref_subset", "gt.csv", "--seed", "-1"], ["select_ref_subset", "gt.csv", "--size", "9" * 30],
    ["index", "build", "--index", "i", "--sample", "0x10", "a.h5"], ["bench", "search", "--repeats", "0"],
    ["verify", "a.h5", ".", "-o", "o.csv", "-j", "100000"], ["eval_metrics", "a.h5", "gt.csv", "--topk", "\u0663"]])
def test_numbers_that_no_computer_counts_are_told(here, capsys, words):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(words[0]).main(words[1:])
    assert left.value.code == 2 and "not a whole number from" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    ("--seed -1", "--seed must be at least 0"), (f"--seed {2 ** 70}", "--seed must be at least 0, "),
    ("--start-epoch -3", "--start-epoch must be at least 0"), ("-j 100000", "--workers 100000: at most 1,024"),
    ("--gem-p 0", "--gem-p must be above 0, not 0"), ("--gem-eval-p -2", "--gem-eval-p must be above 0, not -2")])
def test_numbers_of_flags_of_train(capsys, words, message):
    with pytest.raises(SystemExit):
        parse_args([*words.split(), "x"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-1e999"])
def test_numbers_of_views(value):
    with pytest.raises(InputError, match="--view0: 'crop:area=.*' is not crop:area,p"):
        parse_ops(f"crop:area={value}", 1, "--view0")


def damaged(checkpoint, rng):
    """Files that a checkpoint can become on its way: cut short, a page of errors, bytes changed."""
    data = checkpoint.read_bytes()
    yield from (b"", b"\x80", b"<!DOCTYPE html>", b"PK\x03\x04", data[:200], data[:len(data) // 2], data[:-30])
    torch.save(torch.load(checkpoint, weights_only=True), older := checkpoint.with_name("older"),
               _use_new_zipfile_serialization=False)
    for source in (data, older.read_bytes()):
        for _ in range(40):
            mutated = bytearray(source)
            for _ in range(3):
                mutated[rng.integers(min(len(source), 3000))] = rng.integers(256)
            yield bytes(mutated)


def test_no_damage_to_a_checkpoint_is_a_traceback(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(3)}, "arch": "x", "args": {"dim": 3}}, tmp_path / "good")
    told = 0
    for content in damaged(tmp_path / "good", np.random.default_rng(0)):
        (tmp_path / "bad").write_bytes(content)
        for read in (read_checkpoint, lambda file: read_backbone_weights(file, "test_efficientnet")):
            try:
                read(tmp_path / "bad")
            except InputError as error:
                told += 1
                assert "bad" in str(error) and "\n" not in str(error)
    assert told > 80


@pytest.mark.parametrize("content", [[], {"state_dict": []}, {"state_dict": {"a": 3}},
                                     {"state_dict": {}, "args": [1]}, {"state_dict": {}, "preprocess": 3},
                                     {"state_dict": {}, "args": {"resize": "x"}}, {"state_dict": {}, "arch": 3},
                                     {"state_dict": {}, "args": {"dim": "9"}}])
def test_a_checkpoint_of_another_form_is_told(tmp_path, content):
    torch.save(content, tmp_path / "c")
    with pytest.raises(InputError, match="c( is not a checkpoint|: its setting (resize|arch|dim) is )"):
        take_source(parse_args(["--mode", "extract"]), tmp_path / "c")


@pytest.mark.parametrize("flag", ["--weight", "--backbone-weights", "--resume", "--pairs"])
@pytest.mark.parametrize("name, message", [("none", "no such file: none"), (".", "is a folder, not a file"),
                                           ("/dev/null", "/dev/null: is no regular file"),
                                           ("x" * 300, os.strerror(errno.ENAMETOOLONG))])
def test_files_of_flags(capsys, flag, name, message):
    with pytest.raises(SystemExit):
        parse_args([flag, name])
    err = capsys.readouterr().err
    assert f"{flag}: " in err and message in err and err.count("\n") == 1


@pytest.mark.parametrize("file, content", [
    ("ladder.json", "{"), ("ladder.json", "[]"), ("ladder.json", '{"photos": 3}'), ("ladder.csv", "a,b\n1,2\n"),
    ("ladder.csv", "\0"), ("ladder.csv", "\udce9\n")])
def test_a_ladder_of_other_making_is_told(tmp_path, file, content):
    (tmp_path / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    told = f"{file} is (broken|not of a ladder)|holds what is not of this program .{file}"
    with pytest.raises(InputError, match=told):
        args = ladder.build_parser().parse_args([str(tmp_path), "--recipes", "v5", "-o", str(tmp_path)])
        args.overrides, args.recipes, args.benchmark = [], ladder.with_parents(["v5"]), []
        ladder.Ladder(args)


def test_an_input_size_that_a_network_cannot_take_is_refused_before_training():
    flags = ["-a", "test_vit", "--input-size", "160", "--pool", "backbone", "--no-pretrained"]
    for more in (["--eval-input-size", "192"], ["--eval-crops", "1,0.5"]):
        with pytest.raises(InputError, match=f"{' '.join(more)}: test_vit takes images of one size only"):
            build_net(parse_args([*flags, *more, "x"]), False)
    build_net(parse_args([*flags, "--eval-input-size", "160", "x"]), False)


# ---------------------------------------------------------------------------------------------------------------------
# Where results go

WRITERS = {  # what writes to the place that is named last
    "pairs": (postprocess, "a.h5", "l2", "-o"), "merge": (merge_shards, "a.h5", "-o"),
    "subset": (select_ref_subset, "gt.csv", "--references", "a.h5", "--size", "1", "-o"),
    "search": (index, "search", "--index", "i", "a.h5", "-o"),
    "candidates": (eval_metrics, "a.h5", "gt.csv", "--candidates"),
    "report": (eval_metrics, "a.h5", "gt.csv", "--report")}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_cannot_be_written_is_told_before_work(here, told, writer, monkeypatch):
    command, *words = WRITERS[writer]
    told(index, "build", "--index", "i", "a.h5", code=0)
    Path("out.csv").mkdir()
    for place, message in (("none/out.csv", "no such folder: none"), ("out.csv", "out.csv: is a folder"),
                           ("gt.csv/out.csv", "no such folder: gt.csv")):
        if (writer, place) != ("report", "out.csv"):
            assert message in told(command, *words, place)[1]
    monkeypatch.setattr(os, "access", lambda *_: False)  # mounted read-only
    assert re.search("(new.csv: |--report: )nothing can be written in", told(command, *words, "new.csv")[1])


def test_errors_name_the_file_that_a_user_knows(tmp_path):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "none/a"
    with pytest.raises(OSError) as error, replacing(path) as temporary:
        temporary.write_text("x")
    assert in_a_line(error.value) == f"{path}: {os.strerror(errno.ENOENT)}" and error.value.errno == errno.ENOENT
    with pytest.raises(InputError, match="folder: is there already, and is not a file"), replacing(tmp_path / "folder"):
        pass
    for kind in (OSError, RuntimeError):  # h5py's own, from a full disk
        with pytest.raises(OSError) as error, replacing(tmp_path / "a.h5") as temporary:
            raise kind(f"Can't write (file write failed: time = Fri\n, filename = '{temporary}', errno = 28, error ...")
        assert in_a_line(error.value) == f"{tmp_path / 'a.h5'}: {os.strerror(errno.ENOSPC)}"
    with pytest.raises(OSError) as error, replacing(tmp_path / "a") as temporary:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert in_a_line(error.value) == f"{tmp_path / 'a'}: {os.strerror(errno.ENOSPC)}"
    for error_of_library in (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 87168 vs 87064"),
                             Exception("Error while serializing: I/O error: No space left (os error 28)")):
        with pytest.raises(OSError) as error, replacing(tmp_path / "a"):
            raise error_of_library
        assert in_a_line(error.value) == f"{tmp_path / 'a'}: {os.strerror(errno.ENOSPC)}"
    for other in (OSError(errno.EIO, "x", "input.h5"), RuntimeError("x")):
        with pytest.raises(type(other)) as error, replacing(tmp_path / "a"):
            raise other
        assert error.value is other
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("error, code, line", [
    (InputError("a\nb"), 2, "a b"), (OSError("x\ny"), 1, "x y"), (OSError(), 1, "OSError"),
    (OSError(errno.EACCES, "Permission denied", "caf\u00e9".encode()), 1, "caf\u00e9: Permission denied"),
    (OSError(errno.EBADF, "Bad file descriptor", 3), 1, "Bad file descriptor"),
    (BrokenProcessPool("A process in the process pool was terminated abruptly"), 1, "A process in the process pool was "
     "terminated abruptly"),
    (RuntimeError("CUDA out of memory. Tried to\nx"), 1, "CUDA out of memory. Tried to"),
    (MemoryError("Unable to allocate 7 TiB"), 1, "Unable to allocate 7 TiB"),
    (OSError(errno.EPERM, "Not permitted", "image.jpg", None, "cache/0.jpg"), 1,
     "cache/0.jpg: Not permitted (a file system without links?)")])
def test_every_error_is_one_line(capfd, monkeypatch, error, code, line):
    monkeypatch.setattr(sys, "argv", ["tool.py"])
    assert run_main(lambda: (_ for _ in ()).throw(error)) == code
    assert capfd.readouterr().err == f"tool.py: {line}\n"


STREAMS = "import sys; from copydet.common import run_main; sys.exit(run_main(lambda: print(open('a').read())))"


@pytest.mark.parametrize("streams, code, told", [
    (">&-", 0, ""), ("2>&-", 0, None), ("<&- >&- 2>&-", 0, None), (">/dev/full", 1, os.strerror(errno.ENOSPC)),
    ("| true; exit ${PIPESTATUS[0]}", 1, os.strerror(errno.EPIPE))])
def test_streams_that_cannot_be_written(tmp_path, streams, code, told):
    (tmp_path / "a").write_text("x" * 200_000)
    done = subprocess.run(["bash", "-c", f'"$0" -B -c "$1" {streams}', sys.executable, STREAMS], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")}, capture_output=True, text=True)
    assert done.returncode == code and told in (None, done.stderr.strip().removeprefix("-c: "))


def test_names_that_are_not_utf_8_are_printed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert run_main(lambda: print("caf\udce9.csv")) == 0
    assert sys.stdout.buffer.getvalue() == b"caf\\udce9.csv\n"


def test_a_file_system_without_links_is_told_as_that(here, told, monkeypatch, weights):
    def refuse(source, target, *_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)
    monkeypatch.setattr(os, "symlink", refuse)
    draw_images(here / "photos", 2)
    err = told(find_copies, "photos", "-o", "report", "--weight", weights, code=1)[1]
    assert "a file system without links?" in err and "/report/cache/" in err


# ---------------------------------------------------------------------------------------------------------------------
# Permissions: as another user where the tests run as root, who may all

AS_NOBODY = """
import contextlib, importlib, io, json, sys
sys.argv = ["tool.py"]
for name, words in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            if name == "train":
                from copydet.common import run_main
                from copydet.options import parse_args
                import train
                code = run_main(lambda: train.main(parse_args(words)))
            else:
                code = importlib.import_module(name).main(words)
        except SystemExit as error:
            code = error.code
    print(json.dumps([code, err.getvalue()]), flush=True)
"""
BOTH_READ_ONLY = "closed/out.csv: nothing can be written in"
CLOSED = [  # command, what is told; `closed` cannot be written in, closed.* cannot be read
    (["eval_metrics", "closed.h5", "gt.csv"], "closed.h5: Permission denied"),
    (["eval_metrics", "a.h5", "closed.csv"], "closed.csv: Permission denied"),
    (["eval_metrics", "closed.csv", "gt.csv"], "closed.csv: Permission denied"),
    (["eval_metrics", "secret/a.h5", "gt.csv"], "secret/a.h5: Permission denied"),
    (["postprocess", "closed.h5", "l2", "-o", "out/b.h5"], "closed.h5: Permission denied"),
    (["merge_shards", "closed.h5", "-o", "out/b.h5"], "closed.h5: Permission denied"),
    (["select_ref_subset", "gt.csv", "--references", "closed.h5", "-o", "out/b.txt"], "closed.h5: Permission denied"),
    (["index", "build", "--index", "out/i", "closed.h5"], "closed.h5: Permission denied"),
    (["index", "search", "--index", "i", "a.h5", "-o", "out/b"], "i/index.json: Permission denied"),
    (["train", "--weight", "closed.h5", "images"], "--weight: closed.h5: Permission denied"),
    (["train", "@closed.csv", "images"], "closed.csv: Permission denied"),
    (["eval_metrics", "a.h5", "gt.csv", "--candidates", "closed/out.csv"], f"--candidates {BOTH_READ_ONLY}"),
    (["eval_metrics", "a.h5", "gt.csv", "--report", "closed"], "--report: nothing can be written in closed"),
    (["eval_metrics", "a.h5", "gt.csv", "--report", "closed/out.csv"], "--report: closed/out.csv: Permission denied"),
    (["eval_metrics", "a.h5", "gt.csv", "--images", ".", "--picture", "closed/out.csv"], f"--picture {BOTH_READ_ONLY}"),
    (["postprocess", "a.h5", "l2", "-o", "closed/out.csv"], f"-o {BOTH_READ_ONLY}"),
    (["merge_shards", "a.h5", "-o", "closed/out.csv"], f"-o {BOTH_READ_ONLY}"),
    (["select_ref_subset", "gt.csv", "-o", "closed/out.csv"], f"-o {BOTH_READ_ONLY}"),
    (["index", "build", "--index", "closed/i", "a.h5"], "closed/i: Permission denied"),
    (["index", "build", "--index", "closed", "a.h5"], "nothing can be written in closed"),
    (["train", "--exp", "HERE/closed/run", "--no-pretrained", "-a", "test_efficientnet", "images"],
     "closed/run: Permission denied"),
    (["train", "--mode", "export", "--weight", "net.pth.tar", "--format", "safetensors", "-o", "closed/a.safetensors"],
     "nothing can be written in closed")]


@pytest.fixture(scope="module")
def as_nobody(tmp_path_factory, weights):
    """What the commands of CLOSED came to for a user without rights: [(code, error)]."""
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    if user and not shutil.which(user[0]):
        pytest.skip("runs as root, and there is no setpriv")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)  # where another user can be: pytest's own folders are closed
        for name in ("closed", "secret", "i", "out", "query_images"):
            (folder / name).mkdir()
        for name in ("a.h5", "closed.h5", "secret/a.h5"):
            write_h5(folder / name)
        for name in ("gt.csv", "closed.csv"):
            (folder / name).write_text(TRUTH)
        draw_images(folder / "images", 4)
        shutil.copy(weights, folder / "net.pth.tar")
        (folder / "i" / "index.json").write_text("{}")
        for name, mode in {".": 0o755, "net.pth.tar": 0o644, "out": 0o777, "secret": 0, "closed": 0o555, "closed.h5": 0,
                           "closed.csv": 0, "i/index.json": 0}.items():
            (folder / name).chmod(mode)
        commands = [(name, [word.replace("HERE", str(folder)) for word in words]) for (name, *words), _ in CLOSED]
        done = subprocess.run([*user, sys.executable, "-c", AS_NOBODY], cwd=folder,
                              input=json.dumps(commands), capture_output=True, text=True,
                              env=WITH_PACKAGE | {"HOME": str(folder / "out"), "PYTHONDONTWRITEBYTECODE": "1"})
        (folder / "secret").chmod(0o755), (folder / "closed").chmod(0o755)
    if user and "Permission denied" in done.stderr.splitlines()[-1:]:
        pytest.skip(f"another user cannot run the tests: {done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize("number", range(len(CLOSED)), ids=[" ".join(words) for words, _ in CLOSED])
def test_what_another_user_may_not_do_is_told(as_nobody, number):
    results, stderr = as_nobody
    assert len(results) > number, stderr
    code, err = results[number]
    assert code == 2 and CLOSED[number][1] in err and err.count("\n") == 1 and "Traceback" not in stderr, (code, err)
