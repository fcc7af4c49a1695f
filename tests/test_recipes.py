"""Every recipe runs: two training steps and an extraction with a tiny network; it differs from its parent as noted, and
has the property that its note names. Properties of losses alone (v10 .. v15, v21, v60, v61) stand in test_losses.py."""
import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import train
from copydet import augmentations, losses, options
from copydet.augmentations import OPS, RESIZES
from copydet.batches import collate_images, collate_views
from copydet.common import InputError
from copydet.distributed import Rank, pick_precision
from copydet.network import build_net
from copydet.options import build_parser, parse_args
from copydet.views import NEGATIVE_LABEL, Pairs, Preprocessing, Views, WholeImages, parse_ops
from helpers import ROOT, draw_images

RECIPES = sorted(path.stem for path in (ROOT / "exp").glob("*.args"))
PARENTS = {  # recipe -> its parent and the flags that its note changes (besides --exp)
    "v2": ("v1", "view1 epochs"),
    "v3": ("v2", "head pred-dim fix-pred-lr decay-all loss scale margin input-size ncrops view1 epochs batch-size lr "
                 "wd"),
    "v4": ("v3", "grow-epochs grow-to sample-size epochs"),
    "v5": ("v4", "grow-epochs grow-to scale loss miner ncrops sample-size view0 view1 epochs lr"),
    "v6": ("v5", "miner type-of-triplets"), "v7": ("v5", "loss margin pos-margin neg-margin"),
    "v8": ("v7", "pos-margin view0 view1 op-prob"),
    "v9": ("v8", "view1 neg-margin gem-eval-p epochs sample-size"),
    "v10": ("v9", "memory-size input-size epochs sample-size"), "v11": ("v10", "miner memory-size"),
    "v12": ("v10", "memory-enqueue"), "v13": ("v12", "miner"),
    "v14": ("v10", "loss temperature pos-margin neg-margin"),
    "v15": ("v10", "loss neg-margin"), "v16": ("v10", "head"), "v17": ("v10", "head"), "v18": ("v10", "arch lr"),
    "v19": ("v18", "amp batch-size memory-size epochs"), "v19m": ("v19", "arch sample-size"),
    "v20": ("v19", "batch-norm arch memory-size epochs batch-size gem-eval-p"),
    "v21": ("v20", "batch-norm arch batch-size memory-size epochs gem-eval-p"),
    "v22": ("v19", "view0 sample-size"), "v23": ("v19m", "weight input-size lr view0 op-prob seed"),
    "v24": ("v19", "dim neg-margin"), "v25": ("v19", "arch pool gem-p gem-eval-p neg-margin lr batch-size input-size"),
    "v26": ("v19", "view1 op-prob neg-margin"), "v27": ("v19", "lr wd neg-margin"), "v28": ("v27", "lr-schedule"),
    "v29": ("v27", "view1"), "v30": ("v29", "view1"), "v31": ("v30", "lr-schedule arch lr sample-size"),
    "v32": ("v31", "view1"),
    "v33": ("v31", "arch pool gem-p gem-eval-p input-size optimizer momentum lr wd batch-size sample-size"),
    "v34": ("v31", "arch"), "v35": ("v31", "arch batch-size"),
    "v36": ("v31", "weight input-size lr batch-size view0 op-prob seed"),
    "v42": ("v31", "arch gem-p gem-eval-p sample-size"), "v45": ("v42", "view1 op-prob"), "v49": ("v45", "arch view0"),
    "v52": ("v49", "resize view1"), "v55": ("v52", "view1"), "v58": ("v55", "arch sample-size memory-size view1"),
    "v60": ("v58", "loss margin temperature pos-margin neg-margin arch sample-size memory-size batch-size"),
    "v61": ("v58", "memory-enqueue arch memory-size"), "v68": ("v58", "weight input-size view1 seed"),
    "v69": ("v68", "lr"), "v72": ("v69", "weight input-size lr view1 seed"), "v79": ("v58", "view1 seed"),
    "v83": ("v79", "lr-schedule epochs"), "v84": ("v83", "weight input-size lr epochs view1 seed"),
    "v85": ("v84", "weight input-size lr epochs view1 seed"), "v86": ("v84", "lr"),
    "v98": ("v85", "weight lr lr-schedule epochs batch-size seed negatives negatives-dir"),
    "v101": ("v98", "weight pairs view0 view1 op-prob neg-margin memory-size epochs seed"),
    "v102": ("v101", "negatives batch-size"), "v103": ("v102", "negatives batch-size"),
    "v104": ("v103", "negatives lr"), "v105": ("v104", "lr"), "v106": ("v105", "lr"), "v107": ("v106", "lr"),
    "default": ("laptop", "input-size eval-input-size epochs view1"),
    "grid": ("laptop", "pool width grid gem-p gem-eval-p eval-crops view1 memory-size epochs lr whiten"),
    "best": ("laptop", "arch input-size eval-input-size memory-size epochs batch-size lr whiten calibrate freeze"),
}

