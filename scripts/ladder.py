#!/usr/bin/env python3
"""Climb the ladder: train recipes with one small budget, score them on one benchmark, show which idea helps.

    python scripts/ladder.py IMAGES --recipes v5,v7,v31,v36 --budget-minutes 30 --seeds 3
    python scripts/ladder.py IMAGES --recipes v7,v31 --steps 500 --strength hard \\
        -a tf_efficientnet_lite0 --backbone-weights LITE0.pth --input-size 128 --batch-size 32 --memory-size 4096

IMAGES is split by chance into training images and a benchmark of edited copies, distractors and references
(scripts/make_benchmark.py); or it holds `train` and `pool`, and the benchmark is made from the latter; or it is a
benchmark already, like input/. Flags that are not listed here go to train.py, after those of each recipe;
--memory-size leaves recipes alone that have no memory.

A recipe that continues another (its --weight is exp/PARENT/train/...) starts from the parent's checkpoint of the same
seed; parents are trained too. The budget is each recipe's own, and its schedule keeps its shape: as many epochs as the
recipe has, of fewer steps. Minutes become steps by the pace of a short probe.

The folder of the ladder (-o) holds

    ladder.csv, ladder.png   a row per run, written when the run ends; AP and recall at 90 % precision, as extracted and
                             after embedding isolation (postprocess.py --preset v23-isolation)
    ladder.json              what the ladder was started with; other settings are refused
    benchmark/, photos/      the benchmark, and links to its images
    RECIPE-sSEED/            checkpoint, log and descriptors of a run; output.txt is what its commands said

The same command goes on where a stopped ladder stood; rows that failed are tried again.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from copydet.checkpoints import newest_checkpoint
from copydet.common import ROOT, InputError, OutputFolder, check_file, first_three, read_json, replacing, run_main
from copydet.descriptors import write_descriptors
from copydet.images import FOLDERS, UnreadableImage, id_of, list_images, open_image, write_skipped
from copydet.metrics import read_ground_truth
from copydet.options import recipe_words

TRAIN, SCRIPTS = ROOT / "train.py", ROOT / "scripts"
COLUMNS = ("recipe", "seed", "status", "steps", "minutes", "ap", "r_p90", "isolated_ap", "isolated_r_p90", "idea",
           "error")
BASELINES = {"raw": "the network's features without training",
             "centred": "raw, minus the mean of the training images, unit length",
             "pdq": "PDQ, a perceptual hash of 256 bits", "phash": "pHash, a perceptual hash of 64 bits"}
OURS = ("--mode", "--exp", "--seed", "--resume", "--start-epoch", "--epoch-steps", "--target-set")
BENCHMARK_FLAGS = ("strength", "edits", "references", "queries", "distractors", "training", "tile")
TRUTH = "public_ground_truth.csv"
SAVE_STEPS = 100  # a training that was killed loses no more
PROBE_STEPS, PROBE_ROW = 20, 5  # steps of the probe and per row of its log; the first row has the start-up in it


Row = dict[str, str]  # of ladder.csv: column -> value, "" where there is none


class Weight(NamedTuple):
    """A descriptor that is there already: `words` describe with it, `text` is what the row shows of them."""
    name: str
    words: list[str]
    text: str


class Failed(Exception):
    """A command failed; the text is its last line."""


# ---------------------------------------------------------------------------------------------------------------------
# Recipes and budgets


class Recipe(NamedTuple):
    """A recipe file; `flags`: name without dashes -> value; `parent`: the Recipe that --weight comes from, or None."""
    name: str
    file: Path
    idea: str
    flags: dict[str, str]
    parent: Recipe | None


def split_flags(words: list[str]) -> list[list[str]]:
    """Words of a command line -> [[flag, value...]]; --flag=value is two words. InputError for a value without flag."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("-") and not re.match(r"-\.?\d", word):
            groups.append(word.split("=", 1) if word.startswith("--") else [word])
        elif not groups:
            raise InputError(f"{word}: belongs to no flag; IMAGES, the one folder, comes first")
        else:
            groups[-1].append(word)
    return groups


