"""The photos of a run: groups of a folder like DISC21's, pairs of a ground truth, negatives."""
import csv
import os
from pathlib import Path

from descriptors import InputError, first_three
from photos import list_photos

FOLDERS = {"query": "query_images", "reference": "reference_images", "train": "training_images"}


def list_group(args, group):
    """Paths and ids (file stems) of one folder, in order of path, and what only looks like a photo."""
    folder = args.dir / FOLDERS[group]
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    paths, odd = list_photos(folder)
    seen = {}
    for path in paths:
        if (other := seen.setdefault(Path(path).stem, path)) != path:
            raise InputError(f"{folder}: {other} and {path} have the same id '{Path(path).stem}'")
    if args.eval_subset and group == "reference":
        file = Path(args.subset_file or args.dir / "rids_subset.txt")
        if not file.is_file():
            raise InputError(f"--eval-subset: no such file: {file}; scripts/select_ref_subset.py makes it")
        wanted = file.read_text(encoding="utf-8").split()
        if absent := sorted(set(wanted) - set(seen)):
            raise InputError(f"{file}: {len(absent)} ids without a photo in {folder}, first: {', '.join(absent[:3])}")
        paths = sorted(seen[name] for name in set(wanted))
    paths = paths[:100] if args.dryrun else paths
    if not paths:
        raise InputError(f"no photos in {folder}")
    if args.shard:
        first, step = map(int, args.shard.split("/"))
        if not (paths := paths[first::step]):
            raise InputError(f"--shard {args.shard}: {folder} has too few photos")
    return {"paths": [str(folder / path) for path in paths], "ids": [Path(path).stem for path in paths],
            "odd": [(str(folder / path), reason) for path, reason in odd]}


def list_pairs(args):
    """[(query path, reference path)] of the ground truth's positive pairs, relative to DIR; and what is no photo."""
    groups = {group: list_group(args, group) for group in ("query", "reference")}
    paths = {group: dict(zip(listed["ids"], listed["paths"])) for group, listed in groups.items()}
    with open(args.pairs, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.DictReader(file) if row.get("reference_id")]
    if not rows or "query_id" not in rows[0]:
        raise InputError(f"--pairs {args.pairs}: no pairs in columns query_id and reference_id")
    pairs = sorted((row["query_id"], row["reference_id"]) for row in rows)
    absent = sorted({name for pair in pairs for group, name in zip(paths, pair) if name not in paths[group]})
    if absent:
        raise InputError(f"--pairs {args.pairs}: {len(absent)} ids without a photo in {args.dir}: "
                         f"{first_three(absent)}")
    found = [tuple(os.path.relpath(paths[group][name], args.dir) for group, name in zip(paths, pair)) for pair in pairs]
    return found, sum((listed["odd"] for listed in groups.values()), [])


def list_negatives(args):
    """Paths of photos that match nothing: those of --negatives-dir but the photos of --pairs."""
    folder = Path(args.negatives_dir)
    if not folder.is_dir():
        raise InputError(f"--negatives-dir: no such folder: {folder}")
    used = {os.path.realpath(args.dir / path) for pair in args.photos for path in pair} if args.pairs else set()
    found = [path for path in (str(folder / name) for name in list_photos(folder)[0])
             if os.path.realpath(path) not in used]
    if len(found) < args.negatives:
        raise InputError(f"--negatives {args.negatives}: {folder} has {len(found)} photos to draw from")
    return found
