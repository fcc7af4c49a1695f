"""What does not fit into memory is told before the first step; how many cores there are."""
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from copydet import capacity, extraction, machine
from copydet.common import InputError, WorkError
from copydet.options import parse_args
from helpers import WITH_PACKAGE, data_folder, draw_images, run

TINY = ["-a", "test_efficientnet", "--no-pretrained", "--input-size", "32", "--batch-size", "8", "--memory-size", "16",
        "--epochs", "1", "--seed", "5", "-j", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("photos"), 24)


def training(exp, images, *flags):
    train.main(parse_args([*TINY, *map(str, flags), "--exp", exp, str(images)]))
    return json.loads((Path(exp) / "train" / "args.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def lay(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize("files, free", [
    ({}, []),
    ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": "max\n", f"{V2}/a/b/memory.current": "50\n",
      f"{V2}/a/memory.max": "1000\n", f"{V2}/a/memory.current": "700\n", f"{V2}/a/memory.stat": "anon 1\n"
      "inactive_file 200\n"}, [500]),
    ({"proc/self/cgroup": "0::/outside/of/a/container\n", f"{V2}/memory.max": "300\n", f"{V2}/memory.current": "400\n",
      f"{V2}/memory.stat": "inactive_file 10\n"}, [0]),
    ({"proc/self/cgroup": "5:cpu:/a\n4:cpuset,memory:/a\n", f"{V1}/a/memory.limit_in_bytes": "900\n",
      f"{V1}/a/memory.usage_in_bytes": "100\n", f"{V1}/a/memory.stat": "inactive_file 9\ntotal_inactive_file 60\n",
      f"{V1}/memory.limit_in_bytes": "9223372036854771712\n", f"{V1}/memory.usage_in_bytes": "0\n"},
     [9223372036854771712, 860]),
], ids=["none", "of a group above", "of a container", "version 1"])
def test_limits_of_control_groups_count(tmp_path, files, free):
    assert machine.free_in_groups(lay(tmp_path, files)) == [2**63, *free]


def test_what_is_available_counts_not_what_is_installed(tmp_path):
    text = "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable:   77 kB\n"
    assert machine.free_on_machine(lay(tmp_path, {"proc/meminfo": text})) == 77 * 1024
    assert machine.free_on_machine(tmp_path / "absent") > 2**20


def test_the_estimate_of_a_known_network():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 1), torch.nn.ReLU())
    before = torch.get_rng_state(), [p.clone() for p in net.parameters()]
    found = [capacity.footprint(net, (8, 8), torch.device("cpu"), training=mode).each for mode in (True, False)]
    kept = 4 * 64 * np.array([3 + 4 * 64, 3 + 2 * 64])  # the image, feature maps, their gradients
    assert np.allclose(found, capacity.HEADROOM["cpu"] * kept, rtol=0.01)
    assert torch.equal(torch.get_rng_state(), before[0]) and all(p.grad is None for p in net.parameters())
    assert all(map(torch.equal, net.parameters(), before[1]))


PEAK = """
import re, sys, torch, train
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
parts, seen = train.Need.parts, []
def noted(need):
    seen.extend([peak(), need.of(need.batch, 1)])
    return parts(need)
train.Need.parts = noted
train.main(train.parse_args(sys.argv[1:]))
print(seen[1] / (peak() - seen[0]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc keeps freed memory, other libraries give it back")
def test_the_estimate_is_near_what_a_run_takes(images, exp):
    flags = ["--input-size", 96, "--batch-size", 24, "--ncrops", 8, "--memory-size", 0, "--exp", exp]
    done = run("-c", PEAK, *TINY, *flags, images, env=WITH_PACKAGE)
    assert 0.6 < float(done.stdout.split()[-1]) < 2, done.stdout  # in so small a run libraries are a third of it


def need_of(exp, images, monkeypatch, *flags):
    """What --batch-size 8 in one part is estimated to need."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(train.Need, "parts", lambda need: seen.append(need) or 1)
        training(exp, images, *flags)
    return seen[0]


