"""Extraction: descriptors of all images of a run to one HDF5 file, in blocks on disk until they are complete.

What is finished survives a kill, and memory does not grow with the images. Images are cut into batches in their order,
batches into blocks; rank p of P does blocks p, p + P, ... Batches are the same for any number of processes with one
batch size, and so are the rows.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from copydet.batches import collate_images, collate_views, make_loader, size_of_memory
from copydet.calibration import measure
from copydet.capacity import footprint, free_memory, largest, out_of_memory, told
from copydet.checkpoints import DEFAULT, FROM_CHECKPOINT, OF_IMAGES, Source, find_source, load_net, take_source
from copydet.common import (COMMANDS, InputError, OutputFolder, WorkError, check_output, locked, open_folder, replacing,
                            shown)
from copydet.descriptors import Descriptors, write_descriptors
from copydet.distributed import Rank, gather_objects, launch, leads, pick_precision, threads_in_words
from copydet.images import BLANK, FOLDERS, Group, Odd, beside, list_group, not_read, read_skipped, write_skipped
from copydet.network import quiet_timm
from copydet.options import LEAST_CALIBRATED, LETTERS, PRESETS, Args, parse_args
from copydet.record import Record, record
from copydet.regions import WHOLE, Box, parse_regions
from copydet.views import Preprocessing, Views, WholeImages, parse_ops

IMAGES_PER_BLOCK = 4096

Block: TypeAlias = "list[range]"  # ranges of image indices, one per batch
Noted: TypeAlias = "list[tuple[int, str]]"  # image indices, and why they are unreadable or that they are BLANK


class Blocks:
    """Blocks of `count` images in `folder`, a file each, with `regions` rows for each image.

    Attributes: todo: this process's blocks that are not finished, lists of ranges of image indices, one per batch.
    """

    def __init__(self, folder: Path, name: str, count: int, batch: int, rank: Rank, regions: int = 1) -> None:
        self.folder, self.name, self.regions = folder, name, regions
        batch = max(1, batch // regions)
        batches = [range(i, min(i + batch, count)) for i in range(0, count, batch)]
        sixteenth = len(batches) // (16 * rank.world_size)  # what a kill costs at most
        size = max(1, min(IMAGES_PER_BLOCK // batch, sixteenth))
        self.blocks = [batches[i:i + size] for i in range(0, len(batches), size)]
        self.todo = [block for block in self.blocks[rank.rank::rank.world_size] if not self.file(block).is_file()]

    def file(self, block: Block) -> Path:
        return self.folder / f"{self.name}.{block[0].start}-{block[-1].stop}.npz"

    def write(self, block: Block, rows: np.ndarray, indices: np.ndarray, bad: Noted) -> None:
        """Finish a block: rows [n, dim], their images' indices [n], [(index, reason)] of unreadable and blank ones."""
        with replacing(self.file(block)) as temporary, open(temporary, "wb") as out:
            np.savez(out, rows=rows, indices=indices, bad=json.dumps(bad))

    def read(self, block: Block) -> tuple[np.ndarray, np.ndarray, Noted]:
        try:
            with np.load(self.file(block)) as file:
                return file["rows"], file["indices"], [tuple(entry) for entry in json.loads(str(file["bad"]))]
        except (OSError, ValueError, zipfile.BadZipFile):
            raise InputError(f"{self.file(block)} cannot be read; delete it and go on with --resume auto") from None

    def collect(self) -> tuple[np.ndarray, np.ndarray, Noted]:
        """All finished rows [n, dim] as a memory map, their images' indices [n], [(index, reason)] of unreadable and
        blank ones."""
        indices, bad, done = [], [], 0
        shape = self.regions * self.blocks[-1][-1].stop, self.read(self.blocks[0])[0].shape[1]
        rows = np.lib.format.open_memmap(self.folder / f"{self.name}.npy", "w+", np.float32, shape)
        for block in self.blocks:
            part, some, unreadable = self.read(block)
            rows[done:done + len(some)] = part
            done += len(some)
            indices.append(some)
            bad += unreadable
        return rows[:done], np.concatenate(indices), bad


# ---------------------------------------------------------------------------------------------------------------------
# Images through the network


