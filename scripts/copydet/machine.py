"""What the machine leaves to this process: cores and memory. Imports nothing heavy."""
from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from copydet.common import read_text


def let_idle_threads_sleep() -> None:
    """Threads that wait for the next part of PyTorch's work leave their core to the loading processes, unless the
    environment says otherwise. To be called before PyTorch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def control_groups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the control groups of this process and of those above them, by which containers and batch systems set
    limits; and whether they are of version 1."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        parts = Path(group.lstrip("/")).parts
        for name in dict.fromkeys([controller, controllers]) if controllers else [""]:  # it may lie with others
            for n in range(len(parts) + 1):  # a container may see the top alone
                yield Path(root, "sys/fs/cgroup", name, *parts[:n]), bool(controllers)


def count_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: a container can have a share of them only."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [float(there)]
    for folder, version_1 in control_groups("cpu", root):
        quota = [read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")] if version_1 else (
            read_text(folder / "cpu.max").split())
        if quota and all(part.isdecimal() for part in quota) and int(quota[1]):
            shares.append(int(quota[0]) / int(quota[1]))
    return max(1, math.ceil(min(shares)))


def available_memory() -> int:
    """Bytes that this process can still take."""
    return min(free_on_machine(), *free_in_groups(), free_of_limit())


def free_on_machine(root: Path = Path("/")) -> int:
    """Bytes that the system can give away; where it does not say, all that is installed."""
    for line in read_text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_in_groups(root: Path = Path("/")) -> list[int]:
    """Bytes that each control group of this process, and those above it, may still take. Pages of files that nobody
    uses are given up before a limit counts."""
    found = [2**63]
    for folder, version_1 in control_groups("memory", root):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") if version_1 else (
            "memory.max", "memory.current", "inactive_file")
        limit, used = (read_text(folder / name).strip() for name in names[:2])
        if limit.isdecimal() and used.isdecimal():
            statistics = dict(line.split() for line in read_text(folder / "memory.stat").splitlines())
            found.append(max(0, int(limit) - int(used) + int(statistics.get(names[2], 0))))
    return found


def free_of_limit() -> int:
    """Bytes of addresses that `ulimit -v` leaves."""
    import resource
    limit, size = resource.getrlimit(resource.RLIMIT_AS)[0], read_text("/proc/self/statm").split()
    if limit == resource.RLIM_INFINITY or not size:
        return 2**63
    return max(0, limit - int(size[0]) * resource.getpagesize())
