"""Regions of a query: a copy often fills a part of it only, as in a collage, a screenshot or a post.

A query may be described in several regions, each as an image of its own; its score with a reference is the best of
them. References keep one vector each, so that an archive does not grow.
"""
from __future__ import annotations

import numpy as np

from copydet.common import InputError

Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the image's sides

WHOLE: Box = (0, 0, 1, 1)
MIDDLE: list[Box] = [(0.15, 0.15, 0.85, 0.85), (0.25, 0.25, 0.75, 0.75)]
HALVES: list[Box] = [(0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 0.5), (0, 0.5, 1, 1)]
WINDOWS: list[Box] = [(x, y, x + 0.5, y + 0.5) for y in (0, 0.25, 0.5) for x in (0, 0.25, 0.5) if x != y or x != 0.25]
CORNERS: list[Box] = [(x, y, x + 0.65, y + 0.65) for y in (0, 0.35) for x in (0, 0.35)]
REGIONS = {"whole": [WHOLE], "7": [WHOLE, *MIDDLE, *HALVES], "19": [WHOLE, *MIDDLE, *HALVES, *WINDOWS, *CORNERS]}


def parse_regions(text: str) -> list[Box]:
    """A name of REGIONS, or boxes "left,top,right,bottom" in fractions of the image, separated by spaces.

    Raises InputError: neither, or a box that is empty or reaches beyond the image.
    """
    if text in REGIONS:
        return REGIONS[text]
    boxes = []
    for word in text.split():
        try:
            left, top, right, bottom = map(float, word.split(","))
        except ValueError:
            left = top = right = bottom = 0.0
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise InputError(f"--query-regions: '{word}' is neither {', '.join(REGIONS)} nor left,top,right,bottom "
                             "with 0 <= left < right <= 1 and 0 <= top < bottom <= 1")
        boxes.append((left, top, right, bottom))
    if not boxes:
        raise InputError("--query-regions: no region given")
    return boxes


def images_of(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of rows [n], where an image's rows are one after another -> ids of the images [m] in their order, and the
    image of each row [n]."""
    first = np.append(True, ids[1:] != ids[:-1])
    return ids[first], np.cumsum(first) - 1
