#!/usr/bin/env python3
"""Measure this machine: views, decoding, training step, extraction, start and search, each beside a floor.

    python scripts/bench.py views decode --images IMAGES --side 1000 -o bench.json
    python scripts/bench.py train loop extract --images IMAGES -a tf_efficientnet_lite0 --backbone-weights LITE0.pth
    python scripts/bench.py start --images IMAGES --side 64 --device cpu
    python scripts/bench.py search --compare bench.json

Images are copied to --side px first; smaller ones are enlarged, which leaves out the detail that slows real decoding.
Where there are fewer than --count they come again.
Every figure and the one it is compared with are measured in turns, --repeats times; the table shows medians. `views`
and `decode` use one core. Floors: the notes' pipeline as written, with AugLy and torchvision (views); Pillow at full
size (decode); forward, backward and optimizer on a ready batch (train, and loop, which trains from files); forward or
decoding alone, whichever is longer (extract); os.walk (start); one faiss search (search). Below the table a line says
how far each figure is from what it cannot do without, and what limits it: for views decoding and resizing, for decode
a memory copy of the pixels, for others the floor. Other flags go to train.py.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from PIL import Image

from copydet.common import ROOT, InputError, WorkError, check_file, check_output, replacing, run_main, warn
from copydet.descriptors import Descriptors, write_descriptors
from copydet.images import ImageFile, UnreadableImage, list_images, not_read, open_image
from copydet.options import Args
from copydet.options import parse_args as parse_train_args
from copydet.options import positive

if TYPE_CHECKING:  # imported where they are used: sections that do without them start at once
    import torch

    from copydet.augmentations import Augmentation
    from copydet.distributed import Rank
    from copydet.network import Descriptor
    from copydet.views import Views
    from train import Trainer

P = ParamSpec("P")
R = TypeVar("R")
View = Callable[[Image.Image], "torch.Tensor"]  # float32 [3, s, s]


class Figure(NamedTuple):
    """What a section measures: a line of the table."""
    what: str
    value: float
    unit: str
    floor: float | None = None
    verdict: str = ""  # how far from what cannot be undercut, and what limits it


def verdict(share: float, of: str, limit: str) -> str:
    """A figure's verdict: it is `share` of the rate of what it cannot do without."""
    return f"{share:.2f} of {of}; limited by {limit}"


def plain_pair(size: int, q: float = 0.2, mean: Sequence[float] = (0.5,) * 3,
               std: Sequence[float] = (0.5,) * 3) -> tuple[View, View]:
    """Moderate and hard views of the notes' v31, as written there (AugLy, torchvision)."""
    import augly.image as A
    import augly.utils
    import torchvision.transforms as T
    web, mobile = (os.path.join(augly.utils.SCREENSHOT_TEMPLATES_DIR, name) for name in ("web.png", "mobile.png"))
    emoji = augly.utils.SMILEY_EMOJI_DIR

    def text(img: Image.Image) -> Image.Image:
        return A.overlay_text(img, text=[random.randrange(1, 1000) for _ in range(5)],
                              font_size=random.uniform(0.1, 0.3), color=tuple(random.choices(range(256), k=3)),
                              x_pos=random.uniform(0, 0.5), y_pos=random.uniform(0, 0.5))

    def smiley(img: Image.Image) -> Image.Image:
        return A.overlay_emoji(img, emoji_path=os.path.join(emoji, random.choice(os.listdir(emoji))),
                               emoji_size=random.uniform(0.1, 0.3), x_pos=random.uniform(0, 1),
                               y_pos=random.uniform(0, 1))

    jpeg = A.OneOf([A.EncodingQuality(quality=k) for k in (10, 20, 30, 50)], p=0.5)
    shuffled = [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), A.RandomPixelization(p=q),
                A.ShufflePixels(factor=0.1, p=q), jpeg,
                T.RandomGrayscale(q), A.RandomBlur(p=q), T.RandomPerspective(p=q), T.RandomHorizontalFlip(),
                T.RandomVerticalFlip(q), T.RandomApply([text], q), T.RandomApply([smiley], q)]
    to_tensor, normalize = T.ToTensor(), T.Normalize(mean, std)
    moderate = T.Compose([T.RandomResizedCrop(size, (0.5, 1)), T.RandomHorizontalFlip(), to_tensor, normalize])
    screenshot = A.OneOf([A.OverlayOntoScreenshot(template_filepath=file) for file in (web, mobile)], p=0.01)
    before = T.Compose([A.RandomRotation(p=q), screenshot, T.RandomResizedCrop(size, (0.2, 1))])
    after = T.Compose([to_tensor, T.RandomErasing(q, value="random"), normalize])

    def hard(img: Image.Image) -> torch.Tensor:
        img = before(img)
        for op in random.sample(shuffled, len(shuffled)):
            img = op(img)
        return after(img.convert("RGB"))

    return moderate, hard


