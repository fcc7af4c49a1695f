"""What fits into memory: what a network takes for each image, measured with a few of them, and what is free."""
from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from copydet.common import NO_MEMORY, WorkError
from copydet.machine import available_memory

HEADROOM = {"cuda": 1.1, "cpu": 1.25}  # what lies between tensors and what libraries take within an operation; measured
# on a CPU with five networks: 1.12 to 1.39


def free_memory(device: torch.device = torch.device("cpu")) -> int:
    """Bytes that this process can still take on a device."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return available_memory()


class Footprint(NamedTuple):
    """Bytes of a network's work: for each image that it sees at once, and beside that; without its parameters."""
    each: float
    fixed: float

    def of(self, images: float) -> float:
        return self.fixed + self.each * images


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in it and live, without those of `known`, which were there before;
    `peak` is the most there were."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if torch.is_tensor(x) and (key := (storage := x.untyped_storage())._cdata) not in self.seen:
                self.seen.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key, storage.nbytes())
        return made

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak_of(work: Callable[[], Any], known: Iterable[torch.Tensor], device: torch.device) -> int:
    """The most bytes that `work` takes on a device, beside the tensors `known`."""
    if device.type != "cuda":
        with LiveBytes(known) as live:
            work()
        return live.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def footprint(net: torch.nn.Module, shape: tuple[int, int], device: torch.device, training: bool) -> Footprint:
    """Of images of `shape` (height, width) that `net` describes, or that it learns from: measured with two and with
    four. The network and the random numbers stay as they are."""
    net = copy.deepcopy(net).train() if training else net
    known = [*net.parameters(), *net.buffers()]
    if training:  # the first gradients of all parameters would hide those of the images
        for p in filter(lambda p: p.requires_grad, net.parameters()):
            p.grad = torch.zeros_like(p)
            known.append(p.grad)

    def step(n: int) -> None:
        outputs: Any = net(torch.zeros(n, 3, *shape, device=device).to(memory_format=torch.channels_last))
        if training:
            sum(x.sum() for x in tree_leaves(outputs)).backward()

    deterministic = torch.backends.cudnn.deterministic
    with (torch.random.fork_rng([device] if device.type == "cuda" else []), torch.set_grad_enabled(training),
          torch.backends.cudnn.flags(benchmark=False, deterministic=deterministic)):
        two, four = (peak_of(lambda: step(n), known, device) for n in (2, 4))
    each = (four - two) / 2
    return Footprint(HEADROOM.get(device.type, 1.25) * each, max(0, two - 2 * each))


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all below one that fits do; 0: none."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def told(need: float, free: float, device: torch.device) -> str:
    """Bytes in words."""
    where = "the GPU" if device.type == "cuda" else "this machine"
    return f"about {need / 2**30:,.1f} GiB of {free / 2**30:,.1f} GiB free on {where}"


@contextlib.contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """What PyTorch and Python raise in here where memory ends becomes a WorkError with this advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
        raise WorkError(f"out of memory: {advice}") from None
