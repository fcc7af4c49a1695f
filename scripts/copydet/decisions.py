"""What people decided of pairs, copy, not a copy or unsure: decisions.csv, and how precise the pairs were."""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from copydet.calibration import Calibration
from copydet.common import InputError, shown
from copydet.copies import Collection
from copydet.metrics import at_lines, check_ids, read_table

COPY, NOT, UNSURE = VERDICTS = ("copy", "not a copy", "unsure")
Decisions = dict[tuple[str, str], str]  # (query, reference) -> verdict


def read_decisions(path: str | Path) -> Decisions:
    """decisions.csv: query, reference, verdict; of several decisions on a pair the last one. Raises InputError: no such
    file, no such columns, another verdict."""
    table = read_table(path, ["query_id", "reference_id", "verdict"])
    check_ids(path, table, "query_id")
    check_ids(path, table, "reference_id")
    if (wrong := ~table["verdict"].isin(VERDICTS).to_numpy()).any():
        said = shown(repr(table["verdict"].to_numpy()[wrong][0]))
        raise InputError(f"{path}: the verdict {said} is none of {', '.join(VERDICTS)}: {at_lines(table, wrong)}")
    return {(query, reference): verdict for query, reference, verdict in table.itertuples(index=False)}


def place(collection: Collection) -> str:
    """What comes before an image's name in its full name, by which decisions know it: the folder's absolute path,
    nothing for the ids of a descriptor file."""
    source = os.path.abspath(collection.source)
    if os.path.isdir(source):
        return shown(os.path.join(source, ""))
    return shown(os.path.join(os.path.dirname(source), "")) if collection.ids == [shown(collection.source)] else ""


def find_images(collection: Collection, names: Iterable[str]) -> dict[str, int]:
    """{name: image} of those of the names that are known, full names or ids as in pairs.csv."""
    full = place(collection)
    known = dict(zip(collection.ids, range(len(collection.ids))))
    known |= {full + name: i for i, name in enumerate(collection.names)}
    return {name: known[name] for name in names if name in known}


def find_decided(queries: Collection, archive: Collection,
                 decisions: Decisions) -> tuple[dict[tuple[int, int], str], Decisions]:
    """{(query, reference): verdict} as numbers of images, where both are known, within one collection in the order in
    which pairs are; and the other decisions."""
    query = find_images(queries, (pair[0] for pair in decisions))
    reference = find_images(archive, (pair[1] for pair in decisions))
    found, unknown = {}, {}
    for (a, b), verdict in decisions.items():
        if a in query and b in reference:
            pair = query[a], reference[b]
            found[(min(pair), max(pair)) if queries is archive else pair] = verdict
        else:
            unknown[a, b] = verdict
    return found, unknown


def verdicts_of(pairs: np.ndarray, decided: dict[tuple[int, int], str]) -> np.ndarray:
    """str [n]: the decision on each of the PAIRS [n], empty where there is none."""
    if not decided:
        return np.full(len(pairs), "", "U10")
    return np.array([decided.get(pair, "") for pair in pairs[["query", "reference"]].tolist()], "U10")


def interval(hits: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction."""
    centre, spread = hits + z * z / 2, z * np.sqrt(hits * (of - hits) / of + z * z / 4)
    return float((centre - spread) / (of + z * z)), float((centre + spread) / (of + z * z))


def summary(scores: np.ndarray, verdicts: np.ndarray, threshold: float, calibration: Calibration | None,
            lost: int) -> str:
    """What the decisions say of pairs with these scores [n], from the threshold on, beside what was promised. `lost`:
    decisions on pairs that are not among them."""
    at = scores >= threshold
    copies, wrong, unsure = (int((verdicts[at] == verdict).sum()) for verdict in VERDICTS)
    text = f"decisions: {copies} copies, {wrong} not, {unsure} unsure among the pairs from score {threshold:.4f} on"
    if judged := copies + wrong:
        low, high = interval(copies, judged)
        text += f": precision {copies / judged:.3f} (95 %: {low:.3f} to {high:.3f})"
    text += (f"; the calibration promised {float(calibration.at(np.array([threshold]))[0]):.3f}" if calibration else
             "; no calibration promised any")
    below, elsewhere = int((verdicts[~at] != "").sum()), f"; {lost} on pairs that were not found" if lost else ""
    return text + (f"; {below} below it" if below else "") + elsewhere
