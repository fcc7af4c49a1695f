"""What find_copies.py writes: pairs.csv, duplicates.txt, thumbnails, and a page that opens from disk. The page is
page.html, page.css and page.js with the data put in."""
from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

import copydet
from copydet.calibration import Calibration
from copydet.common import MANIFEST, OutputFolder, manifest_of, replacing, shown
from copydet.copies import Collection, nearest_regions
from copydet.decisions import NOT, Decisions, find_decided, place, summary, verdicts_of
from copydet.duplicates import (group_numbers, keeping_order, link, look_at, number_contents,
                                write_duplicates)
from copydet.images import UnreadableImage, not_read, open_thumbnail, write_skipped
from copydet.machine import count_cores
from copydet.regions import WHOLE
from copydet.verification import ABSTAIN, COPY, Match

THUMBNAIL = 256  # px
POINTS = 20  # of a match, that the page shows
PRECISION = 0.9  # the page opens with pairs of which so many are copies
FEWEST = 5  # spacings of answers that tell where others begin to stand out
LATER = 9  # answers after the best one; within one collection more are known of some images, with others missing
FENCE = 3.0  # interquartile ranges above the upper quartile, Tukey's outer fence


def are_linked(pairs: np.ndarray, matches: list[Match] | None, threshold: float | None) -> np.ndarray:
    """bool [n]: pairs that make a group: all of them, or, where local features were compared, those that show a copy
    and, at or above a threshold, those of which they cannot tell."""
    if matches is None:
        return np.ones(len(pairs), bool)
    verdicts = [ABSTAIN if n < 0 else matches[n].verdict for n in pairs["match"].tolist()]
    return np.array([verdict == COPY or threshold is not None and verdict == ABSTAIN for verdict in verdicts], bool)