def describe_views(describe: Callable, paths: Sequence[str], root: str | Path, pipelines: list[list],
                   preprocessing: Preprocessing, seed: int, workers: int, rank: Rank) -> list[torch.Tensor]:
    """Describe images `paths` of `root` in a view by each of the pipelines: -> for each, describe(images [B, 3, s, s])
    [n, d] on the CPU. An unreadable image is replaced as in training."""
    views = Views(root, paths, preprocessing, pipelines, seed)
    batches = [[(0, i) for i in range(start, min(start + 64, len(paths)))] for start in range(0, len(paths), 64)]
    loader = make_loader(views, batches, collate_views, workers, rank)
    rows = []
    with torch.inference_mode():
        for images, *_ in tqdm(loader, "images", unit="batch", leave=False):
            images = images.to(rank.device, non_blocking=True, memory_format=torch.channels_last)
            rows.append(describe(images).float().cpu().chunk(len(pipelines)))
    return [torch.cat(parts) for parts in zip(*rows)]


@torch.inference_mode()
def describe_images(describe: Callable, dim: int, blocks: Blocks, paths: Sequence[str], preprocessing: Preprocessing,
                    workers: int, rank: Rank, strict: bool = False, boxes: Sequence[Box] = (WHOLE,)) -> None:
    """Write this rank's unfinished blocks; `describe`: images [B, 3, h, w] of `paths` -> rows [B, dim]. With several
    `boxes` an image has a row for each, one after another."""
    batches = [batch for block in blocks.todo for batch in block]
    loader = iter(make_loader(WholeImages(paths, preprocessing, boxes), batches, collate_images, workers, rank))
    with tqdm(total=sum(map(len, batches)), desc=blocks.name, unit="image", disable=not rank.is_main) as bar:
        for block in blocks.todo:
            rows, indices, bad = [torch.empty(0, dim)], [], []
            for batch in block:
                sizes, noted = next(loader)
                if strict and (unreadable := [(i, reason) for i, reason in noted if reason != BLANK]):
                    raise WorkError(f"{paths[unreadable[0][0]]}: {unreadable[0][1]}")
                for good, images in sizes:
                    images = images.to(rank.device, non_blocking=True, memory_format=torch.channels_last)
                    described = describe(images).float().cpu().unflatten(0, (len(boxes), len(good)))
                    rows.append(described.transpose(0, 1).flatten(0, 1))
                    indices += [i for i in good for _ in boxes]
                bad += noted
                bar.update(len(batch))
            blocks.write(block, torch.cat(rows).numpy(), np.array(indices, dtype=int), bad)


# ---------------------------------------------------------------------------------------------------------------------
# train.py --mode extract


@dataclass(frozen=True)
class Job:
    """An extraction: what describes, which images, in which regions each query, and the file it ends in."""
    source: Source
    groups: dict[str, Group]
    boxes: list[Box]
    h5: Path

    def boxes_of(self, group: str) -> list[Box]:
        """Only queries are described in regions."""
        return self.boxes if group == "query" else [WHOLE]

    @property
    def lock(self) -> Path:
        return self.h5.with_name(f".{self.h5.name}.lock")


def prepare_extraction(args: Args) -> tuple[Args, Job]:
    """Find checkpoint, images and ids before anything is computed."""
    args, source = find_source(args)
    groups = {LETTERS[letter]: list_group(args, LETTERS[letter]) for letter in LETTERS if letter in args.target_set}
    if args.calibrate and args.resize == "short":
        if "calibrate" in args.given:
            raise InputError(f"--calibrate {args.calibrate}: the edited copies are squares; not with --resize short")
        args = args.replace(calibrate=0)
    if args.calibrate:
        parse_ops(args.view1, args.op_prob, "--view1")
    boxes = parse_regions(args.query_regions)
    if len(boxes) > 1 and args.resize == "short":
        raise InputError(f"--query-regions {args.query_regions}: not with --resize short, where sizes differ")
    name = f"fb-isc-submission{'-subset' * args.eval_subset}"
    h5 = args.out / (name + (f".shard-{args.shard.replace('/', '-of-')}" if args.shard else "") + ".h5")
    if h5.parent.is_dir():
        check_output("--exp", h5)
    if h5.is_file():
        with Descriptors(h5):  # groups of it may stay, and what is noted of them
            read_skipped(beside(h5, "skipped")), read_skipped(beside(h5, "blank"))
    return args, Job(source, groups, boxes, h5)


