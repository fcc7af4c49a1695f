#!/usr/bin/env python3
"""Train an image copy-detection descriptor and extract it.

A query photo that was cropped, re-encoded, written on or pasted into another photo has to find its original among a
million references, with one 256-d vector per photo and one threshold for all queries. Training makes two views of every
photo, pulls their descriptors together and pushes those of other photos, remembered from earlier batches, apart.

Train on one device, on all GPUs of this machine, or on several machines (4 GPUs each here):

    python train.py @exp/v31.args input/training_images
    python train.py @exp/v31.args --multiprocessing-distributed input/training_images
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py @exp/v31.args

Continue a run that was stopped at any point, from its newest checkpoint:

    python train.py @exp/v31.args --resume auto input/training_images

Extract descriptors of queries, references and training photos with the newest checkpoint, then score them:

    python train.py --mode extract --exp v31 --target-set qrt input
    python scripts/eval_metrics.py exp/v31/extract/fb-isc-submission.h5 input/public_ground_truth.csv

A recipe (@exp/NAME.args) is a list of flags; flags after it on the command line win. Results go to exp/NAME.
"""
import argparse
import csv
import datetime
import difflib
import hashlib
import json
import logging
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# What an experiment chooses from: one entry per choice. Entries are called late, after the heavy imports below.

LOSSES = {  # name -> loss of pytorch-metric-learning; sees descriptors [batch, dim] against batch or memory
    "contrastive": lambda a: pml.losses.ContrastiveLoss(pos_margin=a.pos_margin, neg_margin=a.neg_margin),
    "triplet": lambda a: pml.losses.TripletMarginLoss(margin=a.margin),
    "snr": lambda a: pml.losses.SignalToNoiseRatioContrastiveLoss(pos_margin=a.pos_margin, neg_margin=a.neg_margin),
    "ntxent": lambda a: pml.losses.NTXentLoss(temperature=a.temperature),
}
MINERS = {  # name -> miner that picks the pairs or triplets that the loss sees; None: all of them
    "none": lambda a: None,
    "triplet": lambda a: pml.miners.TripletMarginMiner(margin=a.margin, type_of_triplets=a.type_of_triplets),
}
HEADS = {  # name -> modules between pooled features [batch, channels] and the L2 normalisation, in order
    "linear-bn": lambda c, d: dict(zip(("fc", "bn"), linear_bn(c, d))),  # notes H-A
    "deep": lambda c, d: {"fc": torch.nn.Sequential(*linear_bn(c, d), torch.nn.ReLU(), *linear_bn(d, d))},  # H-deep
    "linear": lambda c, d: {"fc": torch.nn.Linear(c, d)},  # notes H-nobn
    "none": lambda c, d: {},  # pooled features as they are
}
OPTIMIZERS = {  # name -> optimizer over parameter groups
    "sgd": lambda groups, a: torch.optim.SGD(groups, a.lr, momentum=a.momentum),
    "adamw": lambda groups, a: torch.optim.AdamW(groups, a.lr),
}
SCHEDULES = {  # name -> learning rate factor at (epoch, epoch + share of its steps done, number of epochs)
    "cosine": lambda epoch, now, epochs: 0.5 * (1 + math.cos(math.pi * epoch / epochs)),
    "cosine-iter": lambda epoch, now, epochs: 0.5 * (1 + math.cos(math.pi * now / epochs)),
    "linear": lambda epoch, now, epochs: 1 - epoch / epochs,
    "constant": lambda epoch, now, epochs: 1.0,
}
RESIZES = {  # name -> whole photo to a square tensor's size, for extraction and the `clean` view
    "crop": lambda img, s: TF.center_crop(TF.resize(img, s + 32), [s, s]),  # notes v3..v51
    "square": lambda img, s: TF.resize(img, [s, s]),  # notes v52 and later
}
MODERATE = "crop:0.5=1 hflip=0.5"
HARD = ("screenshot=0.01 crop:0.2=1 jitter:0.4:0.4:0.4:0.1=0.8 pixelize shuffle jpeg=0.5 gray blur perspective "
        "hflip=0.5 vflip text emoji erase")
LETTERS = {"q": "query", "r": "reference", "t": "train"}  # --target-set letter -> group of the descriptor file
FOLDERS = {"query": "query_images", "reference": "reference_images", "train": "training_images"}
FROM_CHECKPOINT = ("arch", "pool", "head", "dim", "gem_p", "gem_eval_p", "input_size", "resize", "exif_transpose")

# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse that reads recipes: flags in @file, any number per line, # starts a comment."""

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def error(self, message):
        fail(message)


def fail(message, code=2):
    """Tell what is wrong in one line on stderr and leave: 2 wrong usage or input, 1 failed while working."""
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


