"""What every module and command shares: errors in one line, files that appear when they are whole. Nothing heavy."""
from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parents[2]  # of the project
LONGEST = 200  # characters of a name in a message
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(Exception):
    """A wrong input. Its text is one line that names the file, row or flag; commands print it and exit with 2."""


class WorkError(Exception):
    """What failed while working, in one line; commands print it and exit with 1."""


def first_three(names: Sequence | np.ndarray) -> str:
    """Sequence of names -> "a, b, c and 4 more", long ones cut."""
    shown = [name if len(name) <= LONGEST else f"{name[:LONGEST]}..." for name in map(str, names[:3])]
    return ", ".join(shown) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, renamed to `path` at the end, removed if anything fails on the way. Raises
    OSError that names `path` where nothing can be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()  # so that all libraries fail alike
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        number = error_number(error)
        if number is None or not (temporary.name in str(error) or number in DISK_FULL):
            raise
        raise OSError(number, os.strerror(number), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def error_number(error: Exception) -> int | None:
    """The system's number for what went wrong; HDF5 has it in its text, whatever the error's type."""
    found = re.search(r"errno = (\d+)", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


def check_file(path: str | Path, flag: str = "") -> None:
    """Raise InputError unless `path` is a file that can be read; it tells why, after the flag that names the file."""
    where = f"{flag}: " if flag else ""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            return open(path, "rb").close()
        why = "is a folder, not a file" if os.path.isdir(path) else "is no regular file"
    except FileNotFoundError:
        raise InputError(f"{where}no such file: {path}") from None
    except OSError as error:
        why = error.strerror or str(error)
    raise InputError(f"{where}{path}: {why}")


def check_output(path: str | Path, flag: str = "-o") -> None:
    """Raise InputError unless a file can be written at `path`, which it replaces; it tells why, after the flag."""
    folder = Path(path).parent
    if os.path.isdir(path):
        raise InputError(f"{flag} {path}: is a folder")
    if not os.path.isdir(folder.resolve()):
        raise InputError(f"{flag} {path}: no such folder: {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: nothing can be written in {folder.resolve()}")


def make_folder(path: str | Path) -> None:
    """Make a folder for results, and those above it. Raises InputError where it cannot be made or written in."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(in_a_line(error)) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"nothing can be written in {path}")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises InputError: no such file, unreadable, no JSON."""
    check_file(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is broken: {error}") from None


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def tell(text: str) -> None:
    """Print a command's last word to stderr, after its name."""
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)


def in_a_line(error: BaseException) -> str:
    """What an error says. One that comes from a loading process brings its traceback: then the last line."""
    if isinstance(error, OSError) and error.strerror:
        why = os.strerror(error_number(error) or 0) if "errno = " in error.strerror else error.strerror
        names = [os.fsdecode(name) for name in (error.filename2, error.filename) if name and not isinstance(name, int)]
        links = " (a file system without links?)" * (len(names) > 1 and error.errno in NO_LINKS)
        return ": ".join([*names[:1], why]) + links
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return " ".join(text.split("\n")) or type(error).__name__


def run_main(work: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Do the work of a command -> its exit code, the one place where errors become one line: 0 done, 1 failed while
    working (WorkError, OSError, MemoryError), 2 wrong input (InputError), 130 Ctrl-C, told as `stopped`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except InputError as error:
        tell(in_a_line(error))
        return 2
    except (WorkError, OSError, MemoryError) as error:
        tell(in_a_line(error))
        return 1
    except KeyboardInterrupt:
        tell(stopped)
        return 130