def read_recipe(name: str, children: Sequence[Path] = ()) -> Recipe:
    """Recipe of exp/NAME.args, or of a file that ends in .args, with its parents. InputError if one is missing, or has
    one of the files of its `children` for a parent."""
    file = Path(name) if name.endswith(".args") else ROOT / "exp" / f"{name}.args"
    if not file.is_file():
        raise InputError(f"no such recipe: {file}")
    if file.resolve() in children:
        raise InputError(f"{file}: continues itself (--weight), by way of {first_three(list(children))}")
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    flags = {flag.lstrip("-"): " ".join(values) for flag, *values in split_flags(recipe_words(file))}
    if not {"epochs", "batch-size"} <= set(flags):
        raise InputError(f"{file}: needs --epochs and --batch-size")
    check_numbers(flags.items(), file)
    idea = next((line.lstrip("# ").removeprefix(f"{file.stem}: ") for line in lines if line.startswith("#")), "")
    found = re.search(r"(?:^|/)exp/([^/]+)/train/", flags.get("weight", ""))
    parent = read_recipe(str(file.with_name(f"{found[1]}.args")), [*children, file.resolve()]) if found else None
    return Recipe(file.stem, file.resolve(), idea, flags, parent)


def check_numbers(flags: Iterable[tuple[str, str]], where: object) -> None:
    """Raise InputError, after `where` the flags (name without dashes, value) are from, for one that the ladder counts
    with and that is no number above 0."""
    for name, value in flags:
        if name in ("epochs", "b", "batch-size", "sample-size") and not re.fullmatch(r"0*[1-9]\d{0,9}", value):
            raise InputError(f"{where}: --{name} {value}: not a positive number")


def with_parents(names: Iterable[str]) -> list[Recipe]:
    """Names of recipes -> Recipes, each once and after its parents."""
    recipes: dict[str, Recipe] = {}
    for name in names:
        chain = [read_recipe(name)]
        while chain[0].parent:
            chain.insert(0, chain[0].parent)
        for recipe in chain:
            recipes.setdefault(recipe.name, recipe)
    return list(recipes.values())


def flags_for(recipe: Recipe, overrides: list[list[str]]) -> list[str]:
    """The overrides [[flag, value...]] that make sense for a recipe, as words."""
    without_memory = recipe.flags.get("memory-size") == "0"
    return [word for group in overrides if not (without_memory and group[0] == "--memory-size") for word in group]


def last_value(recipe: Recipe, overrides: list[list[str]], *names: str) -> str:
    """Value of a flag, all of whose names are given, or ""."""
    given = [values[-1] for flag, *values in overrides if flag.lstrip("-") in names and values]
    found = given or [recipe.flags[name] for name in names if name in recipe.flags]
    return found[-1] if found else ""


def share_steps(steps: int, epochs: int, longest: int) -> tuple[int, int]:
    """Epochs and steps in each, for a budget of `steps` and a recipe of `epochs`, none longer than `longest` steps.

    As many epochs as the recipe has, unless the images are too few for that (more) or the budget is too small (fewer).
    Their product is `steps` or more, by less than one epoch.
    """
    each = min(math.ceil(steps / epochs), longest)
    return math.ceil(steps / each), each


# ---------------------------------------------------------------------------------------------------------------------
# Baselines: perceptual hashes as descriptors


def pdq_bits(img: Image.Image) -> np.ndarray:
    import pdqhash
    return pdqhash.compute(np.asarray(img))[0]


def phash_bits(img: Image.Image) -> np.ndarray:
    import imagehash
    return imagehash.phash(img).hash.ravel()


HASHES: dict[str, Callable[[Image.Image], np.ndarray]] = {"pdq": pdq_bits, "phash": phash_bits}  # -> bits [n]


def hash_image(name: str, path: Path) -> np.ndarray | str:
    """Bits of an image as +-1 / sqrt(n), float32 [n]: squared L2 is 4 / n x Hamming distance. Or why not."""
    try:
        bits = HASHES[name](open_image(path))
    except UnreadableImage as error:
        return error.reason
    return np.where(bits, 1, -1).astype(np.float32) / np.float32(math.sqrt(len(bits)))


