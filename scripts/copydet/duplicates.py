"""Groups of duplicates within one collection: files of the same bytes, what links to what, which file to keep."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from copydet.common import replacing, sha256_of, warn
from copydet.images import UnreadableImage, orientation_of, reading
from copydet.machine import count_cores

LOSSLESS = ("PNG", "TIFF", "BMP", "PPM")
LOSSY = ("jpeg", "tiff_jpeg", "webp")  # compression of a TIFF


class Look(NamedTuple):
    """What is known of an image file without decoding it: upright size in px, bytes, time of change in ns, and how
    coarse its compression is: the mean quantization step of a JPEG, 1 where nothing is lost, else 24 over the bits that
    a pixel takes, which is of that order."""
    width: int
    height: int
    bytes: int
    mtime: int
    step: float


def look_at(file: str | None) -> Look | None:
    """None where there is no such image."""
    if not file or not os.path.isfile(file):
        return None
    try:
        info = os.stat(file)
        with reading(file), Image.open(file) as img:
            size = img.size[::-1] if orientation_of(img) >= 5 else img.size
            tables = getattr(img, "quantization", None)  # number -> table, of brightness first
            lossless = img.format in LOSSLESS and img.info.get("compression") not in LOSSY
            guess = 3 * img.width * img.height / max(1, info.st_size)
            step = float(np.mean(tables[min(tables)])) if tables else 1.0 if lossless else guess
    except (OSError, UnreadableImage):
        return None
    return Look(*size, info.st_size, info.st_mtime_ns, step)


def number_contents(files: Sequence[str | None], looks: Sequence[Look | None]) -> list[int]:
    """Number [n] of each file's content: files of the same bytes have the same. Only files of equal length are read."""
    lengths = Counter(look.bytes for look in looks if look)
    alike = [i for i, look in enumerate(looks) if look and lengths[look.bytes] > 1]

    def content(i: int) -> object:
        try:
            return sha256_of(files[i] or "")
        except OSError:
            return i

    with ThreadPoolExecutor(count_cores()) as pool:
        known = dict(zip(alike, pool.map(content, alike)))
    numbers: dict = {}
    return [numbers.setdefault(known.get(i, i), len(numbers)) for i in range(len(files))]


def keeping_order(names: Sequence[str], looks: Sequence[Look | None]) -> list[int]:
    """Rank [n], from 0: of the images in a group the one of the lowest rank is to be kept. It is the largest, then the
    least compressed, then the oldest."""
    def key(i: int) -> tuple:
        look = looks[i]
        if look is None:
            return 1, names[i]
        return 0, -look.width * look.height, look.step, look.mtime, len(names[i]), names[i]

    rank = [0] * len(names)
    for position, i in enumerate(sorted(range(len(names)), key=key)):
        rank[i] = position
    return rank


def link(edges: Iterable[tuple[int, int]], apart: Iterable[tuple[int, int]] = ()) -> dict[int, int]:
    """{image: first image of its group} that the edges make, one after another, but for those that would bring two
    images into one group that were told to be kept apart."""
    parent: dict[int, int] = {}
    foes: dict[int, set[int]] = {}
    for a, b in apart:
        foes.setdefault(a, set()).add(b)
        foes.setdefault(b, set()).add(a)

    def root(image: int) -> int:
        while (above := parent.setdefault(image, image)) != image:
            parent[image] = parent[above]
            image = parent[image]
        return image

    for a, b in edges:
        a, b = root(a), root(b)
        if a == b or any(root(foe) == b for foe in foes.get(a, ())):
            continue
        parent[b] = a
        if b in foes:
            foes[a] = foes.get(a, set()) | foes[b]
    return {image: root(image) for image in list(parent)}


def group_numbers(pairs: np.ndarray, apart: Iterable[tuple[int, int]] = ()) -> np.ndarray:
    """Number [n], from 1, of the group that each of the PAIRS [n] belongs to; the best pair's is 1. 0 where its images
    ended in different groups."""
    edges = pairs[["query", "reference"]].tolist()
    group, numbers = link(edges, apart), {}  # type: ignore[var-annotated]
    return np.array([numbers.setdefault(group[i], len(numbers) + 1) if group[i] == group[j] else 0 for i, j in edges],
                    int)


def write_duplicates(file: Path, groups: dict[int, int], rank: Mapping[int, int], paths: Sequence[str],
                     null: bool) -> int:
    """duplicates.txt: in each group the files but for the one to keep, one path per line, or each ended by a NUL ->
    number of paths. A path that holds a line break is only written with `null`."""
    members: dict[int, list[int]] = {}
    for image, group in groups.items():
        members.setdefault(group, []).append(image)
    listed = [paths[i] for _, group in sorted(members.items()) for i in sorted(group, key=lambda i: rank[i])[1:]]
    lines = [path for path in listed if null or "\n" not in path]
    if len(lines) < len(listed):
        warn(f"{file.name}: {len(listed) - len(lines)} paths with a line break are left out; --null writes them")
    with replacing(file) as temporary:
        temporary.write_bytes(b"".join(os.fsencode(path) + (b"\0" if null else b"\n") for path in lines))
    return len(lines)