def timed(work: Callable) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(repeats: int, *works: Callable) -> np.ndarray:
    """Median seconds of each work; they run in turns, after a first round that is not counted."""
    return np.median([[timed(work) for work in works] for _ in range(repeats + 1)][1:], axis=0)


def recipe(bench: argparse.Namespace, *flags: object) -> Args:
    """Arguments of train.py for the recipe of --recipe and the flags given."""
    source = ROOT / "exp" / f"{bench.recipe}.args"
    check_file(source, "--recipe")
    lines = source.read_text(encoding="utf-8").splitlines()
    file = bench.work / "recipe.args"
    file.write_text("\n".join(line for line in lines if not line.startswith(("--weight", "--pairs"))) + "\n")
    words = f"@{file}", "--exp", bench.work / "run", *bench.flags, *flags, "--seed", 1, bench.folder
    return parse_train_args([str(word) for word in words])


def dataset(bench: argparse.Namespace) -> Views:
    """Two views of each image, by --recipe."""
    from copydet.views import Preprocessing, Views, parse_ops
    args = recipe(bench)
    pipelines = [parse_ops(text, args.op_prob) for text in (args.view0, args.view1)]
    return Views(bench.folder, bench.names, Preprocessing(args.input_size, args.resize, [0.5] * 3, [0.5] * 3,
                                                          args.exif_transpose, args.decode), pipelines, args.seed)


def bench_views(bench: argparse.Namespace) -> Iterator[Figure]:
    """Pairs of views per second of one core, and the fraction of each operation."""
    import cv2
    import torch

    from copydet import augmentations, views
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    data = dataset(bench)
    moderate, hard = plain_pair(data.size)

    def plain() -> None:
        for name in bench.names:
            img = Image.open(bench.folder / name)
            torch.stack([moderate(img), hard(img)])

    def ours() -> None:
        for i in range(len(data)):
            data[(0, i)]

    random.seed(0), torch.manual_seed(0)
    slow, fast = len(data) / in_turns(bench.repeats, plain, ours)
    spent: dict[str, float] = {}
    with watched(ImageFile, spent, {"pixels": "decode"}), watched(augmentations, spent, {"resize": "resize"}), \
            watched(views, spent, {"resize": "resize"}), watched_operations(augmentations.OPS, spent):
        total = timed(ours)
    most = max(spent, key=lambda name: spent[name])
    yield Figure(f"{bench.recipe} pairs of views, {data.size} px", fast, "pairs/s", slow, verdict(
        (spent["decode"] + spent.get("resize", 0)) / total, "decoding and resizing alone",
        f"{most}, {spent[most] / total:.0%} of the time"))
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        if seconds > 0.005 * total:
            yield Figure(f"  of which {name}", 100 * seconds / total, "%")


def timing(function: Callable[P, R], spent: dict[str, float], name: str) -> Callable[P, R]:
    """The function, whose seconds are added to spent[name]."""
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] = spent.get(name, 0) + time.perf_counter() - began
        return result
    return wrapped


@contextlib.contextmanager
def watched(owner: Any, spent: dict[str, float], names: dict[str, str]) -> Iterator[None]:
    """Meanwhile the functions `names`, or a cached property, of a module or class add their time to `spent`."""
    before = {name: vars(owner)[name] for name in names}
    for name, what in names.items():
        if isinstance(before[name], functools.cached_property):
            slow = functools.cached_property(timing(before[name].func, spent, what))
            slow.__set_name__(owner, name)
            setattr(owner, name, slow)
        else:
            setattr(owner, name, timing(before[name], spent, what))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(owner, name, function)


