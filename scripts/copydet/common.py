"""What every module and command shares: errors in one line, files that appear when they are whole. Nothing heavy."""
from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parents[2]  # of the project


class InputError(Exception):
    """A wrong input. Its text is one line that names the file, row or flag; commands print it and exit with 2."""


class WorkError(Exception):
    """What failed while working, in one line; commands print it and exit with 1."""


def first_three(names: Sequence | np.ndarray) -> str:
    """Sequence of names -> "a, b, c and 4 more"."""
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, renamed to `path` at the end, removed if anything fails on the way."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def tell(text: str) -> None:
    """Print a command's last word to stderr, after its name."""
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)


def in_a_line(error: Exception) -> str:
    """What an error says. One that comes from a loading process brings its traceback: then the last line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def run_main(work: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Do the work of a command -> its exit code, the one place where errors become one line: 0 done, 1 failed while
    working (WorkError, OSError), 2 wrong input (InputError), 130 Ctrl-C, told as `stopped`."""
    try:
        return work() or 0
    except InputError as error:
        tell(in_a_line(error))
        return 2
    except (WorkError, OSError) as error:
        tell(in_a_line(error))
        return 1
    except KeyboardInterrupt:
        tell(stopped)
        return 130