def output_folder(args: Args) -> OutputFolder:
    """exp/NAME/extract, for the process that leads; not made yet. Raises InputError where it holds other files."""
    def older(folder: Path) -> list[str]:
        return [name for name in os.listdir(folder) if name.startswith("fb-isc-submission")]

    return OutputFolder(args.out, "--exp", older, parents=True, shared=True)


def run_extraction(args: Args) -> None:
    """The command line, in as many processes as it says."""
    quiet_timm()
    folder = output_folder(args) if leads(args) else contextlib.nullcontext()
    args, job = prepare_extraction(args)
    with folder, locked(job.lock, job.h5) if leads(args) else contextlib.nullcontext():
        launch(extract, args, job)


def extract(args: Args, job: Job, rank: Rank) -> None:
    """Describe all images, each rank every n-th block of them; the main one writes the file from the blocks."""
    with record(beside(job.h5, "run", ".json") if rank.is_main else None, args) as run:
        extract_recorded(args, job, rank, run)


def extract_recorded(args: Args, job: Job, rank: Rank, run: Record) -> None:
    quiet_timm()
    net = load_net(args, job.source)
    preprocessing = Preprocessing.of(args, net)
    net = net.ready(args.input_size, rank.device, pick_precision(args, rank.device))
    print(f"=> network   {job.source.arch_tag or 'of another program'}, {net.dim}-d, input {args.input_size} px "
          f"({args.resize})" + f", GeM p {args.gem_eval_p:g}" * bool(job.source.arch_tag)
          + f", from {job.source.file or args.backbone_weights or 'random weights'}\n"
          f"=> device    {rank.world_size} process{'es' * (rank.world_size > 1)} on {rank.device.type}, "
          f"{threads_in_words()}")
    if not job.source.graph:  # whose memory nobody can look into
        check_memory(args, job, net, rank)
    folder = job.h5.with_suffix(".blocks")
    if rank.is_main:
        paths = json.dumps([group.paths for group in job.groups.values()])
        open_folder(folder, settings_of(args, job.source) | {
            "processes": rank.world_size, "batch_size": args.batch_size,
            "photos": hashlib.sha256(paths.encode()).hexdigest(), "query_regions": args.query_regions},
            bool(args.resume))
    gather_objects(None)  # once the folder is there
    blocks = {name: Blocks(folder, name, len(group.paths), args.batch_size // rank.local_world_size, rank,
                           len(job.boxes_of(name))) for name, group in job.groups.items()}
    for name, group in job.groups.items():
        with run.stage(f"describe {name}"), out_of_memory(
                f"--batch-size {args.batch_size} did not fit; lower it, and --resume auto goes on"):
            describe_images(net, net.dim, blocks[name], group.paths, preprocessing, args.workers, rank, args.strict,
                            job.boxes_of(name))
    gather_objects(None)  # once every rank has written its blocks
    if rank.is_main:
        groups, noted = collect_groups(args, job, blocks)
        calibration = job.source.calibration
        if "reference" in groups:
            rows, ids = groups["reference"]
            with run.stage("calibrate"):
                calibration = calibrate(args, net, preprocessing, rows, ids, job.groups["reference"], noted,
                                        rank) or calibration
        run.counts |= {name: len(ids) for name, (_, ids) in groups.items()} | {
            "blank": (blank := sum(reason == BLANK for _, reason in noted)), "skipped": len(noted) - blank}
        with run.stage("write"):
            write_results(args, job, groups, noted, calibration)
        shutil.rmtree(folder)


