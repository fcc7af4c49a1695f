"""train.py --mode train: command line, views, loss and memory, resume. Tiny networks of timm, images drawn here."""
import ast
import csv
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from copydet import augmentations, options
from copydet.augmentations import OPS
from copydet.checkpoints import newest_checkpoint
from copydet.distributed import launch
from copydet.images import list_images, open_image
from copydet.network import build_net, check_arch, gem, read_backbone_weights
from copydet.common import InputError
from copydet.options import build_parser, parse_args
from copydet.views import Preprocessing, Views, parse_ops
from helpers import ROOT, children_of, draw_images, odd_images, run, run_here

TINY = ["-a", "test_efficientnet", "--no-pretrained", "--input-size", 32, "--batch-size", 4, "--memory-size", 24,
        "--epochs", 2, "--neg-margin", 1.0, "--seed", 5, "-j", 1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("photos"), 24)


def checkpoint(exp, name="checkpoint_0001"):
    return torch.load(Path(exp) / "train" / f"{name}.pth.tar", weights_only=True)


def record_of(exp):
    return json.loads((Path(exp) / "train" / "run.json").read_text())


def assert_same_state(a, b):
    assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    assert a["criterion"].keys() == b["criterion"].keys()
    for name, value in a["criterion"].items():
        assert torch.equal(value, b["criterion"][name]) if torch.is_tensor(value) else value == b["criterion"][name]
    for i, state in a["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"])


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def test_help_is_grouped_and_tells_every_flag():
    text = run("train.py", "--help").stdout
    for group in ("what to do", "network", "training data and views", "loss and memory", "optimisation",
                  "checkpoints and log", "extraction", "devices and processes"):
        assert f"\n{group}" in text
    for action in build_parser()._actions:
        assert action.help, action.option_strings