@contextlib.contextmanager
def watched_operations(table: dict[str, Augmentation], spent: dict[str, float]) -> Iterator[None]:
    """The same of all operations of a table."""
    before = dict(table)
    table.update({name: replace(op, apply=timing(op.apply, spent, name)) for name, op in before.items()})
    try:
        yield
    finally:
        table.update(before)


def bench_decode(bench: argparse.Namespace) -> Iterator[Figure]:
    """Images decoded per second of one core, whole and as small as a 224 px input allows."""
    def decode(side: float) -> None:
        for name in bench.names:
            image = ImageFile(bench.folder / name)
            image.shrink(min(image.size) / side)
            image.pixels

    def with_pillow() -> None:
        for name in bench.names:
            np.asarray(open_image(bench.folder / name))

    pixels = [np.asarray(open_image(bench.folder / bench.names[0]))] * len(bench.names)
    pillow, whole, least, copied = len(bench.names) / in_turns(
        bench.repeats, with_pillow, lambda: decode(math.inf), lambda: decode(256), lambda: [x.copy() for x in pixels])
    for what, rate in (("decode whole", whole), ("decode for 224 px", least)):
        yield Figure(what, rate, "images/s", pillow, verdict(rate / copied, "a memory copy of the pixels",
                                                             "the JPEG decoder"))


def single_process(args: Args) -> Rank:
    """The only rank, its device ready."""
    from copydet.distributed import Rank, pick_device, prepare_device
    device = pick_device(args)
    prepare_device(device)
    return Rank(device=device)


