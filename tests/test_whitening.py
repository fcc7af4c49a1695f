"""Pooling of feature maps, the head's start, whitening at the end, frozen parts; and train.py with all of them."""
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train
from copydet import load_descriptor
from copydet.common import InputError, run_main
from copydet.export import write_onnx, write_torchscript
from copydet.network import build_net, centre_crops, folded_grid
from copydet.options import parse_args
from copydet.whitening import learned_whitening, set_head
from helpers import draw_images, run, run_here


def settings(**changes):
    return parse_args(["-a", "test_efficientnet", "--pool", "grid", "--stages", "1,2", "--dim", "8", "--input-size",
                       "32"]).replace(**changes)


def network(**changes):
    torch.manual_seed(0)
    return build_net(settings(**changes), pretrained=False)


def images(n=6):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("h, w, n", [(5, 4, 1), (8, 8, 3), (10, 7, 5), (6, 6, 4)])
def test_cells_of_a_folded_grid_are_means_over_the_cells_that_flips_exchange(h, w, n):
    x = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(0))
    bounds = lambda size: [(i * size // n, -(-(i + 1) * size // n)) for i in range(n)]
    cell = lambda i, j: x[:, :, slice(*bounds(h)[i]), slice(*bounds(w)[j])].mean((-2, -1))
    m = (n + 1) // 2
    wanted = torch.stack([sum(cell(p, q) for p in (i, n - 1 - i) for q in (j, n - 1 - j)) / 4
                          for i in range(m) for j in range(m)], -1)
    found = folded_grid(x, n)
    assert torch.allclose(found, wanted.flatten(1), atol=1e-5)
    for sides in ([-1], [-2], [-1, -2]):
        assert torch.allclose(folded_grid(x.flip(sides), n), found, atol=1e-5)


def test_pooled_cells_are_standardised_and_each_map_has_unit_length():
    net = network().eval()
    rows = torch.cat(net.features(images(40)), 1)
    a, b = net.fit_standard(rows[:20], rows[20:])
    widths = [norm.num_features for norm in net.standard]
    assert len(widths) == 2 and torch.allclose(net.pooled(images(40)), torch.cat([a, b]), atol=1e-5)
    for norm, part, raw in zip(net.standard, torch.cat([a, b]).split(widths, 1), rows.split(widths, 1)):
        assert torch.allclose(part.norm(dim=1), torch.ones(40), atol=1e-5)
        assert torch.allclose(norm(raw).mean(0), torch.zeros(len(raw[0])), atol=1e-4)


def test_crops_are_centred_and_seen_at_the_size_of_the_smallest():
    x = torch.arange(40.).expand(1, 3, 40, 40)
    whole, half, part = centre_crops(x, (1, 0.5, 0.75))
    assert whole.shape == half.shape == part.shape == (1, 3, 20, 20)
    assert torch.equal(half, x[..., 10:30, 10:30])
    assert torch.allclose(whole[0, 0, 5, 1:-1], torch.arange(2.5, 38, 2), atol=1e-4)
    assert part.mean() == pytest.approx(19.5, abs=0.01) and 5 < part.min() < 6 and 33 < part.max() < 34
    assert torch.equal(centre_crops(x, (1,))[0], x)


def test_conv_gem_pools_a_convolution_of_each_map():
    net, x = network(pool="conv-gem", width=7, gem_eval_p=2.5).eval(), images()
    assert [tuple(part.shape) for part in net.features(x)] == [(6, 7)] * 2 and net.fc.in_features == 14
    for conv, x, found in zip(net.convs, net.maps(x), net.features(x)):
        maps = torch.einsum("oc,bchw->bohw", conv[0].weight[..., 0, 0], x) / (1 + conv[1].eps) ** 0.5
        expected = maps.clamp(min=1e-6).pow(2.5).mean((-2, -1)).pow(1 / 2.5)
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("pool", ["grid", "conv-gem", "gem", "backbone"])
def test_extraction_averages_the_features_of_crops(pool):
    net, x = network(pool=pool, eval_crops="1,0.5").eval(), images()
    whole = F.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    views = whole, x[..., 8:24, 8:24]
    for i, found in enumerate(net.eval_features(x)):
        assert torch.allclose(found, torch.stack([net.features(view)[i] for view in views]).mean(0), atol=1e-5)
    net.train()
    assert net(x).shape == (6, 8)


def test_crops_are_part_of_the_exported_graph(tmp_path):
    net, x = network(eval_crops="1,0.5").eval(), images()
    wanted = net(x).detach().numpy()
    write_torchscript(net, {"input_size": 32}, tmp_path / "net.pt")
    assert np.allclose(torch.jit.load(tmp_path / "net.pt")(x).detach().numpy(), wanted, atol=1e-5)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    write_onnx(net, {"input_size": 32}, tmp_path / "net.onnx")
    rows, = onnxruntime.InferenceSession(str(tmp_path / "net.onnx")).run(None, {"images": x.numpy()})
    assert np.allclose(rows, wanted, atol=1e-4)


def test_layers_after_the_last_stage_are_left_out():
    count = lambda stages: sum(p.numel() for p in network(stages=stages).backbone.parameters())
    assert count("0,1") < count("1,2") < count("1,4")


def test_learned_whitening_shrinks_what_differs_between_views():
    rng = np.random.default_rng(0)
    signal, nuisance = rng.standard_normal((500, 6)), 5 * rng.standard_normal((2, 500, 3))
    mix, noise = rng.standard_normal((9, 9)), 0.05 * rng.standard_normal((2, 500, 6))
    a, b = (torch.from_numpy(np.hstack([signal + noise[i], nuisance[i]]) @ mix) for i in range(2))
    same = lambda x, y: float(F.cosine_similarity(x, y).mean())
    mean, projection = learned_whitening(a, b, 6, shrinkage=0.001)
    plain_mean = torch.cat([a, b]).mean(0)
    plain = torch.pca_lowrank(torch.cat([a, b]), 6)[2]
    assert same((a - mean) @ projection, (b - mean) @ projection) > 0.95
    assert same((a - plain_mean) @ plain, (b - plain_mean) @ plain) < 0.7
    full = learned_whitening(a, b, 9, shrinkage=0)[1]
    within = full.T @ (a - b).T @ (a - b) @ full / len(a)
    assert torch.allclose(within, torch.eye(9, dtype=within.dtype), atol=1e-6)


def test_the_head_is_the_whitening():
    net, generator = network().eval(), torch.Generator().manual_seed(2)
    a = torch.randn(200, net.fc.in_features, generator=generator)
    b = a + 0.1 * torch.randn(a.shape, generator=generator)
    set_head(net, a, b)
    mean, matrix = learned_whitening(a, b, 8)
    wanted = F.normalize((a.double() - mean) @ matrix)
    assert torch.allclose(F.normalize(net.bn(net.fc(a))).double(), wanted, atol=1e-4)
    net.train()
    trained = F.normalize(net.bn(net.fc(torch.cat([a, b]))))[:200].double()  # with the batch's own statistics
    assert F.cosine_similarity(trained, wanted).min() > 0.99


def test_frozen_batch_norm_and_frozen_stages():
    net = network(batch_norm="frozen")
    train.freeze_stages(net.backbone, 1)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    net.train()
    net(images()).square().sum().backward()
    moved = {name for name, x in net.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    learning = {name for name, p in net.backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    frozen = {name for name, p in net.backbone.named_parameters() if not p.requires_grad}
    assert frozen and learning and not frozen & learning
    assert any(name.startswith("conv_stem") for name in frozen)
    with pytest.raises(InputError, match="--freeze 9"):
        train.freeze_stages(net.backbone, 9)


def test_train_whitened_and_calibrated_then_extract(tmp_path):
    """The laptop's recipe at a small scale, in two processes and in one: what the checkpoint carries is in the file."""
    images = draw_images(tmp_path / "input" / "training_images", 60)
    draw_images(tmp_path / "input" / "query_images", 5, name="Q{}.jpg")
    draw_images(tmp_path / "input" / "reference_images", 40, name="R{}.jpg")
    words = ["train.py", "-a", "test_efficientnet", "--no-pretrained", "--pool", "conv-gem", "--width", 24,
             "--stages", "1,2", "--dim", 16, "--input-size", 32, "--eval-input-size", 48, "--resize", "square",
             "--loss", "ntxent", "--memory-size", 64, "--batch-size", 8, "--epochs", 1, "--optimizer", "adamw", "--lr",
             1e-3, "--freeze", 1, "--batch-norm", "frozen", "--whiten", 40,
             "--calibrate", 20, "--eval-crops", "1,0.5", "--grid", 3, "--seed", 3, "-j", 1, "--device", "cpu", images]
    weights, last = {}, Path("train", "checkpoint_0000.pth.tar")
    for name, more in (("one", []), ("two", ["--multiprocessing-distributed", "--nproc", 2, "--dist-url",
                                             "tcp://localhost:10077"])):
        launch = run if more else run_here
        launch(*words, *more, "--exp", tmp_path / name)
        state = torch.load(tmp_path / name / last, weights_only=True)
        weights[name] = state["state_dict"]
        assert state["whitened"] and sorted(state["calibration"]) == [
            "copies_ratio", "false_rate", "photos", "recall", "scores"]
        out = launch(*words, *more, "--exp", tmp_path / name, "--epochs", 2, "--resume", tmp_path / name / last).stdout
        assert "40 used" in out and "had ended with --whiten" in out
    assert weights["one"].keys() == weights["two"].keys()
    extracted = {}
    for more in ([], ["--target-set", "t"], ["--input-size", 64], ["--target-set", "q", "--resize", "crop"],
                 ["--target-set", "q"]):
        if more == ["--target-set", "q"]:
            (tmp_path / "one" / "extract" / "fb-isc-submission.h5").unlink()
        run_here("train.py", "--mode", "extract", "--weight", tmp_path / "one" / last, "--exp", tmp_path / "one", "-j",
                 0, "--device", "cpu", "--target-set", "qr", *more, tmp_path / "input")
        with h5py.File(tmp_path / "one" / "extract" / "fb-isc-submission.h5") as file:
            extracted[" ".join(map(str, more))] = dict(file.attrs)
            rows = file["query"][:]
            assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        if not more:
            queries = sorted((tmp_path / "input" / "query_images").iterdir())
            assert np.allclose(load_descriptor(tmp_path / "one" / last)(queries), rows, atol=1e-5)
            run_here("train.py", "--mode", "export", "--weight", tmp_path / "one" / last, "--format", "safetensors",
                     "-o", tmp_path / "net.safetensors")
            assert np.allclose(load_descriptor(tmp_path / "net.safetensors")(queries), rows, atol=1e-5)
    assert extracted[""]["input_size"] == 48 and extracted["--input-size 64"]["input_size"] == 64
    calibrations = {more: json.loads(attrs.get("calibration", "{}")) for more, attrs in extracted.items()}
    assert {more: found.get("photos") for more, found in calibrations.items()} == {
        "": "references", "--target-set t": "references", "--input-size 64": "references",
        "--target-set q": "training",
        "--target-set q --resize crop": None}  # the checkpoint's was measured on squares
    assert calibrations[""] != calibrations["--input-size 64"] and calibrations[""]["copies_ratio"] == 0.2


@pytest.mark.parametrize("flags, message", [
    (["--pool", "grid", "--stages", "2,x"], "--stages 2,x"), (["--pool", "grid", "--stages", "9"], "--pool grid"),
    (["--head", "deep", "--whiten", 10], "--head deep"), (["--calibrate", 30], "--calibrate 30"),
    (["--freeze", 9], "--freeze 9"),
    (["--eval-crops", "1,2"], "--eval-crops 1,2"),
    (["-a", "test_vit", "--eval-crops", "0.5"], "images of one size"), (["--grid", 0], "--grid"),
    (["--pool", "conv-gem", "--width", 0], "--width")])
def test_what_does_not_fit_is_told_in_one_line(flags, message, tmp_path, capsys):
    images = draw_images(tmp_path / "photos", 40)
    words = ["-a", "test_efficientnet", "--no-pretrained", "--input-size", 32, "--batch-size", 4, "-j", 0, "--device",
             "cpu", "--exp", tmp_path / "exp", *flags, images]
    try:
        code = run_main(lambda: train.main(parse_args(words)))
    except SystemExit as left:
        code = left.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