COMPLETE = set(
    "exp arch pool gem-p gem-eval-p stages grid width head dim pred-dim input-size resize sample-size ncrops view0 "
    "view1 op-prob loss margin scale temperature pos-margin neg-margin miner type-of-triplets memory-size epochs "
    "batch-size optimizer lr momentum wd lr-schedule batch-norm amp seed".split())
MATTERS = {  # flag -> given a recipe's arguments, whether it has an effect; flags that are not here always have one
    ("gem-p", "gem-eval-p"): lambda a: a.pool in ("gem", "conv-gem"),
    ("stages",): lambda a: a.pool in ("grid", "conv-gem"),
    ("grid",): lambda a: a.pool == "grid",
    ("width",): lambda a: a.pool == "conv-gem",
    ("pred-dim", "fix-pred-lr", "extract-from"): lambda a: a.head == "simsiam",
    ("view1",): lambda a: len(views_in_use(a)) > 1,
    ("op-prob",): lambda a: any(parse_ops(ops, 0.1) != parse_ops(ops, 0.9) for ops in views_in_use(a)),
    ("grow-to",): lambda a: a.grow_epochs > 0,
    ("negatives-dir",): lambda a: a.negatives > 0,
    ("margin",): lambda a: a.loss in ("triplet", "arcface", "ntxent-margin"),
    ("scale",): lambda a: a.loss == "arcface",
    ("temperature",): lambda a: a.loss in ("ntxent", "ntxent-margin"),
    ("pos-margin", "neg-margin"): lambda a: a.loss in ("contrastive", "snr"),
    ("miner",): lambda a: a.loss not in ("arcface", "simsiam"),
    ("type-of-triplets",): lambda a: a.miner == "triplet",
    ("memory-enqueue",): lambda a: a.memory_size > 0,
    ("momentum",): lambda a: a.optimizer == "sgd",
}
BACKBONES = {
    "nfnet": "dm_nfnet_f0", "swin": "swin_base_patch4_window7_224_in22k",
    **{size.upper(): f"tf_efficientnetv2_{size}_in21k" for size in "sml"},
    **{f"{size.upper()}-ft": f"tf_efficientnetv2_{size}_in21ft1k" for size in "sm"},
}
FIGURES = {  # recipe -> figures of the winner's own command (v1 to v3: rate x batch / 256); "-": none, or no effect
    #    arch px  photos  epochs batch lr  wd   margins memory gem-p, in extraction  seed  checkpoint it continues
    "v1": "nfnet 224 1000000 20 128 0.025 1e-4 - - 0 3 4 - -",
    "v2": "nfnet 224 1000000 5 128 0.025 1e-4 - - 0 3 4 - -",
    "v3": "nfnet 320 1000000 10 64 0.0025 1e-5 - - 0 3 4 - -",
    "v5": "nfnet 320 100000 1 64 0.01 1e-5 - - 0 3 4 - -",
    "v6": "nfnet 320 100000 1 64 0.01 1e-5 - - 0 3 4 - -",
    "v7": "nfnet 320 100000 1 64 0.01 1e-5 0.2 0.7 0 3 4 - -",
    "v8": "nfnet 320 100000 1 64 0.01 1e-5 0 0.7 0 3 4 - -",
    "v9": "nfnet 320 1000000 5 64 0.01 1e-5 0 1.1 0 3 5 - -",
    "v10": "nfnet 256 100000 1 64 0.01 1e-5 0 1.1 4096 3 5 - -",
    "v18": "S 256 100000 1 64 0.1 1e-5 0 1.1 4096 3 5 7 -",
    "v19": "S 256 100000 5 128 0.1 1e-5 0 1.1 10000 3 5 7 -",
    "v19m": "M 256 1000000 5 128 0.1 1e-5 0 1.1 10000 3 5 7 -",
    "v20": "M 256 100000 1 64 0.1 1e-5 0 1.1 4096 3 6 7 -",
    "v21": "S 256 100000 5 256 0.1 1e-5 0 1.1 10000 3 5 7 -",
    "v22": "S 256 1000000 5 128 0.1 1e-5 0 1.1 10000 3 5 7 -",
    "v23": "M 448 1000000 5 128 0.01 1e-5 0 1.1 10000 3 5 77 v19m/4",
    "v24": "S 256 100000 5 128 0.1 1e-5 0 1.0 10000 3 5 7 -",
    "v25": "swin 224 100000 5 64 0.001 1e-5 0 1.0 10000 - - 7 -",
    "v26": "S 256 100000 5 128 0.1 1e-5 0 1.0 10000 3 5 7 -",
    "v27": "S 256 100000 5 128 0.35 1e-6 0 1.0 10000 3 5 7 -",
    "v31": "L 256 1000000 5 128 0.1 1e-6 0 1.0 10000 3 5 7 -",
    "v33": "swin 224 100000 5 64 3e-4 1e-2 0 1.0 10000 - - 7 -",
    "v34": "M 256 1000000 5 128 0.1 1e-6 0 1.0 10000 3 5 7 -",
    "v35": "S 256 1000000 5 64 0.1 1e-6 0 1.0 10000 3 5 7 -",
    "v36": "L 384 1000000 5 96 0.01 1e-6 0 1.0 10000 3 5 77 v31/4",
    "v42": "S 256 100000 5 128 0.1 1e-6 0 1.0 10000 1 1 7 -",
    "v45": "S 256 100000 5 128 0.1 1e-6 0 1.0 10000 1 1 7 -",
    "v49": "S-ft 256 100000 5 128 0.1 1e-6 0 1.0 10000 1 1 7 -",
    "v52": "S-ft 256 100000 5 128 0.1 1e-6 0 1.0 10000 1 1 7 -",
    "v55": "S-ft 256 100000 5 128 0.1 1e-6 0 1.0 10000 1 1 7 -",
    "v58": "M-ft 256 1000000 5 128 0.1 1e-6 0 1.0 20000 1 1 7 -",
    "v60": "S-ft 256 100000 5 64 0.1 1e-6 - - 10000 1 1 7 -",
    "v61": "S-ft 256 1000000 5 128 0.1 1e-6 0 1.0 10000 1 1 7 -",
    "v68": "M-ft 384 1000000 5 128 0.1 1e-6 0 1.0 20000 1 1 77 v58/4",
    "v69": "M-ft 384 1000000 5 128 0.05 1e-6 0 1.0 20000 1 1 77 v58/4",
    "v72": "M-ft 512 1000000 5 128 0.025 1e-6 0 1.0 20000 1 1 777 v69/4",
    "v79": "M-ft 256 1000000 5 128 0.1 1e-6 0 1.0 20000 1 1 9 -",
    "v83": "M-ft 256 1000000 - 128 0.1 1e-6 0 1.0 20000 1 1 9 -",
    "v84": "M-ft 384 1000000 7 128 0.02 1e-6 0 1.0 20000 1 1 99 v83/5",
    "v85": "M-ft 512 1000000 5 128 0.004 1e-6 0 1.0 20000 1 1 777 v84/6",
    "v86": "M-ft 384 1000000 7 128 0.1 1e-6 0 1.0 20000 1 1 99 v83/5",
    "v98": "M-ft 512 1000000 3 64 0.1 1e-6 0 1.0 20000 1 1 999 v86/5",
    "v101": "M-ft 512 1000000 10 64 0.1 1e-6 0 1.1 1000 1 1 99999 v98/1",
    "v102": "M-ft 512 1000000 10 32 0.1 1e-6 0 1.1 1000 1 1 99999 v98/1",
    "v103": "M-ft 512 1000000 10 16 0.1 1e-6 0 1.1 1000 1 1 99999 v98/1",
    "v104": "M-ft 512 1000000 10 16 0.2 1e-6 0 1.1 1000 1 1 99999 v98/1",
    "v105": "M-ft 512 1000000 10 16 0.3 1e-6 0 1.1 1000 1 1 99999 v98/1",
    "v106": "M-ft 512 1000000 10 16 0.4 1e-6 0 1.1 1000 1 1 99999 v98/1",
    "v107": "M-ft 512 1000000 10 16 0.5 1e-6 0 1.1 1000 1 1 99999 v98/1",
}


