"""What every module and command shares: errors in one line, files that appear when they are whole, folders that hold
nobody's files but ours, locks. Nothing heavy."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import multiprocessing.context
import os
import re
import secrets
import shutil
import signal
import sqlite3
import stat
import sys
import types
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

HERE = Path(__file__).resolve().parent
INSTALLED = (HERE / "commands").is_dir()  # without the rest of the project: what of it is needed lies below the package
ROOT = Path() if INSTALLED else HERE.parents[1]  # of the project: exp/NAME holds results
COMMANDS = HERE / "commands" if INSTALLED else HERE.parent
LONGEST = 200  # characters of a name in a message
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
NO_MEMORY = re.compile("out of memory|can.t allocate memory|terminated abruptly")  # PyTorch's; of a pool's process
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MANIFEST = ".written.txt"  # in a folder of ours: what we wrote there, a path per line
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems that have none
LONGEST_FILE = 225  # bytes of an output's name: locks and temporary files beside it have longer ones, 255 at most
LEFT_BY_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini", "lost+found")  # a folder that holds these alone is empty


class InputError(Exception):
    """A wrong input. Its text is one line that names the file, row or flag; commands print it and exit with 2."""


class WorkError(Exception):
    """What failed while working, in one line; commands print it and exit with 1."""


def shown(path: str | Path) -> str:
    """A path or name as text that is valid UTF-8; other bytes become \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def first_three(names: Sequence | np.ndarray) -> str:
    """Sequence of names -> "a, b, c and 4 more", long ones cut."""
    shown = [name if len(name) <= LONGEST else f"{name[:LONGEST]}..." for name in map(str, names[:3])]
    return ", ".join(shown) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def composed(name: str) -> str:
    """A name as it is compared: Unicode's composed form (NFC), without spaces around it."""
    return unicodedata.normalize("NFC", name).strip()


def time_of(info: os.stat_result) -> int:
    """A file's time of change in nanoseconds, in 64 bits as SQLite has them: of a time after 2262 the lowest ones."""
    return (info.st_mtime_ns + 2**63) % 2**64 - 2**63


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, renamed to `path` at the end, removed if anything fails on the way. Where
    `path` is a link, it is the file behind it. Raises InputError where it is a device, or another thing but a file;
    OSError that names `path` where nothing can be written."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is there already, and is not a file")
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()  # so that all libraries fail alike
        yield temporary
        os.replace(temporary, path)
    except Exception as error:  # HDF5, PyTorch and safetensors have their own types
        number = error_number(error)
        if number is None or not (temporary.name in str(error) or number in DISK_FULL):
            raise
        raise OSError(number, os.strerror(number), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Where the disk is full in here, the error names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL or error.filename:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None


def error_number(error: Exception) -> int | None:
    """The system's number for what went wrong; HDF5 and safetensors have it in their texts, whatever the error's type.
    PyTorch has none: less arrived in its file than it wrote."""
    found = re.search(r"(?:errno =|[(]os error) (\d+)", str(error))
    if found:
        return int(found[1])
    return errno.ENOSPC if "inline_container" in str(error) else getattr(error, "errno", None)


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


def check_name(path: str | Path, flag: str) -> None:
    """Raise InputError, naming `flag`, for an output that no file system takes, or that nobody may look at."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise InputError(f"{flag} {first_three([str(path)])}: {error.strerror}") from None
    if len(os.fsencode(os.path.basename(os.path.realpath(path)))) > LONGEST_FILE:
        raise InputError(f"{flag} {first_three([str(path)])}: a name of more than {LONGEST_FILE} bytes")


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
    return parse_json(Path(path).read_bytes(), f"{path} is broken")


def parse_json(text: Any, what: str) -> Any:
    """What a text of JSON holds. Raises InputError, after `what` is wrong: no text, no JSON, nested too deeply."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what}: {error}") from None


