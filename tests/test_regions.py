"""Queries in regions: rows, files, and that every tool takes the best of them."""
import csv
import json

import h5py
import numpy as np
import pytest
from PIL import Image

import eval_metrics
import find_copies
import index
import merge_shards
import postprocess
import train
from copydet import options
from copydet.common import InputError
from copydet.descriptors import Descriptors, write_descriptors
from copydet.extraction import prepare_extraction
from copydet.options import parse_args
from copydet.regions import REGIONS, parse_regions
from copydet.search import exact_distances, nearest_rows, search, search_topk
from helpers import data_folder, draw_images, photo

QUERIES, REGIONS_EACH, REFERENCES = 20, 3, 50


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """sub.h5: each query's last region is near a reference, the others near nothing; and gt.csv."""
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    references = unit(rng.standard_normal((REFERENCES, 16)))
    queries = unit(rng.standard_normal((QUERIES, REGIONS_EACH, 16)))
    queries[:, -1] = unit(references[:QUERIES] + 0.05 * queries[:, -1])
    ids = np.repeat([f"Q{i:02d}" for i in range(QUERIES)], REGIONS_EACH)
    boxes = np.tile(REGIONS["7"][:REGIONS_EACH], (QUERIES, 1))
    names = [f"R{i:02d}" for i in range(REFERENCES)]
    write_descriptors(folder / "sub.h5", {"query": (queries.reshape(-1, 16), ids), "reference": (references, names),
                                          "train": (references[::-1], names)}, {}, regions=boxes)
    lines = [f"Q{i:02d},R{i:02d}" for i in range(QUERIES)]
    (folder / "gt.csv").write_text("query_id,reference_id\n" + "\n".join(lines) + "\n")
    return folder


def best_of_regions(file):
    """Scores [queries, references] by brute force."""
    with Descriptors(file) as opened:
        queries, references = (opened[name].read().astype(float) for name in ("query", "reference"))
    distances = np.square(queries[:, None] - references).sum(-1)
    return -distances.reshape(-1, REGIONS_EACH, len(references)).min(1)


