#!/usr/bin/env python3
"""Train an image copy-detection descriptor and extract it.

A query image that was cropped, re-encoded, written on or pasted into another image has to find its original among a
million references, with one 256-d vector per image and one threshold for all queries. Training makes two views of every
image, pulls their descriptors together and pushes those of other images, remembered from earlier batches, apart.

Train on one device, on all GPUs of this machine, or on several machines (4 GPUs each here):

    python train.py @exp/v31.args input/training_images
    python train.py @exp/v31.args --multiprocessing-distributed input/training_images
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py @exp/v31.args

Continue a run that was stopped at any point, from its newest checkpoint:

    python train.py @exp/v31.args --resume auto input/training_images

Extract descriptors of queries, references and training images with the newest checkpoint, then score them:

    python train.py --mode extract --exp v31 --target-set qrt input
    python scripts/eval_metrics.py exp/v31/extract/fb-isc-submission.h5 input/public_ground_truth.csv

A recipe (@exp/NAME.args) is a list of flags; flags after it on the command line win. Results go to exp/NAME.
"""
import contextlib
import copy
import json
import math
import os
import re
import secrets
import signal
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "scripts"))
from copydet.common import (WARNED, InputError, OutputFolder, WorkError, check_output, make_folder, manifest_of,
                            open_folder, replacing, run_main, shown)
from copydet.machine import let_idle_threads_sleep
from copydet.options import Args, parse_args

if __name__ == "__main__":
    ARGS = parse_args(description=__doc__)  # before the imports that take seconds: --help, wrong flags
    let_idle_threads_sleep()

import numpy as np
import pytorch_metric_learning as pml
import pytorch_metric_learning.losses
import pytorch_metric_learning.miners
import torch
import torch.distributed as dist
from tqdm import tqdm

from copydet.batches import (EpochBatches, Images, check_shared_memory, collate_views, make_loader, shape_of_batch,
                             size_of_memory)
from copydet.calibration import measure
from copydet.capacity import Footprint, footprint, free_memory, largest, out_of_memory, told
from copydet.checkpoints import find_source, load_net, load_weights, newest_checkpoint, read_checkpoint
from copydet.distributed import Rank, gather_objects, launch, leads, pick_precision, threads_in_words
from copydet.export import ENDINGS, FORMATS, INPUT
from copydet.extraction import (Blocks, describe_images, describe_views, load_descriptor, run_extraction, settings_of,
                                versions)
from copydet.images import FOLDERS, IMAGE_ENDINGS, list_images, list_negatives, list_pairs, not_read, write_skipped
from copydet.log import Log
from copydet.losses import (ArcFaceLoss, ContrastiveLoss, NTXentLoss, Objective, PairCriterion, SimSiamLoss,
                            SNRDistance)
from copydet.network import STANDARDISED, build_net, check_arch, memory_format, quiet_timm, read_backbone_weights
from copydet.record import record
from copydet.views import Pairs, Preprocessing, Views, list_augmentations, parse_ops, write_views_png
from copydet.whitening import set_head

__all__ = ["load_descriptor"]  # for programs that import it from here

# ---------------------------------------------------------------------------------------------------------------------
# What an experiment chooses from: one entry per choice, by the name that its flag has in copydet/options.py.

LOSSES: dict[str, Callable] = {  # name -> loss of (args, number of images); see copydet/losses.py
    "contrastive": lambda a, n: ContrastiveLoss(a.pos_margin, a.neg_margin),
    "triplet": lambda a, n: pml.losses.TripletMarginLoss(margin=a.margin),
    "snr": lambda a, n: ContrastiveLoss(a.pos_margin, a.neg_margin, distance=SNRDistance()),
    "ntxent": lambda a, n: NTXentLoss(a.temperature),
    "ntxent-margin": lambda a, n: NTXentLoss(a.temperature, a.margin),
    "arcface": lambda a, n: ArcFaceLoss(n, a.dim, a.margin, a.scale),
    "simsiam": lambda a, n: SimSiamLoss(),
}
MINERS: dict[str, Callable] = {  # name -> miner that picks the pairs or triplets that the loss sees; None: all of them
    "none": lambda a: None,
    "triplet": lambda a: pml.miners.TripletMarginMiner(margin=a.margin, type_of_triplets=a.type_of_triplets),
    "bipartite": lambda a: None,  # of the pairs between view 0 and the other views
}
OPTIMIZERS: dict[str, Callable] = {  # name -> optimizer over parameter groups
    "sgd": lambda groups, a: torch.optim.SGD(groups, a.lr, momentum=a.momentum, fused=on_gpu(groups)),
    "adamw": lambda groups, a: torch.optim.AdamW(groups, a.lr, fused=on_gpu(groups)),
}
SCHEDULES: dict[str, Callable] = {  # name -> learning rate factor at (epoch, epoch + fraction of it done, epochs)
    "cosine": lambda epoch, now, epochs: 0.5 * (1 + math.cos(math.pi * epoch / epochs)),
    "cosine-iter": lambda epoch, now, epochs: 0.5 * (1 + math.cos(math.pi * now / epochs)),
    "linear": lambda epoch, now, epochs: 1 - epoch / epochs,
    "constant": lambda epoch, now, epochs: 1.0,
}
LATE_LIBRARIES = 2**28  # bytes that a process grows by, beside its work, from the first step on (measured)
STANDARD_IMAGES, CALIBRATION_IMAGES = 2000, 2000  # training images that --pool grid and --calibrate look at


