"""Views of training images: the grammar of --view0 and --view1, and the data sets that make views.

A pipeline is a text: `crop:area=0.2,p=1 [pixelize:p=0.8 gray] erase` is a crop to 0.2..1 of the area, always, then in
random order pixels made coarse with probability 0.8 and a grey conversion, then an erased rectangle, both with the
default probability. Every random choice comes from one generator per view, so a view depends on (seed, epoch, image,
view number) only.
"""
from __future__ import annotations

import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image

from copydet.augmentations import GEOMETRY, OPS, RESIZES, LazyCrop, resize
from copydet.batches import Images
from copydet.common import InputError, replacing
from copydet.images import BLANK, ImageFile, UnreadableImage, is_blank, to_rgb
from copydet.options import Args, split_settings
from copydet.regions import WHOLE, Box

if TYPE_CHECKING:
    from copydet.graphs import Graph
    from copydet.network import Descriptor

UNUSABLE = (UnreadableImage, cv2.error)  # OpenCV 4 turns no image with a side of more than 32,767 px


def parse_ops(text: str, default_prob: float, flag: str = "view") -> list[list[tuple[str, tuple, float]]]:
    """ "crop:area=0.2,p=1 [gray text]" -> [[("crop", (0.2,), 1.0)], [("gray", (), default), ("text", (), default)]]:
    groups in order, the augmentations inside a group in random order. Raises InputError naming `flag`."""
    groups: list[list] = []
    inside = False
    for word in text.replace("[", " [ ").replace("]", " ] ").split():
        if word in "[]":
            if inside == (word == "["):
                raise InputError(f"{flag}: brackets do not match in '{text}'")
            inside = word == "["
            groups += [[]] if inside else []
        elif inside:
            groups[-1].append(parse_op(word, default_prob, flag))
        else:
            groups.append([parse_op(word, default_prob, flag)])
    if inside:
        raise InputError(f"{flag}: brackets do not match in '{text}'")
    names = [name for group in groups for name, *_ in group]
    if "erase" in names and (names.index("erase") < len(names) - 1 or len(groups[-1]) > 1):
        raise InputError(f"{flag}: 'erase' must come last and by itself in '{text}'")
    return groups


def parse_op(word: str, default_prob: float, flag: str) -> tuple[str, tuple, float]:
    """ "jitter:brightness=0.4,...,p=0.8" -> (name, parameters in their order, probability)."""
    name = re.split("[:=]", word)[0]
    if name not in OPS:
        raise InputError(f"{flag}: unknown augmentation '{name}'; --list-augmentations prints all")
    known = OPS[name].parameters
    try:
        settings = old_settings(word, list(known)) or split_settings(word)[1]
        values = {key: float(value) for key, value in settings.items()}
        prob = values.pop("p", default_prob)
        if values.keys() - known.keys() or not 0 <= prob <= 1 or not all(map(math.isfinite, values.values())) or any(
                default is inspect.Parameter.empty and key not in values for key, default in known.items()):
            raise ValueError
    except (InputError, ValueError):
        raise InputError(f"{flag}: '{word}' is not {':'.join(filter(None, [name, ','.join([*known, 'p'])]))}, "
                         "each as key=number, p from 0 to 1") from None
    return name, tuple(values.get(key, default) for key, default in known.items()) if values else (), prob


def old_settings(word: str, keys: list[str]) -> dict[str, str]:
    """Settings of the form that older checkpoints hold, name:value:value=probability; none where it is not that."""
    if not (old := re.fullmatch(r"[\w-]+((?::[\d.e+-]+)*)(?:=([\d.e+-]+))?", word)):
        return {}
    values = old[1].split(":")[1:]
    if len(values) > len(keys):
        raise ValueError
    return dict(zip(keys, values)) | ({"p": old[2]} if old[2] else {})


def list_augmentations() -> str:
    """The table that --list-augmentations prints: name:parameters with their defaults, and what each does."""
    lines = []
    for name, op in OPS.items():
        settings = [key if default is inspect.Parameter.empty else f"{key}={'' if default is None else default}"
                    for key, default in op.parameters.items()]
        lines.append(f"{name}{':' * bool(settings)}{','.join(settings)}\n    {op.meaning}")
    return "\n".join(lines)


NEGATIVE_LABEL = 10**9  # the first label of negatives, beyond those of any training set