def flags_of(name):
    lines = (ROOT / "exp" / f"{name}.args").read_text().splitlines()
    return dict(re.match(r"--(\S+)\s*(.*)", line).groups() for line in lines if line.startswith("--"))


def views_in_use(args):
    """Operations of the views that a recipe makes; more than training may look at edited copies."""
    edited = args.ncrops > 1 or args.whiten or args.calibrate or args.pool == "grid"
    return [args.view0, args.view1][:2 if edited else 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """input/ as DISC21 lays it out, with generated images."""
    root = tmp_path_factory.mktemp("input")
    draw_images(root / "training_images", 8)
    draw_images(root / "query_images", 8, name="Q{:05d}.jpg")
    draw_images(root / "reference_images", 40, name="R{:06d}.jpg")
    pairs = [f"Q{i:05d},R{i:06d}" if i < 4 else f"Q{i:05d}," for i in range(8)]
    (root / "public_ground_truth.csv").write_text("\n".join(["query_id,reference_id", *pairs]) + "\n")
    return root


@pytest.mark.parametrize("name", PARENTS)
def test_a_recipe_changes_what_its_note_says(name):
    parent, changed = PARENTS[name]
    old, new = flags_of(parent), flags_of(name)
    assert {flag for flag in old.keys() | new.keys() if old.get(flag) != new.get(flag)} == {"exp", *changed.split()}


@pytest.mark.parametrize("name", FIGURES)
def test_a_recipe_has_the_figures_of_the_winners_command(name):
    columns = ("input-size sample-size epochs batch-size lr wd pos-margin neg-margin memory-size gem-p gem-eval-p "
               "seed").split()
    arch, *figures, start = FIGURES[name].split()
    flags = flags_of(name)
    assert flags["arch"] == BACKBONES[arch]
    for flag, figure in zip(columns, figures, strict=True):
        assert figure == "-" or float(flags[flag]) == float(figure), flag
    folder, _, epoch = start.partition("/")
    assert flags.get("weight") == (f"exp/{folder}/train/checkpoint_{int(epoch):04d}.pth.tar" if epoch else None)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete_and_holds_nothing_without_effect(name):
    args = build_parser().parse_args([f"@{ROOT}/exp/{name}.args"])
    flags, inert = set(flags_of(name)), {flag for group in MATTERS if not MATTERS[group](args) for flag in group}
    assert not flags & inert and not COMPLETE - inert - flags
    assert args.exp == name
    for pipeline in (args.view0, args.view1):
        assert all(op in OPS for group in parse_ops(pipeline, args.op_prob) for op, _, _ in group)


def test_every_recipe_but_the_first_ones_has_a_parent():
    assert set(RECIPES) - set(PARENTS) == {"v1", "laptop"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_extracts(name, data, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0))  # the evaluation
    recipe, flags = (ROOT / "exp" / f"{name}.args").read_text(), flags_of(name)
    recipe = re.sub(r"(?m)^--weight .*", "", recipe).replace(" input/", f" {data}/")
    (tmp_path / "recipe.args").write_text(recipe)
    small = ["-a", "test_mambaout" if flags["pool"] == "backbone" else "test_efficientnet", "--no-pretrained",
             "--input-size", 32, "--batch-size", 4, "--epochs", 2, "--epoch-steps", 1, "--device", "cpu", "-j", 0]
    small += ["--memory-size", 160] if flags["memory-size"] != "0" else []
    small += ["--sample-size", 4, "--grow-epochs", 1] if "grow-epochs" in flags else []
    small += ["--whiten", 4, "--calibrate", 0] if "whiten" in flags else []
    folder = data if "pairs" in flags else data / "training_images"
    train.main(parse_args([f"@{tmp_path}/recipe.args", *map(str, small), str(folder)]))
    assert (tmp_path / "exp" / name / "train" / "checkpoint_0001.pth.tar").is_file()
    train.main(parse_args(["--mode", "extract", "--exp", name, "-j", "0", "--device", "cpu", str(data)]))
    with h5py.File(tmp_path / "exp" / name / "extract" / "fb-isc-submission.h5") as file:
        assert file["query"].shape == (8, int(flags["dim"]))
        norms = np.linalg.norm(file["reference"][()], axis=1)
        assert file.attrs.get("contaminated") == ("public_ground_truth.csv" if "pairs" in flags else None)
    assert np.allclose(norms, 1, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What sets a recipe apart


TINY = ["-a", "test_efficientnet", "--no-pretrained", "--input-size", "32", "--batch-size", "4", "--device", "cpu",
        "-j", "0"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def args_of(name, folder="x", *flags):
    """Parsed recipe with a tiny network; without --weight and --pairs, whose files a test does not have."""
    lines = (ROOT / "exp" / f"{name}.args").read_text().splitlines()
    words = [word for line in lines if not line.startswith(("#", "--weight", "--pairs"))
             for word in shlex.split(line)]
    return parse_args([*words, *TINY, *map(str, flags), str(folder)])


def net_of(name, *flags):
    args = args_of(name, "x", *flags)
    return build_net(args, False), args


def views_of(name, data, *flags):
    args = args_of(name, data / "training_images", "--seed", 1, *flags)
    negatives = [str(path) for path in sorted((data / "reference_images").iterdir())]
    paths = sorted(path.name for path in (data / "training_images").iterdir())
    return Views(data / "training_images", paths, Preprocessing(args.input_size, args.resize, [0.5] * 3, [0.5] * 3),
                 [parse_ops(text, args.op_prob) for text in (args.view0, args.view1)], args.seed, args.negatives,
                 negatives)


def applied(name, data, monkeypatch, epochs=20, number=1):
    """Operations that were applied to each view `number`: a list of lists of names."""
    dataset, seen = views_of(name, data), []
    with monkeypatch.context() as patched:
        for op in OPS:
            patched.setitem(OPS, op, lambda img, rng, v, *parameters, op=op: seen[-1].append(op) or img)
        for epoch in range(epochs):
            for i in range(len(dataset)):
                seen.append([])
                dataset.view(dataset.open(i)[0], epoch, i, number)
    return seen


def rates(name, steps=10, epochs=5):
    """Learning rate at each step of a run."""
    args = args_of(name, "x", "--epochs", epochs)
    return [train.learning_rate(args, epoch, step / steps) / args.lr for epoch in range(epochs)
            for step in range(steps)]


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_simsiam_projects_predicts_and_keeps_the_predictors_rate(name):
    net, args = net_of(name)
    net = losses.Objective(net, losses.SimSiamLoss(), 2, False)
    fixed = [group["fixed"] for group in train.param_groups(net, args)]
    assert fixed == [False, True] and {group["weight_decay"] for group in train.param_groups(net, args)} == {1e-4}
    assert len(train.param_groups(net, args)[1]["params"]) == len(list(net.net.predictor.parameters())) == 5
    images = torch.rand(8, 3, 32, 32)
    net.net.eval()
    z = net.net.projector(net.net.pooled(images))
    p = net.net.predictor(z)
    for which, expected in (("proj", z), ("pred", p), ("proj+pred", z + p)):
        net.net.extract_from = which
        assert torch.allclose(net.net(images), torch.nn.functional.normalize(expected), atol=1e-6)
    net.train()
    together = net(images, None)  # each view has batch statistics of its own
    apart = losses.SimSiamLoss()([net.net(images[:4]), net.net(images[4:])], None)
    mixed = losses.SimSiamLoss()([[x[:4] for x in net.net(images)], [x[4:] for x in net.net(images)]], None)
    assert torch.allclose(together, apart, atol=1e-5) and not torch.allclose(together, mixed, atol=1e-3)


def test_v2_leaves_one_view_clean(data):
    dataset = views_of("v2", data)
    item = [dataset[(epoch, 0)][0].pixels for epoch in (0, 1)]
    assert torch.equal(item[0][1], item[1][1]) and not torch.equal(item[0][0], item[1][0])


def run_recipe(name, tmp_path, folder, *flags):
    """Train a recipe in this process, below `tmp_path`; returns its output folder."""
    recipe = (ROOT / "exp" / f"{name}.args").read_text()
    (tmp_path / f"{name}.args").write_text(re.sub(r"(?m)^--(weight|pairs) .*", "", recipe))
    args = parse_args([f"@{tmp_path}/{name}.args", *TINY, *map(str, flags), str(folder)])
    args = args.replace(exp=str(tmp_path / "exp" / args.exp))  # spawned processes too write there
    train.main(args)
    return args.out


def load(file):
    return torch.load(file, weights_only=True)


def class_vectors(net, folder, classes):
    """What the class vectors of the first images are to start as: the network's output for the clean image."""
    paths = sorted(str(path) for path in folder.iterdir())[:classes]
    whole = WholeImages(paths, Preprocessing.of(args_of("v3", folder), net))
    with torch.no_grad():
        return net.eval().embed(collate_images([whole[i] for i in range(classes)])[0][0][1].to("cpu")).T


def test_v3_classes_start_as_their_photos_on_any_number_of_processes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "ROOT", tmp_path)
    torch.manual_seed(7)
    expected = class_vectors(build_net(args_of("v3"), False), data / "training_images", 8)
    assert expected.std(1).min() > 1e-4  # images differ
    port = ["--dist-url", f"tcp://localhost:{20000 + os.getpid() % 20000}"]
    for exp, flags in (("one", []), ("two", ["--multiprocessing-distributed", "--nproc", 2, *port])):
        out = run_recipe("v3", tmp_path, data / "training_images", "--epochs", 1, "--lr", 0, "--exp", exp, *flags)
        checkpoint = load(out / "checkpoint_0000.pth.tar")
        assert checkpoint["processes"] == (2 if flags else 1)
        assert torch.allclose(checkpoint["criterion"]["W"], expected, atol=1e-5)


def test_v4_doubles_to_a_million_and_halves_whole_batches():
    args, data = args_of("v4", "x", "--batch-size", 64), train.Data(range(2_000_000), 2_000_000)
    stages = [data.sample_of_epoch(args, epoch, 1) for epoch in range(22)]
    assert [count for count, _ in stages[::2]] == [1000 * 2 ** i for i in range(10)] + [1_000_000]
    assert stages[::2] == stages[1::2] and [batch for _, batch in stages[::2]] == [64] * 7 + [32, 16, 8, 4]


def test_v4_keeps_photos_labels_and_weights_when_it_grows_and_resumes(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(options, "ROOT", tmp_path)
    grown, init_classes = [], train.Trainer.init_classes

    def record(trainer):
        init_classes(trainer)
        state = {name: value.clone() for name, value in trainer.net.state_dict().items()}
        grown.append((trainer.views.paths, state, trainer.criterion.W.data.clone(), trainer.optimizer.state_dict()))

    monkeypatch.setattr(train.Trainer, "init_classes", record)
    folder = data / "training_images"
    flags = ["--sample-size", 2, "--grow-epochs", 1, "--grow-to", 8, "--epochs", 3, "--batch-size", 2]
    whole = run_recipe("v4", tmp_path, folder, *flags, "--exp", "whole", "--save-steps", 1)
    names = sorted(path.name for path in folder.iterdir())
    assert [paths for paths, *_ in grown] == [names[:2], names[:4], names[:8]]
    for epoch, (paths, state, classes, optimizer) in enumerate(grown):
        net = build_net(args_of("v4"), False)
        net.load_state_dict(state)
        assert torch.allclose(classes, class_vectors(net, folder, len(paths)), rtol=1e-3,
                              atol=1e-4 * float(classes.abs().max()))
        assert not optimizer["state"]  # momentum starts anew
        if epoch:
            before = load(whole / f"checkpoint_{epoch - 1:04d}.pth.tar")
            assert all(torch.equal(value, state[name]) for name, value in before["state_dict"].items())
            assert before["criterion"]["W"].shape[1] == len(paths) // 2
    for epoch in (0, 1):  # resumed where it grows
        part = tmp_path / "exp" / f"part{epoch}" / "train"
        part.mkdir(parents=True)
        shutil.copy(whole / f"checkpoint_{epoch:04d}.pth.tar", part)
        run_recipe("v4", tmp_path, folder, *flags, "--exp", f"part{epoch}", "--resume", "auto")
        assert "warning" not in capsys.readouterr().out
        a, b = load(whole / "checkpoint_0002.pth.tar"), load(part / "checkpoint_0002.pth.tar")
        assert all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())
        assert torch.equal(a["criterion"]["W"], b["criterion"]["W"]) and a["step"] == b["step"] == 1 + 2 + 4


@pytest.mark.parametrize("name", ["v5", "v6"])
def test_v5_takes_all_triplets_and_v6_semihard_ones(name):
    ours = train.build_criterion(args_of(name, "x", "--dim", 8), 0, Rank())
    x, labels = torch.nn.functional.normalize(torch.randn(12, 8) + 1), torch.arange(6).repeat(2)
    distance, mined, all_of_them = torch.cdist(x, x), [], []
    for a, p, n in itertools.permutations(range(12), 3):
        if labels[a] == labels[p] and labels[a] != labels[n]:
            margin = 0.1 - (distance[a, n] - distance[a, p])
            all_of_them.append(margin.relu())
            if 0 <= margin < 0.1:  # the negative is farther than the positive, by less than the margin
                mined.append(margin)
    terms = torch.stack(mined if name == "v6" else all_of_them)
    assert 0 < len(mined) < len(all_of_them)
    assert abs(ours(x, labels) - terms[terms > 0].mean()) < 1e-5


def test_v7_compares_all_rows_of_the_batch():
    ours = train.build_criterion(args_of("v7", "x", "--dim", 8), 0, Rank())
    x, labels = torch.nn.functional.normalize(torch.randn(12, 8) + 1), torch.arange(6).repeat(2)
    distance, same = torch.cdist(x, x), labels[:, None] == labels
    terms = (distance[same & ~torch.eye(12, dtype=bool)] - 0.2).relu(), (0.7 - distance[~same]).relu()
    assert abs(ours(x, labels) - sum(part[part > 0].mean() for part in terms)) < 1e-4


def test_v8_and_v9_operations(data, monkeypatch):
    v8, v9 = (Counter(op for view in applied(name, data, monkeypatch) for op in view) for name in ("v8", "v9"))
    assert v8.keys() - v9.keys() == {"saturation", "brightness"}
    shares = {"crop": 1, "jitter": 0.8, "jpeg": 0.5, "hflip": 0.5, "blur": 0.2, "text": 0.2, "erase": 0.2, "vflip": 0.2}
    for op, share in shares.items():  # of 160 views
        assert abs(v9[op] / 160 - share) < 4 * math.sqrt(share * (1 - share) / 160) + 1e-9, op


@pytest.mark.parametrize("name, layers", [
    ("v10", "fc.weight bn.weight bn.bias"), ("v16", "fc.weight fc.bias"),
    ("v17", "fc.0.weight fc.1.weight fc.1.bias fc.3.weight fc.4.weight fc.4.bias")])
def test_heads(name, layers):
    net, _ = net_of(name)
    assert [key for key, _ in net.named_parameters() if not key.startswith("backbone")] == layers.split()
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    assert len(norms) == {"v10": 1, "v16": 0, "v17": 2}[name]


def test_v18_normalises_as_the_backbone_was_trained():
    for arch in ("tf_efficientnetv2_s_in21k", "dm_nfnet_f0"):
        config = timm.create_model(arch, features_only=True).pretrained_cfg
        args = args_of("v18", "x", "-a", arch)
        assert build_net(args, False).mean == list(config["mean"])
    assert tuple(config["mean"]) != (0.5, 0.5, 0.5)


def test_v19_computes_in_half_precision_where_there_is_one():
    cuda = torch.device("cuda")
    with pytest.MonkeyPatch.context() as patch:
        for bf16, expected in ((True, torch.bfloat16), (False, torch.float16)):
            patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
            assert pick_precision(args_of("v18"), cuda) is None
            assert pick_precision(args_of("v19"), cuda) == expected
    assert pick_precision(args_of("v19"), torch.device("cpu")) is None


def test_v20_and_v21_keep_batch_statistics_to_the_process():
    for name, expected in (("v19", True), ("v20", False), ("v21", False)):
        args = args_of(name)
        assert train.synchronised(args, Rank(world_size=2, device=torch.device("cuda"))) is expected
        assert not train.synchronised(args, Rank(world_size=2))


def test_v22_makes_both_views_alike(data, monkeypatch):
    for name, alike in (("v19", False), ("v22", True)):
        first, other = (Counter(sum(applied(name, data, monkeypatch, number=number), [])) for number in (0, 1))
        assert (first.keys() == other.keys()) is alike


def test_v24_memory_and_descriptors_have_512_dimensions():
    net, args = net_of("v24", "--memory-size", 64)
    criterion = train.build_criterion(args, 0, Rank())
    assert net(torch.rand(8, 3, 32, 32)).shape == (8, 512) and criterion.memories[0].embedding_memory.shape == (64, 512)


@pytest.mark.parametrize("name", ["v25", "v33"])
def test_swin_pools_by_its_own_norm_and_mean(name):
    net, _ = net_of(name, "-a", "test_mambaout")
    images = torch.rand(8, 3, 32, 32)
    net.eval()
    features = net.backbone.forward_head(net.backbone.forward_features(images), pre_logits=True)
    assert torch.allclose(net(images), torch.nn.functional.normalize(net.bn(net.fc(features))), atol=1e-5)


def test_v26_probabilities(data, monkeypatch):
    v26 = views_of("v26", data).pipelines[1]
    v19 = views_of("v19", data).pipelines[1]
    old, new = ({name: prob for group in pipeline for name, _, prob in group} for pipeline in (v19, v26))
    assert {name for name in new if new[name] != old[name]} == {
        "pixelize", "shuffle", "jpeg", "gray", "blur", "perspective", "vflip", "text", "emoji", "erase"}
    assert all(new[name] == 0.3 for name in new if new[name] != old[name])


def test_rate_at_every_step():
    cosine = [0.5 * (1 + math.cos(math.pi * i / 50)) for i in range(50)]
    expected = {"v27": cosine[::10], "v28": cosine, "v31": [1 - e / 5 for e in range(5)], "v83": [1.0] * 5}
    for name, values in expected.items():
        assert np.allclose(rates(name), values if len(values) == 50 else np.repeat(values, 10), atol=1e-12), name


def test_v29_shuffles_the_operations_of_each_photo_and_v30_rotates_first(data, monkeypatch):
    for name, orders in (("v27", 1), ("v29", 2), ("v30", 2)):
        seen = applied(name, data, monkeypatch)
        assert {view[-1] for view in seen if "erase" in view} == {"erase"}
        found = {tuple(op for op in view if op in ("jitter", "hflip")) for view in seen}
        assert len(found - {("jitter",), ("hflip",), ()}) == orders
        assert {view.index("rotation") for view in seen if "rotation" in view} == ({0} if name == "v30" else set())
        assert all(view.index("crop") < min(map(view.index, set(view) - {"crop", "rotation", "screenshot"}), default=99)
                   for view in seen)


def test_v32_pastes_one_photo_in_ten_onto_another(data, monkeypatch):
    seen = applied("v32", data, monkeypatch, epochs=50)
    share = np.mean(["overlay" in view for view in seen])
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / len(seen))
    assert all(view.index("overlay") < view.index("crop") for view in seen if "overlay" in view)
    monkeypatch.undo()
    calls, dataset = [], views_of("v32", data)
    monkeypatch.setattr(augmentations.imaugs, "overlay_image", lambda img, **kwargs: calls.append(kwargs) or img)
    for i in range(200):
        OPS["overlay"](dataset.open(0)[0].pixels, np.random.default_rng(i), dataset)
    for key, low, high in (("overlay_size", 0.1, 0.5), ("x_pos", 0, 0.5), ("y_pos", 0, 0.5)):
        values = [call[key] for call in calls]
        assert low <= min(values) < low + 0.05 and high - 0.05 < max(values) <= high


def test_v33_trains_with_adamw():
    net, args = net_of("v33", "-a", "test_mambaout")
    optimizer = train.OPTIMIZERS[args.optimizer](train.param_groups(net, args), args)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 1e-2]