def check_memory(args: Args, job: Job, net: Any, rank: Rank) -> None:
    """Raise InputError where a batch and those being loaded do not fit into the memory that is free, the same in all
    ranks."""
    size, regions = args.input_size, max(len(job.boxes_of(name)) for name in job.groups)
    shape = size, size * 3 // 2 if args.resize == "short" else size
    each, fixed = footprint(net, shape, rank.device, training=False)
    free = free_memory(rank.device)

    def need(batch: int) -> float:
        rows = max(batch // regions, 1) * regions
        on_device = fixed + each * rows
        if rank.device.type == "cuda":
            return on_device
        return on_device * rank.local_world_size + size_of_memory(args.workers, rank, (rows, *shape, 3))

    world = rank.local_world_size
    batch = min(args.batch_size // world, max(len(group.paths) for group in job.groups.values()) * regions)
    fits = min(gather_objects(largest(lambda n: need(n) <= free, batch)))
    if fits < batch:
        raise InputError(f"--batch-size {args.batch_size} needs {told(need(batch), free, rank.device)}; what fits: "
                         + (f"--batch-size {fits * world}" if fits else "a smaller --input-size"))


def collect_groups(args: Args, job: Job, blocks: dict[str, Blocks]) -> tuple[dict, Odd]:
    """{group: (rows [n, dim], ids [n])} of the finished blocks, and [(path, reason)] of images left out and of those
    that are BLANK: described, but as like to each other as copies are."""
    groups, noted = {}, []
    for name, group in job.groups.items():
        rows, indices, bad = blocks[name].collect()
        noted += [(group.paths[i], reason) for i, reason in bad] + group.odd
        groups[name] = rows, [group.ids[i] for i in indices]
        if not len(rows):
            write_skipped(file := beside(job.h5, "skipped"), noted)
            raise InputError(f"none of the {len(group.paths)} images in {args.dir / FOLDERS[name]} can be read, see "
                             f"{file}")
    return groups, noted


def calibrate(args: Args, net: Callable, preprocessing: Preprocessing, rows: np.ndarray, ids: list[str], group: Group,
              noted: Odd, rank: Rank) -> dict | None:
    """Measure the calibration on the archive, references `ids` [n] with descriptors `rows` [n, dim]: edited copies of
    --calibrate of them, at most half, against the others, all without blank ones. None for a shard and for too few."""
    paths, blank = dict(zip(group.ids, group.paths)), {path for path, reason in noted if reason == BLANK}
    usable = np.array([i for i, name in enumerate(ids) if paths[name] not in blank], dtype=int)
    n = min(args.calibrate, len(usable) // 2)
    if n < LEAST_CALIBRATED or args.shard:
        return None
    chosen, others = np.split(usable[np.random.default_rng(0).permutation(len(usable))], [n])
    copies, = describe_views(net, [paths[ids[i]] for i in chosen], "", [parse_ops(args.view1, args.op_prob)],
                             preprocessing, args.seed or 0, args.workers, rank)
    blocks = (rows[part] for part in np.array_split(np.sort(others), -(-n * len(others) // 2**24)))
    return measure(copies.numpy(), rows[chosen], blocks, "references")


def settings_of(args: Args, source: Source) -> dict:
    """What rows depend on, as it stands in the descriptor file: only rows of the same settings are put together."""
    names = FROM_CHECKPOINT if source.arch_tag else (*OF_IMAGES, "mean", "std")
    settings = {name: getattr(args, name) for name in names} | {
        "arch": source.arch_tag, "checkpoint_sha256": source.sha256, "contaminated": source.contaminated or "",
        "extract_from": args.extract_from * (args.head == "simsiam"), "shard": args.shard or ""}
    return {name: value for name, value in settings.items() if value not in ("", None)}


def write_results(args: Args, job: Job, groups: dict, noted: Odd, calibration: dict | None) -> None:
    """Write the descriptor file, skipped.csv and blank.csv; groups of an earlier run with the same settings stay in
    them, a file of other settings is kept under a name with a hash of these. Score it where there is truth."""
    settings, h5, keep, backup = settings_of(args, job.source), job.h5, [], None
    if h5.is_file():
        with Descriptors(h5) as old:
            before = {name: str(old.attrs.get(name)) for name in settings}
            keep, measured = [name for name in old.groups if name not in groups], old.attrs.get("calibration")
        if before != {name: str(value) for name, value in settings.items()}:
            keep = []
            tag = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:8]
            backup = h5.with_name(f"{h5.stem}.{tag}.h5")
    if "reference" in keep:  # it was measured on them
        calibration = measured
    others = {"checkpoint": shown(job.source.file or args.backbone_weights or "random weights"),
              "file_sha256": job.source.file_sha256, "versions": versions()}
    others |= {"preset": args.preset} if args.preset else {}
    others |= {"calibration": calibration} if calibration else {}
    regions = None
    if len(job.boxes) > 1 and "query" in groups:
        regions = np.tile(job.boxes, (len(groups["query"][1]) // len(job.boxes), 1))
    new = h5.with_name(f".{h5.stem}.new.h5") if backup else h5  # the earlier file is renamed once this one is whole
    write_descriptors(new, groups, settings | others, keep, regions)
    if backup:
        os.replace(h5, backup)
        os.replace(new, h5)
        print(f"=> kept the earlier file of other settings as {backup}; delete it when you do not need it")
    skipped, blank = write_noted(args, h5, noted, keep)
    print(f"=> wrote {h5}: " + ", ".join(f"{len(rows):,} {name}" for name, (rows, _) in groups.items()) +
          (f"; {len(skipped):,} skipped{not_read(skipped)}, see {beside(h5, 'skipped')}" if skipped else "") +
          (f"; {len(blank):,} of one flat colour, see {beside(h5, 'blank')}" if blank else ""))
    truth = args.dir / "public_ground_truth.csv"
    if {"query", "reference"} <= set(groups) and truth.is_file() and not (args.dryrun or args.shard):
        sys.stdout.flush()
        command = [sys.executable, COMMANDS / "eval_metrics.py", h5, truth]
        if subprocess.run(command + ["--allow-contaminated"] * bool(job.source.contaminated)).returncode:  # it says so
            raise WorkError(f"scripts/eval_metrics.py failed on {h5}")


def write_noted(args: Args, h5: Path, noted: Odd, keep: list[str]) -> tuple[Odd, Odd]:
    """skipped.csv and blank.csv of [(path, reason)] and what they hold of the groups `keep`; both parts of `noted`."""
    kept = tuple(shown(args.dir / FOLDERS[name]) + os.sep for name in keep)
    parts = [row for row in noted if row[1] != BLANK], [row for row in noted if row[1] == BLANK]
    for file, part in zip((beside(h5, "skipped"), beside(h5, "blank")), parts):
        write_skipped(file, part + [row for row in read_skipped(file) if row[0].startswith(kept)])
    return parts


def versions() -> dict[str, str]:
    """Of the libraries that a result depends on."""
    import pytorch_metric_learning
    import timm
    import torchvision
    modules = torch, torchvision, timm, pytorch_metric_learning, np, sys.modules.get("onnxruntime")
    return {module.__name__: str(module.__version__) for module in modules if module}


# ---------------------------------------------------------------------------------------------------------------------
# In other programs


def load_descriptor(weight: str | Path = DEFAULT, device: str = "cpu",
                    **settings: object) -> Callable[[Sequence], np.ndarray]:
    """A file that --weight takes as a function: images -> float32 [n, dim], rows of unit length.

        from copydet import load_descriptor
        descriptor = load_descriptor()      # or of a file: "exp/v31/train/checkpoint_0004.pth.tar"
        descriptor = load_descriptor("sscd_disc_mixup.torchscript.pt", preset="sscd", allow_code=True)
        vectors = descriptor(["a.jpg", "b.png"])

    Images are paths or PIL images, or one of them; batches are up to the caller. `settings` are flags of train.py that
    win over the file's, such as input_size=320, resize="square", gem_eval_p=1.0, mean=[0.5, 0.5, 0.5].

    Raises InputError for a file that cannot be used or a setting that does not exist, OSError for an image that
    cannot be read.
    """
    args = parse_args(["--mode", "extract"])
    if unknown := sorted(set(settings) - vars(args).keys()):
        raise InputError(f"load_descriptor: no such setting: {', '.join(unknown)}")
    if (preset := settings.get("preset")) and preset not in PRESETS:
        raise InputError(f"load_descriptor: preset {preset}: none of {', '.join(PRESETS)}")
    args, source = take_source(Args(vars(args) | settings, settings), weight)
    net = load_net(args, source)
    preprocessing = Preprocessing.of(args, net)
    net = net.ready(args.input_size, torch.device(device))

    @torch.inference_mode()
    def descriptor(images: Sequence | str | Path | Image.Image) -> np.ndarray:
        images = [images] if isinstance(images, (str, Path, Image.Image)) else images
        if not len(images):
            return np.empty((0, net.dim), np.float32)
        batches = [[image] for image in images] if args.resize == "short" else [images]
        return torch.cat([net(preprocessing.prepare(batch).to(device)) for batch in batches]).cpu().numpy()

    return descriptor
