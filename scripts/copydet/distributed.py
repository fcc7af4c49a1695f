"""Where a run happens: ranks, devices, precision. Importing it changes nothing; `launch` does."""
from __future__ import annotations

import ctypes
import datetime
import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from copydet.common import InputError, WorkError, error_number, first_line, run_main
from copydet.machine import count_cores
from copydet.options import Args


KEPT = "what was finished is kept, --resume auto goes on"
LOST = re.compile(r"[Cc]onnection (closed|reset|refused)|Broken pipe|pair closure|NCCL|gloo")  # of a rank that is gone


@dataclass(frozen=True)
class Rank:
    """This process among those of a run, in PyTorch's terms, and its device."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1  # processes on this machine
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launch(work: Callable, args: Args, *rest: Any) -> None:
    """Run work(args, *rest, rank) here, in --nproc new processes, or in torchrun's. A new process that fails ends this
    one with its exit code. Raises InputError: more processes than GPUs, a --batch-size that they cannot share."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        place = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        return run_rank(work, args, rest, "env://", *place)
    if not args.multiprocessing_distributed:
        return run_rank(work, args, rest, None, 0, 1, args.gpu or 0, 1)
    gpus = torch.cuda.device_count() if pick_device(args).type == "cuda" else 0
    nproc = args.nproc or gpus or 1
    if gpus and nproc > gpus:
        raise InputError(f"--nproc {nproc}: this machine has {gpus} GPUs")
    if args.batch_size % nproc:
        raise InputError(f"--batch-size {args.batch_size} cannot be shared by {nproc} processes")
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the processes, which finish their step
    try:
        torch.multiprocessing.spawn(spawned, (work, args, rest, nproc), nprocs=nproc)
    except torch.multiprocessing.ProcessExitedException as error:  # PyTorch has ended the others, in 30 s at most
        if error.exit_code > 0:
            sys.exit(error.exit_code)  # it has told why
        raise WorkError(f"process {error.error_index} of {nproc} was killed ({error.signal_name}; out of memory?); "
                        f"{KEPT}") from None
    finally:
        signal.signal(signal.SIGINT, previous)


def leads(args: Args) -> bool:
    """Whether rank 0 of a run that `launch` is about to start is this process, or one that it starts."""
    return os.environ["RANK"] == "0" if "TORCHELASTIC_RUN_ID" in os.environ else args.rank <= 0


def spawned(local_rank: int, work: Callable, args: Args, rest: tuple, nproc: int) -> None:
    nodes, node = max(1, args.world_size), max(0, args.rank)
    place = node * nproc + local_rank, nodes * nproc, local_rank, nproc
    if code := run_main(lambda: run_rank(work, args, rest, args.dist_url, *place)):
        sys.exit(code)


def run_rank(work: Callable, args: Args, rest: tuple, url: str | None, rank: int, world_size: int, local_rank: int,
             local_world_size: int) -> None:
    """Join the process group at `url` (None: a single process), get the device ready, do the work, leave the group.

    Raises WorkError: the processes cannot meet, another one is gone, the disk is full.
    """
    device = pick_device(args, local_rank)
    prepare_device(device, local_world_size, args.threads)
    if url:
        backend = args.dist_backend if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, url, datetime.timedelta(hours=12), world_size, rank)
        except (RuntimeError, ValueError) as error:
            raise WorkError(f"the processes cannot meet at {url}: {str(error).splitlines()[0]}; is the port in "
                            "use?") from None
    if rank:
        sys.stdout = open(os.devnull, "w")  # one voice; errors and warnings go to stderr
    try:
        work(args, *rest, Rank(rank, world_size, local_rank, local_world_size, device))
    except OSError as error:
        if error_number(error) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise WorkError(f"no space left on the disk of {args.out}; {KEPT}") from None
    except RuntimeError as error:
        if world_size == 1 or not LOST.search(str(error)):
            raise
        raise WorkError(f"process {rank} of {world_size} has lost the others ({first_line(error)}); {KEPT}") from None
    finally:
        if url:
            dist.destroy_process_group()


def prepare_device(device: torch.device, local_world_size: int = 1, threads: int | None = None) -> None:
    """Without `threads` it has as many as cores, or its share of them: with more they would wait for each other's."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return
    keep_freed_memory()
    before, cores = torch.get_num_threads(), max(1, count_cores() // local_world_size)
    threads = threads or (cores if local_world_size > 1 else min(cores, before))
    if threads != before:
        torch.set_num_threads(threads)


def threads_in_words() -> str:
    """Those that compute on the CPU."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def keep_freed_memory() -> None:
    """Let glibc keep the memory of tensors that are gone for the next ones. It would give each back to the system, and
    fresh pages cost more than the computing on some virtual machines (a training step of 12 s against 2.6 s)."""
    for parameter, value in ((-1, 2**31 - 1), (-2, 2**26), (-4, 0)):  # TRIM_THRESHOLD, TOP_PAD, MMAP_MAX
        libc("mallopt", parameter, value)


def libc(name: str, *numbers: int) -> None:
    """Call a function of glibc, where there is one."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function:
        function(*numbers)


def pick_device(args: Args, local_rank: int | None = None) -> torch.device:
    """cuda (this rank's own, or --gpu), mps or cpu. Raises InputError: no such GPU."""
    kind, gpu = args.device, args.gpu or 0
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and torch.cuda.device_count() <= gpu:
        raise InputError(f"--device cuda --gpu {gpu}: {torch.cuda.device_count()} GPUs found")
    return torch.device(kind, gpu if local_rank is None else local_rank) if kind == "cuda" else torch.device(kind)


def pick_precision(args: Args, device: torch.device) -> torch.dtype | None:
    """dtype of the backbone's autocast, or None for fp32."""
    if args.amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return None  # CPUs: with AVX-512 and AMX too, bf16 gradients of depth-wise convolutions take four times as long


def gather_objects(x: Any) -> list:
    """A picklable object of each process -> list in order of rank."""
    objects = [x] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(objects, x)
    return objects
