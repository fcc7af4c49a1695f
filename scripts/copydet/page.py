"""What find_copies.py writes: pairs.csv, thumbnails, and a page that opens from disk."""
from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

import copydet
from copydet.calibration import Calibration
from copydet.common import OutputFolder, manifest_of, replacing, shown
from copydet.copies import Collection, group_numbers
from copydet.images import UnreadableImage, not_read, open_thumbnail, write_skipped
from copydet.verification import ABSTAIN, COPY, Match

THUMBNAIL = 256  # px
POINTS = 60  # of a match, that the page shows


def are_linked(pairs: np.ndarray, matches: list[Match] | None, threshold: float | None) -> np.ndarray:
    """bool [n]: pairs that make a group: all of them, or, where local features were compared, those that show a copy
    and, at or above a threshold, those of which they cannot tell."""
    if matches is None:
        return np.ones(len(pairs), bool)
    verdicts = [ABSTAIN if n < 0 else matches[n].verdict for n in pairs["match"].tolist()]
    return np.array([verdict == COPY or threshold is not None and verdict == ABSTAIN for verdict in verdicts], bool)


def are_blank(queries: Collection, archive: Collection, pairs: np.ndarray) -> np.ndarray:
    """bool [n]: pairs with an image that shows one flat colour. Their scores tell nothing."""
    return queries.blank[pairs["query"]] | archive.blank[pairs["reference"]]


def match_columns(matches: Sequence[Match | None]) -> dict[str, list]:
    """Columns of pairs.csv: what local features say of each pair, nothing where they were not compared."""
    def text(value: Callable[[Match], object]) -> list:
        return ["" if match is None else value(match) for match in matches]

    return {"inliers": text(lambda m: m.inliers), "coverage_query": text(lambda m: f"{m.coverage_query:.3f}"),
            "coverage_reference": text(lambda m: f"{m.coverage_reference:.3f}"), "verdict": text(lambda m: m.verdict),
            "outline": text(lambda m: m.outline_text)}


