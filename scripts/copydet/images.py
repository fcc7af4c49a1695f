"""Images in folders: find them, open them as RGB, list those of a run and those that cannot be used. No torch."""
from __future__ import annotations

import contextlib
import csv
import fnmatch
import functools
import io
import os
import pickle
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from copydet.common import (LEFT_BY_SYSTEMS, InputError, check_file, composed, first_three, manifest_of, replacing,
                            shown)
from copydet.options import Args

try:
    import simplejpeg
except ImportError:  # Pillow decodes everything, JPEGs in about 1.4 times the time
    simplejpeg = None

# ---------------------------------------------------------------------------------------------------------------------
# Kinds of files

FORMATS = {  # what is opened, by Pillow's name -> endings of its files; none of these starts another program
    "JPEG": ".jpg .jpeg .jpe .jfif .jif .mpo", "PNG": ".png .apng", "WEBP": ".webp", "BMP": ".bmp .dib",
    "TIFF": ".tif .tiff", "GIF": ".gif", "AVIF": ".avif .avifs", "JPEG2000": ".jp2 .j2k .j2c .jpc .jpf .jpx",
    "PPM": ".ppm .pgm .pbm .pnm .pfm", "PSD": ".psd"}
OTHERS = """.heic .heif .hif .jxl .svg .svgz .eps .psb .xcf .ico .icns .cur .tga .pcx .dds .exr .hdr .qoi .sgi .wmf .emf
    .jxr .wdp .bpg .flif .djvu .fits .dcm .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw
    .x3f .3fr .iiq .erf .kdc .mrw"""  # images that are told, not opened
OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # what not every Pillow has, by its name for it
KNOWN = {**features.modules, **features.codecs}
READ = [name for name in FORMATS
        if name not in OPTIONAL or OPTIONAL[name] in KNOWN and features.check(OPTIONAL[name])]
IMAGE_ENDINGS = tuple(ending for name in READ for ending in FORMATS[name].split())
OTHER_ENDINGS = set(" ".join([OTHERS, *FORMATS.values()]).split()) - set(IMAGE_ENDINGS)
ENDING = re.compile(r"\.[a-z0-9]{0,4}[a-z][a-z0-9]{0,4}$")  # neither .1 nor .jpg_large
CONTENT = re.compile(  # how files begin
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<WEBP>RIFF....WEBP)|(?P<BMP>BM....\0{4})|"
    rb"(?P<TIFF>II\*\0|MM\0\*)|(?P<GIF>GIF8[79]a)|(?P<AVIF>....ftyp(?:avi[fs]|mif1|msf1))|"
    rb"(?P<JPEG2000>\0\0\0\x0cjP  |\xff\x4f\xff\x51)|(?P<PSD>8BPS\0\x01)|(?P<HEIC>....ftyphe[iv][cxms])|"
    rb"(?P<JXL>\0\0\0\x0cJXL |\xff\x0a)|(?P<PostScript>%!PS|\xc5\xd0\xd3\xc6)|(?P<PDF>%PDF)|(?P<HTML>\s*<(?:!|html))",
    re.DOTALL)
NOT_READ = " is not read here"
Odd = list[tuple[str, str]]  # [(path, reason)]


def kind_of(content: bytes) -> str | None:
    """What a file holds, by how it begins: a key of FORMATS or another name, None where that tells nothing."""
    found = CONTENT.match(content[:32])
    return found.lastgroup if found else None


def id_of(path: str | Path) -> str:
    """Id of an image: its file's name without the ending, as valid UTF-8."""
    name = os.path.basename(path)
    stem, ending = os.path.splitext(name)
    return shown(stem if ending.lower() in IMAGE_ENDINGS else name)


# ---------------------------------------------------------------------------------------------------------------------
# Listing

SYSTEM = {*map(str.lower, LEFT_BY_SYSTEMS), "ehthumbs.db", "@eadir", "@recycle", "@recently-snapshot", "#recycle",
          "#snapshot", "$recycle.bin", "recycler", "system volume information", "__macosx"}