@pytest.mark.parametrize("name", [name for name in RECIPES if "weight" in flags_of(name)])
def test_continuations_start_from_a_checkpoint_that_the_parent_writes(name):
    folder, file = Path(flags_of(name)["weight"]).parts[1], Path(flags_of(name)["weight"]).name
    parent = flags_of(folder)
    assert int(file.split("_")[1].split(".")[0]) < int(parent["epochs"])
    assert (parent["arch"], parent["dim"], parent["head"]) == tuple(flags_of(name)[k] for k in ("arch", "dim", "head"))


def test_v42_pools_by_the_mean():
    net, _ = net_of("v42")
    images = torch.rand(8, 3, 32, 32)
    for training in (True, False):
        net.train(training)
        assert torch.allclose(net.pooled(images), net.backbone(images)[-1].clamp(min=1e-6).mean((2, 3)), atol=1e-5)


def test_v52_describes_the_whole_photo():
    wide = Image.new("RGB", (320, 64), "black")
    wide.paste("white", (0, 0, 32, 64))  # a border that the centre crop cuts off
    for name, seen in (("v49", False), ("v52", True)):
        assert bool(np.asarray(RESIZES[args_of(name).resize](wide, 32)).any()) is seen


def test_v98_negatives_are_references_with_labels_of_their_own(data):
    dataset = views_of("v98", data)
    images, labels, _, _ = collate_views([dataset[(epoch, i)] for epoch in (0, 1) for i in range(4)])
    images = images.to("cpu")
    labels = labels.reshape(4, 8)  # view 0, view 1, two negatives
    assert images.shape == (32, 3, 32, 32) and labels[0].tolist() == labels[1].tolist() == [0, 1, 2, 3] * 2
    negatives = labels[2:].flatten().tolist()
    assert min(negatives) >= NEGATIVE_LABEL and (labels[2] != labels[3]).all() and len(set(negatives)) > 8
    expected = Image.open(dataset.negative_images[negatives[0] - NEGATIVE_LABEL]).resize((32, 32), Image.BILINEAR)
    assert np.abs((images[16].numpy() + 1) * 127.5 - np.asarray(expected).transpose(2, 0, 1)).max() < 2
    ours = train.build_criterion(args_of("v98", "x", "--dim", 8, "--memory-size", 64), 0, Rank())
    x = torch.nn.functional.normalize(torch.randn(32, 8)).requires_grad_()
    ours(x, labels.flatten()).backward()
    assert (x.grad[16:].abs().sum(1) > 0).any()  # pushed away