def trainer(bench: argparse.Namespace) -> Trainer:
    """train.py's own, loaded by its file: what is measured is what it runs."""
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    assert spec and spec.loader
    script = sys.modules["train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    args, data = script.prepare_training(recipe(bench, "--sample-size", len(bench.names)))
    return script.Trainer(args, data, single_process(args))


def bench_train(bench: argparse.Namespace) -> Iterator[Figure]:
    """Images per second of a training step with a full memory, and of the bare network with the same optimizer."""
    import torch

    from copydet.batches import Images
    run = trainer(bench)
    args, device = run.args, run.device
    pixels = np.random.default_rng(0).integers(256, size=(args.batch_size * args.ncrops, *[args.input_size] * 2, 3),
                                               dtype=np.uint8)
    images = Images.of([(view, None) for view in pixels], run.net.mean, run.net.std)
    images = images.pin_memory() if device.type == "cuda" else images
    labels = torch.arange(args.batch_size).repeat(args.ncrops)
    for start in range(0, args.memory_size, len(images)):  # fill the memory
        run.criterion(torch.randn(len(images), run.net.dim, device=device), labels.to(device) + start)
    run.objective.train()

    def step() -> None:
        run.train_step(images, labels)
        done(device)

    floor, ours = len(images) / in_turns(bench.repeats, bare_step(run), step)
    limit = "the network" if ours > 0.8 * floor else "loss, memory and the batch's way to the device"
    yield Figure(f"training step, {args.arch}, {args.input_size} px, memory {args.memory_size:,}", ours, "images/s",
                 floor, verdict(ours / floor, "forward, backward and optimizer alone", limit))


def bare_step(run: Trainer) -> Callable[[], None]:
    """Forward, backward and optimizer of the network alone, on a batch that is on the device."""
    import torch
    args, device = run.args, run.device
    ready = torch.randn(args.batch_size * args.ncrops, 3, args.input_size, args.input_size, device=device)
    ready = ready.to(memory_format=torch.channels_last)

    def step() -> None:
        run.optimizer.zero_grad()
        run.net(ready).square().mean().backward()
        run.optimizer.step()
        done(device)
    return step


def bench_loop(bench: argparse.Namespace) -> Iterator[Figure]:
    """Images per second of training from files to the optimizer's step, beside the bare network."""
    from copydet.batches import PREFETCHED
    run = trainer(bench)
    args, steps = run.args, run.batches.steps()
    ready = PREFETCHED * args.workers
    batches = run.load(run.batches.after(0, 0, (bench.repeats + 1) * (1 + math.ceil(ready / steps))))
    run.objective.train()

    waited: dict[str, float] = {}

    def loop(n: int, waited: dict[str, float]) -> None:
        take = timing(lambda: next(batches), waited, "loading")
        for _ in range(n):
            images, labels, *_ = take()
            run.train_step(images, labels)
        done(run.device)

    floor, _, ours = args.batch_size * args.ncrops / (in_turns(
        bench.repeats, bare_step(run), lambda: loop(ready, {}),  # what was loaded meanwhile
        lambda: loop(steps, waited)) / [1, 1, steps])
    share = waited["loading"] * ours / ((bench.repeats + 1) * steps * args.batch_size * args.ncrops)
    yield Figure(f"{steps} steps from files, {args.arch}, {args.input_size} px, -j {args.workers}", ours, "images/s",
                 floor, verdict(ours / floor, "forward, backward and optimizer alone",
                                f"loading, waited for {share:.0%} of the time" if share > 0.1 else "the training step"))


def done(device: torch.device) -> None:
    """Wait until what was asked of it is."""
    import torch
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain_loop(net: Descriptor, paths: list[str], batches: list[range], device: torch.device) -> torch.Tensor:
    """Rows [n, dim] of images, as a loop of a few lines describes them."""
    import torch
    import torchvision.transforms as T
    transform = T.Compose([T.Resize((224, 224)), T.ToTensor(), T.Normalize(net.mean, net.std)])
    read = lambda batch: torch.stack([transform(Image.open(paths[i]).convert("RGB")) for i in batch])
    with torch.inference_mode():
        return torch.cat([net(read(batch).to(device)).float().cpu() for batch in batches])


def bench_extract(bench: argparse.Namespace) -> Iterator[Figure]:
    """Images per second of extraction, beside decoding alone and forward alone, and beside a plain loop."""
    import torch

    from copydet.batches import collate_images, make_loader
    from copydet.checkpoints import load_net, take_source
    from copydet.distributed import pick_precision
    from copydet.extraction import Block, Blocks, Noted, describe_images
    from copydet.network import Descriptor
    from copydet.views import Preprocessing, WholeImages
    args, source = take_source(recipe(bench, "--mode", "extract", "--input-size", 224, "--resize", "square",
                                      "--batch-size", 64), None)
    rank = single_process(args)
    device, net = rank.device, load_net(args, source)
    assert isinstance(net, Descriptor)
    preprocessing = Preprocessing.of(args, net)
    net.amp_dtype = pick_precision(args, device)
    faster = copy.deepcopy(net).folded(224)  # as extraction does
    net, faster = (n.to(device).to(memory_format=torch.channels_last) for n in (net, faster))
    paths = [str(bench.folder / name) for name in bench.names]
    batches = [range(i, min(i + 64, len(paths))) for i in range(0, len(paths), 64)]
    found: dict[int, np.ndarray] = {}
    plain_rows: list[torch.Tensor] = []

    class Kept(Blocks):
        """In memory, and never finished."""

        def write(self, block: Block, rows: np.ndarray, indices: np.ndarray, bad: Noted) -> None:
            found.update(zip(indices.tolist(), rows))

    blocks = Kept(bench.work, "images", len(paths), 64, rank)
    data = WholeImages(paths, preprocessing)
    ready = torch.randn(64, 3, 224, 224).to(device, memory_format=torch.channels_last)

    def decode() -> None:
        for _ in make_loader(data, batches, collate_images, args.workers, rank):
            pass

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            faster(ready[:len(batch)]).float().cpu()

    def plain() -> None:
        plain_rows[:] = [plain_loop(net, paths, batches, device)]

    @torch.inference_mode()
    def extract() -> None:
        describe_images(faster, faster.dim, blocks, paths, preprocessing, args.workers, rank)

    decoding, network, loop, ours = in_turns(bench.repeats, decode, forward, plain, extract)
    yield Figure("extraction, beside the longer of the two", len(paths) / ours, "images/s",
                 len(paths) / max(decoding, network), extraction_verdict(ours, decoding, network))
    yield Figure("  decoding alone", len(paths) / decoding, "images/s")
    yield Figure("  forward alone", len(paths) / network, "images/s")
    yield Figure("extraction, beside a plain loop", len(paths) / ours, "images/s", len(paths) / loop)
    rows, expected = np.stack([found[i] for i in range(len(paths))]), torch.cat(plain_rows).numpy()
    cosines = (rows * expected).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(expected, axis=1)
    yield Figure("  median cosine to the plain loop's descriptors", float(np.median(cosines)), "")


def extraction_verdict(ours: float, decoding: float, network: float) -> str:
    """Of an extraction's seconds and those of its parts alone."""
    longer = max(decoding, network)
    of, limit = ("forward alone", "the network") if network == longer else ("decoding alone", "decoding")
    return verdict(longer / ours, of, limit if ours < 1.5 * longer else "both, which share the cores")


def bench_start(bench: argparse.Namespace) -> Iterator[Figure]:
    """Seconds of train.py with one step over --links images, which are hard links in folders of a thousand."""
    folder, files, count = bench.work / "links", [bench.folder / name for name in bench.names], bench.links
    for i in range(count):
        if i % 1000 == 0:
            (folder / f"{i // 1000:03d}").mkdir(parents=True)
        os.link(files[i % len(files)], folder / f"{i // 1000:03d}" / f"{i:06d}.jpg")
    walk, listing = in_turns(bench.repeats, lambda: sum(len(names) for *_, names in os.walk(folder)),
                             lambda: list_images(folder))
    yield Figure(f"list {count:,} images, beside os.walk", count / listing, "files/s", count / walk, verdict(
        walk / listing, "os.walk", "the file system" if listing < 2 * walk else "the look at each name"))
    tracemalloc.start()
    paths, _ = list_images(folder)
    memory = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    yield Figure(f"  memory of {len(paths):,} paths", memory, "MiB")
    command = ["train.py", "-a", "test_efficientnet", "--no-pretrained", "--input-size", 64, "-b", 32, "--memory-size",
               64, "--sample-size", count, "--epoch-steps", 1, "--epochs", 1, "--exp", bench.work / "out",
               "--overwrite", *bench.flags]

    def run() -> None:
        if (code := subprocess.run([sys.executable, *map(str, command), folder], cwd=ROOT,
                                   stdout=subprocess.DEVNULL).returncode):
            raise WorkError(f"train.py ended with {code}, see above")

    yield Figure("  train.py with one step, from start to exit", in_turns(bench.repeats, run)[0], "s")


def bench_search(bench: argparse.Namespace) -> Iterator[Figure]:
    """Queries per second: exact top 10 of eval_metrics.py, beside one faiss search of the same arrays."""
    import faiss

    from copydet.search import search_topk
    rows = np.random.default_rng(0).standard_normal((51_000, 256), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries, references = rows[:1000], rows[1000:]
    file = bench.work / "search.h5"
    write_descriptors(file, {"reference": (references, [f"R{i:06d}" for i in range(len(references))])}, {})
    with Descriptors(file) as descriptors:
        ours, floor = 1000 / in_turns(
            bench.repeats, lambda: search_topk(queries, descriptors["reference"], 10, np.empty(0, np.int64)),
            lambda: faiss.knn(queries, references, 10))
    yield Figure("exact top 10 of 50,000 references", ours, "queries/s", floor, verdict(
        ours / floor, "faiss.knn alone", "faiss" if ours > 0.8 * floor else "reading the file and merging its blocks"))


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Figure]]] = {
    "views": bench_views, "decode": bench_decode, "train": bench_train, "loop": bench_loop,
    "extract": bench_extract, "start": bench_start, "search": bench_search}