FLAGS = {  # group -> rows of (names and metavar, type or choices or bool, default, help)
    "what to do": [
        ("--mode", ["train", "extract"], "train", "what to do"),
        ("--exp NAME", str, None, "results go to exp/NAME/train and exp/NAME/extract (default: the experiment that "
         "--weight or --resume lies in, else 'default')"),
        ("--seed N", int, None, "seed of weights, order and views (default: drawn and printed)"),
        ("-j --workers N", int, os.cpu_count(), "processes that load photos, shared by the devices of this machine"),
        ("-b --batch-size N", int, 512, "train: photos per step on this machine, over all its devices, each seen "
         "--ncrops times; extract: photos per batch"),
        ("--strict", bool, False, "stop at the first unreadable photo instead of skipping it"),
        ("--exif-transpose", bool, False, "turn photos upright by their EXIF tag, which the notes ignore"),
    ],
    "network (extract mode takes these from the checkpoint unless given)": [
        ("-a --arch NAME", str, "resnet50", "timm model, old names too"),
        ("--pool", ["gem", "backbone"], "gem", "gem: GeM over the last feature map; backbone: the network's own "
         "final norm and pooling, as for Swin in the notes"),
        ("--gem-p P", float, 3.0, "GeM exponent in training"),
        ("--gem-eval-p P", float, 4.0, "GeM exponent in extraction"),
        ("--head", list(HEADS), "linear-bn", "from pooled features to descriptor; none: the pooled features"),
        ("--dim N", int, 256, "descriptor dimensions"),
        ("--input-size PX", int, 224, "side of the network's square input"),
        ("--resize", list(RESIZES), "crop", "whole photo to square; crop: shorter side to PX + 32, centre crop "
         "(notes v3..v51); square: stretch (v52 on)"),
        ("--weight FILE", str, None, "checkpoint to extract with (default: the newest of --exp) or to start training "
         "from; it must fit exactly"),
        ("--backbone-weights FILE", str, None, "timm weights (.pth, .safetensors) to start from instead of a "
         "download; in extract mode: their raw features"),
        ("--no-pretrained", bool, False, "start from random weights"),
    ],
    "training data and views": [
        ("--sample-size N", int, 100_000, "use the first N photos in order of their paths"),
        ("--ncrops N", int, 2, "views per photo"),
        ("--view0 OPS", str, MODERATE, "operations of view 0 in order, each name[:parameter...][=probability]; those "
         "in [brackets] in random order; all names stand in scripts/views.py"),
        ("--view1 OPS", str, HARD, "operations of the other views"),
        ("--op-prob P", float, 0.2, "probability of the operations given without one"),
    ],
    "loss and memory": [
        ("--loss", list(LOSSES), "contrastive", "loss between views of the same and of other photos"),
        ("--pos-margin M", float, 0.0, "contrastive, snr: distance up to which positives are close enough"),
        ("--neg-margin M", float, 0.7, "contrastive, snr: distance from which negatives are far enough"),
        ("-m --margin M", float, 0.05, "triplet: margin"),
        ("--temperature T", float, 0.1, "ntxent: temperature"),
        ("--miner", list(MINERS), "none", "picks the pairs or triplets that the loss sees"),
        ("--type-of-triplets", ["all", "hard", "semihard", "easy"], "all", "triplet miner: which ones"),
        ("--memory-size N", int, 1024, "descriptors of earlier batches that the loss compares with (cross-batch "
         "memory, arXiv 1912.06798); 0: none"),
        ("--world-scaled-loss", bool, False, "multiply the loss by the number of processes, so that gradients do not "
         "shrink with it as in the notes"),
    ],
    "optimisation": [
        ("--epochs N", int, 100, "also the length of the schedule"),
        ("--start-epoch N", int, 0, "first epoch, when not resumed"),
        ("--optimizer", list(OPTIMIZERS), "sgd", "optimizer"),
        ("--lr --learning-rate LR", float, 0.05, "used as given, not scaled by the batch size"),
        ("--lr-schedule", list(SCHEDULES), "cosine", "cosine and linear change per epoch, cosine-iter per step"),
        ("--momentum M", float, 0.9, "SGD"),
        ("--wd --weight-decay W", float, 1e-4, "never on 1-D parameters, biases and gains"),
        ("--batch-norm", ["sync", "local"], "sync", "statistics over all GPUs or each its own; processes without a "
         "GPU always have their own"),
        ("--amp", ["auto", "off", "bf16", "fp16"], "auto", "precision of the backbone; auto: bf16 where the device "
         "computes in it, else fp16 on GPUs and fp32 on CPUs; extraction on a CPU is fp32, head and loss always are"),
    ],
    "checkpoints and log": [
        ("--resume FILE", str, "", "continue from a checkpoint of this script; auto: from the newest of --exp, if any"),
        ("--save-steps N", int, 0, "also write latest.pth.tar every N steps; 0: each epoch only"),
        ("-p --print-freq N", int, 10, "steps between log entries and checks of the loss and of Ctrl-C"),
    ],
    "extraction": [
        ("--target-set LETTERS", str, "qr", "which folders: q queries, r references, t training photos"),
        ("--eval-subset", bool, False, "only the references in --subset-file; writes fb-isc-submission-subset.h5"),
        ("--subset-file FILE", str, None, "one reference id per line, by scripts/select_ref_subset.py (default: "
         "DIR/rids_subset.txt)"),
        ("--dryrun", bool, False, "the first 100 photos of each folder only"),
    ],
    "devices and processes (under torchrun its environment decides)": [
        ("--device", ["auto", "cuda", "mps", "cpu"], "auto", "auto: the best there is"),
        ("--gpu N", int, None, "use this GPU only"),
        ("--multiprocessing-distributed", bool, False, "one process per GPU of this machine; without a GPU --nproc "
         "processes"),
        ("--nproc N", int, None, "number of processes (default: number of GPUs, else 1)"),
        ("--world-size N", int, -1, "number of machines; -1: one"),
        ("--rank N", int, -1, "number of this machine, from 0; -1: 0"),
        ("--dist-url URL", str, "tcp://localhost:10001", "where the processes meet"),
        ("--dist-backend NAME", str, "nccl", "nccl or gloo; always gloo without a GPU"),
    ],
}


def build_parser():
    p = Parser(fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
               allow_abbrev=False)
    p.add_argument("dir", metavar="DIR", nargs="?", help="train: folder of photos, nested or not (default: "
                   "input/training_images); extract: folder that holds query_images, reference_images, training_images "
                   "(default: input)")
    for title, rows in FLAGS.items():
        group = p.add_argument_group(title)
        for names, kind, default, text in rows:
            text += "" if default in (None, "", False) else " (default: %(default)s)"
            if kind is bool:
                group.add_argument(names, action="store_true", help=text)
            elif isinstance(kind, list):
                group.add_argument(names, choices=kind, default=default, help=text)
            else:
                *names, metavar = names.split()
                group.add_argument(*names, metavar=metavar, type=kind, default=default, help=text)
    return p