def write_hashes(name: str, benchmark: Path, file: Path) -> None:
    """Descriptor file of a benchmark by perceptual hash; unreadable images are listed in skipped.csv beside it."""
    groups, skipped = {}, []
    with ProcessPoolExecutor() as pool:
        for group, folder in FOLDERS.items():
            paths = [benchmark / folder / path for path in list_images(benchmark / folder)[0]]
            found = dict(zip(paths, pool.map(partial(hash_image, name), paths, chunksize=16)))
            rows = {id_of(path): row for path, row in found.items() if not isinstance(row, str)}
            if not rows:
                raise Failed(f"no image that can be read in {benchmark / folder}")
            groups[group] = np.stack(list(rows.values())), list(rows)
            skipped += [(str(path), why) for path, why in found.items() if isinstance(why, str)]
    write_descriptors(file, groups, {"hash": name})
    write_skipped(file.with_name("skipped.csv"), skipped)


# ---------------------------------------------------------------------------------------------------------------------
# Running


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def is_benchmark(folder: Path) -> bool:
    return (folder / TRUTH).is_file()


def source_folders(args: argparse.Namespace) -> list[str]:
    """Training images, where they lie apart, and images of the benchmark."""
    images, pool = args.images, args.benchmark_images
    if not pool and (images / "train").is_dir() and (images / "pool").is_dir():
        images, pool = images / "train", images / "pool"
    return [str(folder.resolve()) for folder in (images, pool) if folder]


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of a finished training. Raises Failed if there is none."""
    newest = newest_checkpoint(folder / "train")
    if not newest:
        raise Failed(f"no checkpoint in {folder / 'train'}")
    return newest


def steps_in(minutes: float, log: list[tuple[int, float]]) -> int:
    """Steps in so many minutes, by the pace of the log's rows [(steps, seconds)] after the first."""
    steps, seconds = (sum(column) for column in zip(*log[1:]))
    return max(1, round(minutes * 60 * steps / seconds))


def read_log(folder: Path) -> list[tuple[int, float]]:
    """[(steps, seconds)] of each row of a training's log.csv; pauses between rows are not in it."""
    args = json.loads((folder / "args.json").read_text())
    views = args["batch_size"] * max(1, args["world_size"]) * args["ncrops"]
    with open(folder / "log.csv", newline="") as lines:
        rows = [(int(row["step"]), float(row["images_per_s"])) for row in csv.DictReader(lines)]
    steps = np.diff([0, *(step for step, _ in rows)])
    return [(int(n), n * views / pace) for n, (_, pace) in zip(steps, rows)]


def older_ladder(folder: Path) -> list[str]:
    """What a version that listed nothing wrote in a folder: OutputFolder's `older`."""
    names = set(os.listdir(folder))
    return sorted(names) if "ladder.json" in names or {".lock", "benchmark.txt"} <= names else []


def read_rows(file: Path) -> dict[tuple[str, str], Row]:
    """Rows of a ladder.csv by recipe and seed. Raises InputError: not of a ladder."""
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            if set(COLUMNS) <= set(rows.fieldnames or ()):
                return {(row["recipe"], row["seed"]): row for row in rows}
    except (ValueError, csv.Error):
        pass
    raise InputError(f"{file} is not of a ladder; give another folder with -o")


def has_flags(recipes: object) -> bool:
    """Whether `recipes` of a ladder.json hold flags, each."""
    return isinstance(recipes, dict) and all(isinstance(recipe, dict) and isinstance(recipe.get("flags"), dict)
                                             for recipe in recipes.values())


