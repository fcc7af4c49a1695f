"""Views on their way to the device: batches of bytes, the order of the images, and the processes that load them."""
from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cv2
import numpy as np
import torch
import torchvision.transforms.functional as TF

from copydet.common import InputError
from copydet.distributed import Rank, libc
from copydet.options import Args


class Images:
    """Images or views on their way to the device: bytes, a quarter of what `to` makes of them there, and beside them
    the noise of erased parts.

    Attributes: pixels: uint8 [n, h, w, 3]; boxes: [(row, top, left, height, width)] of erased parts; noise: their
    normalised values one after the other, float32 [sum of 3 * height * width]: one tensor, as each takes a file
    descriptor.
    """

    def __init__(self, pixels: torch.Tensor, boxes: list[tuple], noise: torch.Tensor, mean: Sequence[float],
                 std: Sequence[float]) -> None:
        self.pixels, self.boxes, self.noise, self.mean, self.std = pixels, boxes, noise, mean, std

    @classmethod
    def of(cls, views: Sequence[tuple[np.ndarray, tuple | None]], mean: Sequence[float],
           std: Sequence[float]) -> Images:
        """Of views [(pixels [s, s, 3], erased part as `erased_part` draws it or None)]."""
        parts = [(i, *erased) for i, (_, erased) in enumerate(views) if erased]
        noise = [TF.normalize(torch.from_numpy(noise), mean, std).flatten() for *_, noise in parts]
        return cls(torch.from_numpy(np.stack([pixels for pixels, _ in views])),
                   [(i, top, left, *noise.shape[1:]) for i, top, left, noise in parts],
                   torch.cat([torch.empty(0), *noise]), mean, std)

    def __len__(self) -> int:
        return len(self.pixels)

    def pin_memory(self) -> Images:
        return Images(self.pixels.pin_memory(), self.boxes, self.noise.pin_memory(), self.mean, self.std)

    def to(self, device: torch.device | str, non_blocking: bool = False,
           memory_format: torch.memory_format = torch.channels_last) -> torch.Tensor:
        """Normalised float32 [n, 3, s, s] on the device, channels last as the pixels are."""
        mean, std = (torch.tensor(x).to(device, non_blocking=True) for x in (self.mean, self.std))
        side = self.pixels.shape[2]
        pinned = self.pixels.is_pinned()  # else a loading process may write over what is not copied yet
        rows = self.pixels.to(device, non_blocking=non_blocking and pinned).flatten(2)
        rows = rows.float()  # long rows: the fast way on CPUs
        rows.mul_((1 / 255 / std).repeat(side)).sub_((mean / std).repeat(side))
        images = rows.unflatten(2, (side, 3)).permute(0, 3, 1, 2)
        noise = self.noise.to(device, non_blocking=non_blocking)
        for row, top, left, height, width in self.boxes:
            part, noise = noise[:3 * height * width].view(3, height, width), noise[3 * height * width:]
            images[row, :, top:top + height, left:left + width] = part
        return images


def collate_views(items: Sequence[tuple], out: torch.Tensor | None = None) -> tuple[Images, torch.Tensor, list, list]:
    """-> Images of views * batch, view after view, labels alike, unreadable images, failed operations. `out`: memory
    for the pixels, uint8 [views, batch, s, s, 3]."""
    views, labels, unreadable, failed = zip(*items)
    boxes = [(row * len(items) + i, *box) for i, item in enumerate(views) for row, *box in item.boxes]
    images = Images(torch.stack([item.pixels for item in views], 1, out=out).flatten(0, 1), boxes,
                    torch.cat([item.noise for item in views]), views[0].mean, views[0].std)
    return images, torch.tensor(labels).T.flatten(), sum(unreadable, []), sum(failed, [])


def shape_of_batch(args: Args, images: int) -> tuple:
    """Of the pixels of the views of so many images: [views, images, s, s, 3]."""
    return args.ncrops + args.negatives, images, args.input_size, args.input_size, 3


class EpochBatches:
    """This process's batches of (epoch, image index); the order depends on (seed, epoch) only, the tail is dropped.

    An epoch ends after `limit` steps, if that is not 0.
    """

    def __init__(self, count: int, batch: int, seed: int, rank: int, world: int, limit: int = 0) -> None:
        self.count, self.batch, self.seed, self.rank, self.world, self.limit = count, batch, seed, rank, world, limit

    def steps(self) -> int:
        """Of an epoch."""
        whole = self.count // (self.batch * self.world)
        return min(whole, self.limit) if self.limit else whole

    def after(self, epoch: int, done: int, epochs: int) -> Iterator[list[tuple[int, int]]]:
        """The batches after `done` steps of `epoch`, up to the end of epoch `epochs` - 1."""
        for epoch in range(epoch, epochs):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            for step in range(done, self.steps()):
                first = (step * self.world + self.rank) * self.batch
                yield [(epoch, int(i)) for i in order[first:first + self.batch]]
            done = 0