IMAGE = "image"


def list_images(root: str | Path, exclude: Sequence[str] = ()) -> tuple[list[str], Odd]:
    """All images below `root`: their paths relative to it, sorted, and [(path, reason)] of what only looks like one.

    Left out are hidden and system files and folders, and those whose name or relative path one of the globs `exclude`
    fits, and thumbnails and pictures that this program wrote, as its manifests tell. Folders that links lead to are
    listed once. Files without an ending count by their content.
    """
    paths: list[str] = []
    odd: Odd = []
    written = functools.cache(manifest_of)
    for path, entry in walk(root, exclude, odd):
        if is_ours(entry.path, written):
            continue
        if (what := what_is(entry)) == IMAGE:
            paths.append(path)
        elif what:
            odd.append((path, what))
    return sorted(paths), sorted(odd)


def is_ours(path: str, written: Callable[[str], set]) -> bool:
    """Whether a manifest lists this file, in its folder or the one above; `written`: folder -> what its manifest lists.
    """
    folder, name = os.path.split(path)
    above, below = os.path.split(folder)
    return name in written(folder) or f"{below}/{name}" in written(above)


def images_by_id(root: str | Path) -> dict[str, str]:
    """Paths of the images below `root`, by id; ask `find_image` for one."""
    paths = {id_of(path): os.path.join(root, path) for path in list_images(root)[0]}
    return {composed(name): path for name, path in paths.items()} | paths


def find_image(images: dict[str, str], name: str) -> str | None:
    """The path of the image of an id, which may be in another form of Unicode than the file's name."""
    return images.get(name) or images.get(composed(name))