def copy_images(bench: argparse.Namespace) -> None:
    """`--count` images of `--images`, again from the first where there are fewer."""
    paths, odd = list_images(bench.images)
    paths = paths[:bench.count]
    bench.folder.mkdir()
    copy = lambda i: copy_image(os.path.join(bench.images, paths[i]), bench.folder / f"{i:06d}.jpg", bench.side)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        skipped = [error for error in pool.map(copy, range(len(paths))) if error]
    names = sorted(os.listdir(bench.folder))
    if not names:
        raise InputError(f"no images in {bench.images}{not_read(odd)}" + "".join(f"; {error}" for error in skipped[:1]))
    if skipped:
        warn(f"{len(skipped)} images left out, first: {skipped[0]}")
    for i in range(len(names), bench.count):
        os.link(bench.folder / names[i % len(names)], bench.folder / f"more-{i:06d}.jpg")
    bench.names = sorted(file.name for file in bench.folder.iterdir())


def copy_image(path: str, to: Path, side: int) -> UnreadableImage | None:
    """A JPEG of quality 90 with the longer side at `side` px; or why not."""
    try:
        img = open_image(path)
    except UnreadableImage as error:
        return error
    scale = side / max(img.size)
    img.resize([max(1, round(side * scale)) for side in img.size], Image.Resampling.LANCZOS).save(to, quality=90)
    return None


