"""Which cores compute. Imports nothing heavy, as the number of threads is set before PyTorch starts them.

Threads that compute wait for each other many times a step. Beside another such process each wait lasts until the other
one lets go of a core. So the threads of a process keep to those cores that other processes leave: two threads on one
core lose little, as one works while the other waits. Their number stays, and with it every bit of what they compute.
"""
from __future__ import annotations

import contextlib
import math
import os
import random
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from copydet.common import read_text

TICK = 2.0  # seconds between looks at other processes, about
ALLOWED = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset(
    range(os.cpu_count() or 1))  # cores of this process, as it was started


def count_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: a container can have a share of them only (cgroup's cpu.max)."""
    shares = [float(len(ALLOWED))]
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        for folder in {top, top / group.lstrip("/")}:  # a container may see the top alone
            quota = read_text(folder / "cpu.max").split() or [
                read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            if all(part.isdecimal() for part in quota) and int(quota[1]):
                shares.append(int(quota[0]) / int(quota[1]))
    return max(1, math.ceil(min(shares)))


def free_cores(load: Mapping[int, float], own: float, current: Collection[int], threads: int) -> frozenset[int]:
    """Of the cores with `load`, {core: share of a time that it was busy}, those that `threads` run on next: all; or
    where others leave so few that some would wait a turn, half as many as threads, which is a fair share beside
    whatever there is. Those that others use least. `own`: this process's part of the load, in cores, on `current`."""
    if 1.5 * (len(load) - others_on(load, own)) > threads:
        return frozenset(load)
    others = {core: busy - own / len(current) * (core in current) for core, busy in load.items()}
    best = sorted(load, key=lambda core: (round(others[core], 1), core not in current, random.random()))
    return frozenset(best[:math.ceil(threads / 2)])


def others_on(load: Mapping[int, float], own: float) -> float:
    """Cores that other processes keep busy."""
    return max(0.0, sum(load.values()) - own)


class SharedCores(threading.Thread):
    """Looks at times at what other processes do, and lets this process's threads run on the cores that they leave.

    Attributes: current: these cores; others: cores that other processes kept busy when last looked at.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(name="cores", daemon=True)
        self.threads, self.current, self.others, self.ended = threads, ALLOWED, 0.0, threading.Event()
        self.before = STARTED
        self.update()

    def run(self) -> None:
        while not self.ended.wait(TICK * random.uniform(0.5, 1.5)):  # not in step with another such process
            self.update()

    def update(self) -> None:
        now = look()
        passed = max(1.0, now.clock - self.before.clock)
        load = {core: (now.busy[core] - self.before.busy.get(core, 0)) / passed for core in now.busy}
        own = (now.own - self.before.own) / passed
        self.before, self.others = now, others_on(load, own)
        if load:
            self.run_on(free_cores(load, own, self.current, self.threads))

    def run_on(self, cores: frozenset[int]) -> None:
        if cores != self.current:
            self.current = cores
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(OSError):  # it has just ended
                    os.sched_setaffinity(int(thread), cores)

    def __str__(self) -> str:
        few = f", as other processes keep {self.others:.1f} busy" * (self.current != ALLOWED)
        return f"{self.threads} threads on {len(self.current)} of {len(ALLOWED)} cores{few}"


class Look(NamedTuple):
    """Ticks of the system's clock: since some time, of each core's work, of this process's and of its children's."""
    clock: float
    busy: dict[int, int]
    own: int


def look() -> Look:
    """At all processes; nothing to be seen where the system is not Linux."""
    if sys.platform != "linux":
        return Look(0, {}, 0)
    polite = os.nice(0) > 0  # else what is nicer than this process gives way
    busy = {}
    for line in read_text("/proc/stat").splitlines():
        name, *ticks = line.split()
        if name[:3] == "cpu" and name[3:].isdecimal() and int(name[3:]) in ALLOWED:
            user, nice, system = map(int, ticks[:3])
            busy[int(name[3:])] = user + system + nice * polite
    parents, used = {}, {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if fields := read_text(f"/proc/{pid}/stat").rpartition(")")[2].split():
            parents[int(pid)], used[int(pid)] = int(fields[1]), sum(map(int, fields[11:15]))
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return Look(time.monotonic() * os.sysconf("SC_CLK_TCK"), busy, sum(used.get(pid, 0) for pid in ours))


STARTED = look()


@contextlib.contextmanager
def shared_cores(threads: int, shared: bool) -> Iterator[str]:
    """In here this process's `threads` keep to the cores that others leave, where the system lets them (Linux), if they
    are to be `shared`; yields what they begin on, in words."""
    if threads == 1 or not shared or sys.platform != "linux":
        yield f"{threads} thread{'s' * (threads > 1)}"
        return
    cores = SharedCores(threads)
    cores.start()
    try:
        yield str(cores)
    finally:
        cores.ended.set()
        cores.join()
        cores.run_on(ALLOWED)


def let_idle_threads_sleep() -> None:
    """They leave cores to the loading processes, unless the environment says otherwise. Before PyTorch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def use_all_cores() -> None:
    """For a process that was forked from one whose threads keep to some."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, ALLOWED)
