"""Images in folders: find them, open them as RGB, list those of a run and those that cannot be used. No torch."""
from __future__ import annotations

import csv
import functools
import io
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from copydet.common import InputError, first_three, replacing
from copydet.options import Args

try:
    import simplejpeg
except ImportError:  # Pillow decodes everything, JPEGs in about 1.4 times the time
    simplejpeg = None

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def list_images(root):
    """All images below `root`: their paths relative to it, sorted, and [(path, reason)] of what only looks like one."""
    paths, odd, folders = [], [], [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError as error:
            odd.append((folder or ".", error.strerror))
            continue
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):  # macOS sidecars, notebook checkpoints
                continue
            looks_like_image = entry.name.lower().endswith(IMAGE_ENDINGS)
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link to itself
                odd.append((path, error.strerror))
                continue
            if not is_folder:
                paths += [path] if looks_like_image else []
            elif looks_like_image:
                odd.append((path, "is a folder"))
            elif not entry.is_symlink():  # links to folders can form loops
                folders.append(path)
    return sorted(paths), sorted(odd)


def open_image(path, exif_transpose=False):
    """Decode an image to 8-bit RGB: first frame, 16 bits scaled down, transparency on white, EXIF turn if asked.

    Raises OSError, ValueError, SyntaxError or Image.DecompressionBombError where it cannot be decoded whole.
    """
    with Image.open(path) as img:
        return to_rgb(img, exif_transpose)


