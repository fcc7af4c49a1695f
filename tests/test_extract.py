"""train.py --mode extract: which images, which rows, which file."""
import csv
import hashlib
import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from safetensors import safe_open

import train
from copydet import extraction, load_descriptor, options
from copydet.checkpoints import load_weights, read_checkpoint
from copydet.common import MANIFEST, InputError, WorkError
from copydet.distributed import launch
from copydet.extraction import Blocks, prepare_extraction, settings_of
from copydet.network import build_net
from copydet.options import parse_args
from helpers import ROOT, WITH_PACKAGE, data_folder, odd_images, run, run_here

RAW = ["--mode", "extract", "-a", "test_efficientnet", "--no-pretrained", "--seed", 1, "--input-size", 32, "-j", 1,
       "--batch-size", 16]


def read(file):
    with h5py.File(file) as f:
        return {name: f[name][()] for name in f}, dict(f.attrs)


def skipped(folder):
    with open(folder / "skipped.csv", newline="", encoding="utf-8") as f:
        return {os.path.basename(row["path"]): row["reason"] for row in csv.DictReader(f)}


def test_descriptors_are_those_of_the_network(tmp_path, extract, weights):
    data = data_folder(tmp_path)
    extract(data, "--target-set", "qrt")
    rows, attrs = read(extract.out() / "fb-isc-submission.h5")
    assert list(rows["query_ids"]) == [f"Q{i:05d}".encode() for i in range(6)] and rows["train"].shape == (4, 256)
    assert rows["query_ids"].dtype == "S6" and rows["reference_ids"].dtype == "S7"
    args = parse_args(["-a", "test_efficientnet", "--input-size", "32", "--gem-eval-p", "5", "x"])
    net = build_net(args, False).eval()
    load_weights(net, read_checkpoint(weights)["state_dict"], weights)
    for i in range(6):
        img = Image.open(data / "query_images" / f"Q{i:05d}.jpg")
        img = img.resize((64, 64), Image.BILINEAR).crop((16, 16, 48, 48))  # 64 px to 32 + 32, centre 32
        x = (torch.from_numpy(np.array(img)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
        with torch.no_grad():
            assert np.allclose(net(x)[0].numpy(), rows["query"][i], atol=1e-5)
    assert attrs["arch"] == "test_efficientnet.r160_in1k" and attrs["gem_eval_p"] == 5 and attrs["input_size"] == 32
    assert len(attrs["checkpoint_sha256"]) == 64 and "torch" in json.loads(attrs["versions"])


def test_bad_files_are_skipped_and_listed(tmp_path, extract):
    data = data_folder(tmp_path)
    folder = data / "query_images"
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.jpg").write_bytes((folder / "Q00000.jpg").read_bytes()[:400])
    (folder / "folder.jpg").mkdir()
    done = extract(data)
    assert "4 skipped" in done.stdout and "6 query" in done.stdout
    assert set(skipped(extract.out())) == {"empty.jpg", "text.jpg", "cut.jpg", "folder.jpg"}
    assert all(skipped(extract.out()).values())
    told = json.loads((extract.out() / "run.json").read_text())
    assert told["counts"] == {"query": 6, "reference": 10, "blank": 0, "skipped": 4} and told["outcome"] == "done"
    assert {"describe query", "describe reference", "write", "total"} <= told["seconds"].keys()
    assert "cut.jpg" in extract(data, "--strict", code=1).stderr
    told = json.loads((extract.out() / "run.json").read_text())
    assert told["outcome"] == "failed" and "cut.jpg" in told["error"]
    for name in folder.glob("Q*"):
        name.unlink()
    done = extract(data, code=2)
    assert "none of the 3 images" in done.stderr and len(done.stderr.strip().splitlines()[-1:]) == 1


def test_names_stay_whole_and_unique(tmp_path, extract):
    data = data_folder(tmp_path)
    folder = data / "query_images"
    names = ["É'日本", "a" * 40, "UPPER", "with space"]
    for name, ending in zip(names, (".JPG", ".JPEG", ".PNG", ".jpg")):
        Image.new("RGB", (40, 40), (len(name) * 5, 9, 99)).save(folder / (name + ending), "PNG" if "P" == ending[1] else
                                                                "JPEG")
    (folder / "._Q00000.jpg").write_bytes(b"sidecar")
    extract(data)
    rows, _ = read(extract.out() / "fb-isc-submission.h5")
    ids = [name.decode() for name in rows["query_ids"]]
    assert set(names) <= set(ids) and len(set(ids)) == len(ids) == len(rows["query"]) == 10
    (folder / "b").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "b" / "UPPER.jpg")
    done = extract(data, code=2)
    assert "UPPER.PNG" in done.stderr and "b/UPPER.jpg" in done.stderr


def test_odd_photos_give_finite_descriptors(tmp_path, extract):
    data = data_folder(tmp_path)
    odd_images(data / "query_images")
    os.remove(data / "query_images" / "image.webp")  # the same stem twice is an error of its own
    done = extract(data)
    rows, _ = read(extract.out() / "fb-isc-submission.h5")
    assert "1 skipped" in done.stdout and "more than 178,956,970" in skipped(extract.out())["bomb.png"]
    assert np.isfinite(rows["query"]).all() and len(rows["query"]) == 6 + 12
    ids = list(rows["query_ids"])
    assert rows["query"][ids.index(b"grey8")] @ rows["query"][ids.index(b"grey16")] > 0.99


def test_three_processes_write_the_same_file(tmp_path, extract):
    data = data_folder(tmp_path, queries=1003, references=7, training=2)
    (data / "query_images" / "broken.jpg").write_bytes(b"")
    extract(data, "--target-set", "qrt", "--device", "cpu")
    extract(data, "--target-set", "qrt", "--device", "cpu", "--multiprocessing-distributed", "--nproc", 3, "--dist-url",
            f"tcp://localhost:{20001 + os.getpid() % 20000}", suffix="-3")
    (one, _), (three, _) = (read(extract.out(suffix) / "fb-isc-submission.h5") for suffix in ("", "-3"))
    assert len(set(three["query_ids"])) == len(three["query"]) == 1003
    for name in ("query", "reference", "train"):
        assert (one[f"{name}_ids"] == three[f"{name}_ids"]).all()
        assert np.abs(one[name] - three[name]).max() < 1e-6  # batches differ: 15 images, and 5 in each process
    assert skipped(extract.out()) == skipped(extract.out("-3"))
    assert [file for file in os.listdir(extract.out("-3")) if file.startswith(".")] == [MANIFEST]


def test_dryrun_and_subset_cut_rows_and_ids_alike(tmp_path, extract):
    data = data_folder(tmp_path, queries=3, references=120)
    (data / "rids_subset.txt").write_text("R000119\nR000004\n")
    extract(data, "--dryrun")
    rows, _ = read(extract.out() / "fb-isc-submission.h5")
    assert rows["reference"].shape[0] == len(rows["reference_ids"]) == 100 and len(rows["query"]) == 3
    extract(data, "--eval-subset")
    subset, _ = read(extract.out() / "fb-isc-submission-subset.h5")
    assert list(subset["reference_ids"]) == [b"R000004", b"R000119"] and len(subset["query"]) == 3
    assert np.allclose(subset["reference"][0], rows["reference"][4], atol=1e-6)
    (data / "rids_subset.txt").write_text("R000119\nR999999\n")
    assert "R999999" in extract(data, "--eval-subset", code=2).stderr


def test_groups_are_added_and_other_checkpoints_kept_apart(tmp_path, extract, weights):
    data = data_folder(tmp_path)
    file = extract.out() / "fb-isc-submission.h5"
    extract(data, "--target-set", "qr")
    before, _ = read(file)
    extract(data, "--target-set", "t")
    after, _ = read(file)
    assert (after["query"] == before["query"]).all() and len(after["train"]) == 4
    state = torch.load(weights, weights_only=True)
    state["state_dict"]["fc.weight"] += 1
    torch.save(state, tmp_path / "other.pth.tar")
    done = extract(data, "--target-set", "t", "--weight", tmp_path / "other.pth.tar")
    backup, = file.parent.glob("fb-isc-submission.????????.h5")
    assert str(backup) in done.stdout and len(read(backup)[0]["query"]) == 6
    assert set(read(file)[0]) == {"train", "train_ids"}
    extract(data, "--target-set", "t", "--gem-eval-p", 1)
    extract(data, "--target-set", "t", "--gem-eval-p", 2)  # other settings of one checkpoint do not replace each other
    assert len(list(file.parent.glob("fb-isc-submission.????????.h5"))) == 3


def test_a_recipe_extracts_with_what_it_trained_not_with_what_it_started_from(tmp_path, exp, weights):
    data, recipe = data_folder(tmp_path), tmp_path / "next.args"
    recipe.write_text(f"--exp {exp}\n-a test_efficientnet\n--weight {weights}\n--input-size 32\n--gem-eval-p 5\n")
    flags = [f"@{recipe}", "-j", 1, "--device", "cpu"]
    done = run_here("train.py", *flags, "--mode", "extract", data, code=2)
    assert "no checkpoint in" in done.stderr
    run_here("train.py", *flags, "-b", 4, "--memory-size", 16, "--epochs", 1, "--lr", 0.1, data / "training_images")
    own = Path(exp) / "train" / "checkpoint_0000.pth.tar"
    done = run_here("train.py", *flags, "--mode", "extract", data)
    assert f"from {own}" in done.stdout
    done = run_here("train.py", *flags, "--mode", "extract", "--weight", weights, data)  # typed by hand
    assert f"from {weights}" in done.stdout
    run_here("train.py", *flags, "--mode", "export", "--format", "safetensors", "-o", tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "pt") as tensors:
        config = json.loads(tensors.metadata()["config"])
    assert config["checkpoint_sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()


def test_the_notes_pickled_subset_is_read_and_code_in_one_is_not(tmp_path, extract):
    data = data_folder(tmp_path, queries=1)
    file = data / "rids_subset.pickle"
    file.write_bytes(pickle.dumps(["R000007", "R000002"]))
    extract(data, "--eval-subset", "--subset-file", file)
    rows, _ = read(extract.out() / "fb-isc-submission-subset.h5")
    assert list(rows["reference_ids"]) == [b"R000002", b"R000007"]
    for content in (pickle.dumps([Path("R000007")]), pickle.dumps({"a": 1}), pickle.dumps([1, 2]), b"\x80\x04cut"):
        file.write_bytes(content)
        done = extract(data, "--eval-subset", "--subset-file", file, code=2)
        assert "rids_subset.pickle" in done.stderr and len(done.stderr.splitlines()) == 1
    (data / "rids_subset.txt").write_text("\ufeffR000002\n", encoding="utf-8")
    extract(data, "--eval-subset")


def test_an_earlier_file_stays_until_the_new_one_is_whole(tmp_path, weights, monkeypatch):
    data = data_folder(tmp_path / "data")
    monkeypatch.setattr(options, "ROOT", tmp_path)
    flags = ["--mode", "extract", "-j", "0", "--device", "cpu", "--exp", "x", "--weight", weights, data]
    train.main(parse_args(flags))
    folder = tmp_path / "exp" / "x" / "extract"
    before = (folder / "fb-isc-submission.h5").read_bytes()

    def fail(*_, **__):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr("copydet.extraction.write_descriptors", fail)
    with pytest.raises(OSError):
        train.main(parse_args([*flags, "--gem-eval-p", "1"]))
    assert (folder / "fb-isc-submission.h5").read_bytes() == before and len(list(folder.glob("*.h5"))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The winner's published weights


class WinnersNet(torch.nn.Module):
    """The network of the winner's package: last feature map, GeM, linear without bias, batch norm, unit length."""

    def __init__(self, arch, dim=256, p=1.0):
        super().__init__()
        self.backbone = timm.create_model(arch, features_only=True)
        self.fc = torch.nn.Linear(self.backbone.feature_info.channels()[-1], dim, bias=False)
        self.bn = torch.nn.BatchNorm1d(dim)
        self.p = p

    def forward(self, x):
        x = self.backbone(x)[-1]
        x = x.clamp(min=1e-6).pow(self.p).mean((-2, -1)).pow(1 / self.p)
        return torch.nn.functional.normalize(self.bn(self.fc(x)))


def test_published_weights_are_described_as_by_the_winners_package(tmp_path, exp):
    """Their files hold the parser's gem_eval_p of 4.0 and nothing of the square: the package knows better."""
    torch.manual_seed(0)
    net = WinnersNet("test_efficientnet").eval()
    net.bn.running_mean.uniform_(-0.1, 0.1), net.bn.running_var.uniform_(0.5, 1.5)
    args = Namespace(arch="test_efficientnet", input_size=96, gem_p=1.0, gem_eval_p=4.0, batch_size=16, seed=99999)
    file = tmp_path / "isc_ft_v107.pth.tar"
    torch.save({"epoch": 10, "arch": "test_efficientnet", "optimizer": {}, "args": args,
                "state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, file)
    data, rng = tmp_path / "data", np.random.default_rng(0)
    for folder, name in (("query_images", "Q{:05d}.png"), ("reference_images", "R{:06d}.png")):
        (data / folder).mkdir(parents=True)
        for i in range(3):
            img = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
            img.resize((140, 110), Image.BICUBIC).save(data / folder / name.format(i))
    paths = sorted((data / "query_images").iterdir())
    mean, std = (torch.tensor(net.backbone.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    tensors = [(TF.to_tensor(TF.resize(Image.open(path), [96, 96])) - mean) / std for path in paths]
    with torch.no_grad():
        expected = net(torch.stack(tensors)).numpy()
    done = run("train.py", "--mode", "extract", "--exp", exp, "--weight", file, "-j", 1, "--device", "cpu", data)
    assert "as its package does: GeM p 1, 96 px, square" in done.stdout
    rows, _ = read(Path(exp) / "extract" / "fb-isc-submission.h5")
    by_page = find_copies_rows(tmp_path, file, data)
    for found in (rows["query"], load_descriptor(file)(paths), by_page):
        assert np.abs(found - expected).max() < 1e-5
    forced = load_descriptor(file, gem_eval_p=4.0)(paths)
    assert np.abs(forced - expected).max() > 1e-3
    with pytest.raises(InputError, match="no such setting: gem_evalp"):
        load_descriptor(file, gem_evalp=1.0)


def find_copies_rows(tmp_path, file, data):
    """Descriptors of the queries in find_copies.py's cache."""
    run("scripts/find_copies.py", data / "query_images", data / "reference_images", "-o", tmp_path / "report",
        "--weight", file, "--", "--device", "cpu", "-j", "1")
    cache, = (file for file in (tmp_path / "report" / "cache").glob("*.sqlite") if not file.name.startswith("features"))
    with sqlite3.connect(cache) as db:
        rows = db.execute("SELECT path, row FROM photos ORDER BY path").fetchall()
    return np.array([np.frombuffer(row, np.float32) for path, row in rows if b"/query_images/" in path])


def test_metrics_follow_where_the_truth_is_known(tmp_path, extract):
    data = data_folder(tmp_path)
    for i in range(3):
        shutil.copy(data / "reference_images" / f"R{i:06d}.jpg", data / "query_images" / f"Q{i:05d}.jpg")
    (data / "public_ground_truth.csv").write_text("query_id,reference_id\n" + "".join(
        f"Q{i:05d},{f'R{i:06d}' if i < 3 else ''}\n" for i in range(6)))
    done = extract(data, apart=True)  # eval_metrics.py prints
    assert '"average_precision": 1.0' in done.stdout and '"recall_p90": 1.0' in done.stdout


@pytest.mark.parametrize("flags, words", [
    (["--target-set", "qx"], "--target-set"), (["--target-set", ""], "--target-set"),
    (["--eval-subset"], "select_ref_subset.py"), (["--dim", 128], "--dim differs"),
    (["-a", "test_resnet"], "does not fit"), (["-a", "nonesuch"], "--arch")])
def test_wrong_flags(tmp_path, extract, flags, words):
    assert words in extract(data_folder(tmp_path), *flags, code=2).stderr


def test_missing_folders_and_checkpoints(tmp_path, exp):
    data = data_folder(tmp_path)
    done = run("train.py", "--mode", "extract", "--exp", exp, data, code=2)
    assert "no checkpoint in" in done.stderr and "--weight" in done.stderr
    subprocess.run(["rm", "-r", data / "training_images"], check=True)
    assert "training_images" in run("train.py", *RAW, "--exp", exp, "--target-set", "t", data, code=2).stderr


def test_raw_features_need_no_checkpoint_and_no_hub(tmp_path, exp):
    data = data_folder(tmp_path)
    run("train.py", *RAW, "--exp", exp, data, env={"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9"})
    rows, _ = read(Path(exp) / "extract" / "fb-isc-submission.h5")
    assert rows["query"].shape[1] > 32 and np.allclose(np.linalg.norm(rows["query"], axis=1), 1, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and continued, in parts, on several machines


KILLED = """
import os, signal, sys, time
import numpy as np
import train  # once: every try is a fork of this process
out, flags, moments = sys.argv[1], sys.argv[2:], np.random.default_rng(1)
def start():
    if (pid := os.fork()) == 0:
        train.main(train.parse_args(flags))
        os._exit(0)
    return pid
blocks = lambda: len([name for name in os.listdir(out) if name.endswith(".npz")]) if os.path.isdir(out) else 0
for kill in range(10):
    before, pid = blocks(), start()
    while blocks() < before + 1 and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.01))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print("killed with", blocks())
os.waitpid(start(), 0)
"""


def test_killed_at_any_moment_and_resumed_it_writes_the_same_file(tmp_path, extract, weights, exp):
    data = data_folder(tmp_path, queries=100, references=101, training=2)
    flags = ["--target-set", "qrt", "--batch-size", 2]
    extract(data, *flags, suffix="-whole", apart=True)
    folder = extract.out() / "fb-isc-submission.blocks"
    done = run("-c", KILLED, folder, "--mode", "extract", "-j", 0, "--device", "cpu", "--exp", exp, "--weight", weights,
               *flags, "--resume", "auto", data, env=WITH_PACKAGE)
    counts = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("killed")]
    assert len(counts) == 10 and 1 <= counts[0] < counts[-1] < 102, counts
    whole, broken = (read(extract.out(suffix) / "fb-isc-submission.h5") for suffix in ("-whole", ""))
    for name, rows in whole[0].items():
        assert np.array_equal(rows, broken[0][name]), name
    assert not folder.exists()


def killed_in_second_block(args, job, rank):
    """Extract, but rank 1 is killed when it is about to write its second block."""
    write, written = Blocks.write, []

    def write_once(self, *rest):
        if written:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(rest)
        write(self, *rest)

    if rank.rank == 1:
        Blocks.write = write_once
    extraction.extract(args, job, rank)


def test_where_a_rank_is_killed_what_was_finished_is_whole_and_the_rest_follows(tmp_path, extract, weights, exp):
    data = data_folder(tmp_path, queries=30, references=41)
    extract(data, "--batch-size", 2, suffix="-one")
    args, job = prepare_extraction(parse_args([
        "--mode", "extract", "--device", "cpu", "-j", "0", "--batch-size", "4", "--exp", exp, "--weight", str(weights),
        "--multiprocessing-distributed", "--nproc", "2", "--dist-url",
        f"tcp://localhost:{20003 + os.getpid() % 20000}", str(data)]))
    with extraction.output_folder(args):
        with pytest.raises((WorkError, SystemExit), match="process 1 of 2 was killed|1"):
            launch(killed_in_second_block, args, job)
        blocks = job.h5.with_suffix(".blocks")
        whole = [file for file in blocks.glob("*.npz") if not file.name.startswith(".")]
        assert whole and not job.h5.exists()
        for file in whole:  # what was being written has another name
            assert np.load(file)["rows"].shape[1] == 256
        launch(extraction.extract, args.replace(resume="auto"), job)
    one, two = read(extract.out("-one") / "fb-isc-submission.h5")[0], read(job.h5)[0]
    for name, rows in one.items():
        assert np.array_equal(rows, two[name]) if rows.dtype.kind == "S" else np.allclose(rows, two[name], atol=1e-6)
    assert not blocks.exists()


def test_resumed_with_other_settings_is_refused(tmp_path, extract, weights, exp):
    data = data_folder(tmp_path)
    folder = extract.out() / "fb-isc-submission.blocks"
    folder.mkdir(parents=True)
    args, job = prepare_extraction(parse_args(["--mode", "extract", "--weight", weights, data]))
    (folder / "settings.json").write_text(json.dumps(settings_of(args, job.source) | {"gem_eval_p": 4.0}))
    done = extract(data, "--resume", "auto", code=2)
    assert "other settings" in done.stderr and "gem_eval_p 4.0 -> 5.0" in done.stderr and "Traceback" not in done.stderr
    assert "--weight" in extract(data, "--resume", weights, code=2).stderr
    extract(data)  # anew
    assert not folder.exists()


def test_two_machines_write_the_same_file(tmp_path, extract, weights, exp):
    data = data_folder(tmp_path, queries=40, references=50)
    extract(data, "--device", "cpu", suffix="-one", apart=True)
    port = 20000 + os.getpid() % 20000
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend",
               "c10d", "--rdzv-endpoint", f"localhost:{port}", "train.py", "--mode", "extract", "--device", "cpu", "-j",
               0, "--batch-size", 15, "--exp", exp, "--weight", weights, data]
    agents = [subprocess.Popen(list(map(str, command)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=200)
        assert agent.returncode == 0, errors
    one, two = (read(extract.out(suffix) / "fb-isc-submission.h5")[0] for suffix in ("-one", ""))
    for name, rows in one.items():
        assert np.array_equal(rows, two[name]), name


def test_shards_put_together_are_the_whole(tmp_path, weights, monkeypatch):
    data = data_folder(tmp_path / "data")
    monkeypatch.setattr(options, "ROOT", tmp_path)

    def shard(*flags):
        args = parse_args(["--mode", "extract", "-j", "0", "--device", "cpu", "--exp", "x", "--weight", weights, *flags,
                           data])
        train.main(args)
        return prepare_extraction(args)[1].h5

    files = [shard("--shard", f"{i}/3") for i in range(3)]
    other = shard("--shard", "1/3", "--gem-eval-p", "1")
    whole = shard()
    os.rename(other, tmp_path / "other.h5")
    files[1] = shard("--shard", "1/3")
    merged = tmp_path / "merged.h5"
    run("scripts/merge_shards.py", *files[::-1], "-o", merged)
    (a, attrs), (b, expected) = read(merged), read(whole)
    assert all(np.allclose(a[name], b[name], atol=1e-6) if b[name].dtype.kind == "f" else
               np.array_equal(a[name], b[name]) for name in b)
    assert {**attrs, "versions": 0} == {**expected, "versions": 0}
    for wrong, words in ((files[:2], "shard 2/3 is missing"), ([*files, files[0]], "shard 0/3 is there twice"),
                         ([files[0], tmp_path / "other.h5", files[2]], "differ in gem_eval_p"),
                         ([whole, *files], "is no shard")):
        assert words in run("scripts/merge_shards.py", *wrong, "-o", tmp_path / "no.h5", code=2).stderr
    assert not (tmp_path / "no.h5").exists()
    for text in ("3/3", "1", "a/b"):
        with pytest.raises(SystemExit):
            shard("--shard", text)


def test_a_full_disk_is_told_in_one_line_and_loses_nothing(tmp_path, weights, monkeypatch):
    data = data_folder(tmp_path / "data")
    monkeypatch.setattr(options, "ROOT", tmp_path)
    flags = ["--mode", "extract", "-j", "0", "--device", "cpu", "--exp", "x", "--batch-size", "2", "--weight",
             str(weights)]
    write, written = Blocks.write, []

    def full(self, block, *rest):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(block)
        write(self, block, *rest)

    monkeypatch.setattr(Blocks, "write", full)
    with pytest.raises(WorkError, match="no space left on the disk of"):
        train.main(parse_args([*flags, data]))
    monkeypatch.setattr(Blocks, "write", lambda self, *rest: written.append(rest[0]) or write(self, *rest))
    train.main(parse_args([*flags, "--resume", "auto", data]))
    file = tmp_path / "exp" / "x" / "extract" / "fb-isc-submission.h5"
    assert len(written) == 8 and len(read(file)[0]["reference"]) == 10  # 3 and 5 batches of 2, none twice
