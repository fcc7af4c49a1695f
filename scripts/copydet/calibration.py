"""Scores to precision: which fraction of the pairs above a threshold are copies.

Measured on edited copies of some images of an archive, or of images that were not trained on, and carried by
descriptor files or checkpoints as their attribute `calibration`, JSON: `scores` (rising, minus the squared L2
distance), `recall` (fraction of copies with a score of at least that), `false_rate` (non-copies with such a score,
per query and archive image), `copies_ratio` (fraction of queries that have an original in the archive), `photos`
(`training` or `references`).
"""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from copydet.common import InputError, parse_json, shown

POINTS = 100  # of a stored curve, at scores of copies
TAIL = 30  # best scores of non-copies from which those above are extrapolated
DUPLICATE = 0.9  # quantile of the copies' scores from which two originals count as one
COPIES_RATIO = 0.2  # unless told: most queries have no original


def false_rates(false: np.ndarray, pairs: int, at: np.ndarray) -> np.ndarray:
    """Rates [n], per pair, of non-copies with scores of at least `at`.

    Args: false: the best scores of non-copies, falling; pairs: number of all non-copies; at: scores [n].

    Up to the score of rank TAIL they are counts; above it an exponential tail is fitted (peaks over threshold, Pickands
    1975), so that some images can speak for large archives.
    """
    level, above = false[TAIL], false[:TAIL] - false[TAIL]
    count = np.where(at > level, TAIL * np.exp(-(at - level) / above.mean()),
                     np.searchsorted(-false, -at, side="right"))
    return count / pairs


def measure(copies: np.ndarray, originals: np.ndarray, others: Iterable[np.ndarray], images: str) -> dict | None:
    """Calibration of edited copies [n, d] of `originals` [n, d] against `others`, blocks [m, d] of images that no copy
    shows any of: the images that views paste in are not among them. `images` names where all of these come from.

    Others that are as near to an original as the nearest tenth of the copies to theirs are its duplicates, and do not
    count as false. None where that leaves at most TAIL pairs.
    """
    score = lambda cosine: 2 * cosine.astype(float) - 2
    cosines = np.einsum("ij,ij->i", copies, originals)
    duplicate, found = np.quantile(cosines, DUPLICATE), np.sort(score(cosines))
    best, most, pairs = np.empty(0, np.float32), 100 * len(copies), 0
    for block in others:
        best = np.concatenate([best, (copies @ block.T)[originals @ block.T < duplicate]])
        best = np.partition(best, len(best) - most)[-most:] if len(best) > most else best
        pairs += len(copies) * len(block)
    if len(best) <= TAIL:
        return None
    false = np.sort(score(best))[::-1]
    at = np.unique(np.concatenate([np.quantile(found, np.linspace(0, 1, POINTS)), np.linspace(false[TAIL], 0, POINTS)]))
    return {"scores": at.tolist(), "recall": ((len(found) - np.searchsorted(found, at)) / len(found)).tolist(),
            "false_rate": false_rates(false, pairs, at).tolist(), "copies_ratio": COPIES_RATIO, "photos": images}


def measure_answers(scores: np.ndarray, is_true: np.ndarray, copies: int, references: int) -> dict:
    """Calibration of the answers [n] to edited copies of some images of an archive of so many references: their scores,
    and whether they are the copies' originals.

    Half a false answer more than there were is counted: that none was seen among some hundred copies does not mean that
    none will be. It stands for the answers that were looked at alone, of which each query has the same number.
    """
    best_false = np.sort(scores[~is_true])[-POINTS:]  # a high precision lies among these, a hundredth or less of all
    at = np.unique(np.concatenate([best_false, *(np.quantile(part, np.linspace(0, 1, POINTS)) for part in
                                                 (scores[is_true], scores[~is_true]) if len(part))]))
    true, false = (len(part) - np.searchsorted(np.sort(part), at) for part in (scores[is_true], scores[~is_true]))
    return {"scores": at.tolist(), "recall": (true / copies).tolist(),
            "false_rate": ((false + 0.5) / (copies * references)).tolist(), "copies_ratio": COPIES_RATIO,
            "photos": "references"}


class Calibration:
    """Precision at a score, for an archive of `references` images, from the attribute `text` of the file `source`.

    With R the recall and F the false rate at a score, c the copies ratio: c R / (c R + F x references). More queries
    without an original, or a larger archive, bring more false pairs for as many true ones.

    Attributes: of_archive: measured on the archive's images, not on those of the network's training.

    Raises InputError: `text`, of the file `source`, is not of that form.
    """

    def __init__(self, text: str, source: str | Path, references: int, copies_ratio: float | None = None) -> None:
        self.source = source
        what = f"{source}: attribute `calibration` cannot be read"
        table = parse_json(text, what)
        self.of_archive = isinstance(table, dict) and table.get("photos") == "references"
        try:
            self.scores, recall, false = (np.array(table[name], float) for name in ("scores", "recall", "false_rate"))
            self.copies_ratio = float(table["copies_ratio"]) if copies_ratio is None else copies_ratio
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{what}: {error}") from None
        if not (self.scores.ndim == 1 and len(self.scores) and self.scores.shape == recall.shape == false.shape
                and (np.diff(self.scores) > 0).all() and ((0 <= recall) & (recall <= 1)).all() and (false >= 0).all()
                and 0 <= self.copies_ratio <= 1):
            raise InputError(f"{source}: attribute `calibration`: `scores` should rise, `recall` and "
                             "`copies_ratio` be from 0 to 1, `false_rate` not negative")
        true = self.copies_ratio * recall
        self.precision = np.maximum.accumulate(true / np.maximum(true + false * references, 1e-12))

    def at(self, scores: np.ndarray) -> np.ndarray:
        """Precision [n] of pairs of these scores [n] and above."""
        return np.interp(scores, self.scores, self.precision)

    def threshold(self, precision: float, flag: str, advice: str = "") -> float:
        """The smallest score whose precision reaches `precision`. InputError naming `flag` where none does."""
        i = int(np.searchsorted(self.precision, precision))
        if i == len(self.precision):
            raise InputError(f"{flag} {precision:g}: the calibration of {shown(self.source)} reaches "
                             f"{self.precision[-1]:.3f}{advice}")
        if not i:
            return float(self.scores[0])
        return float(np.interp(precision, self.precision[i - 1:i + 1], self.scores[i - 1:i + 1]))