def to_rgb(img, exif_transpose):
    img.load()
    if exif_transpose:
        img = ImageOps.exif_transpose(img)
    if img.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        img = Image.fromarray((np.asarray(img).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if img.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in img.info:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img.convert("RGB")


class ImageFile:
    """An image's file, decoded when its pixels are asked for: once, and a JPEG at 1/2, 1/4 or 1/8 of its size where all
    that look at it said that they need no more (`shrink`). With `draft` off as open_image does. Raises its errors.
    """

    def __init__(self, path, exif_transpose=False, draft=True):
        with open(path, "rb") as file:
            self.data = file.read()
        self.exif, self.draft, self.shrinks = exif_transpose, draft, []
        try:
            if not (simplejpeg and draft) or exif_transpose:
                raise ValueError
            self.size = simplejpeg.decode_jpeg_header(self.data)[1::-1]
            self.fast = self.size[0] * self.size[1] < Image.MAX_IMAGE_PIXELS
        except ValueError:
            self.fast = False
        if not self.fast:
            with open_bytes(self.data) as img:
                turned = exif_transpose and img.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                self.size = img.size[::-1] if turned else img.size

    def shrink(self, factor):
        """Whoever calls needs no more than the image at 1/factor of its size."""
        self.shrinks.append(factor)

    @functools.cached_property
    def pixels(self):
        """uint8 [h, w, 3]"""
        factor = min(self.shrinks, default=1) if self.draft else 1
        factor = max(f for f in (1, 2, 4, 8) if f <= max(1, factor))
        if self.fast:
            width, height = (-(-side // factor) for side in self.size)
            try:
                return simplejpeg.decode_jpeg(self.data, min_height=height, min_width=width)
            except ValueError:  # no baseline JPEG: Pillow reads it, or tells why it cannot
                pass
        with open_bytes(self.data) as img:
            img.draft("RGB", [max(1, side // factor) for side in img.size])
            return np.array(to_rgb(img, self.exif))


def through_jpeg(pixels, quality):
    """What a JPEG of `quality` leaves of pixels, uint8 [h, w, 3]."""
    if simplejpeg:
        return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(pixels, quality, colorsubsampling="420"))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


def open_bytes(data):
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # Pillow's text names the address of `data`
        raise UnidentifiedImageError("cannot identify image file") from None


UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def write_skipped(file, rows):
    """skipped.csv: path and reason of every image that could not be used; no file when there is none."""
    if not rows:
        file.unlink(missing_ok=True)
        return
    with replacing(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("path", "reason"), *sorted(rows)])


# ---------------------------------------------------------------------------------------------------------------------
# The images of a run

FOLDERS = {"query": "query_images", "reference": "reference_images", "train": "training_images"}


@dataclass
class Group:
    """The images of one folder, in order of path: paths [n], ids [n] (file stems), and [(path, reason)] of what only
    looks like an image."""
    paths: list[str]
    ids: list[str]
    odd: list[tuple[str, str]] = field(default_factory=list)


def list_group(args: Args, group: str) -> Group:
    """The images of --target-set's folder `group`. Raises InputError: no folder, no image, two with one id."""
    folder = args.dir / FOLDERS[group]
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    paths, odd = list_images(folder)
    seen = {}
    for path in paths:
        if (other := seen.setdefault(Path(path).stem, path)) != path:
            raise InputError(f"{folder}: {other} and {path} have the same id '{Path(path).stem}'")
    if args.eval_subset and group == "reference":
        file = Path(args.subset_file or args.dir / "rids_subset.txt")
        if not file.is_file():
            raise InputError(f"--eval-subset: no such file: {file}; scripts/select_ref_subset.py makes it")
        wanted = read_subset(file)
        if absent := sorted(set(wanted) - set(seen)):
            raise InputError(f"{file}: {len(absent)} ids without an image in {folder}, first: {', '.join(absent[:3])}")
        paths = sorted(seen[name] for name in set(wanted))
    paths = paths[:100] if args.dryrun else paths
    if not paths:
        raise InputError(f"no images in {folder}")
    if args.shard:
        first, step = map(int, args.shard.split("/"))
        if not (paths := paths[first::step]):
            raise InputError(f"--shard {args.shard}: {folder} has too few images")
    return Group([str(folder / path) for path in paths], [Path(path).stem for path in paths],
                 [(str(folder / path), reason) for path, reason in odd])


class PlainUnpickler(pickle.Unpickler):
    """Of lists, strings and the like; whatever would need code is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_subset(file: Path) -> list[str]:
    """Ids of a subset: one per line, or the notes' pickled list of strings. InputError: neither."""
    data = file.read_bytes()
    try:
        ids = PlainUnpickler(io.BytesIO(data)).load() if data[:1] == b"\x80" else data.decode("utf-8-sig").split()
    except (pickle.UnpicklingError, ValueError, EOFError, IndexError, AttributeError) as error:
        raise InputError(f"{file}: neither one id per line nor a pickled list of ids: {error}") from None
    if not isinstance(ids, (list, tuple, set)) or not all(isinstance(name, str) for name in ids):
        raise InputError(f"{file}: a pickle, but not a list of ids")
    return list(ids)


def list_pairs(args: Args) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """[(query path, reference path)] of the ground truth's positive pairs, relative to DIR; and what is no image."""
    groups = {group: list_group(args, group) for group in ("query", "reference")}
    paths = {group: dict(zip(listed.ids, listed.paths)) for group, listed in groups.items()}
    with open(args.pairs, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.DictReader(file) if row.get("reference_id")]
    if not rows or "query_id" not in rows[0]:
        raise InputError(f"--pairs {args.pairs}: no pairs in columns query_id and reference_id")
    pairs = sorted((row["query_id"], row["reference_id"]) for row in rows)
    absent = sorted({name for pair in pairs for group, name in zip(paths, pair) if name not in paths[group]})
    if absent:
        raise InputError(f"--pairs {args.pairs}: {len(absent)} ids without an image in {args.dir}: "
                         f"{first_three(absent)}")
    found = [tuple(os.path.relpath(paths[group][name], args.dir) for group, name in zip(paths, pair)) for pair in pairs]
    return found, sum((listed.odd for listed in groups.values()), [])


def list_negatives(args: Args, pairs: list[tuple[str, str]]) -> list[str]:
    """Paths of images that match nothing: those of --negatives-dir but those of the pairs of --pairs."""
    folder = Path(args.negatives_dir)
    if not folder.is_dir():
        raise InputError(f"--negatives-dir: no such folder: {folder}")
    used = {os.path.realpath(args.dir / path) for pair in pairs for path in pair}
    found = [path for path in (str(folder / name) for name in list_images(folder)[0])
             if os.path.realpath(path) not in used]
    if len(found) < args.negatives:
        raise InputError(f"--negatives {args.negatives}: {folder} has {len(found)} images to draw from")
    return found
