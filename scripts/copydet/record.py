"""run.json: what a run was asked for, found and spent, for programs that read what people are told."""
from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from copydet import __version__
from copydet.common import WARNED, InputError, in_a_line, replacing

LIBRARIES = ("torch", "torchvision", "timm", "pytorch_metric_learning", "numpy", "cv2", "PIL", "h5py", "faiss",
             "onnxruntime")  # those that are loaded are told


class Record:
    """Of a run, as it goes. Attributes: counts: {what: number}; seconds: {stage: seconds}."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.settings = vars(args)
        self.began, self.start = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
        self.warned = len(WARNED)
        self.counts: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done in here counts for this stage; several times add up."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.monotonic() - start, 3)

    def write(self, file: Path, outcome: str, error: str | None = None) -> None:
        loaded = {name: sys.modules[name] for name in LIBRARIES if name in sys.modules}
        versions = {"python": platform.python_version(), "copydet": __version__,
                    **{name: str(getattr(module, "__version__", "")) for name, module in loaded.items()}}
        told = {"command": sys.argv, "started": self.began.isoformat("T", "seconds"),
                "outcome": outcome, "error": error,
                "seconds": self.seconds | {"total": round(time.monotonic() - self.start, 3)}, "counts": self.counts,
                "warnings": WARNED[self.warned:], "settings": self.settings, "versions": versions}
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(told, indent=2, default=str) + "\n", encoding="utf-8")


@contextlib.contextmanager
def record(file: Path | None, args: argparse.Namespace) -> Iterator[Record]:
    """The Record of what is done in here, written to `file` (None: nowhere) with its outcome: running, and at the end
    done; failed, and the error in a line; or stopped. A wrong input is no run: an earlier record stays."""
    run = Record(args)
    if not file:
        yield run
        return
    before = file.read_bytes() if file.exists() else None
    with contextlib.suppress(OSError, InputError):  # a full disk is told by who needs it
        run.write(file, "running")
    try:
        yield run
    except InputError:
        with contextlib.suppress(OSError, InputError):
            if before is None:
                file.unlink(missing_ok=True)
            else:
                with replacing(file) as temporary:
                    temporary.write_bytes(before)
        raise
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt) or isinstance(error, SystemExit) and error.code == 130
        with contextlib.suppress(OSError, InputError):  # the disk may be full
            run.write(file, *(["stopped"] if stopped else ["failed", in_a_line(error)]))
        raise
    run.write(file, "done")


def check_record(flag: str, file: Path) -> None:
    """Raise InputError, naming `flag`, where a file of this name is there and no record."""
    if not file.exists():
        return
    try:
        ours = "outcome" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise InputError(f"{flag}: {file} is not of this program; rename it")