def collate_images(items: Sequence[tuple]) -> tuple[list[tuple[list[int], Images]], list[tuple[int, str]]]:
    """-> [(indices of images, their Images)], one for each size that they come in, and [(index, reason)] of unreadable
    and of blank ones."""
    sizes: dict[tuple, list] = {}
    for i, images, _ in items:
        if images is not None:
            sizes.setdefault(images.pixels.shape, []).append((i, images))
    return [([i for i, _ in good], collate_views([(images, [0], [], []) for _, images in good])[0])
            for good in sizes.values()], [(i, reason) for i, _, reason in items if reason is not None]


PREFETCHED = 2  # batches that each loading process has ready


class CollateInPlace:
    """`collate`(items, out) with memory `out`, uint8, that the loading processes share with this one and use again; its
    `shape` is (processes, batches of each, ...). To map and unmap new memory for each batch keeps this process from its
    work: Python lets nothing else run meanwhile."""

    def __init__(self, collate: Callable, shape: tuple) -> None:
        self.collate, self.filled = collate, 0
        memory = torch.UntypedStorage._new_shared(math.prod(shape))
        self.memory = torch.empty(0, dtype=torch.uint8).set_(memory).view(shape)
        ForkingPickler.loads(ForkingPickler.dumps(self.memory))  # torch then knows it in what the processes send

    def __call__(self, items: Sequence[tuple]) -> Any:
        process: Any = torch.utils.data.get_worker_info()
        mine = self.memory[process.id]
        self.filled += 1
        return self.collate(items, mine[self.filled % len(mine)])


def shape_of_memory(workers: int, rank: Rank, shape: tuple) -> tuple:
    """Of the batches that this rank's loading processes fill in turns, each with pixels of `shape`."""
    return math.ceil(workers / rank.local_world_size), PREFETCHED + 1, *shape


def size_of_memory(workers: int, rank: Rank, shape: tuple) -> int:
    """Its bytes, of all ranks of this machine."""
    return rank.local_world_size * math.prod(shape_of_memory(workers, rank, shape))


def check_shared_memory(workers: int, rank: Rank, shape: tuple) -> None:
    """Raise InputError if batches with pixels of `shape` for each rank of this machine do not fit into shared memory;
    a quarter more is for the rest."""
    size = 1.25 * size_of_memory(workers, rank, shape)
    if os.path.isdir("/dev/shm") and size > (free := shutil.disk_usage("/dev/shm").free):
        raise InputError(f"-j {workers} with a --batch-size of {shape[1] * rank.local_world_size} needs "
                         f"{size / 2**30:.1f} GiB of shared memory, /dev/shm has {free / 2**30:.1f} GiB free; lower "
                         "them, or in Docker give --shm-size")


def make_loader(data: torch.utils.data.Dataset, batches: Iterable, collate: Callable, workers: int, rank: Rank,
                shape: tuple | None = None) -> torch.utils.data.DataLoader:
    """DataLoader of batches [indices], which takes no number from the global generator. With the `shape` of each
    batch's pixels their memory is used again: then a batch holds until the next one is taken. Its processes are forked,
    which is at once, where a process that was spawned itself would spawn them. `workers`: of all ranks of this machine.
    """
    workers = math.ceil(workers / rank.local_world_size)
    if shape and workers:
        collate = CollateInPlace(collate, shape_of_memory(workers * rank.local_world_size, rank, shape))
    forked = workers and sys.platform == "linux"
    if forked and rank.device.type == "cpu":
        libc("malloc_trim", 0)  # after a fork, each page that was freed and kept would be copied when it is used again
    return torch.utils.data.DataLoader(
        data, batch_sampler=batches, collate_fn=collate, num_workers=workers, generator=torch.Generator(),
        prefetch_factor=PREFETCHED if workers else None, pin_memory=rank.device.type == "cuda",
        multiprocessing_context="fork" if forked else None, worker_init_fn=one_thread)


def one_thread(_: int) -> None:
    """Loading processes have a core each, and OpenCV's threads do not outlive a fork."""
    cv2.setNumThreads(0)
