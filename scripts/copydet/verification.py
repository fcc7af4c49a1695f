"""Verification: does a query show a reference, where, and is it a copy? Local features, geometry, then the pixels.

    query, reference = describe_file("query.jpg"), describe_file("reference.jpg")
    match = verify(query, reference)            # match.verdict, match.inliers, match.outline

SIFT features (Lowe, 2004) with RootSIFT descriptors (Arandjelovic and Zisserman, 2012). Features have a place, a size
and an angle, so that each match of two proposes a similarity by itself (Philbin et al., 2007); the best proposals are
refined to affine transforms. Nothing is drawn at random, and descriptors are multiplied as whole numbers below 2^24,
exact in float32 in any order: the same features always give the same match. What the transform lays upon each other is
compared then: two photos with one logo, caption, watermark or screen around them have many inliers, and differ.

Coordinates are in px of the original image, upright, which covers [0, width] x [0, height]; the y axis points down.
"""
from __future__ import annotations

import collections
import functools
import hashlib
import io
import multiprocessing
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from copydet.common import InputError, ProcessesApart, WorkError, time_of
from copydet.images import NOT_NOW, ImageFile, UnreadableImage

SIDES = 256, 400  # px: smaller images are enlarged to the one, larger ones reduced to the other (their longer side)
COUNT, EDGE = 600, 0.02  # features of an image, at most; contrast that SIFT asks for
RATIO = 0.85  # of the distances to the nearest and to the second nearest feature, below which the nearest is a match
TOLERANCE = 0.015  # of the query's longer side that an inlier may be off
PROPOSALS, REFINED = 150, 8  # matches that propose a transform, and the best of them
SCALE, ANGLE = np.log(2), np.pi / 4  # by which a feature's own size and angle may deviate from the transform's
LARGEST_SCALE, LARGEST_STRETCH = 16, 4  # of a plausible transform: enlargement, and of one axis against the other
GRAIN = 0.005  # of the longer side: inliers nearer to each other count once
LEAST_INLIERS = 5  # of a match
LEAST_FEATURES, SMALLEST = 8, 32  # of an image that can be verified: features, px of the shorter side

THUMBNAIL = 96  # px, longer side of what is compared pixel by pixel
WINDOW = 9  # px, side of the windows that are correlated
CONTRAST = 4.0  # standard deviation of grey levels in a window from which it shows something
ALIKE, UNLIKE = 0.6, 0.4  # correlation of windows that show the same, and of those that differ
FEW = 15  # inliers
LEAST_COVERAGE, WITH_FEW = 0.55, 0.75  # of a copy: of the query or of the reference; with FEW inliers
EVIDENCE = 20  # inliers that agree, at which the score is 0.5
LARGEST_HOLE = 0.15  # of a copy: the largest part where both images show something else, of what they share

PER_JOB = 32  # images or queries that a process does at a time
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

COPY, PART, NONE, ABSTAIN = "copy", "shares a part", "none", "not verifiable"

CELLS = np.arange(128).reshape(4, 4, 8)  # of a SIFT descriptor: across the feature's angle, along it, gradient's angle
MIRRORED = CELLS[::-1, :, -np.arange(8) % 8].ravel()  # the mirrored image's descriptor in terms of the image's


@dataclass(frozen=True)
class Features:
    """What of an image is compared.

    Attributes: size: (width, height) in px; frames: float32 [n, 4], x, y and diameter in px, angle in degrees;
    descriptors: uint8 [n, 128], RootSIFT of length 255; thumbnail: uint8 [h, w] grey, THUMBNAIL px.
    """
    size: tuple[int, int]
    frames: np.ndarray
    descriptors: np.ndarray
    thumbnail: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        for array in (np.array(self.size, np.int32), self.frames, self.descriptors, self.thumbnail):
            np.save(file, array)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Features:
        file = io.BytesIO(data)
        size, *arrays = (np.load(file) for _ in range(4))
        return cls(tuple(size.tolist()), *arrays)

    @functools.cached_property
    def mirrored(self) -> Features:
        """Those of the mirrored image."""
        x, y, size, angle = self.frames.T
        frames = np.stack([self.size[0] - x, y, size, (180 - angle) % 360], 1)
        return Features(self.size, frames, self.descriptors[:, MIRRORED], self.thumbnail[:, ::-1])

    @functools.cached_property
    def vectors(self) -> np.ndarray:
        """The descriptors as float32."""
        return self.descriptors.astype(np.float32)