@dataclass(frozen=True)
class Preprocessing:
    """How a whole image becomes the network's input."""
    input_size: int  # px, of the square
    resize: str  # name in RESIZES
    mean: Sequence[float]  # of pixels 0..1, per channel
    std: Sequence[float]
    exif_transpose: bool = False
    decode: str = "draft"

    @classmethod
    def of(cls, args: Args, net: Descriptor | Graph, input_size: int | None = None) -> Preprocessing:
        """That of a command line for a network."""
        return cls(input_size or args.input_size, args.resize, net.mean, net.std, args.exif_transpose, args.decode)

    def open(self, path: str) -> ImageFile:
        return ImageFile(path, self.exif_transpose, self.decode == "draft")

    def whole(self, image: str | Image.Image) -> np.ndarray:
        """Pixels [size, size, 3] of a whole image, a path or a Pillow image."""
        file = np.array(to_rgb(image, self.exif_transpose)) if isinstance(image, Image.Image) else self.open(image)
        return LazyCrop(file).whole(RESIZES[self.resize], self.input_size).pixels()

    def regions(self, path: str, boxes: Sequence[Box]) -> list[np.ndarray]:
        """Pixels [size, size, 3] of each of the boxes of an image; of the whole where a box shows one flat colour,
        which is like any other."""
        file, square = self.open(path), RESIZES[self.resize]
        parts = [LazyCrop(file).part(box).whole(square, self.input_size) for box in boxes]
        for part in parts:
            file.shrink(part.shrink())
        whole = LazyCrop(file).whole(square, self.input_size)
        pixels = [part.pixels() for part in parts]
        return [whole.pixels() if box != WHOLE and is_blank(part) else part for box, part in zip(boxes, pixels)]

    def prepare(self, images: Sequence[str | Image.Image]) -> Images:
        """Whole images, paths or Pillow images, on their way to the device."""
        return Images.of([(self.whole(image), None) for image in images], self.mean, self.std)


def why(error: Exception) -> str:
    """The reason that goes with UNUSABLE's errors."""
    return error.reason if isinstance(error, UnreadableImage) else "too long a side for OpenCV to turn it"


class Views(torch.utils.data.Dataset):
    """Training images: item (epoch, i) -> Images of the views and negatives, their labels, unreadable [(path, reason)],
    failed operations.

    In place of an unreadable image the next readable one is taken, with its own label. Negatives are whole images with
    labels of their own (notes v98).

    Args: paths: of images, relative to `root`; pipelines: what `parse_ops` gives for each view; seed: of all draws;
    negatives: number of random ones out of `negative_images`, paths, with each item.
    """

    def __init__(self, root: str | Path, paths: Sequence, preprocessing: Preprocessing, pipelines: Sequence[list],
                 seed: int, negatives: int = 0, negative_images: Sequence[str] = (), strict: bool = False) -> None:
        self.root, self.paths, self.preprocessing, self.pipelines = root, paths, preprocessing, pipelines
        self.seed, self.strict = seed, strict
        self.size, self.resize = preprocessing.input_size, RESIZES[preprocessing.resize]
        self.negatives, self.negative_images = negatives, negative_images

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, i: int) -> list[ImageFile]:
        """The image of each view of item `i`."""
        return [self.preprocessing.open(os.path.join(self.root, self.paths[i]))] * len(self.pipelines)

    def name(self, i: int) -> str:
        """The path of item `i`, for messages."""
        return os.path.join(self.root, self.paths[i])

    def random_image(self, rng: np.random.Generator) -> np.ndarray:
        """Pixels uint8 [h, w, 3] of a training image."""
        pixels, _, _ = self.first_readable(int(rng.integers(len(self.paths))), lambda i: self.open(i)[0].pixels)
        return pixels

    def first_readable(self, i: int, read: Callable[[int], Any]) -> tuple[Any, int, list[tuple[str, str]]]:
        """read(i) of the first image from `i` on that can be read, its index, unreadable ones [(path, reason)].

        Raises InputError: 100 in a row, or with `strict` the first one, cannot be read.
        """
        unreadable: list[tuple[str, str]] = []
        while len(unreadable) < min(len(self.paths), 100):
            try:
                return read(i), i, unreadable
            except UNUSABLE as error:
                unreadable.append((self.name(i), why(error)))
                if self.strict:
                    break
                i = (i + 1) % len(self.paths)
        raise InputError(": ".join(unreadable[0])
                         + (f", nor can the {len(unreadable) - 1} images after it be read" * (not self.strict)))

    def read_negatives(self, rng: np.random.Generator) -> tuple[list[tuple[np.ndarray, int]], list[tuple[str, str]]]:
        """Random negatives [(pixels, label)] and unreadable ones; labels lie beyond those of all training images."""
        read: list[tuple[np.ndarray, int]] = []
        unreadable = []
        for j in rng.permutation(len(self.negative_images)):
            if len(read) == self.negatives:
                break
            try:
                read.append((self.preprocessing.whole(self.negative_images[j]), NEGATIVE_LABEL + int(j)))
            except UnreadableImage as error:
                unreadable.append((self.negative_images[j], error.reason))
        return read, unreadable

    def plan(self, image: np.ndarray | ImageFile, epoch: int, i: int,
             number: int) -> tuple[np.random.Generator, LazyCrop, list[tuple]]:
        """Draw which operations view `number` consists of, and apply those that come before the image is decoded.

        Returns the generator, the image or a part of it, and the other operations [(name, parameters)].
        """
        rng = np.random.default_rng((self.seed, epoch, i, number))
        ops = [group[k] for group in self.pipelines[number] for k in rng.permutation(len(group))]
        ops = [(name, parameters) for (name, parameters, prob), drawn in zip(ops, rng.random(len(ops))) if drawn < prob]
        part = LazyCrop(image)
        while ops and ops[0][0] in GEOMETRY:
            name, parameters = ops.pop(0)
            part = OPS[name](part, rng, self, *parameters)
        if isinstance(image, ImageFile):
            image.shrink(part.shrink())
        return rng, part, ops

    def view(self, image: np.ndarray | ImageFile, epoch: int, i: int,
             number: int) -> tuple[np.ndarray, tuple | None, list[str]]:
        """View `number` of image `i`: pixels [size, size, 3], erased part or None, and the operations that failed
        (tiny or odd images)."""
        return self.make(*self.plan(image, epoch, i, number))

    def make(self, rng: np.random.Generator, part: LazyCrop,
             ops: list[tuple]) -> tuple[np.ndarray, tuple | None, list[str]]:
        """The view that `plan` drew, as `view` gives it."""
        img, erased, failed = part.pixels(), None, []
        for name, parameters in ops:
            try:
                result = OPS[name](img, rng, self, *parameters)
                if name == "erase":
                    erased = result
                else:
                    img = result.pixels() if isinstance(result, LazyCrop) else result
            except (OSError, ValueError, RuntimeError, ZeroDivisionError, cv2.error) as error:
                failed.append(f"{name}: {error}")
        return img if img.shape[:2] == (self.size, self.size) else resize(img, self.size, self.size), erased, failed

    def views(self, epoch: int, i: int) -> tuple[list[tuple], list[str]]:
        """All views of item `i`, and the operations that failed. They are planned before one of them is made, so that
        the image is decoded once, no larger than the most demanding view needs it."""
        plans = [self.plan(image, epoch, i, number) for number, image in enumerate(self.open(i))]
        views = [self.make(*plan) for plan in plans]
        return [view[:2] for view in views], sum((failed for *_, failed in views), [])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Images, list[int], list[tuple[str, str]], list[str]]:
        epoch, i = key
        (views, failed), i, unreadable = self.first_readable(i, functools.partial(self.views, epoch))
        labels = [i] * len(views)
        if self.negatives:
            negatives, bad = self.read_negatives(np.random.default_rng((self.seed, epoch, i, len(self.pipelines))))
            unreadable += bad
            views += [(pixels, None) for pixels, _ in negatives]
            labels += [label for _, label in negatives]
        return Images.of(views, self.preprocessing.mean, self.preprocessing.std), labels, unreadable, failed