# ---------------------------------------------------------------------------------------------------------------------
# What training looks at


@dataclass(frozen=True)
class Data:
    """The images of a training run: paths relative to --dir, pairs of them with --pairs."""
    images: list  # to train on
    found: int  # images in the folder
    held_back: list = field(default_factory=list)  # --calibrate
    odd: list = field(default_factory=list)  # [(path, reason)] of what only looks like an image
    negatives: list = field(default_factory=list)
    resume_file: Path | str = ""

    def sample_of_epoch(self, args: Args, epoch: int, local_world_size: int) -> tuple[int, int]:
        """Images used in `epoch` and images per step of a rank; both change where the sample grows (notes v4)."""
        doublings = epoch // args.grow_epochs if args.grow_epochs else 0
        counts = [min(args.sample_size * 2 ** i, max(args.grow_to, args.sample_size)) for i in range(doublings + 1)]
        halvings = sum(count > max(before, 100_000) for before, count in zip(counts, counts[1:]))
        return min(counts[-1], len(self.images)), max(1, args.batch_size // local_world_size >> halvings)


def prepare_training(args: Args) -> tuple[Args, Data]:
    """What every process needs and only one should do: check the input, list the images, make the folder.

    Raises InputError: unknown network or operation, no folder, no images, checkpoints of another run.
    """
    check_arch(args.arch)
    if shown(args.out) != str(args.out):
        raise InputError(f"--exp {shown(args.out)}: TensorBoard writes to no path that is not UTF-8")
    for flag in ("view0", "view1"):
        parse_ops(getattr(args, flag), args.op_prob, f"--{flag}")
    if not args.dir.is_dir():
        raise InputError(f"no such folder: {args.dir}")
    for part in () if args.pairs else (FOLDERS["query"], FOLDERS["reference"]):
        if (args.dir / part).is_dir():
            raise InputError(f"{args.dir} holds {part}, which nobody trains on: give {args.dir / FOLDERS['train']}")
    images, odd = list_pairs(args) if args.pairs else list_images(args.dir, args.exclude)
    if not images:
        raise InputError(f"no images in {args.dir} ({', '.join(IMAGE_ENDINGS)}){not_read(odd)}")
    held_back, rest = hold_back(images, args.calibrate) if args.calibrate else ([], images)
    rest = rest[:max(args.sample_size, args.grow_to * bool(args.grow_epochs))]
    resume_file = find_resume_file(args)
    if resume_file and (args.seed is None or not args.accumulate):
        before = read_checkpoint(resume_file)["args"]
        args = args.replace(seed=before.get("seed") if args.seed is None else args.seed,
                            accumulate=args.accumulate or before.get("accumulate", 1))
    return args, Data(rest, len(images), held_back, [(str(args.dir / path), reason) for path, reason in odd],
                      list_negatives(args, rest if args.pairs else []) if args.negatives else [], resume_file)


CHECKPOINT = re.compile(r"checkpoint_\d+\.pth\.tar|latest\.pth\.tar")


def training_folder(args: Args) -> OutputFolder:
    """exp/NAME/train, for the process that leads; not made yet. Raises InputError where it holds other files."""
    def older(folder: Path) -> list[str]:
        names = [name for name in os.listdir(folder) if CHECKPOINT.fullmatch(name)
                 or name in ("args.json", "log.csv", "views.png", "skipped.csv")]
        return names if "args.json" in names or any(map(CHECKPOINT.fullmatch, names)) else []

    return OutputFolder(args.out, "--exp", older, parents=True)


def find_resume_file(args: Args) -> Path | str:
    """The checkpoint to go on from, "" where the run starts anew. Raises InputError where that would mix two runs."""
    newest = newest_checkpoint(args.out)
    if args.resume == "auto":
        if not newest:
            print(f"=> no checkpoint in {args.out} yet, starting from the beginning")
        return newest or ""
    if newest and not args.resume and not args.overwrite:
        raise InputError(f"{args.out} holds checkpoints of another run: --resume auto goes on with it, --overwrite "
                         "replaces it, --exp NAME keeps both")
    if newest and args.overwrite and not args.resume:
        training_folder(args).check(*filter(CHECKPOINT.fullmatch, os.listdir(args.out)))
    return args.resume


def hold_back(images: list, n: int) -> tuple[list, list]:
    """`n` images by chance, always the same ones, and the others in their order. Raises InputError: more than half."""
    if 2 * n > len(images):
        raise InputError(f"--calibrate {n}: leaves less than half of {len(images)} images to train on")
    kept = set(np.random.default_rng(0).permutation(len(images))[:n].tolist())
    return [images[i] for i in sorted(kept)], [image for i, image in enumerate(images) if i not in kept]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def param_groups(module: torch.nn.Module, args: Args) -> list[dict]:
    """Weight decay for matrices and kernels only: none for 1-D parameters, biases and NFNet gains (--decay-all: for
    all). With --fix-pred-lr the predictor's parameters are groups of their own, marked as `fixed`."""
    groups: dict[tuple, list] = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        spared = not args.decay_all and (p.ndim <= 1 or name.endswith(".bias") or "gain" in name)
        fixed = args.fix_pred_lr and ".predictor." in name
        groups.setdefault((fixed, not spared), []).append(p)
    return [{"params": groups[key], "weight_decay": args.wd * key[1], "fixed": key[0]} for key in sorted(groups)]


def freeze_stages(backbone: Any, n: int) -> None:
    """Leave the parameters up to the backbone's feature map n - 1 as they are. Raises InputError: there is none."""
    if not hasattr(backbone, "feature_info") or n > len(backbone.feature_info.info):
        raise InputError(f"--freeze {n}: the backbone has no feature map {n - 1}")
    last = backbone.feature_info.info[n - 1]["module"].replace(".", "_") + "_"  # as timm names it in flat networks
    names = [name for name, _ in backbone.named_parameters()]
    end = max(i for i, name in enumerate(names) if name.replace(".", "_").startswith(last))
    for name in names[:end + 1]:
        backbone.get_parameter(name).requires_grad_(False)


def checkpoint_gradients(backbone: Any, arch: str) -> None:
    """Have feature maps computed again for the gradients, not kept. Raises InputError: a network that cannot."""
    try:
        getattr(backbone, "model", backbone).set_grad_checkpointing()  # timm wraps some networks
    except (AttributeError, AssertionError):
        raise InputError(f"--grad-checkpointing: {arch} does not offer it") from None


def on_gpu(groups: list[dict]) -> bool:
    """Whether parameter groups are."""
    return groups[0]["params"][0].is_cuda


def synchronised(args: Args, rank: Rank) -> bool:
    """Whether batch norm has statistics over all ranks; PyTorch offers that on GPUs only."""
    return args.batch_norm == "sync" and rank.world_size > 1 and rank.device.type == "cuda"


def learning_rate(args: Args, epoch: int, done: float) -> float:
    """At the fraction `done` of an epoch."""
    return args.lr * SCHEDULES[args.lr_schedule](epoch, epoch + done, args.epochs)


def build_criterion(args: Args, count: int, rank: Rank) -> torch.nn.Module:
    """--loss for `count` images: one with classes or predictions of its own, or over pairs of descriptors."""
    loss = LOSSES[args.loss](args, count)
    if isinstance(loss, (ArcFaceLoss, SimSiamLoss)):
        return loss
    return PairCriterion(args, loss, MINERS[args.miner](args), args.dim, rank.world_size)


class Trainer:
    """One process's part of a training run: builds everything, resumes, runs the epochs, writes the checkpoints."""
    net: Any  # a Descriptor
    criterion: Any  # a module of copydet.losses

    def __init__(self, args: Args, data: Data, rank: Rank) -> None:
        self.data, self.rank, self.device = data, rank, rank.device
        self.args = self.seeded(args)
        self.amp_dtype = pick_precision(args, self.device)
        self.contaminated = shown(Path(args.pairs).name) if args.pairs else None
        self.build_network()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self.epoch, self.done = args.start_epoch, 0  # `done` steps of this epoch
        self.build_stage(self.sample_of_epoch())
        self.step = self.epoch * self.batches.steps()
        self.failed, self.stop = 0, False  # failed operations
        self.skipped: dict[str, str] = {}  # unreadable images: path -> reason
        self.calibration: dict | None = None

    def seeded(self, args: Args) -> Args:
        """The command line with the seed that all ranks agree on; cudnn either repeats itself (seed given) or searches
        for the fastest kernels."""
        seed = gather_objects(args.seed if args.seed is not None else secrets.randbits(31))[0]
        torch.manual_seed(seed)
        torch.backends.cudnn.deterministic = "seed" in args.given
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
        return args.replace(seed=seed)

    def build_network(self) -> None:
        """The network with its first weights on the device, and how it sees images."""
        args = self.args
        pretrained: bool | dict = not (args.no_pretrained or args.weight or self.data.resume_file)
        if args.backbone_weights and pretrained:
            pretrained = read_backbone_weights(args.backbone_weights, args.arch)
        self.net = build_net(args, pretrained)
        if args.weight and not self.data.resume_file:
            checkpoint = read_checkpoint(args.weight)
            load_weights(self.net, checkpoint["state_dict"], args.weight)
            self.contaminated = self.contaminated or checkpoint.get("contaminated")
        self.net.try_out(args)
        self.net.amp_dtype = self.amp_dtype
        self.net = self.net.to(self.device, memory_format=memory_format(self.net))
        if args.freeze:
            freeze_stages(self.net.backbone, args.freeze)
        if args.grad_checkpointing:
            checkpoint_gradients(self.net.backbone, args.arch)
        self.need = Need(args, self.data, self.net, self.rank)
        self.args = args = args.replace(accumulate=self.need.parts())
        self.preprocessing = Preprocessing.of(args, self.net)
        if args.whiten and self.net.dim > self.net.fc.in_features:
            raise InputError(f"--dim {args.dim}: --whiten chooses from {self.net.fc.in_features} pooled features")
        self.pipelines = [parse_ops(text, args.op_prob) for text in [args.view0] + [args.view1] * (args.ncrops - 1)]
        self.whole_image = parse_ops("clean", 1)
        self.hard_view = parse_ops(args.view1, args.op_prob)
        if args.pool == "grid" and self.rank.is_main and not (args.weight or self.data.resume_file):  # DDP: to the rest
            self.pool_views(self.data.images[:args.sample_size][:STANDARD_IMAGES], [self.pipelines[0], self.hard_view],
                            self.preprocessing, self.net.features)
        if args.compile:
            self.net.backbone.compile()
        if synchronised(args, self.rank):
            self.net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.net)

    def describe_views(self, describe: Callable, paths: list, pipelines: list,
                       preprocessing: Preprocessing) -> list[torch.Tensor]:
        """`describe` of training images `paths` in a view by each of the pipelines, the network in evaluation mode."""
        self.net.eval()
        return describe_views(describe, paths, self.args.dir, pipelines, preprocessing, self.args.seed,
                              self.args.workers, self.rank)

    def pool_views(self, paths: list, pipelines: list, preprocessing: Preprocessing,
                   features: Callable) -> Sequence[torch.Tensor]:
        """Pooled features [n, channels] of these images in each view; with --pool grid their mean and variance become
        the network's."""
        views = self.describe_views(lambda images: torch.cat(features(images), 1), paths, pipelines, preprocessing)
        return self.net.fit_standard(*views) if self.args.pool in STANDARDISED else views

    def finish(self) -> None:
        """Fit the head anew to the trained backbone and measure the calibration, on images as extraction sees them."""
        args, net = self.args, self.net
        as_extracted = Preprocessing.of(args, net, args.eval_input_size)
        trained, both = self.data.images[:len(self.views)], [self.whole_image, self.hard_view]
        if args.whiten:
            set_head(net, *self.pool_views(trained[:args.whiten], both, as_extracted, net.eval_features))
        if args.calibrate:
            originals, copies = self.describe_views(net, self.data.held_back, both, as_extracted)
            others, = self.describe_views(net, trained[:CALIBRATION_IMAGES], [self.whole_image], as_extracted)
            self.calibration = measure(copies.numpy(), originals.numpy(), [others.numpy()], "training")

    def sample_of_epoch(self, epoch: int | None = None) -> tuple[int, int]:
        epoch = self.epoch if epoch is None else epoch
        return self.data.sample_of_epoch(self.args, epoch, self.rank.local_world_size)

    def build_stage(self, sample: tuple[int, int]) -> None:
        """Views, criterion and optimizer for `sample` (images, images per step of a rank). Raises InputError: less than
        a batch."""
        args, self.sample = self.args, sample
        self.views = (Pairs if args.pairs else Views)(
            args.dir, self.data.images[:sample[0]], self.preprocessing, self.pipelines, args.seed, args.negatives,
            self.data.negatives, args.strict)
        self.batches = EpochBatches(len(self.views), sample[1], args.seed, self.rank.rank, self.rank.world_size,
                                    args.epoch_steps)
        if not self.batches.steps():
            raise InputError(f"{len(self.views)} images do not fill one batch of {sample[1] * self.rank.world_size}; "
                             "lower --batch-size")
        self.loaded: Iterator | None = None  # batches to come, one epoch's after the other's
        self.criterion = build_criterion(args.replace(dim=self.net.dim), len(self.views), self.rank).to(self.device)
        self.objective: torch.nn.Module = Objective(self.net, self.criterion, args.ncrops,
                                                    args.batch_norm == "shuffled", args.accumulate)
        self.optimizer = OPTIMIZERS[args.optimizer](param_groups(self.objective, args), args)
        if dist.is_initialized():
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.objective = torch.nn.parallel.DistributedDataParallel(self.objective, ids)

    def init_classes(self) -> None:
        """Start each class vector as its image's descriptor, before unit length, from the clean view (notes v3)."""
        paths, folder = [str(self.args.dir / path) for path in self.views.paths], self.args.out / "classes.blocks"
        if self.rank.is_main:
            open_folder(folder, {}, resume=False)
        gather_objects(None)
        blocks = Blocks(folder, "classes", len(paths), self.args.batch_size // self.rank.local_world_size, self.rank)
        describe_images(self.net.eval().embed, self.net.dim, blocks, paths, self.preprocessing, self.args.workers,
                        self.rank)
        gather_objects(None)
        weights = self.criterion.W.data
        if self.rank.is_main:
            rows, labels, _ = blocks.collect()
            weights[:, labels] = torch.from_numpy(rows).to(self.device).T
            shutil.rmtree(folder)
        if dist.is_initialized():
            dist.broadcast(weights, 0)

    def run(self) -> None:
        """The whole training, from a checkpoint where there is one to go on from."""
        args = self.args
        if self.data.resume_file:
            self.resume(self.data.resume_file)
        if self.rank.is_main:
            self.start_folder()
        if args.loss == "arcface" and not self.data.resume_file:
            self.init_classes()
        self.log = Log(args.out, self.step) if self.rank.is_main else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(self, "stop", True))
        while self.epoch < args.epochs:
            if self.sample != (sample := self.sample_of_epoch()):
                self.build_stage(sample)
                print(f"=> grown to {sample[0]:,} images, {self.batches.steps():,} steps per epoch")
                if args.loss == "arcface":
                    self.init_classes()
            self.train_epoch()
        print(f"=> done: {args.out / f'checkpoint_{args.epochs - 1:04d}.pth.tar'}")

    def start_folder(self) -> None:
        """Print and write what this run is; with --overwrite the checkpoints of the run before it go."""
        args = self.args
        self.print_summary()
        folder = training_folder(args)
        if args.overwrite and not self.data.resume_file:
            folder.remove(*filter(CHECKPOINT.fullmatch, manifest_of(folder.path)))
        folder.add("args.json", "log.csv", "views.png", "skipped.csv", "run.json")
        write_views_png(self.views, args.out / "views.png")
        with replacing(args.out / "args.json") as temporary:
            temporary.write_text(json.dumps(args.plain(), indent=2) + "\n")

    def print_summary(self) -> None:
        args, n, world, tag = self.args, len(self.views), self.rank.world_size, check_arch(self.args.arch)
        need = self.need.of(self.need.batch, args.accumulate)
        print(f"=> recipe    {recipe_of(args)}\n"
              f"=> network   {tag}" + f" (asked for: {args.arch})" * (tag != args.arch) +
              f", {sum(p.numel() for p in self.net.parameters()) / 1e6:.1f} M parameters, descriptor {self.net.dim}-d, "
              f"input {args.input_size} px\n"
              f"=> images    {self.data.found:,} found in {args.dir}{not_read(self.data.odd)}, {n:,} used "
              f"(--sample-size {args.sample_size:,}); {self.batches.steps():,} steps per epoch of "
              f"{self.batches.batch * world} images x {args.ncrops} views\n"
              f"=> loss      {args.loss}, memory of {args.memory_size:,} descriptors\n"
              f"=> needs     {told(need, self.need.free, self.device)}"
              + f", in {args.accumulate} parts" * (args.accumulate > 1) + "\n"
              f"=> device    {world} process{'es' * (world > 1)} on {self.device.type}, backbone in "
              f"{str(self.amp_dtype or torch.float32).removeprefix('torch.')}, {threads_in_words()}, "
              f"{args.workers} loading processes, seed {args.seed}\n"
              f"=> output    {args.out}", flush=True)

    def train_epoch(self) -> None:
        """The rest of epoch `self.epoch`, after the `self.done` steps that it had; ends with its checkpoint."""
        args, steps = self.args, self.batches.steps()
        if self.loaded is None:
            self.loaded = self.load(self.batches.after(self.epoch, self.done, args.epochs))
        self.objective.train()
        losses: list[Any] = []  # tensors, numbers once they are looked at
        waited, began = 0.0, time.time()
        with tqdm(total=steps, initial=self.done, desc=f"epoch {self.epoch}", unit="step",
                  disable=not self.rank.is_main) as bar:
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
                if self.step % args.print_freq == 0 or last or save or (self.stop and self.rank.world_size == 1):
                    self.check(losses)
                    seconds = time.time() - began
                    seen = len(losses) * self.batches.batch * args.ncrops * self.rank.world_size
                    if self.log:
                        self.log.write(bar, self.epoch, self.step, np.mean(losses), self.rate,
                                       seen / seconds, waited / seconds)
                    losses, waited, began = [], 0.0, time.time()
                    if save and not last:
                        self.save("latest.pth.tar")
                bar.update()
        self.epoch, self.done = self.epoch + 1, 0
        if self.epoch == args.epochs:
            self.loaded = images = None  # its processes end and its memory goes
            if self.rank.is_main:
                self.finish()
        self.save(f"checkpoint_{self.epoch - 1:04d}.pth.tar")
        self.report_skipped()

    def load(self, batches: Iterable) -> Iterator:
        """Iterator over batches of views; one holds until the next one is taken."""
        return iter(make_loader(self.views, batches, collate_views, self.args.workers, self.rank,
                                shape_of_batch(self.args, self.batches.batch)))

    def train_step(self, images: Images, labels: torch.Tensor) -> torch.Tensor:
        """One optimizer step with images and labels [n]; returns the loss as a tensor that is not waited for."""
        self.rate = learning_rate(self.args, self.epoch, self.done / self.batches.steps())
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr if group["fixed"] else self.rate
        pixels = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        loss = self.objective(pixels, labels.to(self.device, non_blocking=True))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def check(self, losses: list) -> None:
        """Fetch the losses since the last check, tensors -> numbers; stop with a checkpoint when any process was told
        to. Raises WorkError: a loss that is not finite."""
        losses[:] = torch.stack(losses).tolist()
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            last = newest_checkpoint(self.args.out)
            raise WorkError(f"the loss is {losses[bad[0]]} at step {self.step - len(losses) + bad[0] + 1}; last "
                            f"checkpoint: {last or 'none'}; try a lower --lr or --amp off")
        if any(gather_objects(self.stop)):
            self.save("latest.pth.tar")
            self.loaded = None
            print(f"\n=> stopped at step {self.step}; continue with --resume auto")
            sys.exit(130)

    def report_skipped(self) -> None:
        """Write skipped.csv; more than 1 % unreadable images are no accident: WorkError."""
        skipped = {path: reason for part in gather_objects(self.skipped) for path, reason in part.items()}
        if self.rank.is_main:
            write_skipped(self.args.out / "skipped.csv", list(skipped.items()) + self.data.odd)
            if skipped or self.failed:
                print(f"=> {len(skipped)} unreadable images replaced by others, see {self.args.out / 'skipped.csv'}; "
                      f"{self.failed} operations left out on images that are too small for them")
        if len(skipped) > max(10, 0.01 * len(self.views)):
            raise WorkError(f"{len(skipped)} of {len(self.views)} images cannot be read, see "
                            f"{self.args.out / 'skipped.csv'}")

    def save(self, name: str) -> None:
        """Write a checkpoint that holds everything to continue bit for bit."""
        rng = gather_objects({"cpu": torch.get_rng_state(),
                              "cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None})
        if not self.rank.is_main:
            return
        preprocess = {"mean": self.net.mean, "std": self.net.std, "input_size": self.args.input_size,
                      "resize": self.args.resize, "exif_transpose": self.args.exif_transpose}
        state = {"epoch": self.epoch, "step": self.step, "done": self.done, "steps_per_epoch": self.batches.steps(),
                 "arch": check_arch(self.args.arch), "state_dict": self.net.state_dict(),
                 "criterion": self.criterion.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "scaler": self.scaler.state_dict(), "rng": rng, "args": self.args.plain(),
                 "photos": len(self.views), "processes": self.rank.world_size, "preprocess": preprocess,
                 "contaminated": self.contaminated, "calibration": self.calibration,
                 "whitened": bool(self.args.whiten) and self.epoch == self.args.epochs, "versions": versions()}
        with replacing(self.args.out / name) as temporary:
            torch.save(state, temporary)
        folder = training_folder(self.args)
        folder.add(name)
        if name != "latest.pth.tar":
            folder.remove("latest.pth.tar")

    def resume(self, file: str | Path) -> None:
        """Take up the run of `file`. Raises InputError: weights only, of another network, broken."""
        state = read_checkpoint(file)
        if "done" not in state:
            raise InputError(f"--resume {file}: not a checkpoint of this script; start from it with --weight")
        try:
            self.take_up(file, state)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"--resume {file}: not as this script writes it ({type(error).__name__}: {error}); start "
                             "from it with --weight") from None

    def take_up(self, file: str | Path, state: dict) -> None:
        """What a checkpoint holds. What changed since is told; an incomplete epoch starts anew if its steps moved."""
        args = self.args
        load_weights(self.net, state["state_dict"], file)
        self.contaminated = self.contaminated or state.get("contaminated")
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.done = state["epoch"], state["step"], state["done"]
        trained = self.sample_of_epoch(self.epoch - (self.done == 0))  # a growth may come next
        if trained != self.sample:
            self.build_stage(trained)
        moved = [f"{name} {old} -> {new}" for name, old, new in (
            ("images", state["photos"], len(self.views)), ("processes", state["processes"], self.rank.world_size),
            ("images per step", state["args"]["batch_size"], args.batch_size)) if old != new]
        if state["steps_per_epoch"] != self.batches.steps() or state["args"]["seed"] != args.seed:
            self.step, self.done = self.step - self.done, 0
            moved += ["an incomplete epoch starts anew"]
        moved += self.load_criterion(state)
        if state["processes"] == self.rank.world_size:
            torch.set_rng_state(state["rng"][self.rank.rank]["cpu"])
            if self.device.type == "cuda" and state["rng"][self.rank.rank]["cuda"] is not None:
                torch.cuda.set_rng_state(state["rng"][self.rank.rank]["cuda"])
        if moved:
            WARNED.append(text := f"not the run that {file} comes from: {'; '.join(moved)}")
            print(f"=> warning: {text}")
        print(f"=> resumed {file} at epoch {self.epoch}, step {self.step}")

    def load_criterion(self, state: dict) -> list[str]:
        """Memory or classes, and the optimizer with the command line's settings; says what starts anew instead."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        shapes = [{name: x.shape for name, x in criterion.items() if torch.is_tensor(x)}
                  for criterion in (state["criterion"], self.criterion.state_dict())]
        if shapes[0] != shapes[1] and self.args.loss == "arcface":
            self.init_classes()
            return ["classes and optimizer start anew"]
        if state.get("whitened"):
            return ["the run had ended with --whiten: optimizer and memory start anew"]
        moved = []
        sizes = [[len(group["params"]) for group in groups]
                 for groups in (state["optimizer"]["param_groups"], self.optimizer.param_groups)]
        if state["args"]["optimizer"] != self.args.optimizer or sizes[0] != sizes[1]:
            moved.append("the optimizer starts anew (it, or what it trains, changed)")
        else:
            self.optimizer.load_state_dict(state["optimizer"])
            for group, setting in zip(self.optimizer.param_groups, settings):
                group.update(setting)
        if shapes[0] != shapes[1]:
            return [*moved, "the memory starts empty (its size changed)"]
        self.criterion.load_state_dict(state["criterion"])
        return moved


def recipe_of(args: Args) -> str:
    """Where views and schedule come from, which the notes kept in each version's script."""
    if args.recipes:
        return ", ".join(args.recipes)
    if {"view0", "view1", "lr_schedule"} <= args.given:
        return "none"
    return ("none: where not given, views and schedule are those of the notes' v19; the other versions have theirs in "
            "recipes, such as @exp/v31.args")


def bytes_of_loss(args: Args, data: Data, dim: int, rank: Rank, batch: int) -> float:
    """Bytes of memory and loss for `batch` images of a rank: matrices of batch x memory, about 32 bytes a pair
    (measured); or the classes with gradient and momentum, and the logits."""
    rows = batch * rank.world_size * (args.ncrops + args.negatives)
    if args.loss == "arcface":
        classes = max(data.sample_of_epoch(args, epoch, rank.local_world_size)[0] for epoch in range(args.epochs))
        return classes * (dim * 12 + rows * 20)
    return max(args.memory_size, rows) * (dim * 4 + rows * 32)


class Need:
    """Bytes that the training of `net` takes: of a rank on its GPU, of all ranks on a machine without. They make it
    together, before the first step, and agree.

    Attributes: free: bytes that can be had.
    """

    def __init__(self, args: Args, data: Data, net: Any, rank: Rank) -> None:
        self.args, self.data, self.net, self.rank = args, data, net, rank
        self.batch, self.views = args.batch_size // rank.local_world_size, args.ncrops + args.negatives
        self.free = min(gather_objects(free_memory(rank.device)))
        measured = footprint(net, (args.input_size, args.input_size), rank.device, training=True)
        self.footprint = Footprint(*map(max, zip(*gather_objects(measured))))

    def of(self, batch: int, parts: int, workers: int | None = None) -> float:
        """For `batch` images of a rank, computed in `parts`, with --workers unless `workers` loading processes."""
        args, rank, rows = self.args, self.rank, batch * self.views
        trained = sum(p.nbytes for p in self.net.parameters() if p.requires_grad)
        copies = 1 + {"sgd": 1}.get(args.optimizer, 2) + (rank.world_size > 1)  # gradients, moments, DDP's buckets
        pixels = rows * 12 * args.input_size ** 2 * (parts > 1)  # of the other parts
        size = (trained * copies + bytes_of_loss(args, self.data, self.net.dim, rank, batch) + pixels
                + self.footprint.of(math.ceil(rows / parts)))
        if rank.device.type == "cuda":
            return size
        loading = size_of_memory(args.workers if workers is None else workers, rank, shape_of_batch(args, batch))
        return (size + LATE_LIBRARIES) * rank.local_world_size + loading

    def parts(self) -> int:
        """--accumulate, for auto the least that fits. Raises InputError that names flags with which the batch fits."""
        args, wanted, at_once = self.args, self.args.accumulate, max(1, self.args.accumulate)
        if self.of(self.batch, at_once) <= self.free:
            return at_once
        whole = args.loss == "simsiam"  # which sees its views in no parts
        fitting = (n for n in range(2, self.batch * self.views // 2 + 1) if self.of(self.batch, n) <= self.free)
        parts = None if whole else next(fitting, None)
        if parts and not wanted:
            return parts
        batch = self.rank.local_world_size * largest(lambda n: self.of(n, at_once) <= self.free, self.batch)
        workers = largest(lambda n: self.of(self.batch, at_once, n) <= self.free, args.workers)
        flags = [f"-j {workers}"] * bool(workers)
        flags += [f"--accumulate {parts} (or auto)"] * bool(parts) + [f"--batch-size {batch}"] * bool(batch)
        flags += ["--grad-checkpointing"] * (not args.grad_checkpointing and self.fits_twice_computed(at_once))
        raise InputError(
            f"--batch-size {args.batch_size} x {self.views} views of {args.input_size} px needs "
            + told(self.of(self.batch, at_once), self.free, self.rank.device)
            + (f"; what fits: {', '.join(flags)}" if flags else "; no batch fits: lower --input-size or --memory-size"))

    def fits_twice_computed(self, parts: int) -> bool:
        """Whether --grad-checkpointing makes it fit."""
        net = copy.deepcopy(self.net)
        try:
            checkpoint_gradients(net.backbone, self.args.arch)
        except InputError:
            return False
        return Need(self.args, self.data, net, self.rank).of(self.batch, parts) <= self.free


def train(args: Args, data: Data, rank: Rank) -> None:
    """Train as the command line says. Raises InputError: memory and loss do not fit into the device; WorkError: what
    was estimated to fit did not."""
    quiet_timm()
    batch = args.batch_size // rank.local_world_size
    need, have = bytes_of_loss(args, data, args.dim, rank, batch), free_memory(rank.device)
    if need > have:
        raise InputError(f"--memory-size {args.memory_size} with --batch-size {args.batch_size} needs "
                         + told(need, have, rank.device))
    check_shared_memory(args.workers, rank, shape_of_batch(args, batch))
    advice = (f"--batch-size {args.batch_size} x {args.ncrops + args.negatives} views of {args.input_size} px did not "
              "fit; lower it, or give --accumulate N or --grad-checkpointing; --resume auto goes on")
    with record(args.out / "run.json" if rank.is_main else None, args) as run, out_of_memory(advice):
        with run.stage("prepare"):
            trainer = Trainer(args, data, rank)
        try:
            with run.stage("train"):
                trainer.run()
        finally:
            run.counts |= {"images": len(trainer.views), "epochs": trainer.epoch, "steps": trainer.step,
                           "skipped": len(trainer.skipped), "operations_left_out": trainer.failed}


# ---------------------------------------------------------------------------------------------------------------------
# Main


def export(args: Args) -> None:
    """Write the network as --format. Raises InputError: no checkpoint, a package that is missing."""
    if args.half and args.format != "safetensors":
        raise InputError(f"--half: of --format safetensors, not {args.format}")
    args, source = find_source(args)
    path = Path(args.output or args.out / f"descriptor{ENDINGS[args.format]}")
    make_folder(path.parent)
    check_output("-o", path, [source.file] if source.file else [])
    net: Any = load_net(args, source)
    config = settings_of(args, source) | {
        "mean": net.mean, "std": net.std, "dim": net.dim, "input": INPUT,
        "output": "descriptors: float32 [n, dim], unit length", "calibration": source.calibration,
        "provenance": source.provenance,
        **{name: getattr(args, name) for name in ("view1", "op_prob", "calibrate")}}
    FORMATS[args.format](net.half() if args.half else net, config, path)
    print(f"=> wrote {path}, with " + ("the calibration" if source.calibration else "no calibration")
          + f"; contaminated by {source.contaminated}" * bool(source.contaminated))


def main(args: Args) -> None:
    """Do what --mode says."""
    quiet_timm()
    if args.list_augmentations:
        print(list_augmentations())
    elif args.mode == "train":
        with training_folder(args) if leads(args) else contextlib.nullcontext():
            launch(train, *prepare_training(args))
    elif args.mode == "extract":
        run_extraction(args)
    else:
        export(args)


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(ARGS)))
