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
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on CPUs, idle threads leave their cores to the loading processes
ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))
from cli import Parser, fail  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# What an experiment chooses from: one entry per choice. Entries are called late, after the heavy imports below.

LOSSES = {  # name -> criterion for `n` photos: (outputs of the network, labels) -> scalar; see scripts/losses.py
    "contrastive": lambda a, n: pairs(a, ContrastiveLoss(a.pos_margin, a.neg_margin)),
    "triplet": lambda a, n: pairs(a, pml.losses.TripletMarginLoss(margin=a.margin)),
    "snr": lambda a, n: pairs(a, ContrastiveLoss(a.pos_margin, a.neg_margin, distance=SNRDistance())),
    "ntxent": lambda a, n: pairs(a, NTXentLoss(a.temperature)),
    "ntxent-margin": lambda a, n: pairs(a, NTXentLoss(a.temperature, a.margin)),
    "arcface": lambda a, n: ArcFaceLoss(n, a.dim, a.margin, a.scale),
    "simsiam": lambda a, n: SimSiamLoss(),
}
MINERS = {  # name -> miner that picks the pairs or triplets that the loss sees; None: all of them
    "none": lambda a: None,
    "triplet": lambda a: pml.miners.TripletMarginMiner(margin=a.margin, type_of_triplets=a.type_of_triplets),
    "bipartite": lambda a: None,  # of the pairs between view 0 and the other views
}
HEADS = {  # name -> modules between pooled features [batch, channels] and the L2 normalisation, in order
    "linear-bn": lambda c, a: dict(zip(("fc", "bn"), linear_bn(c, a.dim))),  # notes H-A
    "deep": lambda c, a: {"fc": torch.nn.Sequential(*linear_bn(c, a.dim), torch.nn.ReLU(), *linear_bn(a.dim, a.dim))},
    "linear": lambda c, a: {"fc": torch.nn.Linear(c, a.dim)},  # notes H-nobn
    "simsiam": lambda c, a: {"projector": projector(c, a.dim), "predictor": predictor(a.dim, a.pred_dim)},
    "none": lambda c, a: {},  # pooled features as they are
}
OPTIMIZERS = {  # name -> optimizer over parameter groups
    "sgd": lambda groups, a: torch.optim.SGD(groups, a.lr, momentum=a.momentum, fused=on_gpu(groups)),
    "adamw": lambda groups, a: torch.optim.AdamW(groups, a.lr, fused=on_gpu(groups)),
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
FROM_CHECKPOINT = ("arch", "pool", "stages", "grid", "head", "dim", "pred_dim", "gem_p", "gem_eval_p", "eval_crops",
                   "input_size", "resize", "exif_transpose", "decode")
STANDARD_PHOTOS, CALIBRATION_PHOTOS = 2000, 2000  # training photos that --pool grid and --calibrate look at
LEAST_CALIBRATED = 10

# ---------------------------------------------------------------------------------------------------------------------
# Command line


FLAGS = {  # group -> rows of (names and metavar, type or choices or bool, default, help)
    "what to do": [
        ("--mode", ["train", "extract", "export"], "train", "what to do"),
        ("--exp NAME", str, None, "results go to exp/NAME/train and exp/NAME/extract (default: the experiment that "
         "--weight or --resume lies in, else 'default')"),
        ("--seed N", int, None, "seed of weights, order and views (default: drawn and printed)"),
        ("-j --workers N", int, os.cpu_count(), "processes that load photos, shared by the devices of this machine"),
        ("-b --batch-size N", int, 512, "train: photos per step on this machine, over all its devices, each seen "
         "--ncrops times; extract: photos per batch"),
        ("--strict", bool, False, "stop at the first unreadable photo instead of skipping it"),
        ("--decode", ["draft", "full"], "draft", "draft: JPEGs no larger than needed; full: whole, by Pillow"),
        ("--exif-transpose", bool, False, "turn photos upright by their EXIF tag, which the notes ignore"),
    ],
    "network (extract mode takes these from the checkpoint unless given)": [
        ("-a --arch NAME", str, "resnet50", "timm model, old names too"),
        ("--pool", ["gem", "grid", "backbone"], "gem", "gem: GeM over the last feature map; grid: means over the cells "
         "of a grid over the maps of --stages, those that flips exchange averaged; backbone: the network's own final "
         "norm and pooling, as for Swin in the notes"),
        ("--stages N,N", str, "3", "pool grid: feature maps, 0 the finest; layers after the last one are left out"),
        ("--grid N", int, 5, "pool grid: N x N cells"),
        ("--gem-p P", float, 3.0, "GeM exponent in training"),
        ("--gem-eval-p P", float, 4.0, "GeM exponent in extraction"),
        ("--head", list(HEADS), "linear-bn", "from pooled features to descriptor; none: the pooled features"),
        ("--dim N", int, 256, "descriptor dimensions"),
        ("--pred-dim N", int, 512, "head simsiam: hidden dimensions of the predictor"),
        ("--extract-from", ["proj", "pred", "proj+pred"], "proj", "head simsiam: describe by projection, prediction or "
         "their sum"),
        ("--input-size PX", int, 224, "side of the network's square input"),
        ("--eval-input-size PX", int, None, "the same for extraction (default: --input-size)"),
        ("--eval-crops SIDE,SIDE", str, "1", "extraction averages the features of centre crops, sides as shares of the "
         "input's, all resized to the smallest"),
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
        ("--grow-epochs N", int, 0, "double the sample after every N epochs; each time the optimizer, and with arcface "
         "the classes, start anew, and beyond 100,000 photos the batch is halved; 0: never (notes v4)"),
        ("--grow-to N", int, 1_000_000, "up to N photos"),
        ("--epoch-steps N", int, 0, "an epoch ends after N steps, or when all photos were seen; 0: only then"),
        ("--pairs FILE", str, None, "train on the pairs of a ground truth (query_id,reference_id), of DIR's "
         "query_images and reference_images: view 0 from the query, view 1 from the reference; descriptors of such a "
         "network are marked as contaminated"),
        ("--negatives N", int, 0, "add to each photo N random ones of --negatives-dir that match nothing"),
        ("--negatives-dir DIR", str, None, "their folder; photos that occur in --pairs are left out"),
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
        ("-m --margin M", float, 0.05, "triplet: margin; arcface: angle in radians; ntxent-margin: taken off the "
         "positives' cosine"),
        ("-s --scale S", float, 30.0, "arcface: factor of the cosines"),
        ("--temperature T", float, 0.1, "ntxent: temperature"),
        ("--miner", list(MINERS), "none", "picks the pairs or triplets that the loss sees; bipartite: pairs of view 0 "
         "with other views"),
        ("--type-of-triplets", ["all", "hard", "semihard", "easy"], "all", "triplet miner: which ones"),
        ("--memory-size N", int, 1024, "descriptors of earlier batches that the loss compares with (cross-batch "
         "memory, arXiv 1912.06798); 0: none"),
        ("--memory-enqueue", ["all", "view0", "crosswise"], "all", "which descriptors enter the memory; view0: those "
         "of view 0, with which the other views are compared; crosswise: a second memory does the reverse"),
        ("--world-scaled-loss", bool, False, "multiply the loss by the number of processes, so that gradients do not "
         "shrink with it as in the notes; arcface and simsiam never do"),
    ],
    "optimisation": [
        ("--epochs N", int, 100, "also the length of the schedule"),
        ("--start-epoch N", int, 0, "first epoch, when not resumed"),
        ("--optimizer", list(OPTIMIZERS), "sgd", "optimizer"),
        ("--lr --learning-rate LR", float, 0.05, "used as given, not scaled by the batch size"),
        ("--lr-schedule", list(SCHEDULES), "cosine", "cosine and linear change per epoch, cosine-iter per step"),
        ("--freeze N", int, 0, "the backbone's parameters up to feature map N - 1 are not trained"),
        ("--momentum M", float, 0.9, "SGD"),
        ("--wd --weight-decay W", float, 1e-4, "on matrices and kernels; not on 1-D parameters, biases and gains"),
        ("--decay-all", bool, False, "weight decay on all parameters (notes v1, v2)"),
        ("--fix-pred-lr", bool, False, "head simsiam: the predictor keeps its first learning rate"),
        ("--batch-norm", ["sync", "local", "shuffled", "frozen"], "sync", "statistics over all GPUs or each its own "
         "(processes without a GPU always have their own); shuffled: its own, of a batch drawn from all processes; "
         "frozen: in the backbone those of its pretraining, in the head its own"),
        ("--accumulate N", int, 1, "compute a batch that does not fit the device in N parts; loss and memory see it "
         "whole, batch norm the parts"),
        ("--grad-checkpointing", bool, False, "keep few activations and compute the others twice: less memory, slower"),
        ("--compile", bool, False, "torch.compile the backbone: the first step takes minutes, the others less"),
        ("--amp", ["auto", "off", "bf16", "fp16"], "auto", "precision of the backbone; auto: bf16 on GPUs that "
         "compute in it, fp16 on others, fp32 on CPUs, where bf16 can be slower; head and loss are always in fp32"),
    ],
    "at the end of training": [
        ("--whiten N", int, 0, "fit the head linear-bn anew to the trained backbone: the projection that shrinks what "
         "differs between N training photos and edited copies (--view1) of them"),
        ("--calibrate N", int, 0, "keep N photos back, and measure the precision at each score on them and edited "
         "copies of them; extract (default: the checkpoint's): on N of the references, at most half; 0: none is "
         "measured"),
    ],
    "checkpoints and log": [
        ("--resume FILE", str, "", "continue from a checkpoint of this script; auto: from the newest of --exp, if any; "
         "extract: auto goes on with an extraction that was stopped"),
        ("--save-steps N", int, 0, "also write latest.pth.tar every N steps; 0: each epoch only"),
        ("-p --print-freq N", int, 10, "steps between log entries and checks of the loss and of Ctrl-C"),
    ],
    "extraction": [
        ("--target-set LETTERS", str, "qr", "which folders: q queries, r references, t training photos"),
        ("--eval-subset", bool, False, "only the references in --subset-file; writes fb-isc-submission-subset.h5"),
        ("--subset-file FILE", str, None, "one reference id per line, by scripts/select_ref_subset.py (default: "
         "DIR/rids_subset.txt)"),
        ("--shard I/N", str, None, "every N-th photo of each folder from the I-th on, 0 the first; writes "
         "fb-isc-submission.shard-I-of-N.h5; scripts/merge_shards.py puts the files together"),
        ("--dryrun", bool, False, "the first 100 photos of each folder only"),
    ],
    "export": [
        ("--format", ["onnx", "torchscript", "safetensors"], "onnx", "of the file for other programs"),
        ("-o --output FILE", str, None, "where to (default: exp/NAME/export/descriptor.onnx, .pt or .safetensors)"),
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
    for names, least in ((("batch_size", "epochs", "input_size", "sample_size", "dim", "pred_dim", "print_freq",
                          "accumulate", "grid"), 1),
                         (("workers", "memory_size", "grow_epochs", "epoch_steps", "negatives", "freeze",
                           "whiten", "calibrate"), 0)):
        for name in names:
            if getattr(args, name) < least:
                fail(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if 0 < args.calibrate < LEAST_CALIBRATED:
        fail(f"--calibrate {args.calibrate}: {LEAST_CALIBRATED} photos are the least that tell anything; 0: no "
             "calibration")
    args.dir = Path(args.dir or ("input/training_images" if args.mode == "train" and not args.pairs else "input"))
    for flag in ("weight", "backbone_weights", "resume", "pairs"):
        file = getattr(args, flag)
        if file and file != "auto" and not Path(file).is_file():
            fail(f"--{flag.replace('_', '-')}: no such file: {file}")
    if not args.target_set or set(args.target_set) - set(LETTERS):
        fail(f"--target-set must be letters out of q, r, t, not '{args.target_set}'")
    if args.exp is None:
        file = Path(args.weight if args.mode != "train" and args.weight else args.resume).resolve()
        args.exp = file.parent.parent.name if file.parent.name == "train" else "default"
    args.out = ROOT / "exp" / args.exp / args.mode
    args.contaminated, args.negative_photos = None, []
    if args.mode != "export":
        (check_training_flags if args.mode == "train" else check_extraction_flags)(args)
    return args


def check_extraction_flags(args):
    if args.resume not in ("", "auto"):
        fail(f"--resume {args.resume}: an extraction goes on with --resume auto; the checkpoint is --weight")
    if args.shard and not ((shard := re.fullmatch(r"(\d+)/(\d+)", args.shard)) and int(shard[1]) < int(shard[2])):
        fail(f"--shard {args.shard}: give I/N with I from 0 to N - 1, such as 0/4")


def check_training_flags(args):
    least = 1 if args.loss == "arcface" else 2
    if args.ncrops < least or (args.pairs and args.ncrops != 2):
        fail(f"--ncrops {args.ncrops}: " + ("a pair has 2 views" if args.pairs else
                                            "a photo needs at least 2 views, or there are no positive pairs"))
    if (args.loss == "simsiam") != (args.head == "simsiam"):
        fail(f"--loss {args.loss} with --head {args.head}: simsiam needs both")
    if args.loss in ("arcface", "simsiam"):
        if "memory_size" in args.given and args.memory_size:
            fail(f"--memory-size {args.memory_size}: --loss {args.loss} has no memory; give 0")
        args.memory_size = 0
        if args.negatives:
            fail(f"--negatives {args.negatives}: --loss {args.loss} compares no photos")
    if args.whiten and args.head != "linear-bn":
        fail(f"--head {args.head}: --whiten is for linear-bn")
    if args.pairs and (args.whiten or args.calibrate or args.pool == "grid"):
        fail("--pairs: --whiten, --calibrate and --pool grid want single photos")
    if args.memory_enqueue != "all" and not args.memory_size:
        fail(f"--memory-enqueue {args.memory_enqueue} needs a --memory-size")
    if args.grow_epochs and args.pairs:
        fail("--grow-epochs: pairs do not grow")
    if args.negatives and not args.negatives_dir:
        fail(f"--negatives {args.negatives} needs their folder, --negatives-dir")
    views = args.ncrops + args.negatives
    rows = args.batch_size * views * max(1, args.world_size)
    if 0 < args.memory_size < rows:
        fail(f"--memory-size {args.memory_size} is smaller than one batch of {rows} descriptors (--batch-size "
             f"{args.batch_size} x {views} views{f' x {args.world_size} machines' * (args.world_size > 1)})")


ARGS = parse_args() if __name__ == "__main__" else None  # before the imports that take seconds: --help, wrong flags

import numpy as np  # noqa: E402
import pytorch_metric_learning as pml  # noqa: E402
import pytorch_metric_learning.losses  # noqa: E402
import pytorch_metric_learning.miners  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torchvision  # noqa: E402
import torchvision.transforms.v2.functional as TF  # noqa: E402
from tqdm import tqdm  # noqa: E402

from blocks import Blocks, open_folder  # noqa: E402
from calibration import measure  # noqa: E402
from checkpoints import load_weights, newest_checkpoint, read_checkpoint  # noqa: E402
from descriptors import Descriptors, InputError, replacing, write_descriptors  # noqa: E402
from export import ENDINGS, FORMATS, INPUT  # noqa: E402
from inputs import FOLDERS, list_group, list_negatives, list_pairs  # noqa: E402
from log import Log  # noqa: E402
from losses import (ArcFaceLoss, ContrastiveLoss, NTXentLoss, Objective, PairCriterion, SimSiamLoss,  # noqa: E402
                    SNRDistance)
from network import (Descriptor, SimSiam, check_arch, linear_bn, predictor, projector,  # noqa: E402
                     read_backbone_weights)
from photos import PHOTO_ENDINGS, list_photos, write_skipped  # noqa: E402
from processes import check_shared_memory, gather_objects, launch, make_loader, pick_precision  # noqa: E402
from views import (EpochBatches, Pairs, Views, WholePhotos, collate_photos, collate_views,  # noqa: E402
                   parse_ops, shape_of_batch, write_views_png)
from whitening import set_head  # noqa: E402

VERSIONS = {module.__name__: str(module.__version__) for module in (torch, torchvision, timm, pml, np)}

# ---------------------------------------------------------------------------------------------------------------------
# Training


def build_net(args, pretrained):
    return (SimSiam if args.head == "simsiam" else Descriptor)(args, HEADS[args.head], pretrained)


def pairs(args, loss):
    return PairCriterion(args, loss, MINERS[args.miner](args))


def param_groups(module, args):
    """Weight decay for matrices and kernels only: none for 1-D parameters, biases and NFNet gains (--decay-all: for
    all). With --fix-pred-lr the predictor's parameters are groups of their own, marked as `fixed`."""
    groups = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        spared = not args.decay_all and (p.ndim <= 1 or name.endswith(".bias") or "gain" in name)
        fixed = args.fix_pred_lr and ".predictor." in name
        groups.setdefault((fixed, not spared), []).append(p)
    return [{"params": groups[key], "weight_decay": args.wd * key[1], "fixed": key[0]} for key in sorted(groups)]


def freeze_stages(backbone, n):
    """Leave the parameters up to the backbone's feature map n - 1 as they are."""
    if not hasattr(backbone, "feature_info") or n > len(backbone.feature_info.info):
        raise InputError(f"--freeze {n}: the backbone has no feature map {n - 1}")
    last = backbone.feature_info.info[n - 1]["module"].replace(".", "_") + "_"  # as timm names it in flat networks
    names = [name for name, _ in backbone.named_parameters()]
    end = max(i for i, name in enumerate(names) if name.replace(".", "_").startswith(last))
    for name in names[:end + 1]:
        backbone.get_parameter(name).requires_grad_(False)


def on_gpu(groups):
    return groups[0]["params"][0].is_cuda


def synchronised(args, device):
    """Whether batch norm has statistics over all processes; PyTorch offers that on GPUs only."""
    return args.batch_norm == "sync" and args.processes > 1 and device.type == "cuda"


def sample_of_epoch(args, epoch):
    """Photos used in `epoch` and photos per step of a process; both change where the sample grows (notes v4)."""
    doublings = epoch // args.grow_epochs if args.grow_epochs else 0
    counts = [min(args.sample_size * 2 ** i, max(args.grow_to, args.sample_size)) for i in range(doublings + 1)]
    halvings = sum(count > max(before, 100_000) for before, count in zip(counts, counts[1:]))
    return min(counts[-1], len(args.photos)), max(1, args.batch_size // args.nproc >> halvings)


def describe_views(args, net, describe, root, paths, pipelines, size):
    """Describe photos `paths` of `root` in len(pipelines) views of `size` px: -> for each view, describe(images
    [B, 3, s, s]) [n, d] on the CPU. An unreadable photo is replaced as in training."""
    settings = {"view0": pipelines[0], "view1": pipelines[-1], "ncrops": len(pipelines), "negatives": 0,
                "negative_photos": [], "input_size": size, "seed": args.seed or 0}
    views = Views(argparse.Namespace(**vars(args) | settings), root, paths, RESIZES[args.resize], net.mean, net.std)
    batches = [[(0, i) for i in range(start, min(start + 64, len(paths)))] for start in range(0, len(paths), 64)]
    rows = []
    with torch.inference_mode():
        for images, *_ in tqdm(make_loader(args, views, batches, collate_views), "photos", unit="batch", leave=False):
            images = images.to(args.device_used, non_blocking=True, memory_format=torch.channels_last)
            rows.append(describe(images).float().cpu().chunk(len(pipelines)))
    return [torch.cat(parts) for parts in zip(*rows)]


class Trainer:
    """One process's part of a training run: builds everything, resumes, runs the epochs, writes the checkpoints."""

    def __init__(self, args):
        self.args, self.device = args, args.device_used
        self.amp_dtype = pick_precision(args, self.device)
        self.seed_everything()
        self.build_network()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self.epoch, self.done = args.start_epoch, 0  # `done` steps of this epoch
        self.build_stage(sample_of_epoch(args, self.epoch))
        self.step = self.epoch * self.batches.steps()
        self.skipped, self.failed, self.stop, self.calibration = {}, 0, False, None

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
        self.net = build_net(args, pretrained)
        if args.weight and not args.resume_file:
            checkpoint = read_checkpoint(args.weight)
            load_weights(self.net, checkpoint["state_dict"], args.weight)
            args.contaminated = args.contaminated or checkpoint.get("contaminated")
        self.net.amp_dtype, args.dim = self.amp_dtype, self.net.dim
        args.preprocess = {"mean": self.net.mean, "std": self.net.std, "input_size": args.input_size,
                           "resize": args.resize, "exif_transpose": args.exif_transpose}
        self.net = self.net.to(self.device, memory_format=torch.channels_last)
        if args.whiten and args.dim > self.net.fc.in_features:
            fail(f"--dim {args.dim}: --whiten chooses from {self.net.fc.in_features} pooled features")
        if args.pool == "grid" and args.process == 0 and not (args.weight or args.resume_file):  # DDP: to the others
            self.pool_views(args.photos[:args.sample_size][:STANDARD_PHOTOS], [args.view0, args.view1],
                            args.input_size, self.net.features)
        if args.freeze:
            freeze_stages(self.net.backbone, args.freeze)
        if args.grad_checkpointing:
            self.net.backbone.set_grad_checkpointing()
        if args.compile:
            self.net.backbone.compile()
        if synchronised(args, self.device):
            self.net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.net)

    def pool_views(self, paths, pipelines, size, features):
        """Pooled features [n, channels] of these photos in each view of `size` px; with --pool grid their mean and
        variance become the network's."""
        views = describe_views(self.args, self.net.eval(), lambda images: torch.cat(features(images), 1),
                               self.args.dir, paths, pipelines, size)
        return self.net.standardise(*views) if self.args.pool == "grid" else views

    def finish(self):
        """Fit the head anew to the trained backbone and measure the calibration, on photos as extraction sees them."""
        args, net, size = self.args, self.net, self.args.eval_input_size or self.args.input_size
        trained = args.photos[:len(self.views)]
        if args.whiten:
            set_head(net, *self.pool_views(trained[:args.whiten], ["clean=1", args.view1], size, net.eval_features))
        if args.calibrate:
            describe = functools.partial(describe_views, args, net.eval(), net, args.dir, size=size)
            originals, copies = describe(args.held_back, ["clean=1", args.view1])
            others, = describe(trained[:CALIBRATION_PHOTOS], ["clean=1"])
            self.calibration = measure(copies.numpy(), originals.numpy(), [others.numpy()], "training")

    def build_stage(self, sample):
        """Photos, criterion and optimizer for `sample` (photos, photos per step of a process)."""
        args, self.sample = self.args, sample
        data = Pairs if args.pairs else Views
        self.views = data(args, args.dir, args.photos[:sample[0]], RESIZES[args.resize], self.net.mean, self.net.std)
        self.batches = EpochBatches(len(self.views), sample[1], args.seed, args.process, args.processes,
                                    args.epoch_steps)
        if not self.batches.steps():
            fail(f"{len(self.views)} photos do not fill one batch of {sample[1] * args.processes}; lower --batch-size")
        self.loaded = None  # batches to come, one epoch's after the other's
        self.criterion = LOSSES[args.loss](args, len(self.views)).to(self.device)
        self.objective = Objective(self.net, self.criterion, args.ncrops, args.batch_norm == "shuffled",
                                   args.accumulate)
        self.optimizer = OPTIMIZERS[args.optimizer](param_groups(self.objective, args), args)
        if dist.is_initialized():
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.objective = torch.nn.parallel.DistributedDataParallel(self.objective, ids)

    def init_classes(self):
        """Start each class vector as its photo's descriptor, before unit length, from the clean view (notes v3)."""
        args = self.args
        paths, folder = [str(args.dir / path) for path in self.views.paths], args.out / "classes.blocks"
        if args.process == 0:
            open_folder(folder, {}, resume=False)
        gather_objects(None)
        self.net.eval()
        describe_photos(args, self.net, self.net.embed, blocks_of(args, folder, "classes", paths), paths)
        gather_objects(None)
        weights = self.criterion.W.data
        if args.process == 0:
            rows, labels, _ = blocks_of(args, folder, "classes", paths).collect()
            weights[:, labels] = torch.from_numpy(rows).to(self.device).T
            shutil.rmtree(folder)
        if dist.is_initialized():
            dist.broadcast(weights, 0)

    def run(self):
        args = self.args
        if args.resume_file:
            self.resume(args.resume_file)
        if args.process == 0:
            self.describe()
            write_views_png(self.views, args.out / "views.png")
            with replacing(args.out / "args.json") as temporary:
                temporary.write_text(json.dumps(plain_args(args), indent=2) + "\n")
        if args.loss == "arcface" and not args.resume_file:
            self.init_classes()
        self.log = Log(args, self.step) if args.process == 0 else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(self, "stop", True))
        while self.epoch < args.epochs:
            if self.sample != (sample := sample_of_epoch(args, self.epoch)):
                self.build_stage(sample)
                print(f"=> grown to {sample[0]:,} photos, {self.batches.steps():,} steps per epoch")
                if args.loss == "arcface":
                    self.init_classes()
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
        now = self.epoch + self.done / self.batches.steps()
        return args.lr * SCHEDULES[args.lr_schedule](self.epoch, now, args.epochs)

    def train_epoch(self):
        """The rest of epoch `self.epoch`, after the `self.done` steps that it had; ends with its checkpoint."""
        args, steps = self.args, self.batches.steps()
        if self.loaded is None:
            self.loaded = self.load(self.batches.after(self.epoch, self.done, args.epochs))
        self.objective.train()
        losses, waited, began = [], 0.0, time.time()
        with tqdm(total=steps, initial=self.done, desc=f"epoch {self.epoch}", unit="step",
                  disable=args.process > 0) as bar:
            while self.done < steps:
                asked = time.time()
                images, labels, unreadable, failed = next(self.loaded)
                waited += time.time() - asked
                losses.append(self.train_step(images, labels))
                self.step, self.done = self.step + 1, self.done + 1
                self.skipped.update(unreadable)
                self.failed += len(failed)
                last = self.done == steps
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
        self.epoch, self.done = self.epoch + 1, 0
        if self.epoch == args.epochs:
            self.loaded = images = None  # its processes end and its memory goes
            if args.process == 0:
                self.finish()
        self.save(f"checkpoint_{self.epoch - 1:04d}.pth.tar")

    def load(self, batches):
        """Iterator over batches of views; one holds until the next one is taken."""
        args = self.args
        return iter(make_loader(args, self.views, batches, collate_views, shape_of_batch(args, self.batches.batch)))

    def train_step(self, images, labels):
        """One optimizer step; returns the loss as a tensor that is not waited for."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr if group["fixed"] else self.learning_rate()
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        loss = self.objective(images, labels.to(self.device, non_blocking=True))
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
            self.loaded = None
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
        state = {"epoch": self.epoch, "step": self.step, "done": self.done, "steps_per_epoch": self.batches.steps(),
                 "arch": self.args.arch_tag, "state_dict": self.net.state_dict(),
                 "criterion": self.criterion.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "scaler": self.scaler.state_dict(), "rng": rng, "args": plain_args(self.args),
                 "photos": len(self.views), "processes": self.args.processes, "preprocess": self.args.preprocess,
                 "contaminated": self.args.contaminated, "calibration": self.calibration,
                 "whitened": bool(self.args.whiten) and self.epoch == self.args.epochs, "versions": VERSIONS}
        with replacing(self.args.out / name) as temporary:
            torch.save(state, temporary)
        if name != "latest.pth.tar":
            (self.args.out / "latest.pth.tar").unlink(missing_ok=True)

    def resume(self, file):
        """Take up the run of `file`. What changed since is told; an incomplete epoch starts anew if its steps moved."""
        args, state = self.args, read_checkpoint(file)
        if "done" not in state:
            fail(f"--resume {file}: not a checkpoint of this script; start from it with --weight")
        load_weights(self.net, state["state_dict"], file)
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.done = state["epoch"], state["step"], state["done"]
        trained = sample_of_epoch(args, self.epoch - (self.done == 0))  # a growth may come next
        if trained != self.sample:
            self.build_stage(trained)
        moved = [f"{name} {old} -> {new}" for name, old, new in (
            ("photos", state["photos"], len(self.views)), ("processes", state["processes"], args.processes),
            ("photos per step", state["args"]["batch_size"], args.batch_size)) if old != new]
        if state["steps_per_epoch"] != self.batches.steps() or state["args"]["seed"] != args.seed:
            self.step, self.done = self.step - self.done, 0
            moved += ["an incomplete epoch starts anew"]
        moved += self.load_criterion(state)
        if state["processes"] == args.processes:
            torch.set_rng_state(state["rng"][args.process]["cpu"])
            if self.device.type == "cuda" and state["rng"][args.process]["cuda"] is not None:
                torch.cuda.set_rng_state(state["rng"][args.process]["cuda"])
        if moved:
            print(f"=> warning: not the run that {file} comes from: {'; '.join(moved)}")
        print(f"=> resumed {file} at epoch {self.epoch}, step {self.step}")

    def load_criterion(self, state):
        """Memory or classes, and the optimizer with the command line's settings; says what starts anew instead."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        shapes = [{name: x.shape for name, x in criterion.items() if torch.is_tensor(x)}
                  for criterion in (state["criterion"], self.criterion.state_dict())]
        if shapes[0] != shapes[1] and self.args.loss == "arcface":
            self.init_classes()
            return ["classes and optimizer start anew"]
        if state.get("whitened"):
            return ["the run had ended with --whiten: optimizer and memory start anew"]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, setting in zip(self.optimizer.param_groups, settings):
            group.update(setting)
        if shapes[0] != shapes[1]:
            return ["the memory starts empty (its size changed)"]
        self.criterion.load_state_dict(state["criterion"])
        return []


def plain_args(args):
    """The command line as plain values: what args.json and checkpoints hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
            if name not in ("photos", "held_back", "odd", "device_used", "given", "found", "negative_photos")}


def memory_estimate(args, dim):
    """GiB of memory and loss, which has matrices of batch x memory: about 32 bytes a pair (measured); or of the
    classes with gradient and momentum, and the logits."""
    rows = args.batch_size // args.nproc * args.processes * (args.ncrops + args.negatives)
    if args.loss == "arcface":
        return max(sample_of_epoch(args, epoch)[0] for epoch in range(args.epochs)) * (dim * 12 + rows * 20) / 2**30
    return max(args.memory_size, rows) * (dim * 4 + rows * 32) / 2**30


def hold_back(photos, n):
    """`n` photos by chance, always the same ones, and the others in their order."""
    if 2 * n > len(photos):
        raise InputError(f"--calibrate {n}: leaves less than half of {len(photos)} photos to train on")
    kept = set(np.random.default_rng(0).permutation(len(photos))[:n].tolist())
    return [photos[i] for i in sorted(kept)], [photo for i, photo in enumerate(photos) if i not in kept]


def prepare_training(args):
    """What every process needs and only one should do: check the input, list the photos, make the folder."""
    args.arch_tag = check_arch(args.arch)
    for flag in ("view0", "view1"):
        parse_ops(getattr(args, flag), args.op_prob, f"--{flag}")
    if not args.dir.is_dir():
        fail(f"no such folder: {args.dir}")
    photos, odd = list_pairs(args) if args.pairs else list_photos(args.dir)
    args.odd = [(str(args.dir / path), reason) for path, reason in odd]
    if not photos:
        fail(f"no photos in {args.dir} ({', '.join(PHOTO_ENDINGS)})")
    args.found = len(photos)
    args.held_back, photos = hold_back(photos, args.calibrate) if args.calibrate else ([], photos)
    args.photos = photos[:max(args.sample_size, args.grow_to * bool(args.grow_epochs))]
    args.contaminated = Path(args.pairs).name if args.pairs else None
    args.negative_photos = list_negatives(args) if args.negatives else []
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
    check_shared_memory(args, shape_of_batch(args, args.batch_size // args.nproc))
    Trainer(args).run()


# ---------------------------------------------------------------------------------------------------------------------
# Extraction


def take_checkpoint(args, file):
    """Weights, and the settings that were not given, of the checkpoint `file`; None: a backbone alone."""
    args.checkpoint, args.contaminated, args.calibration, args.preprocess, stored = file, None, None, {}, {}
    if file:
        checkpoint = read_checkpoint(file)
        stored = checkpoint["args"] | {"arch": checkpoint.get("arch") or checkpoint["args"].get("arch")}
        args.preprocess, args.contaminated = checkpoint.get("preprocess", {}), checkpoint.get("contaminated")
        args.calibration = checkpoint.get("calibration")
        args.state = checkpoint["state_dict"]
    if stored.get("eval_input_size"):
        stored["input_size"] = stored["eval_input_size"]
    for name in (*FROM_CHECKPOINT, "view1", "op_prob", "calibrate"):
        if name not in args.given and stored.get(name) is not None:
            setattr(args, name, stored[name])
    if any(getattr(args, name) != stored.get(name) for name in FROM_CHECKPOINT):
        args.calibration = None  # it was measured with the checkpoint's settings
    args.arch_tag = check_arch(args.arch)
    if not file and "head" not in args.given:
        args.head = "none"
    source = Path(file or args.backbone_weights or os.devnull)
    args.sha256 = hashlib.sha256(source.read_bytes()).hexdigest()


def find_checkpoint(args):
    """Take --weight, or the newest checkpoint of --exp, before anything is computed."""
    file = args.weight or (None if args.backbone_weights or args.no_pretrained else
                           newest_checkpoint(args.out.parent / "train"))
    if not (file or args.backbone_weights or args.no_pretrained):
        fail(f"no checkpoint in {args.out.parent / 'train'}; train --exp {args.exp} first, or give --weight FILE, "
             "--backbone-weights FILE (raw features)")
    take_checkpoint(args, file)


def load_net(args):
    """The network of `take_checkpoint`, for evaluation."""
    net = build_net(args, read_backbone_weights(args.backbone_weights, args.arch)
                    if args.backbone_weights and not args.checkpoint else False)
    if args.checkpoint:
        load_weights(net, args.state, args.checkpoint)
    args.preprocess = {"mean": net.mean, "std": net.std} | args.preprocess
    return net.eval().requires_grad_(False)


def prepare_extraction(args):
    """Find checkpoint, photos and ids before anything is computed."""
    find_checkpoint(args)
    args.groups = {LETTERS[letter]: list_group(args, LETTERS[letter]) for letter in LETTERS
                   if letter in args.target_set}
    if args.calibrate:
        parse_ops(args.view1, args.op_prob, "--view1")
    name = f"fb-isc-submission{'-subset' * args.eval_subset}"
    args.h5 = args.out / (name + (f".shard-{args.shard.replace('/', '-of-')}" if args.shard else "") + ".h5")
    args.out.mkdir(parents=True, exist_ok=True)


def extract(args):
    """Describe all photos, each process every n-th block of them; the first process writes the file from the blocks."""
    net = load_net(args).folded(args.input_size).to(args.device_used, memory_format=torch.channels_last)
    net.amp_dtype = pick_precision(args, args.device_used)
    print(f"=> network   {args.arch_tag}, {net.dim}-d, input {args.input_size} px ({args.resize}), GeM p "
          f"{args.gem_eval_p:g}, from {args.checkpoint or args.backbone_weights or 'random weights'}")
    folder = args.h5.with_suffix(".blocks")
    if args.process == 0:
        paths = json.dumps([group["paths"] for group in args.groups.values()])
        open_folder(folder, settings_of(args) | {"processes": args.processes, "batch_size": args.batch_size, "photos":
                    hashlib.sha256(paths.encode()).hexdigest()}, args.resume)
    gather_objects(None)  # once the folder is there
    for name, group in args.groups.items():
        describe_photos(args, net, net, blocks_of(args, folder, name, group["paths"]), group["paths"])
    gather_objects(None)  # once every process has written its blocks
    if args.process == 0:
        groups, skipped = collect_groups(args, folder)
        if "reference" in groups:
            calibrate(args, net, *groups["reference"])
        write_results(args, groups, skipped)
        shutil.rmtree(folder)


def blocks_of(args, folder, name, paths):
    return Blocks(folder, name, len(paths), args.batch_size // args.nproc, args.process, args.processes)


@torch.inference_mode()
def describe_photos(args, net, describe, blocks, paths):
    """Write this process's unfinished blocks; `describe`: images [B, 3, s, s] of `paths` -> rows [B, dim]."""
    batches = [batch for block in blocks.todo for batch in block]
    photos = WholePhotos(args, paths, RESIZES[args.resize], args.preprocess["mean"], args.preprocess["std"])
    loader = iter(make_loader(args, photos, batches, collate_photos))
    with tqdm(total=sum(map(len, batches)), desc=blocks.name, unit="photo", disable=args.process > 0) as bar:
        for block in blocks.todo:
            rows, indices, bad = [torch.empty(0, net.dim)], [], []
            for batch in block:
                good, images, unreadable = next(loader)
                if unreadable and args.strict:
                    fail(f"{paths[unreadable[0][0]]}: {unreadable[0][1]}", 1)
                if good:
                    images = images.to(args.device_used, non_blocking=True, memory_format=torch.channels_last)
                    rows.append(describe(images).float().cpu())
                indices += good
                bad += unreadable
                bar.update(len(batch))
            blocks.write(block, torch.cat(rows).numpy(), np.array(indices, dtype=int), bad)


def collect_groups(args, folder):
    """{group: (rows [n, dim], ids [n])} of the finished blocks, and [(path, reason)] of photos left out."""
    groups, skipped = {}, []
    for name, group in args.groups.items():
        rows, indices, bad = blocks_of(args, folder, name, group["paths"]).collect()
        skipped += [(group["paths"][i], reason) for i, reason in bad] + group["odd"]
        groups[name] = rows, [group["ids"][i] for i in indices]
        if not len(rows):
            write_skipped(args.out / "skipped.csv", skipped)
            fail(f"none of the {len(group['paths'])} photos in {args.dir / FOLDERS[name]} can be read, see "
                 f"{args.out / 'skipped.csv'}")
    return groups, skipped


def calibrate(args, net, rows, ids):
    """Measure the calibration on the archive, references `ids` [n] with descriptors `rows` [n, dim]: edited copies of
    --calibrate of them, at most half, against the others. The checkpoint's stays for a shard and for less than 20."""
    n = min(args.calibrate, len(rows) // 2)
    if n < LEAST_CALIBRATED or args.shard:
        return
    paths = dict(zip(args.groups["reference"]["ids"], args.groups["reference"]["paths"]))
    chosen, others = np.split(np.random.default_rng(0).permutation(len(rows)), [n])
    copies, = describe_views(args, net, net, "", [paths[ids[i]] for i in chosen], [args.view1], args.input_size)
    blocks = (rows[part] for part in np.array_split(np.sort(others), -(-n * len(others) // 2**24)))
    args.calibration = measure(copies.numpy(), rows[chosen], blocks, "references")


def settings_of(args):
    """What rows depend on, as it stands in the descriptor file: only rows of the same settings are put together."""
    settings = {name: getattr(args, name) for name in FROM_CHECKPOINT} | {
        "arch": args.arch_tag, "checkpoint_sha256": args.sha256, "contaminated": args.contaminated or "",
        "extract_from": args.extract_from * (args.head == "simsiam"), "shard": args.shard or ""}
    return {name: value for name, value in settings.items() if value != ""}


def write_results(args, groups, skipped):
    """Write the descriptor file and skipped.csv; groups of an earlier run with the same settings stay in the file, a
    file of other settings is kept under a name with a hash of these. Score it where there is truth."""
    settings, calibration = settings_of(args), args.calibration
    keep = ()
    if args.h5.is_file():
        with Descriptors(args.h5) as old:
            before = {name: str(old.attrs.get(name)) for name in settings}
            keep, measured = [name for name in old.groups if name not in groups], old.attrs.get("calibration")
        if before != {name: str(value) for name, value in settings.items()}:
            keep = ()
            tag = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:8]
            backup = args.h5.with_name(f"{args.h5.stem}.{tag}.h5")
            os.replace(args.h5, backup)
            print(f"=> kept the earlier file of other settings as {backup}")
    if "reference" in keep:  # it was measured on them
        calibration = measured
    others = {"checkpoint": str(args.checkpoint or args.backbone_weights), "versions": VERSIONS}
    others |= {"calibration": calibration} if calibration else {}
    write_descriptors(args.h5, groups, settings | others, keep=keep)
    write_skipped(args.out / "skipped.csv", skipped)
    print(f"=> wrote {args.h5}: " + ", ".join(f"{len(rows):,} {name}" for name, (rows, _) in groups.items()) +
          (f"; {len(skipped)} skipped, see {args.out / 'skipped.csv'}" if skipped else ""))
    truth = args.dir / "public_ground_truth.csv"
    if {"query", "reference"} <= set(groups) and truth.is_file() and not (args.dryrun or args.shard):
        sys.stdout.flush()
        command = [sys.executable, ROOT / "scripts" / "eval_metrics.py", args.h5, truth]
        if subprocess.run(command + ["--allow-contaminated"] * bool(args.contaminated)).returncode:  # it says so
            fail(f"scripts/eval_metrics.py failed on {args.h5}", 1)


# ---------------------------------------------------------------------------------------------------------------------
# For other programs


def export(args):
    """Write the network as --format."""
    net = load_net(args)
    config = settings_of(args) | {"mean": args.preprocess["mean"], "std": args.preprocess["std"], "dim": net.dim,
                                  "input": INPUT, "output": "descriptors: float32 [n, dim], unit length"}
    path = Path(args.output or args.out / f"descriptor{ENDINGS[args.format]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    FORMATS[args.format](net, config, path)
    print(f"=> wrote {path}")


def load_descriptor(weight, device="cpu"):
    """A checkpoint, or an exported .safetensors, as a function: images -> float32 [n, dim], rows of unit length.

        from train import load_descriptor
        descriptor = load_descriptor("exp/v31/train/checkpoint_0004.pth.tar")
        vectors = descriptor(["a.jpg", "b.png"])

    Images are paths or PIL images; batches are up to the caller. Raises InputError for a file that is no checkpoint,
    OSError for an image that cannot be read.
    """
    args = build_parser().parse_args(["--mode", "extract"])
    args.given = ()
    take_checkpoint(args, weight)
    net = load_net(args).folded(args.input_size).to(device)
    photos = WholePhotos(args, [], RESIZES[args.resize], args.preprocess["mean"], args.preprocess["std"])

    @torch.inference_mode()
    def descriptor(images):
        return net(photos.prepare(images).to(device)).cpu().numpy()

    return descriptor


def main(args):
    warnings.filterwarnings("ignore", "Mapping deprecated model name")  # the resolved name is printed
    logging.getLogger("timm").setLevel(logging.ERROR)  # tells that features_only leaves out the classifier
    prepare, work = {"train": (prepare_training, train), "extract": (prepare_extraction, extract),
                     "export": (find_checkpoint, export)}[args.mode]
    try:
        prepare(args)
    except InputError as error:
        fail(error)
    launch(work, args)


if __name__ == "__main__":
    main(ARGS)
