"""Fixtures that several test files share. Results go to temporary folders, never to exp/ of the checkout."""
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # as many tests as cores run at once: more threads only wait for each other

import pytest
import torch

from copydet.network import build_net
from copydet.options import parse_args
from helpers import run, run_here


@pytest.fixture
def exp(tmp_path_factory):
    """Experiment of its own for --exp: results go to a folder that this path begins."""
    return str(tmp_path_factory.mktemp("exp") / "run")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Checkpoint of an untrained network, as training writes it."""
    folder = tmp_path_factory.mktemp("weights")
    args = parse_args(["-a", "test_efficientnet", "--input-size", "32", "--gem-eval-p", "5", "x"])
    torch.manual_seed(0)
    net = build_net(args, False)
    torch.save({"state_dict": net.state_dict(), "arch": "test_efficientnet.r160_in1k", "args": args.plain(),
                "preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3}}, folder / "net.pth.tar")
    return folder / "net.pth.tar"


@pytest.fixture
def extract(exp, weights):
    """Run extraction with `weights`, in this process unless `apart` or with several: extract(data, flags...);
    extract.out() is its folder."""
    def call(data, *flags, code=0, suffix="", apart=False):
        words = ["train.py", "--mode", "extract", "-j", 0, "--batch-size", 15, "--exp", exp + suffix, "--weight",
                 weights, *flags, data]
        return run(*words, code=code) if apart or "--nproc" in flags else run_here(*words, code=code)
    call.out = lambda suffix="": Path(exp + suffix) / "extract"
    return call