def check_output(flag: str, file: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raise InputError, naming `flag`, where the output `file` cannot be written or would replace one of the inputs."""
    check_name(file, flag)
    if os.path.isdir(file):
        raise InputError(f"{flag} {file}: is a folder")
    if os.path.exists(file) and not os.path.isfile(file):
        raise InputError(f"{flag} {file}: is there already, and is not a file")
    path = Path(os.path.realpath(file))
    if not path.parent.is_dir():
        raise InputError(f"{flag} {file}: no such folder: {Path(file).parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {file}: nothing can be written in {Path(file).parent}")
    if any(path.exists() and os.path.exists(other) and path.samefile(other) for other in inputs):
        raise InputError(f"{flag} {file} is an input")


# ---------------------------------------------------------------------------------------------------------------------
# Locks, and folders of ours


@contextlib.contextmanager
def locked(file: Path, what: str | Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock `file`, so that one run at a time writes `what`; the file goes at the end. It is this process's
    own: it is free once that has ended, however, and no process that it started holds it any longer.

    Raises InputError where another run holds it, unless to `wait` for it.
    """
    while True:
        handle = open(file, "a")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                handle.close()
                raise InputError(f"{what}: another run is writing it") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(file)):
                break
        handle.close()  # the run that held it has just removed it
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        handle.close()


def manifest_of(folder: str | Path) -> set[str]:
    """What a manifest lists: paths relative to its folder, none outside; empty where there is no manifest."""
    try:
        names = Path(folder, MANIFEST).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return set()
    return {name for name in names if name and not (name.startswith("/") or ".." in name.split("/"))}


def is_page(file: Path, title: str) -> bool:
    """Whether `file` is an HTML page whose title begins so."""
    try:
        with open(file, "rb") as page:
            return f"<title>{title}".encode() in page.read(1024)
    except OSError:
        return False


class OutputFolder:
    """A folder that a command fills. Its manifest lists what we wrote there; nothing else is replaced or deleted.

    It is new, empty or has a manifest; or `older` knows it: folder -> names of what a version without manifests wrote,
    none where the folder is somebody else's. What lies there may also be, or lead to, one of `besides`.

    To make the object changes nothing. A `with` makes the folder, and holds its lock unless it is `shared`: a second
    run is refused, or has to `wait`. A folder that stays empty goes.

    Raises InputError, naming `flag`, where it is no folder, or holds other files, or (in `with`) is in use.
    """

    def __init__(self, path: str | Path, flag: str, older: Callable[[Path], Iterable[str]] = lambda folder: (),
                 besides: Iterable[str] = (), parents: bool = False, shared: bool = False, wait: bool = False):
        self.path, self.flag, self.older, self.shared, self.wait = Path(path), flag, older, shared, wait
        self.stack = contextlib.ExitStack()
        self.made: list[Path] = []
        check_name(path, flag)
        if os.path.lexists(path) and not self.path.is_dir():
            raise InputError(f"{flag} {path}: is there already, and is not a folder")
        above = self.path.resolve().parent
        while parents and not above.exists():
            above = above.parent
        if not above.is_dir():
            raise InputError(f"{flag} {path}: no such folder: {above if parents else self.path.parent}")
        others = self.others(besides)  # before the manifest, which another run may be about to write
        if others and not (self.path / MANIFEST).is_file() and not list(older(self.path)):
            raise InputError(f"{flag} {path}: holds what is not of this program ({first_three(others)}); give a new or "
                             "an empty folder")

    def others(self, besides: Iterable[str]) -> list[str]:
        """Names in the folder but for those of `besides`, of systems, and of a run that has just begun."""
        if not self.path.is_dir():
            return []
        sources = [os.path.join(os.path.realpath(source), "") for source in besides]
        return sorted(name for name in os.listdir(self.path)
                      if name not in LEFT_BY_SYSTEMS and not name.startswith((".lock", f".{MANIFEST}."))
                      and not any(source.startswith(os.path.join(self.path.resolve(), name, "")) for source in sources))

    def __enter__(self) -> OutputFolder:
        self.made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            make_folder(self.path)
        except InputError as error:
            raise InputError(f"{self.flag}: {error}") from None
        try:
            if not self.shared:
                self.stack.enter_context(locked(self.path / ".lock", f"{self.flag} {self.path}", self.wait))
            self.add(*([] if (self.path / MANIFEST).is_file() else self.older(self.path)))
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        with contextlib.suppress(OSError):  # another file came in the meantime, or the folder went
            if self.made and not self.shared and os.listdir(self.path) == [MANIFEST]:
                (self.path / MANIFEST).unlink()
                for folder in self.made:
                    folder.rmdir()

    def write_manifest(self, names: Iterable[str]) -> None:
        with replacing(self.path / MANIFEST) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in sorted(names)), encoding="utf-8")

    def add(self, *names: str) -> None:
        """List names of what we are about to write."""
        listed = manifest_of(self.path)
        if not listed.issuperset(names) or not (self.path / MANIFEST).is_file():
            self.write_manifest(listed.union(names))

    def check(self, *names: str) -> None:
        """Raise InputError where one of the names is there and not ours."""
        older = self.path.is_dir() and not (self.path / MANIFEST).is_file()
        listed = set(self.older(self.path)) if older else manifest_of(self.path)
        if others := [name for name in names if name not in listed and os.path.lexists(self.path / name)]:
            raise InputError(f"{self.flag} {self.path}: {first_three(others)} is not of this program; rename it, or "
                             "give a new folder")

    def remove(self, *names: str) -> None:
        """Delete those of the names that are ours."""
        listed = manifest_of(self.path)
        for name in listed.intersection(names):
            (self.path / name).unlink(missing_ok=True)
        self.write_manifest(listed.difference(names))


