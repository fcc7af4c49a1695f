"""Where a run happens: device, precision, and the processes that share the work."""
import ctypes
import datetime
import errno
import math
import os
import shutil
import signal
import sys
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
from cli import fail
from descriptors import InputError


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
    device = take_device(args)
    if device.type != "cuda" and nproc > 1:
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
    except OSError as error:
        if not (error.errno in (errno.ENOSPC, errno.EDQUOT) or "errno = 28" in str(error)):  # h5py tells in words
            raise
        fail(f"no space left on the disk of {args.out}; what was finished is kept, --resume auto goes on", 1)
    finally:
        if url:
            dist.destroy_process_group()


def take_device(args):
    """Pick this process's device, as args.device_used, and get it ready."""
    device = args.device_used = pick_device(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let glibc keep the memory of tensors that are gone for the next ones. It would give each back to the system, and
    fresh pages cost more than the computing on some virtual machines (a training step of 12 s against 2.6 s)."""
    for parameter, value in ((-1, 2**31 - 1), (-2, 2**26), (-4, 0)):  # TRIM_THRESHOLD, TOP_PAD, MMAP_MAX
        libc("mallopt", parameter, value)


def libc(name, *numbers):
    """Call a function of glibc, where there is one."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function:
        function(*numbers)


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
    return None  # CPUs: with AVX-512 and AMX too, bf16 gradients of depth-wise convolutions take four times as long


PREFETCHED = 2  # batches that each loading process has ready


class CollateInPlace:
    """`collate`(items, out) with memory `out`, uint8, that the loading processes share with this one and use again; its
    `shape` is (processes, batches of each, ...). To map and unmap new memory for each batch keeps this process from its
    work: Python lets nothing else run meanwhile."""

    def __init__(self, collate, shape):
        self.collate, self.filled = collate, 0
        memory = torch.UntypedStorage._new_shared(math.prod(shape))
        self.memory = torch.empty(0, dtype=torch.uint8).set_(memory).view(shape)
        ForkingPickler.loads(ForkingPickler.dumps(self.memory))  # torch then knows it in what the processes send

    def __call__(self, items):
        mine = self.memory[torch.utils.data.get_worker_info().id]
        self.filled += 1
        return self.collate(items, mine[self.filled % len(mine)])


def shape_of_memory(args, shape):
    """Of the batches that this process's loading processes fill in turns, each with pixels of `shape`."""
    return math.ceil(args.workers / args.nproc), PREFETCHED + 1, *shape


def check_shared_memory(args, shape):
    """Stop if batches with pixels of `shape` in each process of this machine do not fit; a quarter is for the rest."""
    size = 1.25 * args.nproc * math.prod(shape_of_memory(args, shape))
    if os.path.isdir("/dev/shm") and size > (free := shutil.disk_usage("/dev/shm").free):
        fail(f"-j {args.workers} with --batch-size {args.batch_size} needs {size / 2**30:.1f} GiB of shared memory, "
             f"/dev/shm has {free / 2**30:.1f} GiB free; lower them, or in Docker give --shm-size")


def make_loader(args, data, batches, collate, shape=None):
    """DataLoader of batches [indices], which takes no number from the global generator. With the `shape` of each
    batch's pixels their memory is used again: then a batch holds until the next one is taken. Its processes are forked,
    which is at once, where a process that was spawned itself would spawn them."""
    workers = math.ceil(args.workers / args.nproc)
    if shape and workers:
        collate = CollateInPlace(collate, shape_of_memory(args, shape))
    forked = workers and sys.platform == "linux"
    if forked and args.device_used.type == "cpu":
        libc("malloc_trim", 0)  # after a fork, each page that was freed and kept would be copied when it is used again
    return torch.utils.data.DataLoader(
        data, batch_sampler=batches, collate_fn=collate, num_workers=workers, generator=torch.Generator(),
        prefetch_factor=PREFETCHED if workers else None, pin_memory=args.device_used.type == "cuda",
        multiprocessing_context="fork" if forked else None)


def gather_objects(x):
    """A picklable object of each process -> list in order of rank."""
    objects = [x] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(objects, x)
    return objects