def test_commands_of_the_notes_parse():
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^python train.py (.*?)(?:#.*)?$", readme, re.M)
    assert len(commands) >= 6
    os.chdir(ROOT)
    for command in commands:
        build_parser().parse_args(shlex.split(command))
    first = build_parser().parse_args(shlex.split(commands[0]))
    recipe = build_parser().parse_args(["@exp/v19.args"])
    differs = {name for name, value in vars(first).items() if value != getattr(recipe, name)}
    assert differs == {"exp", "dir", "multiprocessing_distributed", "world_size", "rank"}


@pytest.mark.parametrize("file", [ROOT / "train.py", *sorted((ROOT / "scripts").rglob("*.py"))], ids=lambda f: f.name)
def test_functions_stay_readable(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_every_choice_stands_for_an_entry():
    """What copydet/options.py lists is what the tables hold."""
    from copydet import export, network
    choices = {action.dest: action.choices for action in build_parser()._actions}
    for name, table in (("loss", train.LOSSES), ("miner", train.MINERS), ("optimizer", train.OPTIMIZERS),
                        ("lr_schedule", train.SCHEDULES), ("head", network.HEADS), ("format", export.FORMATS),
                        ("resize", augmentations.RESIZES)):
        assert choices[name] == list(table), name


def test_a_command_line_is_read_only():
    args = parse_args(["--epochs", "3", "x"])
    with pytest.raises(AttributeError, match="read-only"):
        args.epochs = 4
    assert pickle.loads(pickle.dumps(args)).replace(epochs=4).epochs == 4 and args.epochs == 3
    assert "given" not in vars(args) and args.given == {"epochs", "dir"}


@pytest.mark.parametrize("flags, words", [
    (["-a", "no_such_net"], "--arch"), (["-a", "tf_efficientnetv2_sx"], "close: tf_efficientnetv2"),
    (["--ncrops", 1], "--ncrops 1"), (["--memory-size", 4, "--batch-size", 8], "smaller than one batch of 16"),
    (["--memory-size", 10_000_000_000], "GiB"), (["--weight", "absent.pth"], "no such file: absent.pth"),
    (["--resume", "absent.pth"], "no such file: absent.pth"), (["--view1", "crop:0.5=1 sparkle"], "'sparkle'"),
    (["--view1", "[hflip"], "brackets"), (["--lr-schedule", "bogus"], "--lr-schedule"), (["@exp/v99.args"], "v99"),
    (["--multiprocessing-distributed", "--nproc", 3, "--device", "cpu"], "cannot be shared by 3"),
    (["--batch-size", 25], "25 descriptors|do not fill one batch"),
])
def test_wrong_flags_are_told_in_one_line(images, exp, flags, words):
    memory = [] if "--memory-size" in flags else ["--memory-size", 0]
    done = run("train.py", *TINY, *memory, "--exp", exp, *flags, images, code=2)
    assert re.search(words, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1


def test_missing_or_empty_folder(tmp_path, exp):
    assert "no such folder" in run("train.py", *TINY, "--exp", exp, tmp_path / "absent", code=2).stderr
    assert "no images in" in run("train.py", *TINY, "--exp", exp, tmp_path, code=2).stderr
    (tmp_path / "query_images").mkdir()
    said = run("train.py", *TINY, "--exp", exp, tmp_path, code=2).stderr
    assert f"holds query_images, which nobody trains on: give {tmp_path / 'training_images'}" in said


def test_old_timm_names_resolve_and_are_stored(images, exp):
    assert check_arch("swin_base_patch4_window7_224_in22k") == "swin_base_patch4_window7_224.ms_in22k"
    done = run_here("train.py", *TINY, "--exp", exp, "-a", "mobilenetv3_large_100_miil_in21k", "--pool", "backbone",
                    "--epochs", 1, "--epoch-steps", 1, images)
    assert "mobilenetv3_large_100.miil_in21k (asked for: mobilenetv3_large_100_miil_in21k)" in done.stdout
    assert checkpoint(exp, "checkpoint_0000")["arch"] == "mobilenetv3_large_100.miil_in21k"


# ---------------------------------------------------------------------------------------------------------------------
# Images and views


def views_of(images, *flags):
    args = parse_args([*map(str, TINY), *flags, str(images)])
    return Views(images, list_images(images)[0], Preprocessing(args.input_size, "crop", [0.5] * 3, [0.5] * 3),
                 [parse_ops(text, args.op_prob) for text in (args.view0, args.view1)], args.seed)


def test_view_depends_on_seed_epoch_photo_and_number_only(images):
    everything = "[rotation screenshot overlay crop:0.2 jitter:0.4:0.4:0.4:0.1 pixelize shuffle jpeg gray blur " \
                 "perspective hflip vflip text emoji] erase"
    a, b = (views_of(images, "--view1", everything, "--op-prob", "0.7") for _ in range(2))
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = [a[(0, i)][0].to("cpu") for i in range(8)]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert (np.random.get_state()[1] == states[1]).all()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    for i in reversed(range(8)):
        assert torch.equal(b[(0, i)][0].to("cpu"), first[i])
    assert not torch.equal(a[(1, 0)][0].to("cpu"), first[0])
    assert not torch.equal(first[0][0], first[0][1])


def test_recipe_views_never_fail_on_ordinary_photos(images):
    dataset = views_of(images, "--op-prob", "1")
    for i in range(len(dataset)):
        views, label, unreadable, failed = dataset[(0, i)]
        assert views.to("cpu").shape == (2, 3, 32, 32) and label == [i, i] and not unreadable and not failed


def test_operations_do_what_they_say():
    rng = np.random.default_rng(0)
    img = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pixels = np.sort(img.reshape(-1, 3), 0)
    shuffled = [augmentations.shuffle_pixels(img, rng, 0.1) for _ in range(2)]
    assert (np.sort(shuffled[0].reshape(-1, 3), 0) == pixels).all()
    moved = [(s != img).any(-1) for s in shuffled]
    assert 0.05 < moved[0].mean() <= 0.1 and (moved[0] != moved[1]).any()  # AugLy's moves the same pixels each time
    parts = [augmentations.erased_part(64, np.random.default_rng(seed)) for seed in range(200)]
    shares = np.array([noise.shape[1] * noise.shape[2] / 64 ** 2 for *_, noise in parts])
    assert 0.015 < shares.min() < 0.04 and 0.3 < shares.max() < 0.34
    assert all(top + noise.shape[1] <= 64 and left + noise.shape[2] <= 64 for top, left, noise in parts)
    noise = np.concatenate([noise.ravel() for *_, noise in parts])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert parse_ops("crop:0.2=1 [gray text=0.5] jpeg", 0.3) == [
        [("crop", (0.2,), 1.0)], [("gray", (), 0.3), ("text", (), 0.5)], [("jpeg", (), 0.3)]]


def test_bracketed_operations_run_in_another_order_for_each_photo(images, monkeypatch):
    dataset = views_of(images, "--view1", "[hflip=1 vflip=1 gray=1] text=1")
    seen = []
    for name in ("hflip", "vflip", "gray", "text"):
        monkeypatch.setitem(OPS, name, lambda img, rng, v, name=name: seen.append(name) or img)
    orders = []
    for i in range(12):
        seen.clear()
        dataset.view(dataset.open(i)[0], 0, i, 1)
        orders.append(tuple(seen))
    assert len(set(orders)) > 2 and all(order[-1] == "text" for order in orders)


def test_odd_photos_survive_training(tmp_path, exp):
    odd_images(tmp_path)
    done = run_here("train.py", *TINY, "--exp", exp, "--epochs", 1, "--op-prob", 0.8, tmp_path)
    assert "14 found" in done.stdout and "1 unreadable images" in done.stdout
    rows = list(csv.reader(open(Path(exp) / "train" / "skipped.csv")))
    assert rows[1][0] == str(tmp_path / "bomb.png") and "more than 178,956,970 pixels" in rows[1][1]


def test_opened_photos_are_rgb_and_keep_their_values(tmp_path):
    odd_images(tmp_path)
    grey8, grey16 = (np.asarray(open_image(tmp_path / name)) for name in ("grey8.png", "grey16.png"))
    assert (grey8 == grey16).all()
    assert open_image(tmp_path / "turned.JPEG").size == (64, 48)
    assert open_image(tmp_path / "turned.JPEG", exif_transpose=True).size == (48, 64)
    for path in list_images(tmp_path)[0]:
        if path != "bomb.png":
            assert open_image(tmp_path / path).mode == "RGB"
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(open_image(tmp_path / "clear.png")) == 255).all()


def test_views_png_and_args_json_show_the_run(images, exp):
    run_here("train.py", *TINY, "--exp", exp, "--epochs", 1, "--ncrops", 3, images)
    out = Path(exp) / "train"
    assert Image.open(out / "views.png").size == (4 * 34 + 2, 8 * 34 + 2)  # 8 images in rows: itself and 3 views
    assert json.loads((out / "args.json").read_text())["ncrops"] == 3
    log = list(csv.DictReader(open(out / "log.csv")))
    assert log[-1]["step"] == "6" and float(log[-1]["loss"]) > 0 and list(out.glob("events.*"))
    told = record_of(exp)
    assert (told["outcome"], told["settings"]["ncrops"]) == ("done", 3) and "torch" in told["versions"]
    assert told["counts"] == {"images": 24, "epochs": 1, "steps": 6, "skipped": 0, "operations_left_out": 0}
    assert 0 < told["seconds"]["train"] < told["seconds"]["total"]


# ---------------------------------------------------------------------------------------------------------------------
# Network


def network(**changes):
    args = parse_args(["-a", "test_efficientnet", "--no-pretrained", "--input-size", "64", "x"])
    return build_net(args.replace(**changes), False)


def test_gem_and_descriptor_formula():
    x = torch.rand(2, 5, 4, 3) - 0.3
    by_hand = np.power(np.power(np.maximum(x.double().numpy(), 1e-6), 3.0).mean((2, 3)), 1 / 3)
    assert np.allclose(gem(x, 3.0), by_hand, atol=1e-6)
    net = network(gem_p=3.0, gem_eval_p=5.0)
    images = torch.rand(4, 3, 64, 64)
    for training, p in ((True, 3.0), (False, 5.0)):
        net.train(training)
        features = gem(net.backbone(images)[-1], p)
        expected = torch.nn.functional.normalize(net.bn(net.fc(features)))
        assert torch.allclose(net(images), expected, atol=1e-5)
    assert {name.split(".")[0] for name in net.state_dict()} == {"backbone", "fc", "bn"}


def test_channels_last_feature_maps_are_pooled_over_space():
    net = network(arch="test_mambaout", head="none").eval()
    images = torch.rand(2, 3, 64, 64)
    maps = net.backbone(images)[-1]
    assert str(net.backbone.output_fmt).endswith("NHWC") and maps.shape[-1] == net.dim
    expected = torch.nn.functional.normalize(maps.clamp(min=1e-6).pow(4).mean((1, 2)).pow(1 / 4))
    assert torch.allclose(net(images), expected, atol=1e-5)


def test_no_weight_decay_on_vectors_biases_and_gains():
    args = parse_args(["-a", "test_nfnet", "--no-pretrained", "--wd", "0.1", "x"])
    net = build_net(args, False)
    names = {id(p): name for name, p in net.named_parameters()}
    spared, decayed = ([names[id(p)] for p in group["params"]] for group in train.param_groups(net, args))
    assert any(name.endswith("gain") for name in spared) and "fc.weight" in decayed and "bn.weight" in spared
    assert len(spared) + len(decayed) == len(names)
    assert not any(name.endswith(".bias") or "gain" in name for name in decayed)
    groups = train.param_groups(net, args.replace(decay_all=True))
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(len(names), 0.1)]


def test_schedules():
    value = {name: [f(e, e + 0.5, 4) for e in range(4)] for name, f in train.SCHEDULES.items()}
    assert np.allclose(value["cosine"], [1, 0.853553, 0.5, 0.146447], atol=1e-6)
    assert np.allclose(value["cosine-iter"], [0.961940, 0.691342, 0.308658, 0.038060], atol=1e-6)
    assert value["linear"] == [1, 0.75, 0.5, 0.25] and value["constant"] == [1, 1, 1, 1]


def test_local_backbone_weights(tmp_path, images, exp):
    import timm
    from safetensors.torch import save_file
    net = timm.create_model("test_efficientnet")
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    torch.save({f"other.{i}": v for i, v in enumerate(net.state_dict().values())}, tmp_path / "renamed.pth")
    torch.save({k: v for k, v in list(net.state_dict().items())[3:]}, tmp_path / "short.pth")
    for name in ("own.safetensors", "renamed.pth"):
        state = read_backbone_weights(tmp_path / name, "test_efficientnet")
        backbone = build_net(parse_args(["-a", "test_efficientnet", "x"]), state).backbone
        assert torch.equal(backbone.conv_stem.weight, net.conv_stem.weight)
    flags = [flag for flag in TINY if flag != "--no-pretrained"]
    done = run("train.py", *flags, "--exp", exp, "--backbone-weights", tmp_path / "short.pth", images, code=2)
    assert "3 tensors missing" in done.stderr and "conv_stem.weight" in done.stderr
    run_here("train.py", *flags, "--exp", exp, "--epochs", 1, "--backbone-weights", tmp_path / "own.safetensors",
             images)


# ---------------------------------------------------------------------------------------------------------------------
# Runs: the same with any number of workers, any way to start, after any interruption


def test_same_weights_with_any_number_of_workers(images, exp):
    for workers in (0, 1, 3):
        run_here("train.py", *TINY, "-j", workers, "--exp", f"{exp}{workers}", images)
    for workers in (1, 3):
        assert_same_state(checkpoint(f"{exp}0"), checkpoint(f"{exp}{workers}"))


def weights_of_rank(args, data, folder, rank):
    """Train, and write what this rank then has."""
    trainer = train.Trainer(args, data, rank)
    trainer.run()
    torch.save({"net": trainer.net.state_dict(), "memory": trainer.criterion.state_dict()}, f"{folder}/{rank.rank}.pt")


def test_four_ranks_end_with_the_same_weights_and_memory(images, exp, tmp_path):
    args, data = train.prepare_training(parse_args([*map(str, TINY), "--exp", exp, "-j", "0", "--device", "cpu",
        "--batch-norm", "shuffled", "--multiprocessing-distributed", "--nproc", "4", "--dist-url",
        f"tcp://localhost:{20004 + os.getpid() % 20000}", str(images)]))
    with train.training_folder(args):
        launch(weights_of_rank, args, data, str(tmp_path))
    first, *others = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(4)]
    learned = [name for name in first["net"] if "running" not in name]  # each rank has statistics of its own images
    for other in others:
        assert all(torch.equal(first["net"][name], other["net"][name]) for name in learned)
        assert all(torch.equal(first["memory"][name], value) for name, value in other["memory"].items()
                   if torch.is_tensor(value))
    saved = checkpoint(exp)["state_dict"]
    assert all(torch.equal(saved[name], first["net"][name]) for name in saved)