def parse_args(argv=None):
    """Parse and check what can be checked without torch; `args.given` lists what the user or recipe set."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args.given = list(vars(parser.parse_args(argv)))
    for name in ("batch_size", "epochs", "input_size", "sample_size", "dim", "print_freq"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.workers < 0 or args.memory_size < 0:
        fail("--workers and --memory-size cannot be negative")
    args.dir = Path(args.dir or ("input/training_images" if args.mode == "train" else "input"))
    for flag in ("weight", "backbone_weights", "resume"):
        file = getattr(args, flag)
        if file and file != "auto" and not Path(file).is_file():
            fail(f"--{flag.replace('_', '-')}: no such file: {file}")
    if not args.target_set or set(args.target_set) - set(LETTERS):
        fail(f"--target-set must be letters out of q, r, t, not '{args.target_set}'")
    if args.exp is None:
        file = Path(args.weight if args.mode == "extract" and args.weight else args.resume).resolve()
        args.exp = file.parent.parent.name if file.parent.name == "train" else "default"
    args.out = ROOT / "exp" / args.exp / args.mode
    if args.mode == "train":
        check_training_flags(args)
    return args


def check_training_flags(args):
    if args.ncrops < 2:
        fail(f"--ncrops {args.ncrops}: a photo needs at least 2 views, or there are no positive pairs")
    rows = args.batch_size * args.ncrops * max(1, args.world_size)
    if 0 < args.memory_size < rows:
        fail(f"--memory-size {args.memory_size} is smaller than one batch of {rows} descriptors (--batch-size "
             f"{args.batch_size} x --ncrops {args.ncrops}{f' x {args.world_size} machines' * (args.world_size > 1)})")


ARGS = parse_args() if __name__ == "__main__" else None  # before the imports that take seconds: --help, wrong flags

import numpy as np  # noqa: E402
import pytorch_metric_learning as pml  # noqa: E402
import pytorch_metric_learning.losses  # noqa: E402
import pytorch_metric_learning.miners  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torchvision  # noqa: E402
import torchvision.transforms.functional as TF  # noqa: E402
from timm.models import load_state_dict as load_timm_file  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

sys.path.insert(0, str(ROOT / "scripts"))
from descriptors import Descriptors, InputError, replacing, write_descriptors  # noqa: E402
from photos import PHOTO_ENDINGS, list_photos, write_skipped  # noqa: E402
from views import (EpochBatches, Views, WholePhotos, collate_photos, collate_views, parse_ops,  # noqa: E402
                   write_views_png)

VERSIONS = {module.__name__: str(module.__version__) for module in (torch, torchvision, timm, pml, np)}

# ---------------------------------------------------------------------------------------------------------------------
# Network


def gem(x, p, eps=1e-6):
    """Generalised mean pooling [B, C, H, W] -> [B, C]: (mean of max(x, eps)^p)^(1/p) (arXiv 1711.02512)."""
    return x.clamp(min=eps).pow(p).mean((-2, -1)).pow(1 / p)


def linear_bn(channels, dim):
    return torch.nn.Linear(channels, dim, bias=False), torch.nn.BatchNorm1d(dim)


class Descriptor(torch.nn.Module):
    """Images [B, 3, s, s] -> descriptors [B, dim] of unit length, fp32. State keys: backbone.*, fc.*, bn.*.

    Only the backbone runs under autocast (`amp_dtype`); pooling, head and normalisation stay in fp32.
    """

    def __init__(self, args, pretrained):
        super().__init__()
        self.pool, self.gem_p, self.gem_eval_p, self.amp_dtype = args.pool, args.gem_p, args.gem_eval_p, None
        self.backbone = build_backbone(args, pretrained)
        channels = self.backbone.feature_info.channels()[-1] if args.pool == "gem" else self.backbone.head_hidden_size
        self.channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")
        self.mean, self.std = (list(self.backbone.pretrained_cfg[name]) for name in ("mean", "std"))
        modules = HEADS[args.head](channels, args.dim)
        self.head = list(modules)
        self.dim = args.dim if modules else channels
        for name, module in modules.items():
            self.add_module(name, module)
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)

    def forward(self, images):
        with torch.autocast(images.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            if self.pool == "gem":
                features = features[-1].float()
                features = features.permute(0, 3, 1, 2) if self.channels_last else features
                features = gem(features, self.gem_p if self.training else self.gem_eval_p)
            features = features.float()
            for name in self.head:
                features = getattr(self, name)(features)
            return F.normalize(features)


def build_backbone(args, pretrained):
    """timm network for `args.arch`: feature maps with pool gem, pooled features with pool backbone.

    `pretrained`: True asks the hub, False gives random weights, a state dict of the whole network is loaded.
    """
    kwargs = dict(features_only=True) if args.pool == "gem" else dict(num_classes=0)
    with torch.device("meta"):
        config = timm.create_model(args.arch).pretrained_cfg
    if config.get("fixed_input_size"):
        kwargs["img_size"] = args.input_size
    if isinstance(pretrained, dict):
        kwargs["pretrained_cfg_overlay"] = dict(state_dict=pretrained)
    try:
        return timm.create_model(args.arch, pretrained=bool(pretrained), **kwargs)
    except (RuntimeError, AttributeError) as error:
        fail(f"--arch {args.arch} cannot be built with --pool {args.pool}: {error}")
    except OSError as error:
        fail(f"the weights of {args.arch} cannot be downloaded ({str(error).splitlines()[0]}); give --backbone-weights "
             "FILE, --weight FILE or --no-pretrained")


def check_arch(name):
    """Resolved timm name 'arch.tag' of a possibly old name."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
        fail(f"--arch: timm has no model '{name}'" + (f"; close: {', '.join(close)}" if close else ""))
    with torch.device("meta"):
        config = timm.create_model(name).pretrained_cfg
    return config["architecture"] + (f".{config['tag']}" if config.get("tag") else "")