@dataclass(frozen=True)
class Match:
    """What verification found. Without inliers all but the verdict is as in the defaults.

    Attributes:
        verdict: COPY; PART, the images share something, but most of what lies upon each other differs or little does;
            NONE; ABSTAIN, an image shows too little to tell.
        inliers: distinct pairs of features that agree with the transform.
        transform: float64 [2, 3], from px of the reference to px of the query.
        mirrored: whether the query shows the reference mirrored.
        agreement: fraction, of what the images show where they overlap, that is alike.
        coverage_query, coverage_reference: the part of each that overlaps, times the agreement.
        outline: float64 [4, 2], the reference's corners in the query: top left, top right, bottom right, bottom left.
        sizes: (width, height) of the query and of the reference.
        points: float32 [inliers, 4], x and y in the query, x and y in the reference.
    """
    verdict: str
    inliers: int = 0
    transform: np.ndarray | None = None
    mirrored: bool = False
    agreement: float = 0.0
    coverage_query: float = 0.0
    coverage_reference: float = 0.0
    outline: np.ndarray | None = None
    points: np.ndarray | None = None
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None

    @property
    def outline_text(self) -> str:
        """The outline as tables have it: x and y of each corner, in px; nothing without."""
        return "" if self.outline is None else " ".join(f"{x:.1f}" for x in self.outline.ravel())

    @property
    def part(self) -> np.ndarray:
        """float64 [4, 2], the query's corners in the reference: what the outline is for the reference."""
        assert self.transform is not None and self.sizes is not None
        return corners(self.sizes[0], cv2.invertAffineTransform(self.transform))


ABSTAINED = Match(ABSTAIN)


def pair_score(match: Match, nearness: float) -> float:
    """One score for a pair whose descriptors have the score `nearness`, minus the squared distance: above 0, and nearer
    to 1 the more inliers agree, where local features say COPY; where they do not, at most 0: the nearness, and nearer
    to 0 where the images share a part."""
    evidence = match.inliers * match.agreement
    if match.verdict != COPY:
        return nearness / (1 + evidence / 2)
    evidence += 1 / (1 - nearness)
    return evidence / (evidence + EVIDENCE)


# ---------------------------------------------------------------------------------------------------------------------
# Features


def describe_file(path: str) -> Features:
    """Features of an image file, upright and decoded no larger than needed. Raises UnreadableImage."""
    image = ImageFile(path, exif_transpose=True)
    image.shrink(max(image.size) / SIDES[1])
    return describe(image.pixels, image.size)