def standing_out(images: np.ndarray, scores: np.ndarray) -> float | None:
    """Score from which on about PRECISION of the best answers to images are copies, judged by the second and later
    answers to all of them, of which hardly any is. None where there are too few.

    Args: images [n]: that the answers are to; scores [n].

    How far above the second answer the best one lies where neither is a copy is read from the later ones: in an
    exponential tail the spacings between one's answers, times their ranks, are all distributed alike (Renyi 1953).
    Second answers beyond Tukey's outer fence are copies, too, and do not count. Alike images come in series, which is
    no such tail: half the false answers are allowed for.
    """
    order = np.lexsort((-scores, images))
    images, scores = images[order], scores[order]
    rank = np.arange(len(images)) - np.searchsorted(images, images)
    best, second = scores[rank == 0], scores[rank == 1]
    if len(second) < 1:
        return None
    low, high = np.quantile(second, [0.25, 0.75])
    fence = high + FENCE * (high - low)
    later = (rank[:-1] >= 1) & (rank[:-1] < LATER) & (images[:-1] == images[1:]) & (scores[:-1] <= fence)
    gaps = np.sort(((rank[:-1] + 1) * (scores[:-1] - scores[1:]))[later])
    if len(gaps) < FEWEST:
        return None
    second = second[second <= fence][::len(second) // 10_000 + 1]
    at = np.unique(np.quantile(best, np.linspace(0, 1, 400), method="nearest"))
    false = len(best) * np.array([1 - np.searchsorted(gaps, t - second).mean() / len(gaps) for t in at])
    shown_then = len(best) - np.searchsorted(np.sort(best), at)
    enough = np.flatnonzero(false <= (1 - PRECISION) / 2 * shown_then)
    return float(at[enough[0]]) if len(enough) else float(np.nextafter(at[-1], np.inf))


def opening(pairs: np.ndarray, within: bool, threshold: float | None,
            calibration: Calibration | None) -> tuple[float, str]:
    """Score from which on the page shows PAIRS, of which none is of blank images; and what it is, in words."""
    if threshold is not None:
        return threshold, "the threshold that was asked for"
    percent = f"{100 * PRECISION:.0f} %"
    if calibration and calibration.precision[-1] >= PRECISION:
        return calibration.threshold(PRECISION, ""), (
            f"a precision of {percent}, as measured" + " on images of its training" * (not calibration.of_archive))
    why = f"the calibration reaches {100 * calibration.precision[-1]:.0f} % only" if calibration else "no calibration"
    images, scores = pairs["query"], pairs["score"]
    if within:
        images, scores = np.concatenate([images, pairs["reference"]]), np.tile(scores, 2)
    found = standing_out(images, scores)
    if found is None:
        return float(scores.min(initial=0)), f"{why}, and too few answers to tell; all are shown"
    return min(found, 0.0), f"{why}; an estimate of {percent} precision from how second and later answers are spread"


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
                same: list[tuple], calibration: Calibration | None, linked: np.ndarray | None,
                apart: Sequence[tuple[int, int]], regions: np.ndarray | None) -> None:
    """pairs.csv: the pairs, then those of `same`, which `told` made, with nothing to act on. `linked`: bool [n], pairs
    that make a group, if there are groups, in which no two images are that are to be kept `apart`; `regions` [n, 4]:
    of the queries."""
    blank = are_blank(queries, archive, pairs)
    columns = {"query_id": [queries.ids[i] for i in pairs["query"]],
               "reference_id": [archive.ids[j] for j in pairs["reference"]],
               "score": map(repr, pairs["score"].tolist()), "blank": np.where(blank, "yes", "").tolist()}
    if matches is not None:
        columns |= match_columns([None if n < 0 else matches[n] for n in pairs["match"].tolist()])
    if regions is not None:
        columns["region"] = [region_text(region) for region in regions.tolist()]
    if calibration:
        columns["precision"] = ["" if b else f"{p:.4f}" for b, p in zip(blank, calibration.at(pairs["score"]))]
    if linked is not None:
        columns["group"] = [""] * len(pairs)
        for i, number in zip(np.flatnonzero(linked).tolist(), group_numbers(pairs[linked], apart).tolist()):
            columns["group"][i] = number or ""
    columns["same_file"] = [""] * len(pairs)
    nothing = [""] * (len(columns) - 3)
    with replacing(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([columns, *zip(*columns.values()),
                                   *([query, reference, *nothing, what] for query, reference, what in same)])


def region_text(region: Sequence[float]) -> str:
    """As --query-regions takes it; nothing for the whole query."""
    return "" if tuple(region) == WHOLE else ",".join(f"{side:.4g}" for side in region)


def region_on_page(region: Sequence[float]) -> list[int] | None:
    """Corners of a region, clockwise from the top left, in thousandths of the query's sides; None: the whole."""
    left, top, right, bottom = (round(1000 * side) for side in region)
    return None if tuple(region) == WHOLE else [left, top, right, top, right, bottom, left, bottom]


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
    """What the page shows of a match; corners are in whole thousandths of the images' sides."""
    shown_match = {"verdict": match.verdict, "inliers": match.inliers}
    if match.sizes is None or match.outline is None:
        return shown_match
    outlines = [thousandths(corners, size) for corners, size in zip((match.outline, match.part), match.sizes)]
    return shown_match | {"outlines": outlines}


def points_on_page(match: Match | None) -> str:
    """x and y in the query, x and y in the reference of some points that match, in thousandths of the sides."""
    if match is None or match.sizes is None or match.points is None or not len(match.points):
        return ""
    some = np.unique(np.linspace(0, len(match.points) - 1, POINTS).astype(int))
    return " ".join(map(str, thousandths(match.points[some], match.sizes)))


def thousandths(points: np.ndarray, sizes: Sequence) -> list[int]:
    """Points in px as whole thousandths of the images' sides."""
    return (1000 * points / np.ravel(sizes)).round().astype(int).ravel().tolist()


class PageImages:
    """The images in pairs, as the page has them: `of_query` and `of_reference`, {image of the collection: row};
    `table`, a row for each: name, URI or None, thumbnail or None, 1 if blank, width and height in px and bytes or None,
    number of its content, rank among those to keep. Content and rank are also known of `more` images of the archive,
    within one collection: `looked_at` is {image: (content, rank)}."""

    def __init__(self, queries: Collection, archive: Collection, pairs: np.ndarray, more: Sequence[int],
                 report: OutputFolder) -> None:
        of_query: dict[int, int] = {}
        of_reference = of_query if archive is queries else {}
        entries: list[tuple[Collection, int]] = []
        for collection, column, rows in ((queries, "query", of_query), (archive, "reference", of_reference)):
            for i in pairs[column].tolist():
                if i not in rows:
                    rows[i] = len(entries)
                    entries.append((collection, i))
        self.of_query, self.of_reference = of_query, of_reference
        known = entries + [(archive, i) for i in more if i not in of_reference]
        files = [collection.files[i] for collection, i in known]
        with ThreadPoolExecutor(count_cores()) as pool:
            looks = list(pool.map(look_at, files))
        contents = number_contents(files, looks)
        rank = keeping_order([collection.names[i] for collection, i in known], looks)
        self.looked_at = {i: (content, place) for (_, i), content, place in zip(known, contents, rank)}
        thumbs = write_thumbnails(files[:len(entries)], report)
        self.table = [[collection.names[i], file and "file://" + quote(os.fsencode(file)), thumb,
                       int(collection.blank[i]), *(look[:3] if look else (None,) * 3), content, place]
                      for (collection, i), file, thumb, look, content, place in zip(
                          entries, files, thumbs, looks, contents, rank)]


def write_thumbnails(files: Sequence[str | None], report: OutputFolder) -> list[str | None]:
    """Thumbnails of image files, those that are not there yet -> their names in thumbs/."""
    folder = report.path / "thumbs"
    folder.mkdir(exist_ok=True)
    names = list(map(thumbnail_name, files))
    report.add(*(f"thumbs/{name}" for name in names if name))
    with ThreadPoolExecutor(count_cores()) as pool:
        return list(tqdm(pool.map(write_thumbnail, files, [name and folder / name for name in names]),
                         total=len(files), desc="thumbnails", unit="image", disable=None, delay=1))


def fill(data: dict, points: list[str]) -> str:
    """The page with its data; the points come after the script, which does not wait for them."""
    html, style, script = (Path(copydet.__file__).with_name(f"page.{kind}").read_text(encoding="utf-8")
                           for kind in ("html", "css", "js"))
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no name can close the script element
    html = html.replace("{{style}}", style).replace("{{script}}", script).replace("{{points}}", json.dumps(points))
    return html.replace("{{data}}", text)


def pack(report: OutputFolder, file: Path) -> None:
    """The report as one file to send, without its cache and what the run was asked for. With the manifest, by which
    thumbnails are known as such."""
    with replacing(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted({MANIFEST, *manifest_of(report.path)} - {"run.json"}):
            if (report.path / name).is_file():
                stored = zipfile.ZIP_STORED if name.endswith(".jpg") else zipfile.ZIP_DEFLATED
                archive.write(report.path / name, f"{file.stem}/{name}", stored)


def page_data(queries: Collection, archive: Collection, pairs: np.ndarray, found: Sequence[Match | None],
              regions: np.ndarray | None, images: PageImages, calibration: Calibration | None) -> dict:
    """What the page shows of PAIRS, their matches and the regions of their queries, but for what it says of the run."""
    within = archive is queries
    drawn = [None] * len(pairs) if regions is None else map(region_on_page, regions.tolist())
    return {"queries": shown(queries.source), "archive": None if within else shown(archive.source),
            "collections": [shown(os.path.abspath(c.source)) for c in ([queries] if within else [queries, archive])],
            "places": [place(queries), place(archive)], "count": [len(queries.ids), len(archive.ids)],
            "images": images.table,
            "pairs": [[images.of_query[i], images.of_reference[j], score, match and match_on_page(match),
                       *[region] * bool(region)]
                      for (i, j, score, _), match, region in zip(pairs.tolist(), found, drawn)],
            "calibration": calibration and {"scores": calibration.scores.tolist(),
                                            "precision": calibration.precision.tolist(),
                                            "copies_ratio": calibration.copies_ratio}}


def write_report(report: OutputFolder, queries: Collection, archive: Collection, pairs: np.ndarray, same: list[tuple],
                 matches: list[Match] | None, threshold: float | None, calibration: Calibration | None,
                 most: int, decisions: Decisions | None = None, null: bool = False) -> None:
    """thumbs/, pairs.csv, skipped.csv, within one collection of files duplicates.txt, and, last, index.html, each under
    its final name only when it is whole. `null`: paths in duplicates.txt end with a NUL."""
    within, skipped = archive is queries, queries.skipped + (archive.skipped if archive is not queries else [])
    folder, decisions = report.path, decisions or {}
    decided, unknown = find_decided(queries, archive, decisions)
    verdicts, blank = verdicts_of(pairs, decided), are_blank(queries, archive, pairs)
    rejected, apart = verdicts == NOT, [pair for pair, verdict in decided.items() if verdict == NOT]
    start, basis = opening(pairs[~blank], within, threshold, calibration)
    likely = pairs[(pairs["score"] >= start) & ~blank & ~rejected]
    asked = np.ones(len(pairs), bool) if threshold is None else pairs["score"] >= threshold
    keep = asked & ~rejected & ~(blank & (threshold is not None))
    kept, regions = pairs[keep], nearest_regions(queries, archive, pairs)
    more = np.unique([likely["query"], likely["reference"]]).tolist() if within else []
    images = PageImages(queries, archive, pairs[:most], more, report)
    found = [None if matches is None or n < 0 else matches[n] for n in pairs["match"][:most].tolist()]
    listed = {*images.of_query, *pairs["query"][pairs["score"] >= start].tolist()}  # on the page, or beyond `most`
    data = page_data(queries, archive, pairs[:most], found, regions, images, calibration) | {
        "threshold": start, "basis": basis, "asked": threshold is not None, "left_out": len(pairs) - len(found),
        "skipped": len(skipped), "same_files": len(same),
        "others": [] if within else [name for i, name in enumerate(queries.names) if i not in listed],
        **decisions_on_page(queries, archive, decided, unknown)}
    page = fill(data, list(map(points_on_page, found)))
    grouped = within and (threshold is not None or matches is not None)
    write_pairs(folder / "pairs.csv", queries, archive, kept, matches, same, calibration,
                are_linked(kept, matches, threshold) if grouped else None, apart,
                None if regions is None else regions[keep])
    write_skipped(folder / "skipped.csv", skipped)
    duplicates = 0
    if within and any(archive.files):
        duplicates = list_duplicates(folder / "duplicates.txt", archive, likely[are_linked(likely, matches, threshold)],
                                     images.looked_at, apart, null)
    else:
        (folder / "duplicates.txt").unlink(missing_ok=True)
    with replacing(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    shown_now = {f"thumbs/{row[2]}" for row in images.table}
    report.remove(*(name for name in manifest_of(folder) if name.startswith("thumbs/") and name not in shown_now))
    notes = ((len(same), "more names of the same files"),
             ((blank & asked).sum(), "pairs with an image of one flat colour "
              + ("marked" if threshold is None else "left out")),
             (rejected.sum(), "rejected pairs left out"),
             (duplicates, f"files beside those to keep: {folder / 'duplicates.txt'}"),
             (len(skipped), f"skipped{not_read(skipped)}, see {folder / 'skipped.csv'}"))
    print(f"{outcome(queries, archive, kept, matches)}: {folder / 'index.html'}",
          *(f"{n:,} {what}" for n, what in notes if n), sep="; ")
    if decisions:
        judged = verdicts != ""
        print(summary(pairs["score"][judged], verdicts[judged], start, calibration, len(decisions) - judged.sum()))


def decisions_on_page(queries: Collection, archive: Collection, decided: dict[tuple[int, int], str],
                      unknown: Decisions) -> dict:
    """Those of --decisions, by full names where both images are known, and what tells them from another file's."""
    rows = [[place(queries) + queries.names[i], place(archive) + archive.names[j], verdict]
            for (i, j), verdict in decided.items()] + [[*pair, verdict] for pair, verdict in unknown.items()]
    mark = hashlib.blake2b(json.dumps(rows).encode(), digest_size=12).hexdigest() if rows else ""
    return {"decisions": rows, "decided": mark}


def outcome(queries: Collection, archive: Collection, kept: np.ndarray, matches: list[Match] | None) -> str:
    """What was found, in words, of the PAIRS that pairs.csv holds."""
    def counted(n: int, one: str, several: str) -> str:
        return f"{n:,} {one if n == 1 else several}"

    text = f"{counted(len(kept), 'pair', 'pairs')} of "
    if archive is not queries:
        text += f"{counted(len(queries.ids), 'query', 'queries')} and "
    text += counted(len(archive.ids), "image", "images")
    if matches is None:
        return text
    copies = sum(matches[n].verdict == COPY for n in kept["match"].tolist() if n >= 0)
    return f"{text}, of which local features take {copies:,} for copies"


def list_duplicates(file: Path, archive: Collection, pairs: np.ndarray, looked_at: dict[int, tuple[int, int]],
                    apart: Sequence[tuple[int, int]], null: bool) -> int:
    """duplicates.txt of the groups that the PAIRS and equal bytes make -> number of its paths. `looked_at`: {image:
    (content, rank among those to keep)}."""
    first: dict[int, int] = {}
    same_bytes = [(first.setdefault(content, i), i) for i, (content, _) in looked_at.items()]
    groups = link([*same_bytes, *pairs[["query", "reference"]].tolist()], apart)
    return write_duplicates(file, {i: group for i, group in groups.items() if archive.files[i]},
                            {i: rank for i, (_, rank) in looked_at.items()}, archive.files, null)
