"""What eval_metrics.py draws: an HTML report with curves, misses and errors, and a picture of some queries."""
from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from copydet.common import OutputFolder, is_page, replacing, shown
from copydet.images import UnreadableImage, find_image, images_by_id, open_thumbnail

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from PIL.Image import Image

FIGURES = ("precision_recall", "scores", "recall")
FILES = ("index.html", *(f"{name}.png" for name in FIGURES))


class Evaluation(Protocol):
    """What is drawn: `path` of the scored file; DataFrames with the columns query_id and reference_id: `positives`;
    `missed`, those that are no candidates, with score; `pairs`, the candidates, best first, with score and is_true."""
    path: str
    positives: pd.DataFrame
    missed: pd.DataFrame
    pairs: pd.DataFrame

    def curve(self) -> tuple[np.ndarray, np.ndarray]: ...


class Thumbnails:
    """Images by id below DIR/query_images and DIR/reference_images; none at all if the folder is None."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder) if folder else None
        self.listed: dict[str, dict[str, str]] = {}

    def open(self, kind: str, name: str, size: int = 224) -> Image | None:
        """RGB image of at most size x size pixels of id `name`, or None. `kind`: query or reference."""
        if self.folder is None:
            return None
        root = self.folder / f"{kind}_images"
        file: str | None = str(root / f"{name}.jpg")
        if not os.path.isfile(root / f"{name}.jpg"):  # nested, or of another kind: list the folder once
            if kind not in self.listed:
                self.listed[kind] = images_by_id(root)
            file = find_image(self.listed[kind], name)
        if file is None:
            return None
        try:
            return open_thumbnail(file, size)
        except UnreadableImage:
            return None


def figure(draw: Callable[[Axes], None], width: float = 6.4) -> bytes:
    """PNG bytes of a figure that `draw(axes)` fills."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(width, 4), layout="constrained", dpi=120)
    axes = fig.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    return buffer.getvalue()


def figures(evaluation: Evaluation, result: dict) -> dict[str, tuple[str, bytes]]:
    """name -> (caption, PNG bytes): precision-recall curve, scores of top answers, recall by number of candidates."""
    pairs = evaluation.pairs
    precision, recall = evaluation.curve()
    top = pairs.drop_duplicates("query_id")

    def curve(axes: Axes) -> None:
        axes.plot(recall, precision)
        axes.axhline(0.9, color="grey", linestyle=":")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))

    def scores(axes: Axes) -> None:
        if len(top):
            bins = np.linspace(top.score.min(), top.score.max() + 1e-9, 41).tolist()
            axes.hist([top.score[top.is_true], top.score[~top.is_true]], bins, label=["true", "false"],
                      color=["tab:green", "tab:red"], histtype="stepfilled", alpha=0.6)
        if result["threshold_p90"] is not None:
            axes.axvline(result["threshold_p90"], color="black", linestyle=":", label="90 % precision")
        axes.set(xlabel="score of a query's top answer", ylabel="queries", yscale="symlog")
        axes.legend()

    def found(axes: Axes) -> None:
        axes.plot(np.arange(1, len(recall) + 1), recall)
        axes.set(xlabel="candidates, best first", ylabel="recall", xscale="log", ylim=(0, 1.02))

    captions = ("Precision against recall", "Scores of true and false top answers",
                "Recall against the number of candidates")
    return {name: (caption, figure(drawn)) for name, caption, drawn in zip(FIGURES, captions, (curve, scores, found))}


def worst_misses(evaluation: Evaluation, n: int = 20) -> pd.DataFrame:
    """DataFrame query_id, reference_id, score of the positives with the lowest scores, unknown ones first."""
    known = evaluation.pairs[evaluation.pairs.is_true][["query_id", "reference_id", "score"]]
    missed = evaluation.missed.set_index(["query_id", "reference_id"]).score
    missed.update(known.set_index(["query_id", "reference_id"]).score)
    return missed.sort_values(na_position="first").head(n).reset_index()