@contextlib.contextmanager
def interrupts_after(last: Callable[[], None]) -> Iterator[None]:
    """What comes in the meantime, Ctrl-C or SIGTERM, is raised at the end, after `last()`: so no process is started
    that nobody knows of."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        last()
    if came:
        raise KeyboardInterrupt


class Ladder:
    """The folder of a ladder, and what is done in it.

    Attributes: rows: (recipe, seed) -> row of ladder.csv; settings: what ladder.json holds.

    Raises:
        InputError: the folder was started with other settings, or another ladder runs in it.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.output
        self.benchmark = args.images if is_benchmark(args.images) else self.out / "benchmark"
        self.images = self.out / "photos"  # without the ground truth: train.py would score, or refuse to
        self.settings: dict[str, Any] = {
            "photos": shlex.join(source_folders(args)), "benchmark": shlex.join(args.benchmark),
            "budget": args.steps and f"{args.steps} steps" or f"{args.budget_minutes:g} minutes",
            "overrides": shlex.join(itertools.chain(*args.overrides)), "recipes": {}}
        with OutputFolder(self.out, "-o", older_ladder, parents=True, shared=True):
            self.check_settings()
        self.lock = open(self.out / ".lock", "w")  # held by the commands too, which can outlive a killed ladder
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.out}: another ladder, or a command of a killed one, still runs there") from None
        file = self.out / "ladder.csv"
        self.rows = read_rows(file) if file.is_file() else {}
        for weight in args.weight:
            if self.rows.get((weight.name, ""), {"idea": weight.text})["idea"] != weight.text:
                raise InputError(f"--weight '{weight.text}': {self.out} has a row {weight.name} of other flags; rename "
                                 "the file, or give another folder with -o")

    def check_settings(self) -> None:
        """Take up the settings of ladder.json, if there is one; InputError names the first that differs."""
        file = self.out / "ladder.json"
        stored = read_json(file) if file.is_file() else self.settings
        if not (isinstance(stored, dict) and self.settings.keys() <= stored.keys() and has_flags(stored["recipes"])):
            raise InputError(f"{file} is not of a ladder; give another folder with -o")
        for name in ("photos", "benchmark", "budget", "overrides"):
            if stored[name] != self.settings[name]:
                raise InputError(f"{self.out} was started with {name} '{stored[name]}', not '{self.settings[name]}'; "
                                 "give the same, or another folder with -o")
        for recipe in self.args.recipes:
            flags = stored["recipes"].setdefault(recipe.name, {"flags": recipe.flags})["flags"]
            for name in flags.keys() | recipe.flags.keys():
                if flags.get(name) != recipe.flags.get(name):
                    raise InputError(f"{recipe.file}: --{name} has changed since {self.out} was started; give another "
                                     "folder with -o")
        self.settings = stored

    def write_settings(self) -> None:
        with replacing(self.out / "ladder.json") as temporary:
            temporary.write_text(json.dumps(self.settings, indent=2) + "\n")

    def command(self, log: Path, script: Path, *words: object, piped: bool = False) -> str:
        """Run a script, its output added to the file `log`; with `piped`, what it prints is returned instead.

        Raises Failed with its error's last line. An interrupt is passed on, so that a training saves what it has.
        """
        argv = [sys.executable, str(script), *map(str, words)]
        with open(log, "a+", encoding="utf-8", errors="replace") as out:
            print("$", shlex.join(argv), file=out, flush=True)
            start, began, (alive, held) = out.tell(), time.time(), os.pipe()
            process: subprocess.Popen[str] | None = None
            try:
                with interrupts_after(lambda: os.close(held)):
                    process = subprocess.Popen(argv, stdout=subprocess.PIPE if piped else out, stderr=out, text=True,
                                               pass_fds=[self.lock.fileno(), held],
                                               env=os.environ | {"PYTHONUNBUFFERED": "1"})
                printed, _ = process.communicate()
            except BaseException:
                if process:
                    process.terminate()
                    process.wait()
                raise
            finally:
                os.read(alive, 1)  # until all that the command started has ended, and the lock is free
                os.close(alive)
            if process.returncode:
                out.seek(start)
                lines = re.findall(r"[^\r\n]*\S[^\r\n]*", out.read()) or [f"exit {process.returncode}"]
                raise Failed(([line for line in lines if line.startswith(f"{script.name}: ")] or lines)[-1])
            print(f"# {time.time() - began:.1f} s", file=out)
        return printed or ""

    def build_benchmark(self) -> None:
        """Make the benchmark unless it is there, and links to its images. InputError: what make_benchmark.py says."""
        if not is_benchmark(self.benchmark):
            *training, images = source_folders(self.args)
            words = [images, self.benchmark, *self.args.benchmark]
            say(f"making the benchmark in {self.benchmark}")
            try:
                self.command(self.out / "benchmark.txt", SCRIPTS / "make_benchmark.py", *words,
                             *(["--training-images", *training] if training else []))
            except Failed as error:
                raise InputError(str(error).removeprefix("make_benchmark.py: ")) from None
        self.images.mkdir(exist_ok=True)
        for name in FOLDERS.values():
            if not (self.images / name).exists():
                (self.images / name).symlink_to(self.benchmark / name)
        self.write_settings()

    def add_row(self, name: str, seed: str, idea: str, work: Callable[[Path], tuple[Path, Row]]) -> None:
        """Do `work`: folder -> (descriptor file, values of the row); score the file, write the row. Once only."""
        if self.rows.get((name, seed), {"status": "failed"})["status"] != "failed":
            return
        folder = self.out / (f"{name}-s{seed}" if seed else name)
        folder.mkdir(exist_ok=True)
        row = dict.fromkeys(COLUMNS, "") | {"recipe": name, "seed": seed, "idea": idea}
        try:
            file, values = work(folder)
            row |= values | self.score(file, folder / "output.txt")
            say(f"{folder.name}: AP {row['ap']}, R@P90 {row['r_p90']}, isolated {row['isolated_ap']}, "
                f"{row['isolated_r_p90']}")
        except Failed as error:
            row |= {"status": "failed", "error": str(error)}
            say(f"{folder.name} failed: {error} (see {folder / 'output.txt'})")
        self.rows[name, seed] = row
        with replacing(self.out / "ladder.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
            table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows.values())

    def score(self, file: Path, log: Path) -> Row:
        """Status and scores of a descriptor file, as it is and isolated, as text."""
        isolated, row = file.with_name("isolated.h5"), {"status": "ok"}
        self.command(log, SCRIPTS / "postprocess.py", file, "-o", isolated, "--preset", "v23-isolation")
        for prefix, scored in (("", file), ("isolated_", isolated)):
            result = json.loads(self.command(log, SCRIPTS / "eval_metrics.py", scored, self.benchmark / TRUTH,
                                             "--allow-contaminated", piped=True))
            row[f"{prefix}ap"] = f"{result['average_precision']:.5f}"
            row[f"{prefix}r_p90"] = f"{result['recall_p90']:.5f}"
            if "contaminated" in result:
                row["status"] = "contaminated"
        return row

    def extract(self, folder: Path, *words: object) -> Path:
        """Descriptors of the benchmark's images -> their file."""
        say(f"{folder.name}: extracting")
        self.command(folder / "output.txt", TRAIN, self.images, "--mode", "extract", *words, "--exp", folder,
                     "--target-set", "qrt")
        return folder / "extract" / "fb-isc-submission.h5"

    def baseline(self, name: str, folder: Path) -> tuple[Path, Row]:
        """`work` of a baseline's row."""
        file = folder / "descriptors.h5"
        if name in HASHES:
            say(f"{name}: hashing")
            write_hashes(name, self.benchmark, file)
            return file, {}
        raw = self.out / "raw" / "extract" / "fb-isc-submission.h5"
        if name == "raw" or not raw.is_file():
            raw.parent.parent.mkdir(exist_ok=True)
            self.extract(raw.parent.parent, *itertools.chain(*self.args.overrides))
        if name == "raw":
            return raw, {}
        self.command(folder / "output.txt", SCRIPTS / "postprocess.py", raw, "-o", file, "center", "l2")
        return file, {}

    def describe(self, weight: Weight, folder: Path) -> tuple[Path, Row]:
        """`work` of the row of a descriptor that is there already."""
        return self.extract(folder, *weight.words), {}

    def climb(self, recipe: Recipe, seed: str, folder: Path) -> tuple[Path, Row]:
        """`work` of a recipe's row: train, or go on with it, and extract."""
        overrides = flags_for(recipe, self.args.overrides)
        words = self.training_words(recipe, overrides, seed)
        epochs, each = share_steps(self.steps(recipe, words), int(last_value(recipe, self.args.overrides, "epochs")),
                                   self.longest_epoch(recipe))
        say(f"{folder.name}: training, {epochs} epochs of {each} steps")
        self.command(folder / "output.txt", TRAIN, *words, "--exp", folder, "--resume", "auto", "--epochs", epochs,
                     "--epoch-steps", each)
        last = last_checkpoint(folder)
        OutputFolder(last.parent, "--exp").remove(*({file.name for file in last.parent.glob("checkpoint_*.pth.tar")}
                                                    - {last.name}))
        log = read_log(last.parent)
        return self.extract(folder, *overrides, "--weight", last), {
            "steps": str(sum(steps for steps, _ in log)), "minutes": f"{sum(seconds for _, seconds in log) / 60:.2f}"}

    def training_words(self, recipe: Recipe, overrides: list[str], seed: str) -> list[object]:
        """What train.py needs but for the folder and the budget. Raises Failed if the parent did."""
        images = self.benchmark if "pairs" in recipe.flags else self.benchmark / FOLDERS["train"]
        words: list[object] = [images, "--save-steps", SAVE_STEPS, f"@{recipe.file}", *overrides, "--seed", seed]
        for flag, value in recipe.flags.items():
            if value.startswith("input/"):
                words += [f"--{flag}", self.benchmark / value.removeprefix("input/")]
        if recipe.parent:
            if self.rows.get((recipe.parent.name, seed), {"status": "failed"})["status"] == "failed":
                raise Failed(f"its parent {recipe.parent.name} failed")
            words += ["--weight", last_checkpoint(self.out / f"{recipe.parent.name}-s{seed}")]
        return words

    def longest_epoch(self, recipe: Recipe) -> int:
        """Steps after which a recipe has seen all its images or pairs."""
        value = partial(last_value, recipe, self.args.overrides)
        if "pairs" in recipe.flags:
            images = len(read_ground_truth(self.benchmark / TRUTH)[1])
        else:
            images = len(list_images(self.benchmark / FOLDERS["train"])[0])
        return max(1, min(images, int(value("sample-size") or images)) // int(value("b", "batch-size")))

    def steps(self, recipe: Recipe, words: Sequence[object]) -> int:
        """The budget in steps; a budget in minutes becomes steps by a probe, once for all seeds."""
        stored = self.settings["recipes"][recipe.name]
        if "steps" not in stored:
            stored["steps"] = self.args.steps or self.probe(recipe, words)
            self.write_settings()
        return stored["steps"]

    def probe(self, recipe: Recipe, words: Sequence[object]) -> int:
        """Steps that a recipe does in the budgeted minutes, by the pace of a few steps."""
        folder = self.out / "probe"
        if folder.is_dir() and set(os.listdir(folder)) - {"train"}:
            raise InputError(f"{folder}: is in the way, and not of this program; rename it")
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{recipe.name}: {PROBE_STEPS} steps to measure its pace")
        epochs, each = share_steps(PROBE_STEPS, 1, self.longest_epoch(recipe))
        self.command(self.out / "probe.txt", TRAIN, *words, "--exp", folder, "--epochs", epochs, "--epoch-steps", each,
                     "--print-freq", PROBE_ROW)
        steps = steps_in(self.args.budget_minutes, read_log(folder / "train"))
        shutil.rmtree(folder)
        return steps

    def run(self) -> bool:
        """Everything that has no row yet; returns whether all rows of this command are good."""
        self.build_benchmark()
        wanted = [(name, "", BASELINES[name], partial(self.baseline, name)) for name in self.args.baselines]
        wanted += [(weight.name, "", weight.text, partial(self.describe, weight))
                   for weight in self.args.weight]
        wanted += [(recipe.name, seed, recipe.idea, partial(self.climb, recipe, seed))
                   for seed in map(str, range(1, self.args.seeds + 1)) for recipe in self.args.recipes]
        for name, seed, idea, work in wanted:
            self.add_row(name, seed, idea, work)
        return all(self.rows[name, seed]["status"] != "failed" for name, seed, *_ in wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Table and picture


def by_recipe(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows -> name -> those of its seeds; baselines, which have no seed, first."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"] != ""):
        groups.setdefault(row["recipe"], []).append(row)
    return groups


def numbers(rows: Iterable[Row], column: str) -> list[float]:
    """Values of a column, where there are any."""
    return [float(row[column]) for row in rows if row[column]]


def mean_and_spread(rows: Iterable[Row], column: str) -> str:
    """ "0.351 (0.344..0.359)" of several seeds, "0.351" of one, "-" of none."""
    found = numbers(rows, column)
    if not found:
        return "-"
    spread = f" ({min(found):.3f}..{max(found):.3f})" if len(found) > 1 else ""
    return f"{statistics.mean(found):.3f}{spread}"


def print_table(rows: Sequence[Row]) -> None:
    """One line per recipe, means over its seeds."""
    form = "{:<10} {:<48} {:>5} {:>7} {:>7}  {:<21} {:<21} {:<13} {}"
    print(form.format("recipe", "idea", "seeds", "steps", "minutes", "AP", "R@P90", "isolated: AP", "R@P90").rstrip())
    for name, group in by_recipe(rows).items():
        scored = [row for row in group if row["status"] != "failed"]
        steps, minutes = (numbers(scored, column) for column in ("steps", "minutes"))
        means = [mean_and_spread(scored, column) for column in ("ap", "r_p90")]
        isolated = [mean_and_spread(scored, f"isolated_{column}").partition(" ")[0] for column in ("ap", "r_p90")]
        idea = group[0]["idea"]
        print(form.format(name, idea if len(idea) < 49 else idea[:45] + "...", len(scored) if steps else "-",
                          f"{statistics.mean(steps):.0f}" if steps else "-",
                          f"{statistics.mean(minutes):.1f}" if minutes else "-", *means, *isolated).rstrip())
        for row in group:
            if row["status"] != "ok":
                what = row["error"] or "trained on the ground truth: its score is no measurement"
                print(f"{'':<10} seed {row['seed'] or '-'}, {row['status']}: {what}")


def draw(rows: Sequence[Row], file: Path) -> None:
    """PNG: AP and recall at 90 % precision of every recipe, a point per seed; the raw features as a line."""
    from matplotlib.figure import Figure
    groups = by_recipe([row for row in rows if row["status"] != "failed"])
    fig = Figure(figsize=(max(6.4, 1.6 + 0.6 * len(groups)), 6.4), layout="constrained", dpi=120)
    panels = fig.subplots(2, 1, sharex=True)
    for axes, column, label in zip(panels, ("ap", "r_p90"), ("AP", "recall at 90 % precision")):
        for shift, prefix, color, how in ((-0.13, "", "tab:blue", "as extracted"),
                                          (0.13, "isolated_", "tab:orange", "isolated")):
            found = [(x + shift, y) for x, group in enumerate(groups.values()) for y in numbers(group, prefix + column)]
            axes.scatter(*zip(*found), s=20, color=color, label=how, zorder=3, linewidths=0)
            for x, group in enumerate(groups.values()):
                values = numbers(group, prefix + column)
                axes.plot([x + shift] * 2, [min(values), max(values)], color=color, alpha=0.4, linewidth=5)
        if "raw" in groups:
            axes.axhline(numbers(groups["raw"], column)[0], color="tab:blue", linestyle="--", linewidth=1, zorder=1,
                         label="raw features")
        untrained = sum(not group[0]["seed"] for group in groups.values())
        axes.axvspan(-0.5, untrained - 0.5, color="0.94", zorder=0, linewidth=0)
        axes.set(ylabel=label, xlim=(-0.5, len(groups) - 0.5))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_xticks(range(len(groups)), groups, rotation=0 if len(groups) < 16 else 90)
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    with replacing(file) as temporary:
        fig.savefig(temporary, format="png")


def report(ladder: Ladder) -> None:
    """Table and picture of all rows there are."""
    rows = list(ladder.rows.values())
    if rows:
        print_table(rows)
    if any(row["status"] != "failed" for row in rows):
        draw(rows, ladder.out / "ladder.png")
        print(f"{ladder.out / 'ladder.csv'}, ladder.png")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Type of a flag: a number above 0."""
    def parse(text: str) -> float:
        if not re.fullmatch(r"\d+" if kind is int else r"\d*\.?\d+", text) or not kind(text) > 0:
            raise argparse.ArgumentTypeError(f"{text}: not a positive number")
        return kind(text)
    return parse


def build_parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("images", metavar="IMAGES", type=Path, help="folder of images, or with train and pool in it, or a "
                   "benchmark; before the flags for train.py")
    p.add_argument("--recipes", required=True, metavar="A,B,C", help="exp/A.args, ...; or files that end in .args")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--budget-minutes", type=positive(float), default=30, metavar="M", help="training time of each "
                        "recipe, start-up apart (default: %(default)s)")
    budget.add_argument("--steps", type=positive(int), metavar="N", help="steps of each recipe instead")
    p.add_argument("--seeds", type=positive(int), default=3, metavar="N", help="runs of each recipe, seeds 1 to N "
                   "(default: %(default)s)")
    p.add_argument("--baselines", metavar="A,B", help=f"out of {', '.join(BASELINES)} (default: all; raw and centred "
                   "only with --backbone-weights or --no-pretrained)")
    p.add_argument("--weight", action="append", default=[], metavar="'FILE FLAGS'", help="a row for this descriptor, "
                   "with flags of its own, such as 'sscd.onnx --preset sscd'; can be given again")
    p.add_argument("-o", "--output", type=Path, default=ROOT / "exp" / "ladder", metavar="DIR", help="folder of the "
                   "ladder (default: exp/ladder)")
    g = p.add_argument_group("benchmark (see make_benchmark.py)")
    g.add_argument("--benchmark-images", "--benchmark-photos", type=Path, metavar="DIR", help="make it from these; "
                   "IMAGES are for training")
    for flag in BENCHMARK_FLAGS:
        g.add_argument(f"--{flag}", metavar=flag.upper())
    return p


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked: recipes with their parents, baselines, [[flag, value...]] for train.py."""
    args, words = build_parser().parse_known_args(argv)
    for folder in filter(None, (args.images, args.benchmark_images)):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; IMAGES comes before the flags for train.py")
    args.images, args.output, args.overrides = args.images.resolve(), args.output.resolve(), split_flags(words)
    flags = {group[0] for group in args.overrides}
    known = subprocess.run([sys.executable, TRAIN, "--help"], capture_output=True, text=True, check=True).stdout
    for flag in sorted(flags):
        if flag in OURS:
            raise InputError(f"{flag}: the ladder sets it")
        if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", known):
            raise InputError(f"{flag}: a flag of neither ladder.py nor train.py")
    check_numbers([(flag.lstrip("-"), " ".join(values)) for flag, *values in args.overrides], "train.py's flags")
    args.recipes = with_parents(args.recipes.split(","))
    args.baselines = choose_baselines(args.baselines, flags)
    args.weight = read_weights(args.weight, [*BASELINES, *(recipe.name for recipe in args.recipes)])
    args.benchmark = [f"--{flag}={getattr(args, flag)}" for flag in BENCHMARK_FLAGS if getattr(args, flag)]
    if is_benchmark(args.images) and not all((args.images / name).is_dir() for name in FOLDERS.values()):
        raise InputError(f"{args.images}: a benchmark needs the folders {', '.join(FOLDERS.values())}")
    if is_benchmark(args.images) and (args.benchmark or args.benchmark_images):
        raise InputError(f"{args.images} is a benchmark already, of which --benchmark-images, --strength and the like "
                         "change nothing")
    return args


def read_weights(texts: list[str], taken: list[str]) -> list[Weight]:
    """['FILE FLAGS'] -> Weights, by the name of the file. Raises InputError: no file, a name that is `taken`."""
    weights: list[Weight] = []
    for text in texts:
        try:
            file, *flags = shlex.split(text)
        except ValueError:
            raise InputError(f"--weight '{text}': give 'FILE FLAGS'") from None
        check_file(file, "--weight")
        name = Path(file).name.partition(".")[0]
        if name in [*taken, *(weight.name for weight in weights)]:
            raise InputError(f"--weight {file}: there is a row {name} already; rename it")
        weights.append(Weight(name, ["--weight", str(Path(file).resolve()), *flags],
                              shlex.join([Path(file).name, *flags])))
    return weights


def choose_baselines(text: str | None, flags: set[str]) -> list[str]:
    """Names of the baselines asked for, or of all that can be had. InputError for what cannot."""
    names = list(BASELINES) if text is None else list(filter(None, text.split(",")))
    for name in names:
        if name not in BASELINES:
            raise InputError(f"--baselines {name}: none of {', '.join(BASELINES)}")
    if not flags & {"--backbone-weights", "--no-pretrained"}:
        if text and set(names) - set(HASHES):
            raise InputError("--baselines raw,centred: need --backbone-weights FILE")
        names = [name for name in names if name in HASHES]
    if "pdq" in names and not importlib.util.find_spec("pdqhash"):
        if text:
            raise InputError("--baselines pdq: pip install pdqhash (it needs a C++ compiler), or name the others only")
        print("the baseline pdq is left out: it wants pip install pdqhash (and a C++ compiler)")
        names.remove("pdq")
    return names


def climb(argv: list[str] | None) -> int:
    ladder = Ladder(parse_args(argv))
    try:
        good = ladder.run()
    finally:
        report(ladder)
    return 0 if good else 1


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_main(lambda: climb(argv), "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