def test_training_that_does_not_fit_is_refused_with_flags_that_do(images, exp, monkeypatch):
    need = need_of(f"{exp}0", images, monkeypatch)
    free = (need.of(8, 1) + need.of(8, 2)) / 2
    monkeypatch.setattr(train, "free_memory", lambda device: free)
    with pytest.raises(InputError, match=r"^--batch-size 8 x 2 views of 32 px needs about .* on this machine; what "
                                         r"fits: --accumulate 2 \(or auto\), --batch-size \d") as refused:
        training(exp, images)
    assert not (Path(exp) / "train" / "args.json").exists()
    batch = str(refused.value).partition("--batch-size")[2].rpartition("--batch-size ")[2].split(",")[0]
    assert training(f"{exp}1", images, "--batch-size", batch)["batch_size"] < 8
    assert training(f"{exp}2", images, "--accumulate", 2)["accumulate"] == 2
    auto = training(f"{exp}3", images, "--accumulate", "auto")
    assert auto["accumulate"] == 2
    monkeypatch.setattr(train, "free_memory", lambda device: 2**40)
    assert training(f"{exp}3", images, "--accumulate", "auto", "--epochs", 2, "--resume", "auto")["accumulate"] == 2
    assert training(f"{exp}4", images, "--accumulate", "auto")["accumulate"] == 1
    monkeypatch.setattr(train, "free_memory", lambda device: need.of(1, 1) / 2)
    with pytest.raises(InputError, match="no batch fits"):
        training(f"{exp}5", images, "--accumulate", "auto")


def test_loading_processes_are_named_where_they_take_the_memory(images, exp, monkeypatch):
    need = need_of(f"{exp}0", images, monkeypatch).of(8, 1, 0)
    monkeypatch.setattr(train, "size_of_memory", lambda workers, rank, shape: workers * need)
    monkeypatch.setattr(train, "check_shared_memory", lambda *_: None)
    monkeypatch.setattr(train, "free_memory", lambda device: 3.5 * need)
    with pytest.raises(InputError, match="what fits: -j 2"):
        training(f"{exp}1", images, "-j", 4)


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet"])
def test_networks_that_compute_feature_maps_twice(images, exp, arch):
    flags = ["-a", arch, "--pool", "gem", "--input-size", "160", "--grad-checkpointing", "--epoch-steps", "1"]
    assert training(exp, images, *flags)["grad_checkpointing"]
    with pytest.raises(InputError, match="--grad-checkpointing: linear does not offer it"):
        train.checkpoint_gradients(torch.nn.Linear(1, 1), "linear")


def test_grad_checkpointing_is_named_where_it_makes_a_batch_fit(images, exp, monkeypatch):
    flags = ["-a", "test_vit", "--pool", "backbone", "--input-size", "160"]
    sizes = [need_of(exp + name, images, monkeypatch, *flags, *more).of(8, 1)
             for name, more in (("0", []), ("1", ["--grad-checkpointing"]))]
    assert sizes[1] < sizes[0]
    monkeypatch.setattr(train, "free_memory", lambda device: sum(sizes) / 2)
    with pytest.raises(InputError, match="what fits: .*, --grad-checkpointing"):
        training(f"{exp}2", images, *flags)


def test_extraction_that_does_not_fit_is_refused_with_a_batch_that_does(tmp_path, extract, monkeypatch):
    data = data_folder(tmp_path)
    monkeypatch.setattr(extraction, "footprint", lambda *_, **__: capacity.Footprint(1000, 0))
    monkeypatch.setattr(extraction, "free_memory", lambda device: 4500)
    done = extract(data, code=2)
    assert re.search("^train.py: --batch-size 15 needs about .* machine; what fits: --batch-size 4$", done.stderr)
    assert not list(extract.out().glob("*.blocks"))
    extract(data, "--batch-size", 4)
    monkeypatch.setattr(extraction, "free_memory", lambda device: 1)
    assert "a smaller --input-size" in extract(data, code=2).stderr


def fail(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")


def test_memory_that_ends_all_the_same_is_one_line_with_flags(images, tmp_path, exp, extract, monkeypatch):
    monkeypatch.setattr(train.Trainer, "train_step", fail)
    with pytest.raises(WorkError, match="^out of memory: --batch-size 8 x 2 views of 32 px .*--accumulate"):
        training(exp, images)
    monkeypatch.setattr(extraction, "describe_images", fail)
    data = data_folder(tmp_path / "data")
    assert "out of memory: --batch-size 15" in extract(data, code=1).stderr
    monkeypatch.undo()
    extract(data, "--resume", "auto")


# ---------------------------------------------------------------------------------------------------------------------
# Cores


@pytest.mark.parametrize("files, count", [
    ({}, 8), ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "250000 100000\n"}, 3),
    ({"proc/self/cgroup": "0::/a\n", f"{V2}/cpu.max": "max 100000\n"}, 8),
    ({"proc/self/cgroup": "3:cpu,cpuacct:/a\n", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
      "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 1),
    ({"proc/self/cgroup": "3:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8)])
def test_a_containers_share_of_the_cores_counts(tmp_path, monkeypatch, files, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert machine.count_cores(lay(tmp_path, files)) == count


def test_the_number_of_threads_is_told_and_can_be_fixed(images, exp, capsys):
    before = torch.get_num_threads()
    try:
        training(exp, images, "--threads", 2)
        assert torch.get_num_threads() == 2 and ", 2 threads, 0 loading processes" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)