def cards(evaluation: Evaluation, pairs: pd.DataFrame, images: Thumbnails, title: str) -> list[dict]:
    """Dicts for the page: one for each pair, with the true references of its query and thumbnails."""
    truth = evaluation.positives.groupby("query_id").reference_id.agg(", ".join)
    top = evaluation.pairs.drop_duplicates("query_id").set_index("query_id")
    result = []
    for pair in pairs.itertuples():
        shown = [("query", pair.query_id), ("reference", pair.reference_id)]
        answer = f"truth: {truth.get(pair.query_id, 'no match')}"
        if title == "miss":
            best_answer = top.reference_id.get(pair.query_id)
            answer = "no candidate at all" if best_answer is None else \
                f"top answer: {best_answer}, {top.score[pair.query_id]:.4f}"
            if best_answer not in (None, pair.reference_id):
                shown.append(("reference", best_answer))
        result.append({"query": pair.query_id, "reference": pair.reference_id, "answer": answer,
                       "score": "score unknown" if np.isnan(pair.score) else f"{pair.score:.4f}",
                       "images": [(name, data_uri(images.open(kind, name, 160))) for kind, name in shown]})
    return result


def data_uri(image: Image | bytes | None) -> str | None:
    """PIL image or PNG bytes -> data: URI; None stays None."""
    if image is None:
        return None
    kind = "png"
    if not isinstance(image, bytes):
        buffer, kind = io.BytesIO(), "jpeg"
        image.save(buffer, "JPEG", quality=80)
        image = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def number_table(result: dict, prefix: str = "") -> list[tuple[str, object]]:
    """The output as [(label, text)], numbers rounded, nested entries prefixed."""
    rows = []
    for key, value in result.items():
        label = prefix + key.replace("_", " ")
        if isinstance(value, dict):
            rows += number_table(value, f"{label}: ")
        elif isinstance(value, list):
            rows.append((label, ", ".join(f"{v:.5f}" if isinstance(v, float) else str(v) for v in value)))
        else:
            rows.append((label, f"{value:.5f}" if isinstance(value, float) else value))
    return rows


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 16px; overflow-wrap: anywhere }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)) }
figure { margin: 0 } figure img { width: 100%; height: auto } figcaption { font-weight: 600 }
table { border-collapse: collapse } td, th { padding: 2px 10px 2px 0; text-align: right; vertical-align: top }
td:first-child, th:first-child { text-align: left; overflow-wrap: break-word }
.edits td, .edits th { white-space: nowrap; font-size: 14px; padding-right: 8px }
.card { border: 1px solid #ccc; border-radius: 6px; padding: 8px } .thumbs { display: flex; gap: 8px }
.thumbs span { flex: 1; min-width: 0; font-size: 12px } .thumbs img { display: block; max-width: 100%; height: auto }
</style></head><body>
<h1>{{ title }}</h1>
<table>{% for key, value in numbers %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Curves</h2><div class="grid">{% for caption, image in figures %}
<figure><figcaption>{{ caption }}</figcaption><img src="{{ image }}" alt="{{ caption }}"></figure>{% endfor %}</div>
{% if edits %}<h2>By edit</h2><table class="edits"><tr><th>edit</th><th>queries</th>
<th>positives</th><th>AP</th><th>R@P90</th></tr>
{% for edit, queries, positives, ap, recall in edits %}<tr><td>{{ edit }}</td><td>{{ queries }}</td>
<td>{{ positives }}</td>{% for x in (ap, recall) %}<td>{{ "" if x is none else "%.3f" % x }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
{% for heading, list in lists %}<h2>{{ heading }}</h2><div class="grid">{% for card in list %}<div class="card">
<b>{{ card.query }} &ndash; {{ card.reference }}</b> {{ card.score }}<br>{{ card.answer }}<div class="thumbs">
{% for name, image in card.images if image %}<span><img src="{{ image }}" alt="{{ name }}">{{ name }}</span>{% endfor %}
</div></div>{% else %}<p>none</p>{% endfor %}</div>{% endfor %}
</body></html>
"""


def report_folder(path: str | Path) -> OutputFolder:
    """The folder of --report, not made yet. Raises InputError where it holds other files."""
    def older(folder: Path) -> Sequence[str]:
        return FILES if is_page(folder / "index.html", "Copy detection: ") else ()

    folder = OutputFolder(path, "--report", older, wait=True)
    folder.check(*FILES)
    return folder


def write_report(report: OutputFolder, evaluation: Evaluation, result: dict, images: Thumbnails,
                 edits: list[tuple]) -> None:
    """Write index.html, which needs no other file, and its figures as PNGs, to the folder of the report.

    `result`: the numbers, as eval_metrics.py prints them; `edits`: rows of metrics_per_edit.
    """
    import jinja2
    folder = report.path
    drawn = figures(evaluation, result)
    report.add(*FILES)
    for name, (_, png) in drawn.items():
        with replacing(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    errors = evaluation.pairs[~evaluation.pairs.is_true].head(20)
    mark = f" (contaminated: trained on {result['contaminated']})" if "contaminated" in result else ""
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(
        title=f"Copy detection: {shown(Path(evaluation.path).name)}{mark}",
        numbers=number_table(result),
        figures=[(caption, data_uri(png)) for caption, png in drawn.values()],
        edits=edits,
        lists=[("Worst misses", cards(evaluation, worst_misses(evaluation), images, "miss")),
               ("Most confident errors", cards(evaluation, errors, images, "error"))])
    with replacing(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def choose_queries(evaluation: Evaluation, n: int = 8) -> list[str]:
    """Query ids: some right, some wrong (the most confident), some missed, evenly spread over each kind."""
    top = evaluation.pairs.drop_duplicates("query_id")
    right, wrong = top[top.is_true].query_id.to_numpy(), top[~top.is_true].query_id.to_numpy()
    missed = evaluation.positives.query_id[~evaluation.positives.query_id.isin(right)].to_numpy()
    wrong = wrong[~np.isin(wrong, missed)]
    chosen = [*spread(right, n - 4), *wrong[:2], *spread(missed, 2)]
    rest = [q for q in [*right, *missed, *wrong] if q not in set(chosen)]
    return chosen + rest[:n - len(chosen)]


def spread(items: np.ndarray, n: int) -> list:
    """n of the items, evenly spaced; all of them if there are fewer."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, n).astype(int))] if len(items) else []


def write_picture(file: str | Path, evaluation: Evaluation, threshold: float | None, images: Thumbnails) -> None:
    """PNG: queries in rows, their true reference beside them, then the top three answers, framed green or red."""
    from matplotlib.figure import Figure
    queries = choose_queries(evaluation)
    truth = evaluation.positives.groupby("query_id").reference_id.first()
    fig = Figure(figsize=(9, 2 * len(queries) + 0.6), layout="constrained", dpi=100)
    axes = fig.subplots(len(queries), 5, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for row, query in zip(axes, queries):
        original = truth.get(query)
        show(row[0], images.open("query", query), f"query {query}")
        show(row[1], original and images.open("reference", original), f"copy of {original or 'nothing'}")
        answers = evaluation.pairs[evaluation.pairs.query_id == query].head(3)
        for ax, answer in zip(row[2:], answers.itertuples()):
            mark = " = sure" if threshold is not None and answer.score >= threshold else ""
            show(ax, images.open("reference", answer.reference_id), f"{answer.reference_id} {answer.score:.3f}{mark}",
                 "tab:green" if answer.is_true else "tab:red")
        if answers.empty:
            show(row[2], None, "no candidate")
    fig.suptitle("query, its original, top answers with scores (green: right, red: wrong; sure: at or above "
                 "the threshold for 90 % precision)", fontsize=9)
    with replacing(file) as temporary:
        fig.savefig(temporary, format="png")


def show(ax: Axes, image: Image | None, title: str, frame: str | None = None) -> None:
    """One cell of the picture."""
    ax.set_title(title, fontsize=8)
    if image is not None:
        ax.imshow(image)
    if frame:
        ax.spines[:].set(visible=True, color=frame, linewidth=4)