def table(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


# ---------------------------------------------------------------------------------------------------------------------
# Regions and rows


def test_regions_are_those_described():
    assert len(set(REGIONS["7"])) == 7 and len(set(REGIONS["19"])) == 19 and REGIONS["19"][:7] == REGIONS["7"]
    assert all(0 <= left < right <= 1 and 0 <= top < bottom <= 1 for left, top, right, bottom in REGIONS["19"])
    assert parse_regions("0,0,1,1 0.5,0,1,0.25") == [(0, 0, 1, 1), (0.5, 0, 1, 0.25)]


@pytest.mark.parametrize("text", ["8", "", "0,0,1", "0,0,0,1", "0.5,0,0.4,1", "0,0,1,1.1", "nan,0,1,1", "0,0,1,x"])
def test_others_are_refused(text):
    with pytest.raises(InputError, match="--query-regions"):
        parse_regions(text)


def test_a_region_is_described_as_an_image_of_its_own(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(options, "ROOT", tmp_path)
    data = data_folder(tmp_path / "data", queries=0)
    for i, name in enumerate(("coffee", "chelsea", "motorcycle_left")):
        photo(name, (160, 120)).save(data / "query_images" / f"Q{i}.png")
    flat = Image.new("RGB", (160, 120), "white")
    flat.paste(photo("coffee", (80, 120)), (0, 0))
    flat.save(data / "query_images" / "Q3.png")

    def extract(name, *flags):
        args = parse_args(["--mode", "extract", "-j", "0", "--device", "cpu", "--exp", name, "--weight", str(weights),
                           "--resize", "square", "-b", "5", *flags, str(data)])
        train.main(args)
        return prepare_extraction(args)[1].h5

    regions = extract("regions", "--query-regions", "0,0,1,1 0.25,0.25,0.75,0.75 0.5,0,1,1")
    with Descriptors(regions) as file:
        rows, ids = file["query"].read(), file["query"].ids.tolist()
        assert ids == [f"Q{i}" for i in range(4) for _ in range(3)] and file["query"].images.tolist() == ids[::3]
        assert np.allclose(file["query"].regions[:3], [(0, 0, 1, 1), (0.25, 0.25, 0.75, 0.75), (0.5, 0, 1, 1)])
        assert len(file["reference"]) == 10 and file["reference"].regions is None
    for i in range(4):
        file = data / "query_images" / f"Q{i}.png"
        whole = Image.open(file).copy()
        for k, box in enumerate([(0, 0, 160, 120), (40, 30, 120, 90), (80, 0, 160, 120)]):
            whole.crop(box if (i, k) != (3, 2) else (0, 0, 160, 120)).save(file)  # one flat colour is like any other
            with Descriptors(extract("crop", "--target-set", "q")) as crops:
                assert np.allclose(crops["query"].read()[i], rows[3 * i + k], atol=1e-5), (i, k)
        whole.save(file)
    parts = [extract("parts", "--query-regions", "7", "--shard", f"{i}/2") for i in range(2)]
    merge_shards.merge(parts, tmp_path / "merged.h5")
    with Descriptors(tmp_path / "merged.h5") as merged, Descriptors(extract("all", "--query-regions", "7")) as whole:
        for one, other in ((merged["query"].read(), whole["query"].read()),
                           (merged["query"].regions, whole["query"].regions)):
            assert np.array_equal(one, other)


# ---------------------------------------------------------------------------------------------------------------------
# Every tool takes the best of them


@pytest.mark.parametrize("memory", [2**31, 2**20])
def test_search_is_that_of_brute_force(planted, memory):
    wanted = best_of_regions(planted / "sub.h5")
    with Descriptors(planted / "sub.h5") as file:
        queries, references = file["query"], file["reference"]
        none, options = np.empty(0, np.int64), {"memory": memory, "image_of": queries.image_of}
        found = search(queries.read(), references, 200, none, **options)
        order = np.argsort(-wanted, axis=None)[:200]
        assert set(zip(found["query"], found["reference"])) == set(zip(*np.unravel_index(order, wanted.shape)))
        assert np.allclose(found["score"], wanted[found["query"], found["reference"]])
        found = search_topk(queries.read(), references, 4, none, **options)
        assert np.array_equal(found["query"], np.repeat(range(QUERIES), 4))
        assert np.array_equal(found["reference"].reshape(-1, 4), np.sort(np.argsort(-wanted, 1)[:, :4], 1))
        assert np.allclose(exact_distances(queries.read(), references, found, queries.image_of), -found["score"])
        nearest = nearest_rows(queries.read(), references, found, queries.image_of)
        assert np.array_equal(queries.image_of[nearest], found["query"])
        distances = np.square(queries.read()[nearest] - references.read()[found["reference"]]).sum(1)
        assert np.allclose(distances, -found["score"], atol=1e-5)


def test_every_tool_takes_the_best_region(planted, tmp_path, capsys):
    sub, truth = str(planted / "sub.h5"), str(planted / "gt.csv")
    wanted = best_of_regions(sub)
    assert eval_metrics.main([sub, truth]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["average_precision"] == 1 and result["n_queries"] == QUERIES and result["n_candidates"] == 200
    assert postprocess.main([sub, "-o", str(tmp_path / "l2.h5"), "l2"]) == 0
    assert postprocess.main([sub, "-o", str(tmp_path / "l2.csv"), "l2"]) == 0
    assert find_copies.main([sub, "-o", str(tmp_path / "report")]) == 0
    assert index.main(["build", "--index", str(tmp_path / "i"), "--factory", "Flat", sub]) == 0
    assert index.main(["search", "--index", str(tmp_path / "i"), sub, "-o", str(tmp_path / "i.csv")]) == 0
    with Descriptors(sub) as before, Descriptors(tmp_path / "l2.h5") as after:
        assert np.array_equal(before["query"].regions, after["query"].regions)
        assert np.allclose(before["query"].read(), after["query"].read(), atol=1e-6)
    for file in (tmp_path / "l2.csv", tmp_path / "report" / "pairs.csv", tmp_path / "i.csv"):
        pairs = {(row["query_id"], row["reference_id"]): float(row["score"]) for row in table(file)}
        assert len(pairs) == 10 * QUERIES == len(table(file)), file
        assert np.allclose(list(pairs.values()), [wanted[int(q[1:]), int(r[1:])] for q, r in pairs], atol=1e-5), file


def test_an_archive_has_one_vector_for_each_image(planted, tmp_path, capsys):
    with Descriptors(planted / "sub.h5") as file:
        rows = file["query"]
        write_descriptors(tmp_path / "q.h5", {"query": (rows.read(), rows.ids)}, {}, regions=rows.regions)
    for sources in ([tmp_path / "q.h5"], [planted / "sub.h5", tmp_path / "q.h5"]):
        assert find_copies.main([*map(str, sources), "-o", str(tmp_path / "r")]) == 2
        assert "`query` is described in regions" in capsys.readouterr().err
    folder = str(draw_images(tmp_path / "images", 2))
    for name in (folder, folder + "/"):
        assert find_copies.main([folder, name, "-o", str(tmp_path / "r"), "--query-regions", "7"]) == 2
        assert "within one collection whole images are compared" in capsys.readouterr().err


def test_files_in_other_regions_are_not_put_together(planted, tmp_path, capsys):
    with Descriptors(planted / "sub.h5") as file:
        groups = {name: (rows.read(), rows.ids) for name, rows in file.groups.items()}
        write_descriptors(tmp_path / "other.h5", groups, {}, regions=file["query"].regions[::-1])
    assert postprocess.main([str(planted / "sub.h5"), str(tmp_path / "other.h5"), "-o", str(tmp_path / "o.h5"),
                             "concat"]) == 2
    assert "in other regions" in capsys.readouterr().err
    with h5py.File(tmp_path / "other.h5", "a") as file:
        del file["query_regions"]
        file["query_regions"] = np.zeros((3, 4))
    with pytest.raises(InputError, match="with regions of shape"):
        Descriptors(tmp_path / "other.h5")


def test_a_photo_in_another_is_found_by_its_part(tmp_path, weights):
    """find_copies.py: half of the query shows it."""
    archive, queries = draw_images(tmp_path / "archive", 12, seed=3), tmp_path / "queries"
    photo("coffee", (200, 300)).save(archive / "coffee.png")
    queries.mkdir()
    both = Image.new("RGB", (400, 300))
    both.paste(photo("chelsea", (200, 300)), (0, 0))
    both.paste(photo("coffee", (200, 300)), (200, 0))
    both.save(queries / "both.png")
    flags = ["-o", str(tmp_path / "r"), "--weight", str(weights), "-j", "1", "--query-regions", "7", "--topk", "1",
             "--", "--device", "cpu", "-j", "0", "--resize", "square"]
    assert find_copies.main([str(queries), str(archive), *flags]) == 0
    pair, = table(tmp_path / "r" / "pairs.csv")
    assert pair["reference_id"].endswith("coffee.png") and pair["verdict"] == "copy"
    outline = np.array(pair["outline"].split(), float).reshape(4, 2)
    assert np.allclose(outline, [(200, 0), (400, 0), (400, 300), (200, 300)], atol=3)
    assert pair["region"] == "0.5,0,1,1"
    assert find_copies.main([str(archive), *flags]) == 2