def describe(pixels: np.ndarray, size: tuple[int, int] | None = None) -> Features:
    """Features of pixels, uint8 [h, w, 3] RGB or [h, w] grey, of an image of `size` (width, height); theirs if None."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if pixels.ndim == 3 else pixels
    size = size or grey.shape[::-1]
    large = resize(grey, min(max(*size, SIDES[0]), SIDES[1]))
    thumbnail = resize(large, THUMBNAIL)
    sift = cv2.SIFT.create(COUNT, contrastThreshold=EDGE, enable_precise_upscale=True)
    found, descriptors = sift.detectAndCompute(large, None)
    if not found:
        return Features(size, np.empty((0, 4), np.float32), np.empty((0, 128), np.uint8), thumbnail)
    factor = np.array(size) / large.shape[::-1]
    frames = np.array([(*point.pt, point.size, point.angle) for point in found[:COUNT]], np.float32)
    frames[:, :2] = (frames[:, :2] + 0.5) * factor
    frames[:, 2] *= factor.mean()
    shares = descriptors[:COUNT] / np.maximum(descriptors[:COUNT].sum(1, keepdims=True), 1)
    return Features(size, frames, (255 * np.sqrt(shares)).round().astype(np.uint8), thumbnail)


def resize(grey: np.ndarray, side: int) -> np.ndarray:
    """A grey image [h, w] with a longer side of `side` px."""
    factor = side / max(grey.shape)
    width, height = (max(1, round(length * factor)) for length in grey.shape[::-1])
    return cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry


def match_features(query: Features, reference: Features) -> tuple[np.ndarray, np.ndarray]:
    """Rows [m] of the query's features and of those of the reference that they match (ratio test; Lowe, 2004)."""
    product = query.vectors @ reference.vectors.T
    rows, nearest = np.arange(len(product)), product.argmax(1)
    best = product[rows, nearest]
    product[rows, nearest] = 0
    first, second = 255**2 - best, 255**2 - product.max(1)  # half the squared distances
    rows = np.flatnonzero(first < RATIO**2 * second)
    return rows, nearest[rows]