def write_pairs(file: Path, queries: Collection, archive: Collection, pairs: np.ndarray, matches: list[Match] | None,
                same: list[tuple], calibration: Calibration | None, linked: np.ndarray | None) -> None:
    """pairs.csv: the pairs, then those of `same`, which `told` made, with nothing to act on. `linked`: bool [n], pairs
    that make a group, if there are groups."""
    blank = are_blank(queries, archive, pairs)
    columns = {"query_id": [queries.ids[i] for i in pairs["query"]],
               "reference_id": [archive.ids[j] for j in pairs["reference"]],
               "score": map(repr, pairs["score"].tolist()), "blank": np.where(blank, "yes", "").tolist()}
    if matches is not None:
        columns |= match_columns([None if n < 0 else matches[n] for n in pairs["match"].tolist()])
    if calibration:
        columns["precision"] = ["" if b else f"{p:.4f}" for b, p in zip(blank, calibration.at(pairs["score"]))]
    if linked is not None:
        columns["group"] = [""] * len(pairs)
        for i, number in zip(np.flatnonzero(linked).tolist(), group_numbers(pairs[linked]).tolist()):
            columns["group"][i] = number
    columns["same_file"] = [""] * len(pairs)
    nothing = [""] * (len(columns) - 3)
    with replacing(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([columns, *zip(*columns.values()),
                                   *([query, reference, *nothing, what] for query, reference, what in same)])


def thumbnail(path: str) -> bytes | None:
    """JPEG bytes of an image, upright, at most THUMBNAIL px; None where it cannot be read."""
    try:
        img = open_thumbnail(path, THUMBNAIL)
    except UnreadableImage:
        return None
    buffer = io.BytesIO()
    img.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def thumbnail_name(path: str | None) -> str | None:
    """Of the thumbnail of an image as it is now; None where there is no image."""
    if not path:
        return None
    try:
        info = os.stat(path)
    except OSError:
        return None
    key = os.fsencode(path) + f"/{info.st_size}/{info.st_mtime_ns}".encode()
    return hashlib.blake2b(key, digest_size=12).hexdigest() + ".jpg"


def write_thumbnail(path: str, file: Path | None) -> str | None:
    """Make an image's thumbnail, unless it is there -> its name; None where there is no image."""
    if file is None:
        return None
    if not file.exists():
        content = thumbnail(path)
        if content is None:
            return None
        with replacing(file) as temporary:
            temporary.write_bytes(content)
    return file.name


def match_on_page(match: Match) -> dict:
    """What the page shows of a match; places are whole thousandths of the images' sides."""
    shown_match = {"verdict": match.verdict, "inliers": match.inliers}
    if match.sizes is None or match.outline is None or match.points is None:
        return shown_match
    thousandths = lambda points, sizes: (1000 * points / np.ravel(sizes)).round().astype(int).ravel().tolist()
    outlines = [thousandths(corners, size) for corners, size in zip((match.outline, match.part), match.sizes)]
    return shown_match | {"outlines": outlines, "points": thousandths(match.points[:POINTS], match.sizes)}


def image_table(queries: Collection, archive: Collection, pairs: np.ndarray, matches: list[Match] | None,
                report: OutputFolder) -> tuple[list, list]:
    """What the page shows of the images in pairs: [[name, URI or None, thumbnail or None, 1 if blank]], and pairs as
    rows of it: [[query, reference, score, match or None]]."""
    rows: dict[tuple[int, int], int] = {}
    entries: list[tuple[str, str | None, int]] = []
    for collection, column in ((queries, "query"), (archive, "reference")):
        for i in pairs[column].tolist():
            if (id(collection), i) not in rows:
                rows[id(collection), i] = len(entries)
                entries.append((collection.names[i], collection.files[i], int(collection.blank[i])))
    folder, files = report.path / "thumbs", [file for _, file, _ in entries]
    folder.mkdir(exist_ok=True)
    names = list(map(thumbnail_name, files))
    report.add(*(f"thumbs/{name}" for name in names if name))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        thumbs = list(tqdm(pool.map(write_thumbnail, files, [name and folder / name for name in names]),
                           total=len(entries), desc="thumbnails", unit="image", disable=None, delay=1))
    images = [[name, file and "file://" + quote(os.fsencode(file)), thumb, blank]
              for (name, file, blank), thumb in zip(entries, thumbs)]
    on_page = [None if matches is None or n < 0 else match_on_page(matches[n]) for n in pairs["match"].tolist()]
    return images, [[rows[id(queries), i], rows[id(archive), j], score, match]
                    for (i, j, score, _), match in zip(pairs.tolist(), on_page)]


def write_report(report: OutputFolder, queries: Collection, archive: Collection, pairs: np.ndarray, same: list[tuple],
                 matches: list[Match] | None, threshold: float | None, calibration: Calibration | None,
                 most: int) -> None:
    """thumbs/, pairs.csv, skipped.csv and, last, index.html, each under its final name only when it is whole."""
    within, skipped = archive is queries, queries.skipped + (archive.skipped if archive is not queries else [])
    kept, folder = pairs if threshold is None else pairs[pairs["score"] >= threshold], report.path
    blank = are_blank(queries, archive, kept)
    kept = kept if threshold is None else kept[~blank]
    images, on_page = image_table(queries, archive, pairs[:most], matches, report)
    data = {"queries": shown(queries.source), "archive": None if within else shown(archive.source),
            "count": [len(queries.ids), len(archive.ids)], "skipped": len(skipped), "same_files": len(same),
            "threshold": threshold,
            "left_out": len(pairs) - len(on_page), "images": images, "pairs": on_page,
            "calibration": calibration and {"scores": calibration.scores.tolist(),
                                            "precision": calibration.precision.tolist(),
                                            "copies_ratio": calibration.copies_ratio}}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no name can close the script element
    page = (Path(copydet.__file__).with_name("page.html")).read_text(encoding="utf-8").replace("{{data}}", text)
    grouped = within and (threshold is not None or matches is not None)
    write_pairs(folder / "pairs.csv", queries, archive, kept, matches, same, calibration,
                are_linked(kept, matches, threshold) if grouped else None)
    write_skipped(folder / "skipped.csv", skipped)
    with replacing(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    shown_now = {f"thumbs/{thumb}" for _, _, thumb, _ in images}
    report.remove(*(name for name in manifest_of(folder) if name.startswith("thumbs/") and name not in shown_now))
    what = f"{len(queries.ids):,} images" if within else f"{len(queries.ids):,} queries and {len(archive.ids):,} images"
    print(f"{len(kept):,} pairs of {what}: {folder / 'index.html'}"
          + (f"; {len(same):,} more names of the same files" if same else "")
          + (f"; {blank.sum():,} pairs with an image of one flat colour "
             f"{'marked' if threshold is None else 'left out'}" if blank.any() else "")
          + (f"; {len(skipped):,} skipped{not_read(skipped)}, see {folder / 'skipped.csv'}" if skipped else ""))