def walk(root: str | Path, exclude: Sequence[str], odd: Odd) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Relative path and entry of each file below `root`; what cannot be looked into is added to `odd`."""
    globs = re.compile("|".join(map(fnmatch.translate, exclude))) if exclude else None
    above = {key_of(folder) for folder in Path(root).resolve().parents}
    seen: set[tuple[int, int]] = set()
    links = [""]
    while links:  # those to folders, after all that can be reached without them
        links.sort(reverse=True)
        folders = [links.pop()]
        linked = folders[0] != ""
        while folders:
            folder = folders.pop()
            try:
                entries = scan(os.path.join(root, folder), seen, above, linked)
            except OSError as error:
                odd.append((folder or ".", reason_of(error)))
                continue
            prefix = os.path.join(folder, "")
            for entry in entries:
                name = entry.name
                path = prefix + name
                if name[0] == "." or name.lower() in SYSTEM or globs and (globs.match(name) or globs.match(path)):
                    continue
                try:
                    is_folder = entry.is_dir()
                except OSError as error:  # a link to itself
                    odd.append((path, reason_of(error)))
                    continue
                if not is_folder:
                    yield path, entry
                elif name.lower().endswith(IMAGE_ENDINGS):
                    odd.append((path, "is a folder"))
                else:
                    (links if entry.is_symlink() else folders).append(path)


def scan(folder: str, seen: set[tuple[int, int]], above: set[tuple[int, int]], linked: bool) -> list[os.DirEntry[str]]:
    """Entries of a folder; none where a link leads to one that was `seen`, an error where to one `above` the root."""
    key = key_of(folder)
    if linked and key in above:
        raise UnreadableImage("is a link to a folder above, not followed")
    if linked and key in seen:
        return []
    seen.add(key)
    return list(os.scandir(folder))


def key_of(folder: str | Path) -> tuple[int, int]:
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def what_is(entry: os.DirEntry[str] | Path) -> str:
    """IMAGE, or why what looks like one is not listed, or nothing for what does not look like one."""
    name = entry.name.lower()
    ending = name[name.rfind("."):]
    if ending in IMAGE_ENDINGS:
        return IMAGE if entry.is_file() or entry.is_symlink() else "is not a file"
    if ending in OTHER_ENDINGS:
        return ending[1:].upper() + NOT_READ
    if ENDING.search(name) or not entry.is_file():
        return ""
    try:
        with open(entry, "rb") as file:
            kind = kind_of(file.read(32))
    except OSError:
        return ""
    return IMAGE if kind in READ else kind + NOT_READ if kind in ("HEIC", "JXL", "AVIF") else ""


def not_read(rows: Odd) -> str:
    """ " (120 HEIC, 4 SVG: not read here)" of [(path, reason)]; nothing where all are of kinds that are read."""
    kinds = Counter(reason.removesuffix(NOT_READ) for _, reason in rows if reason.endswith(NOT_READ))
    names = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return f" ({names}: not read here)" if names else ""


# ---------------------------------------------------------------------------------------------------------------------
# Opening

MOST_PIXELS = 178_956_970  # of an image: what Pillow opens by default
MOST_SLENDER = 200  # times longer than wide: --resize crop enlarges the shorter side to that of the input
MOST_BYTES = 2**31  # of a file
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # by EXIF's orientation
TIFF_PHOTOMETRIC = 262
FLAT = 8  # levels between the darkest and the brightest pixel of what shows nothing
BLANK = "shows one flat colour"
NOT_NOW = "cannot be read now: "


class UnreadableImage(OSError):
    """An image that cannot be used; `reason`: why, in a few words, which begin with NOT_NOW where the cause may be gone
    another time (permission, drive, memory)."""

    def __init__(self, reason: str, path: str | Path = "") -> None:
        super().__init__(f"{shown(path)}: {reason}" if path else reason)
        self.reason, self.path = reason, path


@contextlib.contextmanager
def reading(path: str | Path = "") -> Iterator[None]:
    """Whatever goes wrong here becomes UnreadableImage: on hostile files Pillow raises errors of nearly every type."""
    try:
        yield
    except Exception as error:
        raise UnreadableImage(reason_of(error), path) from None


def reason_of(error: Exception) -> str:
    if isinstance(error, UnreadableImage):
        return error.reason
    if isinstance(error, MemoryError):
        return NOT_NOW + "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return NOT_NOW + error.strerror
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS:,} pixels"
    text = " ".join(str(error).split())[:200]
    return "broken: " + (text if isinstance(error, (OSError, ValueError, SyntaxError)) and text else
                         f"{type(error).__name__} {text}".rstrip())


def read_file(path: str | Path) -> bytes:
    """Content of an image's file. What is no file (a pipe would wait for ever) or too large is not opened."""
    with reading(path):
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise UnreadableImage("is not a file")
        if info.st_size > MOST_BYTES:
            raise UnreadableImage(f"more than {MOST_BYTES:,} bytes")
        with open(path, "rb") as file:
            return file.read()


def check_size(width: int, height: int) -> None:
    """Raise UnreadableImage for what would not fit into memory, here or when it is resized."""
    if width * height > MOST_PIXELS:
        raise UnreadableImage(f"{width:,} x {height:,} pixels, more than {MOST_PIXELS:,}")
    if max(width, height) > MOST_SLENDER * min(width, height):
        raise UnreadableImage(f"{width:,} x {height:,} pixels, more than {MOST_SLENDER} times longer than wide")


def open_bytes(data: bytes) -> Image.Image:
    """The image that a file's content is, not decoded yet."""
    try:
        img = Image.open(io.BytesIO(data), formats=READ)
    except UnidentifiedImageError:  # Pillow's text names the address of `data`
        raise UnreadableImage(why_not(data)) from None
    check_size(*img.size)
    return img


def open_image(path: str | Path, exif_transpose: bool = False) -> Image.Image:
    """Decode an image to 8-bit RGB: first frame, other depths scaled, transparency on white, EXIF turn if asked.

    Raises UnreadableImage where it cannot be decoded whole.
    """
    with reading(path), open_bytes(read_file(path)) as img:
        return to_rgb(img, exif_transpose)