def fit(source: np.ndarray, target: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The affine transform that most of the matched frames [m, 4] of two images agree with.

    -> (float64 [2, 3] from source to target, its inliers, bool [m]): those at most `tolerance` px off in the target
    whose size and angle change as the transform's do, but for SCALE and ANGLE. None where no plausible one is found.
    """
    source, target = source.astype(float), target.astype(float)
    here, there = source[:, 0] + 1j * source[:, 1], target[:, 0] + 1j * target[:, 1]
    turn = target[:, 2] / source[:, 2] * np.exp(1j * np.deg2rad(target[:, 3] - source[:, 3]))
    by = slice(None, None, 1 + len(turn) // PROPOSALS)
    deviation = np.log(turn[by, None] / turn)
    alike = (np.abs(deviation.real) < SCALE) & (np.abs(deviation.imag) < ANGLE)
    error = np.abs(turn[by, None] * (here - here[by, None]) - (there - there[by, None]))
    agree, best = alike & (error < 3 * tolerance), None
    for i in np.argsort(-agree.sum(1), kind="stable")[:REFINED]:
        found = refine(source[:, :2], target[:, :2], alike[i], agree[i], tolerance)
        if found and (best is None or found[1].sum() > best[1].sum()):
            best = found
    return best


def refine(source: np.ndarray, target: np.ndarray, alike: np.ndarray, inliers: np.ndarray,
           tolerance: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Least squares on the inliers [m] of points [m, 2], then new inliers, with a tolerance that falls."""
    source = np.column_stack([source, np.ones(len(source))])
    for allowed in (3 * tolerance, 2 * tolerance, tolerance):
        if inliers.sum() < 3:
            return None
        transform = np.linalg.lstsq(source[inliers], target[inliers], rcond=None)[0].T
        inliers = alike & (np.hypot(*(source @ transform.T - target).T) < allowed)
    return (transform, inliers) if is_plausible(transform) else None


def is_plausible(transform: np.ndarray) -> bool:
    """Whether a transform [2, 3] keeps the handedness, and scales and stretches no more than people do."""
    large, small = np.linalg.svd(transform[:, :2], compute_uv=False)
    return (np.linalg.det(transform[:, :2]) > 0 and small > 1 / LARGEST_SCALE and large < LARGEST_SCALE
            and large < LARGEST_STRETCH * small)


def distinct(points: np.ndarray, grain: float) -> np.ndarray:
    """Rows of points [n, 2] to keep so that no two are in one square of side `grain` px."""
    return np.unique((points // grain).astype(int), axis=0, return_index=True)[1]


def find(query: Features, reference: Features) -> tuple[np.ndarray, np.ndarray] | None:
    """Transform [2, 3] from the reference to the query, and distinct inliers [n, 4] as Match has them; None without."""
    i, j = match_features(query, reference)
    if len(i) < LEAST_INLIERS:
        return None
    fitted = fit(reference.frames[j], query.frames[i], TOLERANCE * max(query.size))
    if fitted is None:
        return None
    transform, inliers = fitted
    points = np.hstack([query.frames[i[inliers], :2], reference.frames[j[inliers], :2]])
    points = points[distinct(points[:, :2], GRAIN * max(query.size))]
    points = points[distinct(points[:, 2:], GRAIN * max(reference.size))]
    return (transform, points) if len(points) >= LEAST_INLIERS else None


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


@dataclass(frozen=True)
class Overlap:
    """What lies upon each other: agreement, the fraction alike of what either image shows; hole, the largest part in
    which both show something else, as a fraction of the same; query, reference: fractions of the images that overlap.
    """
    agreement: float
    hole: float
    query: float
    reference: float


def compare(query: Features, reference: Features, transform: np.ndarray) -> Overlap:
    """Lay the query's thumbnail upon the reference's with a transform [2, 3] from the reference to the query."""
    to_query, to_reference = (np.array(features.thumbnail.shape[::-1]) / features.size
                              for features in (query, reference))
    matrix = transform[:, :2] * to_query[:, None] / to_reference
    offset = to_query * transform[:, 2] + matrix @ [0.5, 0.5] - 0.5  # OpenCV counts from the centres of pixels
    matrix, scale = np.column_stack([matrix, offset]), np.sqrt(np.linalg.det(matrix))
    here = cv2.GaussianBlur(reference.thumbnail.astype(np.float32), (0, 0), max(1, 1 / scale))
    there = cv2.GaussianBlur(query.thumbnail.astype(np.float32), (0, 0), max(1, scale))  # now both are as sharp
    shape, options = here.shape[::-1], cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR
    inside = cv2.warpAffine(np.ones_like(there), matrix, shape, flags=options) == 1
    there = cv2.warpAffine(there, matrix, shape, flags=options, borderMode=cv2.BORDER_REPLICATE)
    correlation, deviation_here, deviation_there = correlate(here, there)
    shown = inside & (np.maximum(deviation_here, deviation_there) > CONTRAST)
    both = inside & (np.minimum(deviation_here, deviation_there) > CONTRAST)
    total = max(1, shown.sum())
    shared, _ = cv2.intersectConvexConvex(corners(reference.size, transform).astype(np.float32),
                                          corners(query.size).astype(np.float32))
    return Overlap((shown & (correlation > ALIKE)).sum() / total, largest_part(both & (correlation < UNLIKE)) / total,
                   shared / np.prod(query.size), shared / np.linalg.det(transform[:, :2]) / np.prod(reference.size))


def correlate(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlation of two images, float32 [h, w], in the WINDOW around each pixel, and both standard deviations."""
    mean = lambda x: cv2.boxFilter(x, -1, (WINDOW, WINDOW), borderType=cv2.BORDER_REFLECT)
    mean_a, mean_b = mean(a), mean(b)
    deviation_a, deviation_b = (np.sqrt(np.maximum(mean(x * x) - m * m, 1)) for x, m in ((a, mean_a), (b, mean_b)))
    return (mean(a * b) - mean_a * mean_b) / (deviation_a * deviation_b), deviation_a, deviation_b


def largest_part(mask: np.ndarray) -> int:
    """Pixels of the largest connected part of a mask, bool [h, w], but for what is thinner than 3 px."""
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    parts = cv2.connectedComponentsWithStats(mask, connectivity=4)[2]
    return int(parts[1:, cv2.CC_STAT_AREA].max(initial=0))


def corners(size: tuple[int, int], transform: np.ndarray | None = None) -> np.ndarray:
    """Corners [4, 2] of an image of `size` (width, height), from the top left clockwise, through a transform [2, 3]."""
    points = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size
    return points if transform is None else points @ transform[:, :2].T + transform[:, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Verdict


def verify(query: Features, reference: Features) -> Match:
    """Whether the query shows the reference or a part of it, as it is or mirrored."""
    if min(len(query), len(reference)) < LEAST_FEATURES or min(*query.size, *reference.size) < SMALLEST:
        return ABSTAINED
    found = [(len(match[1]), mirrored, match) for mirrored in (False, True)
             if (match := find(query.mirrored if mirrored else query, reference))]
    if not found:
        return Match(NONE)
    inliers, mirrored, (transform, points) = max(found, key=lambda entry: entry[0])
    overlap = compare(query.mirrored if mirrored else query, reference, transform)
    coverage = overlap.query * overlap.agreement, overlap.reference * overlap.agreement
    is_copy = (max(coverage) >= (LEAST_COVERAGE if inliers >= FEW else WITH_FEW) and overlap.hole <= LARGEST_HOLE)
    if mirrored:
        transform, points = transform * [[-1], [1]] + [[0, 0, query.size[0]], [0, 0, 0]], points * [-1, 1, 1, 1]
        points[:, 0] += query.size[0]
    return Match(COPY if is_copy else PART, inliers, transform, mirrored, overlap.agreement, *coverage,
                 corners(reference.size, transform), points, (query.size, reference.size))


# ---------------------------------------------------------------------------------------------------------------------
# Many pairs: features on disk, several processes


class FeatureCache:
    """Features of image files in a folder: a file of SQLite, by path, with size and time that the image's file had. Any
    number of processes may read and write. Raises InputError: the file is another one."""

    def __init__(self, folder: str | Path):
        settings = repr((SIDES, COUNT, EDGE, THUMBNAIL, cv2.__version__))
        self.file = Path(folder) / f"features-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.sqlite"
        self.db = sqlite3.connect(self.file, timeout=600)  # of others that write to it
        try:
            self.db.execute("CREATE TABLE IF NOT EXISTS images (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, "
                            "features BLOB, reason TEXT)")
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # a full disk, or one that is read-only
                raise
            raise InputError(f"{self.file}: {error}; it can be deleted, then images are described again") from None

    def missing(self, paths: Iterable[str]) -> list[str]:
        """Those of the paths that are not described, or have changed since."""
        known = "SELECT size, mtime FROM images WHERE path = ?"
        return [path for path in paths if self.db.execute(known, (os.fsencode(path),)).fetchone() != stamp(path)]

    def write(self, described: Iterable[Described]) -> None:
        """Store what is described in one transaction."""
        with self.db:
            self.db.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?)", [
                (os.fsencode(image.path), *image.stamp,
                 None if image.features is None else image.features.to_bytes(), image.reason) for image in described])

    def forget(self, paths: Iterable[str]) -> None:
        with self.db:
            self.db.executemany("DELETE FROM images WHERE path = ?", [(os.fsencode(path),) for path in paths])

    def read(self, path: str) -> Features | None:
        """Features of a path; None of an image that cannot be read."""
        row = self.db.execute("SELECT features FROM images WHERE path = ?", (os.fsencode(path),)).fetchone()
        return Features.from_bytes(row[0]) if row and row[0] else None

    def unreadable(self, paths: Iterable[str]) -> list[tuple[str, str]]:
        """[(path, reason)] of those of the paths that could not be read."""
        found = ((path, self.db.execute("SELECT reason FROM images WHERE path = ?", (os.fsencode(path),)).fetchone())
                 for path in paths)
        return [(path, row[0]) for path, row in found if row and row[0]]


class Described(NamedTuple):
    """An image file: its path, (size, time in ns) of the file, its features, or the reason why there are none."""
    path: str
    stamp: tuple[int, int]
    features: Features | None
    reason: str | None = None


def stamp(path: str) -> tuple[int, int]:
    """What changes with a file; that of none where there is none any more."""
    try:
        info = os.stat(path)
    except OSError:
        return -1, -1
    return info.st_size, time_of(info)


def describe_files(paths: Sequence[str]) -> list[Described]:
    """Describe image files, those that cannot be read with the reason."""
    described = []
    for path in paths:
        try:
            described.append(Described(path, stamp(path), describe_file(path)))
        except UnreadableImage as error:
            described.append(Described(path, stamp(path), None, error.reason))
    return described


class Verifier:
    """Verifies queries against their candidates in `workers` processes; a context manager.

    Features of references are kept in the FeatureCache of `folder`: they are described first, then read as they are
    asked for, so memory does not grow with them. Every process computes with one thread: the results are the same for
    any number of them.
    """

    def __init__(self, workers: int, folder: str | Path):
        self.workers, self.cache = workers, FeatureCache(folder)

    def __enter__(self) -> Verifier:
        self.before = {name: os.environ.get(name) for name in THREADS}
        os.environ.update(dict.fromkeys(THREADS, "1"))  # processes start with this environment, as they are needed
        self.pool = ProcessPoolExecutor(self.workers, ProcessesApart(), start_worker,
                                        (self.cache.file.parent,))
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        for name, value in self.before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})

    def describe(self, paths: Sequence[str]) -> list[tuple[str, str]]:
        """Describe what of the references is not in the cache -> [(path, reason)] of those that cannot be read now:
        they are tried again another time."""
        missing = self.cache.missing(paths)
        failed: list[tuple[str, str]] = []
        with tqdm(total=len(paths), initial=len(paths) - len(missing), desc="describing", unit=" references",
                  disable=None, delay=1) as bar:
            for described in self.run(describe_files, batches(missing, PER_JOB)):
                passing = {image.path: image.reason for image in described if (image.reason or "").startswith(NOT_NOW)}
                self.cache.forget(passing)
                self.cache.write(image for image in described if image.path not in passing)
                failed += passing.items()
                bar.update(len(described))
        return failed

    def verify(self, jobs: Iterable[Sequence[tuple[str, Sequence[str]]]]) -> Iterator[list[Verified]]:
        """Each job, [(path of a query, paths of its references)] -> a Verified for each of its queries, in order."""
        return self.run(verify_files, jobs)

    def run(self, function: Callable, jobs: Iterable) -> Iterator:
        """Results of function(job), in the order of the jobs, of which a few are under way at a time."""
        waiting: collections.deque = collections.deque()
        try:
            for job in jobs:
                waiting.append(self.pool.submit(function, job))
                if len(waiting) > 2 * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise WorkError("a process ended unexpectedly (memory?); what was verified before is kept") from None


class Verified(NamedTuple):
    """A query's matches with its candidates, in their order; the reason where the query could not be read."""
    matches: list[Match]
    reason: str | None


worker_cache: FeatureCache  # of a process of Verifier


def verify_files(job: Sequence[tuple[str, Sequence[str]]]) -> list[Verified]:
    """What a process of Verifier does with a job."""
    done = []
    for (_, references), query in zip(job, describe_files([path for path, _ in job])):
        matches = [ABSTAINED if query.features is None or (reference := worker_cache.read(path)) is None
                   else verify(query.features, reference) for path in references]
        done.append(Verified(matches, query.reason))
    return done


def start_worker(folder: Path) -> None:
    """Prepare a process of Verifier: one thread, quiet at Ctrl-C, gone when the parent is."""
    global worker_cache
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    worker_cache = FeatureCache(folder)


def leave_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()  # until it ends
    os._exit(1)


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    """Parts of `size` items."""
    return (items[start:start + size] for start in range(0, len(items), size))