def read_backbone_weights(file, arch):
    """State dict of a local file under timm's names; weights of another implementation with the same tensors in the
    same order are renamed by position. Whatever does not fit is an error."""
    try:
        given = load_timm_file(file)
    except Exception as error:  # timm and pickle raise many kinds
        fail(f"--backbone-weights {file}: {str(error).splitlines()[0]}")
    with torch.device("meta"):
        net = timm.create_model(arch)
    wanted = net.state_dict()
    classifier = net.pretrained_cfg.get("classifier") or ()
    classifier = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    missing = [name for name in wanted if name not in given and not name.startswith(classifier)]
    if missing and [v.shape for v in given.values()] == [v.shape for v in wanted.values()]:
        print(f"=> {file}: other names, same shapes in the same order as {arch}; matched by position")
        return dict(zip(wanted, given.values()))
    odd = missing or [name for name in wanted if not name.startswith(classifier)
                      and given[name].shape != wanted[name].shape]
    if odd:
        fail(f"--backbone-weights {file} does not fit {arch}: {len(odd)} tensors missing or of another shape, "
             f"first: {', '.join(odd[:3])}")
    return given

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: plain dicts that load without running code


def read_checkpoint(file):
    """Dict of a checkpoint of this script or of the published ISC21 weights; tensors on the CPU.

    Only tensors, plain containers and argparse.Namespace are unpickled; anything else is refused.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
            fail(f"{file} is not a readable checkpoint")
        fail(f"{file} holds an object of type {found[1]} and was not loaded: it could run code; save it again as a "
             "plain dict of tensors")
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        fail(f"{file} is not a readable checkpoint: {(str(error).splitlines() or ['empty'])[0]}")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        fail(f"{file} is not a checkpoint: it has no 'state_dict'")
    state = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    args = checkpoint.get("args") or {}
    return checkpoint | {"state_dict": state, "args": vars(args) if isinstance(args, argparse.Namespace) else args}


def load_weights(net, state, file):
    """Load strictly; say what does not fit."""
    own = net.state_dict()
    shapes = [f"{k} {list(state[k].shape)}, here {list(own[k].shape)}" for k in own
              if k in state and state[k].shape != own[k].shape]
    keys = [f"{k} missing" for k in own if k not in state] + [f"{k} unexpected" for k in state if k not in own]
    if shapes or keys:
        fail(f"{file} does not fit this network ({len(shapes + keys)} differences): {'; '.join((shapes + keys)[:3])}"
             + "; --dim differs?" * any(text.startswith(("fc.", "bn.")) for text in shapes))
    net.load_state_dict(state)


def newest_checkpoint(folder):
    """The checkpoint with most steps done: the last epoch's, or latest.pth.tar where that went further."""
    files = sorted(folder.glob("checkpoint_*.pth.tar"))[-1:] + list(folder.glob("latest.pth.tar"))
    steps_done = lambda file: read_checkpoint(file).get("step", 0)
    return max(files, key=steps_done) if len(files) > 1 else next(iter(files), None)


# ---------------------------------------------------------------------------------------------------------------------
# Devices and processes


def launch(work, args):
    """Run `work(args)` here, in --nproc new processes, or in torchrun's; args.process counts over all machines."""
    args.process, args.processes, args.local = 0, 1, args.gpu or 0
    if "TORCHELASTIC_RUN_ID" in os.environ:
        env = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        args.process, args.processes, args.local = env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]
        return run_process(work, args, "env://", env["LOCAL_WORLD_SIZE"])
    if not args.multiprocessing_distributed:
        return run_process(work, args, None, 1)
    gpus = torch.cuda.device_count() if pick_device(args).type == "cuda" else 0
    nproc = args.nproc or gpus or 1
    if gpus and nproc > gpus:
        fail(f"--nproc {nproc}: this machine has {gpus} GPUs")
    if args.batch_size % nproc:
        fail(f"--batch-size {args.batch_size} cannot be shared by {nproc} processes")
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the processes, which finish their step
    try:
        torch.multiprocessing.spawn(spawned, (work, args, nproc), nprocs=nproc)
    except torch.multiprocessing.ProcessExitedException as error:
        sys.exit(error.exit_code if error.exit_code > 0 else 1)
    finally:
        signal.signal(signal.SIGINT, previous)


def spawned(local, work, args, nproc):
    nodes, node = max(1, args.world_size), max(0, args.rank)
    args.process, args.processes, args.local = node * nproc + local, nodes * nproc, local
    run_process(work, args, args.dist_url, nproc)