class Pairs(Views):
    """Pairs of images that show the same, `paths` [(query, reference)]: view 0 is made from the query, view 1 from the
    reference (notes v89)."""

    def open(self, i: int) -> list[ImageFile]:
        return [self.preprocessing.open(os.path.join(self.root, path)) for path in self.paths[i]]

    def name(self, i: int) -> str:
        return " or ".join(os.path.join(self.root, path) for path in self.paths[i])


def write_views_png(views: Views, file: Path) -> None:
    """Eight images in rows: as they are, then their views of the first epoch, so that one look shows what is seen."""
    rows = []
    for i in np.linspace(0, len(views) - 1, min(8, len(views))).astype(int):
        (made, _), i, _ = views.first_readable(int(i), functools.partial(views.views, 0))
        image = resize(views.open(i)[0].pixels, views.size, views.size)
        rows.append(Images.of([(image, None), *made], [0.0] * 3, [1.0] * 3).to("cpu"))
    grid = torchvision.utils.make_grid(torch.cat(rows), nrow=1 + len(views.pipelines), pad_value=1)
    with replacing(file) as temporary:
        TF.to_pil_image(grid.clamp(0, 1)).save(temporary, "PNG")


class WholeImages(torch.utils.data.Dataset):
    """Item i -> i, Images of the whole image, or of its regions, or None, reason why not or that it is BLANK."""

    def __init__(self, paths: Sequence[str], preprocessing: Preprocessing, boxes: Sequence[Box] = (WHOLE,)) -> None:
        self.paths, self.preprocessing, self.boxes = paths, preprocessing, boxes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[int, Images | None, str | None]:
        try:
            parts = self.preprocessing.regions(self.paths[i], self.boxes)
        except UnreadableImage as error:
            return i, None, error.reason
        images = Images.of([(part, None) for part in parts], self.preprocessing.mean, self.preprocessing.std)
        return i, images, BLANK if is_blank(parts[0]) else None