def settings_in(folder: Path) -> Any:
    """What the folder of an unfinished work was begun with; None where that is not known."""
    try:
        return read_json(folder / "settings.json")
    except InputError:
        return None


def open_folder(folder: Path, settings: dict, resume: bool) -> None:
    """Make a folder for unfinished work, or take up the one that is there if `resume`. Call it in one process, of a run
    that no other can share the folder with.

    Raises InputError if its work was begun with other settings, or if it holds something else.
    """
    file = folder / "settings.json"
    if not (resume and file.is_file()):
        if folder.is_dir() and not file.is_file() and (others := [
                name for name in os.listdir(folder) if not name.startswith(f".{file.name}.")]):
            raise InputError(f"{folder} is in the way, and not of this program ({first_three(others)}); rename it")
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(settings), encoding="utf-8")
        return
    before = read_json(file)
    if not isinstance(before, dict):
        raise InputError(f"{file} is broken; delete {folder}")
    differ = [f"{name} {before.get(name)} -> {value}" for name, value in settings.items() if before.get(name) != value]
    if differ:
        raise InputError(f"--resume auto: {folder} holds an extraction with other settings ({'; '.join(differ[:3])}); "
                         "without --resume it starts anew")


class ProcessApart(multiprocessing.context.SpawnProcess):
    """A new process that does not import the program's main module, which may have no `if __name__ == "__main__"`."""

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class ProcessesApart(multiprocessing.context.SpawnContext):
    """Context of multiprocessing that starts such processes."""
    Process = ProcessApart


def read_text(file: str | Path) -> str:
    """What the system tells in a file; "" where it does not."""
    try:
        return Path(file).read_text()
    except (OSError, ValueError):
        return ""


def sha256_of(*files: str | Path) -> str:
    """Hex digest of files, one after another."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as data:
            while block := data.read(2**20):
                digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def database(place: str | Path, kept: str) -> Iterator[None]:
    """What SQLite raises in here becomes a WorkError that names the place, and says what is `kept`."""
    try:
        yield
    except sqlite3.Error as error:
        raise WorkError(f"{place}: {error}; {kept}") from None


WARNED: list[str] = []  # by this process


def warn(text: str) -> None:
    WARNED.append(text)
    print(f"warning: {text}", file=sys.stderr)


def tell(text: str) -> None:
    """Print a command's last word to stderr, after its name."""
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    """Of an exception's text, its last one where TorchScript puts its traceback first; its kind if there is no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines["TorchScript interpreter" in lines[0] and -1]


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


def open_streams() -> None:
    """Nothing in the place of standard streams that are closed: a file that is opened would become one of them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))


def can_flush(stream: Any) -> bool:
    """Whether what was printed can be written: not to a pipe that nobody reads any more, nor to a full disk."""
    try:
        stream.flush()
    except (OSError, ValueError):
        return False
    return True


def run_main(work: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Do the work of a command -> its exit code, the one place where errors become one line: 0 done, 1 failed while
    working (WorkError, OSError, out of memory), 2 wrong input (InputError), 130 Ctrl-C or SIGTERM, told as `stopped`.
    """
    if not (multiprocessing.parent_process() or "RANK" in os.environ):  # those are ended by who started them
        with contextlib.suppress(ValueError):  # not of a thread's
            signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of every odd tag in an image
    open_streams()
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
        if isinstance(sys.stdout, io.TextIOWrapper) and not can_flush(sys.stdout):
            sys.stdout = open(os.devnull, "w")  # Python tries again when it ends, and has an exit code of its own
        tell(in_a_line(error))
        return 1
    except RuntimeError as error:
        if not NO_MEMORY.search(str(error)):
            raise
        tell(str(error).splitlines()[0])
        return 1
    except KeyboardInterrupt:
        tell(stopped)
        return 130