def run_process(work, args, url, nproc):
    """Join the process group at `url` (none: single process), set the device, do the work, leave the group."""
    args.nproc = nproc
    device = args.device_used = pick_device(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif nproc > 1:
        torch.set_num_threads(max(1, os.cpu_count() // nproc))  # else they wait for each other's cores
    if url:
        backend = args.dist_backend if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, url, datetime.timedelta(hours=12), args.processes, args.process)
        except (RuntimeError, ValueError) as error:
            fail(f"the processes cannot meet at {url}: {str(error).splitlines()[0]}; is the port in use?", code=1)
    if args.process:
        sys.stdout = open(os.devnull, "w")  # one voice; errors and warnings go to stderr
    try:
        work(args)
    except InputError as error:  # from a loading process it comes with its traceback
        fail(str(error).splitlines()[-1].removeprefix("descriptors.InputError: "))
    finally:
        if url:
            dist.destroy_process_group()


def pick_device(args):
    """cuda (--gpu or the process's own), mps or cpu."""
    kind = args.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and torch.cuda.device_count() <= (args.gpu or 0):
        fail(f"--device cuda --gpu {args.gpu or 0}: {torch.cuda.device_count()} GPUs found")
    return torch.device(kind, getattr(args, "local", args.gpu or 0)) if kind == "cuda" else torch.device(kind)


def pick_precision(args, device):
    """dtype of the backbone's autocast, or None for fp32."""
    if args.amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in
                                          ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if native and args.mode == "train" else None


def loader_options(args):
    """DataLoader settings; forked workers start at once, where a process that was spawned itself would spawn them."""
    workers = math.ceil(args.workers / args.nproc)
    return dict(num_workers=workers, pin_memory=args.device_used.type == "cuda",
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None)


def gather_rows(x):
    """[B, ...] of each process -> [processes * B, ...] in order of rank; the own block keeps its gradient."""
    if not dist.is_initialized():
        return x
    blocks = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(blocks, x.detach().contiguous())
    blocks[dist.get_rank()] = x
    return torch.cat(blocks)


def gather_objects(x):
    """A picklable object of each process -> list in order of rank."""
    objects = [x] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(objects, x)
    return objects


# ---------------------------------------------------------------------------------------------------------------------
# Training


def param_groups(net, weight_decay):
    """Weight decay for matrices and kernels only: none for 1-D parameters, biases and NFNet gains."""
    plain = {name: p for name, p in net.named_parameters() if p.requires_grad}
    spared = {name for name, p in plain.items() if p.ndim <= 1 or name.endswith(".bias") or "gain" in name}
    return [{"params": [p for name, p in plain.items() if name in spared], "weight_decay": 0.0},
            {"params": [p for name, p in plain.items() if name not in spared], "weight_decay": weight_decay}]


class Criterion(torch.nn.Module):
    """Loss of the gathered batch, against the memory where there is one.

    Every process sees all descriptors in order of rank, so all compute the same loss and hold the same memory
    (pytorch-metric-learning's own distributed wrapper puts each rank's block first). Only the own block carries a
    gradient and DDP averages: gradients shrink with the number of processes, as in the notes (--world-scaled-loss).
    """

    def __init__(self, args, dim):
        super().__init__()
        self.scale = args.processes if args.world_scaled_loss else 1
        self.loss, self.miner, self.memory = LOSSES[args.loss](args), MINERS[args.miner](args), None
        if args.memory_size:
            self.memory = pml.losses.CrossBatchMemory(self.loss, dim, args.memory_size, self.miner)

    def forward(self, descriptors, labels):
        """Descriptors [B, dim] and labels [B] of this process -> scalar."""
        descriptors, labels = gather_rows(descriptors), gather_rows(labels)
        if self.memory is not None:
            return self.memory(descriptors, labels) * self.scale
        return self.loss(descriptors, labels, self.miner(descriptors, labels) if self.miner else None) * self.scale

    def memory_state(self):
        """The ring buffer with what the library's state_dict leaves out: its pointer and whether it is full."""
        m = self.memory
        return m and {"embeddings": m.embedding_memory, "labels": m.label_memory, "next": m.queue_idx,
                      "filled": m.has_been_filled}

    def load_memory_state(self, state):
        m = self.memory
        m.embedding_memory, m.label_memory = state["embeddings"], state["labels"]
        m.queue_idx, m.has_been_filled = state["next"], state["filled"]


class Trainer:
    """One process's part of a training run: builds everything, resumes, runs the epochs, writes the checkpoints."""

    def __init__(self, args):
        self.args, self.device = args, args.device_used
        self.amp_dtype = pick_precision(args, self.device)
        self.seed_everything()
        self.build_network()
        self.build_data()
        self.optimizer = OPTIMIZERS[args.optimizer](param_groups(self.net, args.wd), args)
        self.criterion = Criterion(args, self.net.dim).to(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self.epoch, self.step = args.start_epoch, args.start_epoch * self.batches.steps()
        self.skipped, self.failed, self.stop = {}, 0, False

    def seed_everything(self):
        """Agree on a seed; cudnn either repeats itself (seed given) or searches for the fastest kernels."""
        seed = self.args.seed if self.args.seed is not None else int(np.random.SeedSequence().entropy % 2**31)
        self.args.seed = gather_objects(seed)[0]
        torch.manual_seed(self.args.seed)
        torch.backends.cudnn.deterministic = "seed" in self.args.given
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic

    def build_network(self):
        args = self.args
        pretrained = not (args.no_pretrained or args.weight or args.resume_file)
        if args.backbone_weights and pretrained:
            pretrained = read_backbone_weights(args.backbone_weights, args.arch)
        self.net = Descriptor(args, pretrained)
        if args.weight and not args.resume_file:
            load_weights(self.net, read_checkpoint(args.weight)["state_dict"], args.weight)
        self.net.amp_dtype = self.amp_dtype
        self.model = self.net.to(self.device, memory_format=torch.channels_last)
        if args.processes > 1 and args.batch_norm == "sync" and self.device.type == "cuda":
            self.model = self.net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        if dist.is_initialized():
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = torch.nn.parallel.DistributedDataParallel(self.net, device_ids=ids)

    def build_data(self):
        args = self.args
        self.views = Views(args, args.dir, args.photos, RESIZES[args.resize], self.net.mean, self.net.std)
        batch = args.batch_size // args.nproc
        self.batches = EpochBatches(len(self.views), batch, args.seed, args.process, args.processes)
        if not self.batches.steps():
            fail(f"{len(self.views)} photos do not fill one batch of {batch * args.processes}; lower --batch-size")
        self.loader = torch.utils.data.DataLoader(self.views, batch_sampler=self.batches, collate_fn=collate_views,
                                                  persistent_workers=args.workers > 0, **loader_options(args))

    def run(self):
        args = self.args
        if args.resume_file:
            self.resume(args.resume_file)
        if args.process == 0:
            self.describe()
            write_views_png(self.views, args.out / "views.png")
            with replacing(args.out / "args.json") as temporary:
                temporary.write_text(json.dumps(plain_args(args), indent=2) + "\n")
        self.log = Log(args, self.step) if args.process == 0 else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(self, "stop", True))
        while self.epoch < args.epochs:
            self.train_epoch()
        print(f"=> done: {args.out / f'checkpoint_{args.epochs - 1:04d}.pth.tar'}")

    def describe(self):
        args, n, world = self.args, len(self.views), self.args.processes
        print(f"=> network   {args.arch_tag}" + f" (asked for: {args.arch})" * (args.arch_tag != args.arch) +
              f", {sum(p.numel() for p in self.net.parameters()) / 1e6:.1f} M parameters, descriptor {self.net.dim}-d, "
              f"input {args.input_size} px\n"
              f"=> photos    {args.found:,} found in {args.dir}, {n:,} used (--sample-size {args.sample_size:,}); "
              f"{self.batches.steps():,} steps per epoch of {self.batches.batch * world} photos x {args.ncrops} views\n"
              f"=> loss      {args.loss}, memory of {args.memory_size:,} descriptors, about "
              f"{memory_estimate(args, self.net.dim):.2f} GiB for both\n"
              f"=> device    {world} process{'es' * (world > 1)} on {self.device.type}, backbone in "
              f"{str(self.amp_dtype or torch.float32).removeprefix('torch.')}, {args.workers} loading processes, seed "
              f"{args.seed}\n"
              f"=> output    {args.out}", flush=True)

    def learning_rate(self):
        args = self.args
        return args.lr * SCHEDULES[args.lr_schedule](self.epoch, self.step / self.batches.steps(), args.epochs)

    def train_epoch(self):
        """The rest of epoch `self.epoch`, from step `self.step` on; ends with its checkpoint."""
        args, steps = self.args, self.batches.steps()
        self.batches.epoch, self.batches.start = self.epoch, self.step - self.epoch * steps
        self.model.train()
        losses, waited, began = [], 0.0, time.time()
        with tqdm(total=steps, initial=self.batches.start, desc=f"epoch {self.epoch}", unit="step",
                  disable=args.process > 0) as bar:
            batches = iter(self.loader)
            for _ in range(len(self.batches)):
                asked = time.time()
                images, labels, unreadable, failed = next(batches)
                waited += time.time() - asked
                losses.append(self.train_step(images, labels))
                self.step += 1
                self.skipped.update({self.views.paths[i]: reason for i, reason in unreadable})
                self.failed += len(failed)
                last = self.step == (self.epoch + 1) * steps
                save = args.save_steps and self.step % args.save_steps == 0
                if self.step % args.print_freq == 0 or last or save or (self.stop and args.processes == 1):
                    self.check(losses)
                    seconds = time.time() - began
                    seen = len(losses) * self.batches.batch * args.ncrops * args.processes
                    if self.log:
                        self.log.write(bar, self.epoch, self.step, np.mean(losses), self.learning_rate(),
                                       seen / seconds, waited / seconds)
                    losses, waited, began = [], 0.0, time.time()
                    if save and not last:
                        self.save("latest.pth.tar")
                bar.update()
        self.report_skipped()
        self.epoch += 1
        self.save(f"checkpoint_{self.epoch - 1:04d}.pth.tar")

    def train_step(self, images, labels):
        """One optimizer step; returns the loss as a tensor that is not waited for."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        loss = self.criterion(self.model(images), labels.to(self.device, non_blocking=True))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def check(self, losses):
        """Fetch the losses since the last check; stop at NaN, or with a checkpoint when any process was told to."""
        losses[:] = torch.stack(losses).tolist()
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            last = newest_checkpoint(self.args.out)
            fail(f"the loss is {losses[bad[0]]} at step {self.step - len(losses) + bad[0] + 1}; last checkpoint: "
                 f"{last or 'none'}; try a lower --lr or --amp off", code=1)
        if any(gather_objects(self.stop)):
            self.save("latest.pth.tar")
            print(f"\n=> stopped at step {self.step}; continue with --resume auto")
            sys.exit(130)

    def report_skipped(self):
        """Write skipped.csv; more than 1 % unreadable photos are no accident."""
        skipped = {path: reason for part in gather_objects(self.skipped) for path, reason in part.items()}
        if self.args.process == 0:
            write_skipped(self.args.out / "skipped.csv", list(skipped.items()) + self.args.odd)
            if skipped or self.failed:
                print(f"=> {len(skipped)} unreadable photos replaced by others, see {self.args.out / 'skipped.csv'}; "
                      f"{self.failed} operations left out on photos that are too small for them")
        if len(skipped) > max(10, 0.01 * len(self.views)):
            fail(f"{len(skipped)} of {len(self.views)} photos cannot be read, see {self.args.out / 'skipped.csv'}", 1)

    def save(self, name):
        """Write a checkpoint that holds everything to continue bit for bit."""
        rng = gather_objects({"cpu": torch.get_rng_state(),
                              "cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None})
        if self.args.process:
            return
        state = {"epoch": self.epoch, "step": self.step, "steps_per_epoch": self.batches.steps(),
                 "arch": self.args.arch_tag, "state_dict": self.net.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                 "memory": self.criterion.memory_state(), "rng": rng, "args": plain_args(self.args),
                 "photos": len(self.views), "processes": self.args.processes,
                 "preprocess": {"mean": self.net.mean, "std": self.net.std, "input_size": self.args.input_size,
                                "resize": self.args.resize, "exif_transpose": self.args.exif_transpose},
                 "versions": VERSIONS}
        with replacing(self.args.out / name) as temporary:
            torch.save(state, temporary)
        if name != "latest.pth.tar":
            (self.args.out / "latest.pth.tar").unlink(missing_ok=True)

    def resume(self, file):
        """Take up the run of `file`. What changed since is told; an incomplete epoch starts anew if its steps moved."""
        args, state = self.args, read_checkpoint(file)
        if "step" not in state:
            fail(f"--resume {file}: not a checkpoint of this script; start from it with --weight")
        load_weights(self.net, state["state_dict"], file)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        moved = [f"{name} {old} -> {new}" for name, old, new in (
            ("photos", state["photos"], len(self.views)), ("processes", state["processes"], args.processes),
            ("photos per step", state["args"]["batch_size"], args.batch_size)) if old != new]
        if state["steps_per_epoch"] != self.batches.steps() or state["args"]["seed"] != args.seed:
            self.step = self.epoch * self.batches.steps()
            moved += ["an incomplete epoch starts anew"]
        memory, ours = state["memory"], self.criterion.memory_state()
        if memory and ours and memory["embeddings"].shape == ours["embeddings"].shape:
            self.criterion.load_memory_state({k: v.to(self.device) if torch.is_tensor(v) else v
                                              for k, v in memory.items()})
        elif memory or ours:
            moved += ["the memory starts empty (its size changed)"]
        if state["processes"] == args.processes:
            torch.set_rng_state(state["rng"][args.process]["cpu"])
            if self.device.type == "cuda" and state["rng"][args.process]["cuda"] is not None:
                torch.cuda.set_rng_state(state["rng"][args.process]["cuda"])
        if moved:
            print(f"=> warning: not the run that {file} comes from: {'; '.join(moved)}")
        print(f"=> resumed {file} at epoch {self.epoch}, step {self.step}")


class Log:
    """Progress bar, exp/NAME/train/log.csv and TensorBoard; entries after step `start` are from a lost run."""

    COLUMNS = ("epoch", "step", "loss", "lr", "images_per_s", "wait_share")

    def __init__(self, args, start):
        from torch.utils.tensorboard import SummaryWriter
        self.file = args.out / "log.csv"
        lines = self.file.read_text().splitlines()[1:] if start and self.file.is_file() else []
        rows = [row for row in csv.reader(lines) if len(row) == 6 and int(row[1]) <= start]
        with replacing(self.file) as temporary, open(temporary, "w", newline="") as out:
            csv.writer(out).writerows([self.COLUMNS, *rows])
        self.board = SummaryWriter(args.out, purge_step=start + 1)

    def write(self, bar, *values):
        row = dict(zip(self.COLUMNS, values))
        bar.set_postfix_str(f"loss {row['loss']:.4f}, lr {row['lr']:.2g}, {row['images_per_s']:.0f} images/s, waiting "
                            f"for data {row['wait_share']:.0%}", refresh=False)
        with open(self.file, "a", newline="") as out:
            csv.writer(out).writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])
        for name in self.COLUMNS[2:]:
            self.board.add_scalar(name, row[name], row["step"])


def plain_args(args):
    """The command line as plain values: what args.json and checkpoints hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
            if name not in ("photos", "odd", "device_used", "given", "found")}


def memory_estimate(args, dim):
    """GiB of memory and loss, which lists all pairs of batch and memory: about 32 bytes a pair (measured)."""
    rows = args.batch_size // args.nproc * args.processes * args.ncrops
    return max(args.memory_size, rows) * (dim * 4 + rows * 32) / 2**30


def prepare_training(args):
    """What every process needs and only one should do: check the input, list the photos, make the folder."""
    args.arch_tag = check_arch(args.arch)
    for flag in ("view0", "view1"):
        parse_ops(getattr(args, flag), args.op_prob, f"--{flag}")
    if not args.dir.is_dir():
        fail(f"no such folder: {args.dir}")
    photos, args.odd = list_photos(args.dir)
    if not photos:
        fail(f"no photos in {args.dir} ({', '.join(PHOTO_ENDINGS)})")
    args.found, args.photos = len(photos), photos[:args.sample_size]
    args.resume_file = args.resume
    if args.resume == "auto":
        args.resume_file = newest_checkpoint(args.out)
        if not args.resume_file:
            print(f"=> no checkpoint in {args.out} yet, starting from the beginning")
    if args.resume_file and args.seed is None:
        args.seed = read_checkpoint(args.resume_file)["args"].get("seed")
    args.out.mkdir(parents=True, exist_ok=True)


def train(args):
    """Train as the command line says, if memory and loss fit into the device."""
    need, have = memory_estimate(args, args.dim), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if args.device_used.type == "cuda":
        have = torch.cuda.mem_get_info(args.device_used)[0] / 2**30
    if need > have:
        fail(f"--memory-size {args.memory_size} with --batch-size {args.batch_size} needs about {need:,.1f} GiB of "
             f"{have:,.1f} GiB")
    Trainer(args).run()


# ---------------------------------------------------------------------------------------------------------------------
# Extraction


def prepare_extraction(args):
    """Find checkpoint, photos and ids before anything is computed; take what was not given from the checkpoint."""
    file = args.weight or (None if args.backbone_weights or args.no_pretrained else
                           newest_checkpoint(args.out.parent / "train"))
    if not (file or args.backbone_weights or args.no_pretrained):
        fail(f"no checkpoint in {args.out.parent / 'train'}; train --exp {args.exp} first, or give --weight FILE, "
             "--backbone-weights FILE (raw features)")
    args.checkpoint, stored = file, {}
    if file:
        checkpoint = read_checkpoint(file)
        stored = checkpoint["args"] | {"arch": checkpoint.get("arch") or checkpoint["args"].get("arch")}
        args.preprocess = checkpoint.get("preprocess", {})
        args.state = checkpoint["state_dict"]
    for name in FROM_CHECKPOINT:
        if name not in args.given and stored.get(name) is not None:
            setattr(args, name, stored[name])
    args.arch_tag = check_arch(args.arch)
    if not file and "head" not in args.given:
        args.head = "none"
    source = Path(file or args.backbone_weights or os.devnull)
    args.sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    args.groups = {LETTERS[letter]: list_group(args, LETTERS[letter]) for letter in LETTERS
                   if letter in args.target_set}
    args.h5 = args.out / f"fb-isc-submission{'-subset' if args.eval_subset else ''}.h5"
    args.out.mkdir(parents=True, exist_ok=True)


def list_group(args, group):
    """Paths and ids (file stems) of one folder, in order of path, and what only looks like a photo."""
    folder = args.dir / FOLDERS[group]
    if not folder.is_dir():
        fail(f"no such folder: {folder}")
    paths, odd = list_photos(folder)
    seen = {}
    for path in paths:
        if (other := seen.setdefault(Path(path).stem, path)) != path:
            fail(f"{folder}: {other} and {path} have the same id '{Path(path).stem}'")
    if args.eval_subset and group == "reference":
        file = Path(args.subset_file or args.dir / "rids_subset.txt")
        if not file.is_file():
            fail(f"--eval-subset: no such file: {file}; scripts/select_ref_subset.py makes it")
        wanted = file.read_text(encoding="utf-8").split()
        if absent := sorted(set(wanted) - set(seen)):
            fail(f"{file}: {len(absent)} ids without a photo in {folder}, first: {', '.join(absent[:3])}")
        paths = sorted(seen[name] for name in set(wanted))
    paths = paths[:100] if args.dryrun else paths
    if not paths:
        fail(f"no photos in {folder}")
    return {"paths": [str(folder / path) for path in paths], "ids": [Path(path).stem for path in paths],
            "odd": [(str(folder / path), reason) for path, reason in odd]}


def extract(args):
    """Describe all photos, each process every n-th; the first process puts the rows together and writes the file."""
    net = Descriptor(args, read_backbone_weights(args.backbone_weights, args.arch)
                     if args.backbone_weights and not args.checkpoint else False)
    if args.checkpoint:
        load_weights(net, args.state, args.checkpoint)
    net.amp_dtype = pick_precision(args, args.device_used)
    net = net.to(args.device_used, memory_format=torch.channels_last).eval()
    args.preprocess = {"mean": net.mean, "std": net.std} | getattr(args, "preprocess", {})
    print(f"=> network   {args.arch_tag}, {net.dim}-d, input {args.input_size} px ({args.resize}), GeM p "
          f"{args.gem_eval_p:g}, from {args.checkpoint or args.backbone_weights or 'random weights'}")
    groups, skipped = {}, []
    for name, group in args.groups.items():
        rows, indices, bad = merge_parts(args, name, *describe_photos(args, net, name, group["paths"]))
        skipped += [(group["paths"][i], reason) for i, reason in bad] + group["odd"]
        groups[name] = rows, [group["ids"][i] for i in indices]
        if not len(rows) and args.process == 0:
            write_skipped(args.out / "skipped.csv", skipped)
            fail(f"none of the {len(group['paths'])} photos in {args.dir / FOLDERS[name]} can be read, see "
                 f"{args.out / 'skipped.csv'}")
    if args.process == 0:
        write_results(args, groups, skipped)


@torch.inference_mode()
def describe_photos(args, net, name, paths):
    """Descriptors [n, dim] of this process's readable photos, their indices [n] and unreadable ones [(i, reason)]."""
    mine = range(args.process, len(paths), args.processes)
    loader = torch.utils.data.DataLoader(
        WholePhotos(args, paths, RESIZES[args.resize], args.preprocess["mean"], args.preprocess["std"]),
        args.batch_size // args.nproc, sampler=mine, collate_fn=collate_photos, **loader_options(args))
    rows, indices, bad = [torch.empty(0, net.dim)], [], []
    with tqdm(total=len(mine), desc=name, unit="photo", disable=args.process > 0) as bar:
        for good, images, unreadable in loader:
            if unreadable and args.strict:
                fail(f"{paths[unreadable[0][0]]}: {unreadable[0][1]}", 1)
            if good:
                images = images.to(args.device_used, non_blocking=True, memory_format=torch.channels_last)
                rows.append(net(images).float().cpu())
            indices += good
            bad += unreadable
            bar.update(len(good) + len(unreadable))
    return torch.cat(rows).numpy(), np.array(indices, dtype=int), bad


def merge_parts(args, name, rows, indices, bad):
    """Rows of all processes in order of photo, through files in the output folder (shared by all machines)."""
    if args.processes > 1:
        np.save(args.out / f".{name}.{args.process}.npy", rows)
        parts = gather_objects((indices, bad))  # returns once every process has written
        files = [args.out / f".{name}.{process}.npy" for process in range(args.processes)]
        rows = np.concatenate([np.load(file) for file in files]) if args.process == 0 else rows[:0]
        indices, bad = np.concatenate([part[0] for part in parts]), sum((part[1] for part in parts), [])
        gather_objects(None)
        files[args.process].unlink()
    order = np.argsort(indices)
    return (rows[order] if args.process == 0 else rows), indices[order], bad


def write_results(args, groups, skipped):
    """Write the descriptor file and skipped.csv; groups of an earlier run with the same checkpoint stay in the file,
    a file of another checkpoint is kept under a name with that checkpoint's hash. Score it where there is truth."""
    keep = ()
    if args.h5.is_file():
        with Descriptors(args.h5) as old:
            before = str(old.attrs.get("checkpoint_sha256", "unknown"))
            same = all(old.attrs.get(name) == getattr(args, name) for name in ("input_size", "resize", "gem_eval_p"))
            keep = [name for name in old.groups if name not in groups]
        if before != args.sha256 or not same:
            keep = ()
            backup = args.h5.with_name(f"{args.h5.stem}.{before[:8]}.h5")
            os.replace(args.h5, backup)
            print(f"=> kept the earlier file of other settings as {backup}")
    attrs = {name: getattr(args, name) for name in FROM_CHECKPOINT if name != "arch"}
    write_descriptors(args.h5, groups, attrs | {"arch": args.arch_tag, "checkpoint_sha256": args.sha256, "checkpoint":
                      str(args.checkpoint or args.backbone_weights), "versions": VERSIONS}, keep=keep)
    write_skipped(args.out / "skipped.csv", skipped)
    print(f"=> wrote {args.h5}: " + ", ".join(f"{len(rows):,} {name}" for name, (rows, _) in groups.items()) +
          (f"; {len(skipped)} skipped, see {args.out / 'skipped.csv'}" if skipped else ""))
    truth = args.dir / "public_ground_truth.csv"
    if {"query", "reference"} <= set(groups) and truth.is_file() and not args.dryrun:
        sys.stdout.flush()
        if subprocess.run([sys.executable, ROOT / "scripts" / "eval_metrics.py", args.h5, truth]).returncode:
            fail(f"scripts/eval_metrics.py failed on {args.h5}", 1)


def main(args):
    warnings.filterwarnings("ignore", "Mapping deprecated model name")  # the resolved name is printed
    logging.getLogger("timm").setLevel(logging.ERROR)  # tells that features_only leaves out the classifier
    prepare, work = (prepare_training, train) if args.mode == "train" else (prepare_extraction, extract)
    try:
        prepare(args)
    except InputError as error:
        fail(error)
    launch(work, args)


if __name__ == "__main__":
    main(ARGS)