def open_thumbnail(path: str | Path, side: int) -> Image.Image:
    """An image as RGB, upright, at most `side` px high and wide. Raises UnreadableImage."""
    file = ImageFile(path, exif_transpose=True)
    file.shrink(min(file.size) / side)
    img = Image.fromarray(file.pixels)
    img.thumbnail((side, side))
    return img


def why_not(data: bytes) -> str:
    """Why Pillow does not take a file's content for an image."""
    kind = kind_of(data)
    if kind in READ:
        return f"{kind} that is broken, or of a rare kind"
    return kind + NOT_READ if kind else "no image of a kind that is read here" if data else "empty"


@reading()
def to_rgb(img: Image.Image, exif_transpose: bool) -> Image.Image:
    """A Pillow image as `open_image` gives it."""
    check_size(*img.size)
    deep = ";16" in str(getattr(img, "tile", [])[:1])
    img.load()
    inverted = img.mode[0] in "IF" and getattr(img, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == 0  # 0 is white
    turn = TURNS.get(orientation_of(img)) if exif_transpose else None
    img = img if turn is None else img.transpose(turn)  # ImageOps.exif_transpose fails where it cannot rewrite the EXIF
    if img.mode[0] in "IF":  # Pillow would clip at 255
        grey = to_8_bits(np.asarray(img))
        img = Image.fromarray(255 - grey if inverted else grey)
    elif deep and brightest(img) < 16:  # Pillow keeps the upper 8 bits
        raise UnreadableImage("not an 8-bit image: of its 16 bits only the lower are used")
    return on_paper(img.convert("RGBA")) if img.has_transparency_data else img.convert("RGB")


def orientation_of(img: Image.Image) -> int:
    """EXIF's, from 1 to 8; 1, upright, where it cannot be read."""
    try:
        value = img.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return value if value in TURNS else 1


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """uint8 of whole numbers that fill 8, 10, 12, 16 or 32 bits, or of floats from 0 to 1 or to their maximum.

    Raises UnreadableImage for others: below 0, not finite.
    """
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high < np.inf:
        raise UnreadableImage(f"not an 8-bit image: values from {low:g} to {high:g}")
    limits = [1] if values.dtype.kind == "f" else [2 ** bits - 1 for bits in (8, 10, 12, 16)]
    limit = next((limit for limit in limits if high <= limit), high)
    return (values.astype(np.float32) * np.float32(255 / limit)).round().clip(0, 255).astype(np.uint8)


def brightest(img: Image.Image) -> int:
    """The largest value of an 8-bit image's colours."""
    return max(int(np.asarray(band).max()) for name, band in zip(img.getbands(), img.split()) if name.upper() != "A")


def on_paper(img: Image.Image) -> Image.Image:
    """RGBA on white, as RGB; on black what would be blank on white."""
    def page(colour: str) -> Image.Image:
        return Image.alpha_composite(Image.new("RGBA", img.size, colour), img).convert("RGB")

    def blank(page: Image.Image) -> bool:
        few = page.resize((64, 64), Image.Resampling.NEAREST)
        return all(high - low <= FLAT for part in (few, page) for low, high in cast(tuple, part.getextrema()))

    white = page("white")
    return black if blank(white) and not blank(black := page("black")) else white


def is_blank(pixels: np.ndarray) -> bool:
    """Whether pixels, uint8 [h, w, 3], show one flat colour."""
    return all(np.ptp(part, axis=(0, 1)).max() <= FLAT for part in (pixels[::16, ::16], pixels))


class ImageFile:
    """An image's file, decoded when its pixels are asked for: once, and a JPEG at 1/2, 1/4 or 1/8 of its size where all
    that look at it said that they need no more (`shrink`). With `draft` off as open_image does. Raises UnreadableImage.

    Attributes: size: (width, height).
    """

    def __init__(self, path: str | Path, exif_transpose: bool = False, draft: bool = True) -> None:
        self.path, self.data, self.exif, self.draft = path, read_file(path), exif_transpose, draft
        self.shrinks: list[float] = []
        with reading(path):
            try:
                if not (simplejpeg and draft) or exif_transpose and b"Exif" in self.data[:2**16]:
                    raise ValueError
                self.size = simplejpeg.decode_jpeg_header(self.data)[1::-1]
                self.fast = True
            except ValueError:
                self.fast = False
                self.size = self.find_size()
            check_size(*self.size)

    def find_size(self) -> tuple[int, int]:
        """(width, height) by Pillow, which turns each TIFF upright. All but JPEGs have to be decoded whole anyway."""
        with open_bytes(self.data) as img:
            if img.format not in ("JPEG", "MPO"):
                return self.pixels.shape[1::-1]
            return img.size[::-1] if self.exif and orientation_of(img) >= 5 else img.size

    def shrink(self, factor: float) -> None:
        """Whoever calls needs no more than the image at 1/factor of its size."""
        self.shrinks.append(factor)

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """uint8 [h, w, 3]"""
        with reading(self.path):
            return self.decode()

    def decode(self) -> np.ndarray:
        factor = min(self.shrinks, default=1) if self.draft else 1
        factor = max(f for f in (1, 2, 4, 8) if f <= max(1, factor))
        if self.fast:
            width, height = (-(-side // factor) for side in self.size)
            try:
                return simplejpeg.decode_jpeg(self.data, min_height=height, min_width=width)
            except ValueError:  # no baseline JPEG: Pillow reads it, or tells why it cannot
                pass
        with open_bytes(self.data) as img:
            img.draft("RGB", (max(1, img.width // factor), max(1, img.height // factor)))
            return np.array(to_rgb(img, self.exif))


def through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """What a JPEG of `quality` leaves of pixels, uint8 [h, w, 3]."""
    if simplejpeg:
        return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(pixels, quality, colorsubsampling="420"))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


NOTED = "path", "reason"  # columns of skipped.csv and blank.csv


def beside(h5: Path, what: str, ending: str = ".csv") -> Path:
    """skipped.csv, blank.csv or run.json of a descriptor file; a shard's or a subset's is its own: several may run at a
    time."""
    name = h5.stem.removeprefix("fb-isc-submission")
    return h5.with_name(f"{what}{name if name != h5.stem else ''}{ending}")


def read_skipped(file: Path) -> Odd:
    """[(path, reason)] of a skipped.csv or blank.csv, if it is there. Raises InputError: not of that form."""
    if not file.is_file():
        return []
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            header, *rows = csv.reader(lines)
            if header == list(NOTED):
                return [(path, reason) for path, reason in rows]
    except (ValueError, csv.Error):
        pass
    raise InputError(f"{file}: not as this program writes it, path and reason of images; rename or delete it")


def write_skipped(file: Path, rows: Odd) -> None:
    """skipped.csv or blank.csv: path and reason of images, sorted; no file when there is none."""
    if not rows:
        file.unlink(missing_ok=True)
        return
    with replacing(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([NOTED, *sorted((shown(path), shown(reason)) for path, reason in rows)])


# ---------------------------------------------------------------------------------------------------------------------
# The images of a run

FOLDERS = {"query": "query_images", "reference": "reference_images", "train": "training_images"}


@dataclass
class Group:
    """The images of one folder, in order of path: paths [n], ids [n], and [(path, reason)] of what only looks like an
    image."""
    paths: list[str]
    ids: list[str]
    odd: Odd = field(default_factory=list)


def list_group(args: Args, group: str) -> Group:
    """The images of --target-set's folder `group`. Raises InputError: no folder, no image, two with one id."""
    folder = args.dir / FOLDERS[group]
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    paths, odd = list_images(folder, args.exclude)
    seen: dict[str, str] = {}
    for path in paths:
        if (other := seen.setdefault(id_of(path), path)) != path:
            raise InputError(f"{folder}: {other} and {path} have the same id '{id_of(path)}'")
    if args.eval_subset and group == "reference":
        file = Path(args.subset_file or args.dir / "rids_subset.txt")
        if not os.path.lexists(file):
            raise InputError(f"--eval-subset: no such file: {file}; scripts/select_ref_subset.py makes it")
        from copydet.metrics import respell  # late: pandas takes half a second
        wanted, = respell(file, (np.array(read_subset(file)), seen))
        if absent := sorted(set(wanted) - set(seen)):
            raise InputError(f"{file}: {len(absent)} ids without an image in {folder}, first: {', '.join(absent[:3])}")
        paths = sorted(seen[name] for name in set(wanted))
    paths = paths[:100] if args.dryrun else paths
    if not paths:
        raise InputError(f"no images in {folder}" + not_read(odd))
    if args.shard:
        first, step = map(int, args.shard.split("/"))
        if not (paths := paths[first::step]):
            raise InputError(f"--shard {args.shard}: {folder} has too few images")
    return Group([str(folder / path) for path in paths], [id_of(path) for path in paths],
                 [(str(folder / path), reason) for path, reason in odd])


class PlainUnpickler(pickle.Unpickler):
    """Of lists, strings and the like; whatever would need code is refused."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_subset(file: Path) -> list[str]:
    """Ids of a subset: one per line, or the notes' pickled list of strings. InputError: neither."""
    check_file(file, "--eval-subset")
    data = file.read_bytes()
    try:
        if data[:1] == b"\x80":
            ids = PlainUnpickler(io.BytesIO(data)).load()
        else:  # ids can hold spaces
            ids = [line.strip() for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    except Exception as error:  # broken pickles raise nearly every type
        raise InputError(f"{file}: neither one id per line nor a pickled list of ids: {error}") from None
    if not isinstance(ids, (list, tuple, set)) or not all(isinstance(name, str) for name in ids) or not ids:
        raise InputError(f"{file}: holds no list of ids")
    return list(ids)


def list_pairs(args: Args) -> tuple[Odd, Odd]:
    """[(query path, reference path)] of the ground truth's positive pairs, relative to DIR; and what is no image."""
    groups = {group: list_group(args, group) for group in ("query", "reference")}
    paths = {group: dict(zip(listed.ids, listed.paths)) for group, listed in groups.items()}
    from copydet.metrics import read_table, respell  # late: pandas takes half a second
    table = read_table(args.pairs, ["query_id", "reference_id"])
    table = table[(table != "").all(axis=1)]
    if table.empty:
        raise InputError(f"--pairs {args.pairs}: no pairs in columns query_id and reference_id")
    pairs = sorted(zip(*respell(args.pairs, (table.query_id.to_numpy(str), paths["query"]),
                                (table.reference_id.to_numpy(str), paths["reference"]))))
    absent = sorted({name for pair in pairs for group, name in zip(paths, pair) if name not in paths[group]})
    if absent:
        raise InputError(f"--pairs {args.pairs}: {len(absent)} ids without an image in {args.dir}: "
                         f"{first_three(absent)}")
    queries, references = ({name: os.path.relpath(path, args.dir) for name, path in paths[group].items()}
                           for group in groups)
    found = [(queries[query], references[reference]) for query, reference in pairs]
    return found, sum((listed.odd for listed in groups.values()), [])


def list_negatives(args: Args, pairs: Sequence) -> list[str]:
    """Paths of images that match nothing: those of --negatives-dir but those of the pairs of --pairs."""
    folder = Path(args.negatives_dir)
    if not folder.is_dir():
        raise InputError(f"--negatives-dir: no such folder: {folder}")
    used = {os.path.realpath(args.dir / path) for pair in pairs for path in pair}
    paths, odd = list_images(folder, args.exclude)
    found = [path for path in (str(folder / name) for name in paths) if os.path.realpath(path) not in used]
    if len(found) < args.negatives:
        raise InputError(f"--negatives {args.negatives}: {folder} has {len(found)} images to draw from{not_read(odd)}")
    return found