def test_spawned_processes_and_torchrun_train_alike(images, exp):
    port, flags = 20000 + os.getpid() % 20000, [*TINY, "--device", "cpu"]
    run("train.py", *flags, "--exp", f"{exp}a", "--multiprocessing-distributed", "--nproc", 2, "--dist-url",
        f"tcp://localhost:{port}", images)
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py", *flags, "--exp", f"{exp}b",
        images)
    a, b = checkpoint(f"{exp}a"), checkpoint(f"{exp}b")
    assert_same_state(a, b)
    assert a["criterion"]["memories.0._extra_state"]["filled"] and a["processes"] == 2
    done = run_here("train.py", *flags, "--exp", f"{exp}a", "--epochs", 3, "--resume", "auto", images)
    assert "processes 2 -> 1" in done.stdout and "at epoch 2, step 12" in done.stdout
    assert checkpoint(f"{exp}a", "checkpoint_0002")["step"] == 18


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_where_a_rank_is_killed_the_others_end_in_words_and_the_run_goes_on(images, exp):
    """The one that writes; test_extract.py kills another."""
    flags = [*TINY, "--exp", exp, "--device", "cpu", "-j", 0, "-p", 1, "--save-steps", 2,
             "--multiprocessing-distributed", "--nproc", 2, "--dist-url",
             f"tcp://localhost:{20002 + os.getpid() % 20000}"]
    process = subprocess.Popen(list(map(str, [sys.executable, "train.py", *flags, "--epochs", 2000, images])), cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    out = Path(exp) / "train"
    while newest_step(out) < 6 and process.poll() is None:
        time.sleep(0.05)
    ranks = children_of(process.pid, "spawn_main")
    assert len(ranks) == 2, process.communicate(timeout=60)
    os.kill(ranks[0], signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in told, told
    assert "process 0 of 2 was killed (SIGKILL" in told or "has lost the others" in told
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    step = torch.load(newest_checkpoint(out), weights_only=True)["step"]  # whole
    assert step >= 2
    done = run("train.py", *flags, "--epochs", step // 6 + 2, "--resume", "auto", images)
    assert f"step {step}" in done.stdout and "warning" not in done.stdout


def test_killed_at_any_moment_and_resumed_it_ends_the_same(images, exp):
    flags = [*TINY, "--epochs", 10, "--save-steps", 1, "-j", 2]
    run_here("train.py", *flags, "--exp", f"{exp}whole", images)
    out, moments = Path(f"{exp}broken") / "train", np.random.default_rng(3)
    env, kills = {**os.environ, "OMP_NUM_THREADS": "1"}, 0
    while kills < 6:
        process = subprocess.Popen(list(map(str, [sys.executable, "train.py", *flags, "--exp", f"{exp}broken",
                                                  "--resume", "auto", images])), cwd=ROOT, env=env,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        before, deadline = newest_step(out), time.time() + 60
        while newest_step(out) < before + 2 and process.poll() is None and time.time() < deadline:
            time.sleep(0.02)  # past the imports, into the training
        time.sleep(moments.uniform(0, 0.15))
        assert process.poll() is None, "ended before it could be killed: train longer"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        for file in out.glob("*.pth.tar"):
            torch.load(file, weights_only=True)  # whole, or not there
    run("train.py", *flags, "--exp", f"{exp}broken", "--resume", "auto", images)
    assert_same_state(checkpoint(f"{exp}whole", "checkpoint_0009"), checkpoint(f"{exp}broken", "checkpoint_0009"))
    steps = [[row["step"], row["loss"]] for row in csv.DictReader(open(out / "log.csv"))]
    assert len({step for step, _ in steps}) == len(steps)


def newest_step(folder):
    """Number of changes of the log, as a cheap sign of progress."""
    try:
        return len((folder / "log.csv").read_text().splitlines())
    except FileNotFoundError:
        return 0


def test_ctrl_c_leaves_a_checkpoint_that_continues(images, exp):
    flags = list(map(str, [sys.executable, "train.py", *TINY, "--epochs", 200, "-p", 1, "--exp", exp, images]))
    process = subprocess.Popen(flags, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               start_new_session=True)
    out = Path(exp) / "train"
    while newest_step(out) < 4:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loading processes too
    assert "continue with --resume auto" in process.communicate(timeout=60)[0] and process.returncode == 130
    step = checkpoint(exp, "latest")["step"]
    assert record_of(exp)["outcome"] == "stopped" and record_of(exp)["counts"]["steps"] == step
    done = run_here("train.py", *TINY, "--exp", exp, "--epochs", step // 6 + 1, "--resume", "auto", images)
    assert f"step {step}" in done.stdout


def test_nan_loss_stops_with_step_and_checkpoint(images, exp):
    done = run("train.py", *TINY, "--exp", exp, "--lr", 1e30, "--amp", "off", "-p", 1, "--epochs", 3, images, code=1)
    assert re.search(r"the loss is (nan|inf) at step \d+; last checkpoint: ", done.stderr)
    assert "Traceback" not in done.stderr
    assert record_of(exp)["outcome"] == "failed" and record_of(exp)["error"] in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_resume_with_another_network_lists_keys(images, exp):
    run_here("train.py", *TINY, "--exp", exp, "--epochs", 1, images)
    file = Path(exp) / "train" / "checkpoint_0000.pth.tar"
    done = run("train.py", *TINY, "--exp", exp, "-a", "test_resnet", "--resume", file, images, code=2)
    assert "does not fit this network" in done.stderr and "backbone." in done.stderr
    done = run("train.py", *TINY, "--exp", f"{exp}2", "--dim", 64, "--weight", file, images, code=2)
    assert "--dim differs?" in done.stderr and "[256" in done.stderr and "[64" in done.stderr
    done = run_here("train.py", *TINY, "--exp", exp, "--epochs", 2, "--memory-size", 40, "--resume", file, images)
    assert "memory starts empty" in done.stdout
    assert checkpoint(exp)["step"] == 12


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pwned-by-checkpoint",)


def test_published_form_loads_and_code_is_refused(images, exp, tmp_path):
    net = network()
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    legacy = {"epoch": 10, "arch": "test_efficientnet", "state_dict": state, "optimizer": {},
              "args": Namespace(arch="test_efficientnet", input_size=64, gem_p=1.0, gem_eval_p=1.0)}
    torch.save(legacy, tmp_path / "legacy.pth.tar")
    run_here("train.py", *TINY, "--exp", exp, "--epochs", 1, "--lr", 0, "--weight", tmp_path / "legacy.pth.tar", images)
    assert torch.equal(checkpoint(exp, "checkpoint_0000")["state_dict"]["fc.weight"], net.fc.weight)
    for name, content in (("evil.pth", {**legacy, "args": Evil()}), ("odd.pth", {**legacy, "x": Path("a")})):
        torch.save(content, tmp_path / name)
        done = run("train.py", *TINY, "--exp", f"{exp}2", "--weight", tmp_path / name, images, code=2)
        assert "was not loaded: it could run code" in done.stderr
    assert not Path("/tmp/pwned-by-checkpoint").exists()
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "list.pth").write_bytes(pickle.dumps([1, 2]))
    for name in ("text.pth", "list.pth"):
        done = run("train.py", *TINY, "--exp", f"{exp}2", "--weight", tmp_path / name, images, code=2)
        assert "checkpoint" in done.stderr


def test_epochs_follow_each_other_in_one_loader_that_draws_nothing(images, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "ROOT", tmp_path)
    loaders, make_loader = [], train.make_loader

    def counted(*args):
        before = torch.get_rng_state()
        loaders.append(iter(make_loader(*args)))
        assert torch.equal(before, torch.get_rng_state())
        return loaders[-1]
    monkeypatch.setattr(train, "make_loader", counted)
    train.main(parse_args([*map(str, TINY), "--device", "cpu", "--epochs", "3", "--exp", "x", str(images)]))
    assert len(loaders) == 1 and next(loaders[0], None) is None


def test_too_little_shared_memory_is_told_before_the_first_step(images, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "ROOT", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**16, 0, 2**16))
    words = [*map(str, TINY), "--device", "cpu", "--exp", "x", str(images)]
    with pytest.raises(InputError, match="-j 1 with a --batch-size of 4 needs 0.0 GiB"):
        train.main(parse_args(words))
    train.main(parse_args([*words, "-j", "0", "--epochs", "1"]))


# ---------------------------------------------------------------------------------------------------------------------
# Which run, which recipe


def test_a_second_run_does_not_mix_with_the_first(images, exp):
    run_here("train.py", *TINY, "--exp", exp, images)
    done = run("train.py", *TINY, "--exp", exp, "--epochs", 1, images, code=2)
    assert "holds checkpoints of another run" in done.stderr and "--overwrite" in done.stderr
    assert checkpoint(exp)["epoch"] == 2
    run_here("train.py", *TINY, "--exp", exp, "--epochs", 1, "--seed", 6, "--overwrite", images)
    files = sorted(path.name for path in (Path(exp) / "train").glob("*.pth.tar"))
    assert files == ["checkpoint_0000.pth.tar"] and checkpoint(exp, "checkpoint_0000")["args"]["seed"] == 6
    assert newest_checkpoint(Path(exp) / "train").name == "checkpoint_0000.pth.tar"


def test_newest_is_the_checkpoint_written_last(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for time_, name in enumerate(["checkpoint_0009", "checkpoint_0010", "latest"]):
        (tmp_path / f"{name}.pth.tar").touch()
        os.utime(tmp_path / f"{name}.pth.tar", (time_, time_))
        assert newest_checkpoint(tmp_path).name == f"{name}.pth.tar"
    os.utime(tmp_path / "checkpoint_0010.pth.tar", (9, 9))
    assert newest_checkpoint(tmp_path).name == "checkpoint_0010.pth.tar"


def test_the_first_line_says_whose_views_and_schedule_a_run_has(images, exp, tmp_path):
    flags = [*TINY, "--epochs", 1, images]
    done = run_here("train.py", *flags, "--exp", exp)
    assert re.match(r"=> recipe    none: .*v19.*@exp/v31.args", done.stdout)
    recipe = tmp_path / "mine.args"
    recipe.write_text("\ufeff--view1 hflip=0.5  # a byte order mark and a comment\n", encoding="utf-8")
    done = run_here("train.py", f"@{recipe}", *flags, "--exp", f"{exp}2")
    assert done.stdout.startswith(f"=> recipe    {recipe}\n") and checkpoint(f"{exp}2", "checkpoint_0000")[
        "args"]["view1"] == "hflip=0.5"


def test_the_log_holds_the_rate_of_its_steps(images, exp):
    run_here("train.py", *TINY, "--exp", exp, "--lr-schedule", "cosine-iter", "--lr", 0.1, "-p", 1, images)
    logged = [float(row["lr"]) for row in csv.DictReader(open(Path(exp) / "train" / "log.csv"))]
    expected = [0.1 * 0.5 * (1 + np.cos(np.pi * step / 12)) for step in range(12)]
    assert np.allclose(logged, expected, rtol=1e-4)


def test_old_names_do_not_warn_in_any_process(images, exp):
    done = run("train.py", *TINY, "-a", "tf_efficientnet_b0_ns", "--epochs", 1, "--epoch-steps", 1, "--exp", exp,
               "--device", "cpu", "--multiprocessing-distributed", "--nproc", 2, "--dist-url",
               f"tcp://localhost:{20000 + os.getpid() % 20000}", images)
    assert "Mapping deprecated" not in done.stderr and "asked for: tf_efficientnet_b0_ns" in done.stdout