def show(rows: list[dict], old: list[dict]) -> None:
    """The table; `old` are the rows of an earlier run."""
    before = {(row["section"], row["what"]): row["value"] for row in old}
    print(f"{'':60}{'figure':>10} {'':9}{'floor':>10}{'ratio':>7}" + f"{'before':>10}{'change':>8}" * bool(old))
    for row in rows:
        value, floor, then = row["value"], row["floor"], before.get((row["section"], row["what"]))
        print(f"{row['section']:8}{row['what']:52}{value:10.4g} {row['unit']:9}"
              + (f"{floor:10.4g}{value / floor:7.2f}" if floor else " " * 17 * bool(then))
              + (f"{then:10.4g}{value / then - 1:+8.0%}" if then else ""))
    for row in rows:
        if row["verdict"]:
            print(f"{row['section']}: {row['what']}: {row['verdict']}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--images", "--photos", metavar="DIR", help="images for all sections but search")
    parser.add_argument("--side", type=positive, default=1000, metavar="PX", help="longer side (default: %(default)s)")
    parser.add_argument("--count", type=positive, default=200, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--links", type=positive, default=1_000_000, metavar="N",
                        help="of start (default: %(default)s)")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--recipe", default="v31", metavar="NAME", help="exp/NAME.args (default: %(default)s)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--compare", metavar="FILE", help="show the figures of an earlier -o beside these")
    args, flags = parser.parse_known_args(argv)
    args.flags = flags  # the others go to train.py
    return args


def measure(bench: argparse.Namespace) -> list[dict]:
    """Rows {section, what, value, unit, floor, verdict} of the sections asked for."""
    if set(bench.sections) != {"search"} and not bench.images:
        raise InputError("--images DIR is needed")
    with tempfile.TemporaryDirectory() as work:
        bench.work, bench.folder = Path(work), Path(work) / "photos"
        if bench.images:
            copy_images(bench)
        return [{"section": name, "what": what, "value": float(value), "unit": unit,
                 "floor": None if floor is None else float(floor), "verdict": told}
                for name in bench.sections for what, value, unit, floor, told in SECTIONS[name](bench)]


def read_rows(file: str) -> list[dict]:
    """Those of an earlier run. Raises InputError: not written by -o."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--compare {file}: not written by -o ({error})") from None


def write_rows(bench: argparse.Namespace, rows: list[dict]) -> None:
    """-o: the rows, and what they were measured on."""
    settings = {name: getattr(bench, name) for name in ("side", "count", "links", "repeats", "recipe", "flags")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    with replacing(bench.output) as temporary:
        text = json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=2)
        Path(temporary).write_text(text + "\n", encoding="utf-8")


def bench_all(bench: argparse.Namespace) -> None:
    """Run the command line."""
    if bench.output:
        check_output("-o", bench.output)
    old = read_rows(bench.compare) if bench.compare else []
    rows = measure(bench)
    show(rows, old)
    if bench.output:
        write_rows(bench, rows)


def main(argv: list[str] | None = None) -> int:
    bench = parse_args(argv)
    return run_main(lambda: bench_all(bench))


if __name__ == "__main__":
    sys.exit(main())