def test_v101_trains_on_pairs_and_is_marked(data, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "ROOT", tmp_path)
    seen, make = [], Pairs.__getitem__
    monkeypatch.setattr(Pairs, "__getitem__", lambda self, key: seen.append((self, key)) or make(self, key))
    negatives = ["--negatives-dir", data / "reference_images", "--memory-size", 64]
    out = run_recipe("v101", tmp_path, data, "--pairs", data / "public_ground_truth.csv", *negatives, "--epochs", 1)
    dataset = seen[0][0]
    assert dataset.paths == [(f"query_images/Q{i:05d}.jpg", f"reference_images/R{i:06d}.jpg") for i in range(4)]
    assert sorted(Path(path).stem for path in dataset.negative_images) == [f"R{i:06d}" for i in range(4, 40)]
    images, labels, _, _ = dataset[(0, 2)]
    for view, path in zip(images.to("cpu"), dataset.paths[2]):  # whole images, unedited
        expected = np.asarray(Image.open(data / path).resize((32, 32), Image.BILINEAR)).transpose(2, 0, 1) / 255
        mean, std = (np.array(x)[:, None, None] for x in (dataset.preprocessing.mean, dataset.preprocessing.std))
        assert np.abs(view.numpy() * std + mean - expected).max() < 0.01
    assert labels[:2] == [2, 2] and len(labels) == 4
    file = out / "checkpoint_0000.pth.tar"
    assert load(file)["contaminated"] == "public_ground_truth.csv"
    after = run_recipe("v98", tmp_path, data / "training_images", "--weight", file, *negatives, "--epochs", 1)
    assert load(after / "checkpoint_0000.pth.tar")["contaminated"] == "public_ground_truth.csv"  # handed on
    after = run_recipe("v98", tmp_path, data / "training_images", "--resume", "auto", *negatives, "--epochs", 2)
    assert load(after / "checkpoint_0001.pth.tar")["contaminated"] == "public_ground_truth.csv"


@pytest.mark.parametrize("flags, words", [
    (["--pairs", "absent.csv"], "--pairs: no such file"), (["--negatives", "2"], "--negatives-dir"),
    (["--loss", "simsiam"], "simsiam needs both"), (["--loss", "arcface", "--memory-size", "64"], "has no memory"),
    (["--memory-enqueue", "view0", "--memory-size", "0"], "needs a --memory-size"),
])
def test_flags_that_do_not_go_together(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--batch-size", "4", *flags, "x"])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_pairs_without_photos_are_named(data, tmp_path):
    (tmp_path / "gt.csv").write_text("query_id,reference_id\nQ00001,R000001\nQ00009,R000002\n")
    args = parse_args([*TINY, "--pairs", str(tmp_path / "gt.csv"), str(data)])
    with pytest.raises(InputError, match="1 ids without an image.*Q00009"):
        train.main(args)
