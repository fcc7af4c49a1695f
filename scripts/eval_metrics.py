#!/usr/bin/env python3
"""Score descriptors, or a list of scored pairs, against a ground truth: micro-AP and recall at 90 % precision.

    python scripts/eval_metrics.py exp/v31/extract/fb-isc-submission.h5 input/public_ground_truth.csv
    python scripts/eval_metrics.py pairs.csv input/public_ground_truth.csv
    python scripts/eval_metrics.py new.h5 gt.csv --compare old.h5          is the difference real?
    python scripts/eval_metrics.py sub.h5 gt.csv --report report --images input
    python scripts/eval_metrics.py sub.h5 gt.csv --threshold-precision 0.9     what the calibration promises

The protocol is that of DISC21's descriptor track. The queries are those of the ground truth. Over all queries together
the 10 x queries pairs of smallest squared L2 distance are the candidates; their score is minus that distance. Sorted by
score, false pairs first among equals, they give one precision-recall curve. Positives that are not among the candidates
count as missed. A CSV is scored whole, as the competition's tool does, however many rows it has per query: its author
chose the candidates. `rule` in the output says which it was: global, topk (--topk K: the best K of each query) or all.

Standard output holds the result, as JSON, and nothing else. Search is exact: float32 search finds what could be among
the candidates, rounding errors allowed for, and float64 distances decide. References are read from the file in blocks.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from copydet.calibration import Calibration
from copydet.common import InputError, OutputFolder, check_output, first_three, replacing, run_main, warn
from copydet.descriptors import Descriptors
from copydet.metrics import (micro_ap, precision_recall, read_ground_truth, read_predictions, read_table, recall_at_p90,
                             respell, sort_candidates)
from copydet.options import fraction, positive, size_in_bytes
from copydet.regions import images_of
from copydet.report import Thumbnails, report_folder, write_picture, write_report
from copydet.search import PAIR, count_gpus, exact_distances, rows_of, search, search_topk, warn_if_collapsed


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def open_descriptors(path: str, allow_contaminated: bool) -> Descriptors:
    """Open descriptors that may be scored. InputError: more than one checkpoint, trained on the ground truth."""
    file = Descriptors(path)
    try:
        file.check_checkpoint()
        if file.contaminated and not allow_contaminated:
            raise InputError(f"{path}: its checkpoint was trained on {file.contaminated}: a score on that is "
                             "no measurement (--allow-contaminated shows it, marked)")
    except InputError:
        file.file.close()
        raise
    return file


def shown_attrs(file: Descriptors) -> dict:
    """What the output shows of a descriptor file's attributes: steps of post-processing, what taints its score."""
    shown = {"steps": file.steps()} if "steps" in file.attrs else {}
    return shown | ({"contaminated": file.contaminated} if file.contaminated else {})


class Evaluation:
    """What one file scores against one ground truth.

    Attributes:
        queries: query ids [n] of the ground truth, sorted; positives: DataFrame query_id, reference_id.
        pairs: DataFrame of the candidates, sorted: query_id, reference_id, score, is_true.
        counts, attrs: dicts for the output.
        missed: DataFrame of the positives that are not among the candidates, with their score where it is known.
    """

    def __init__(self, path: str, ground_truth: tuple[np.ndarray, pd.DataFrame], args: argparse.Namespace) -> None:
        self.path, self.attrs = path, {"topk": args.topk} if args.topk else {}
        self.queries, self.positives = ground_truth
        read = self.read_csv if is_csv(path, args) else self.read_h5
        pairs = read(path, args)
        truth = pd.MultiIndex.from_frame(self.positives)
        is_true = pd.MultiIndex.from_frame(pairs[["query_id", "reference_id"]]).isin(truth)
        order = sort_candidates(pairs.score.to_numpy(), is_true)
        self.pairs = pairs.assign(is_true=is_true).iloc[order].reset_index(drop=True)
        self.counts |= {"n_positives": len(self.positives), "n_candidates": len(pairs), "n_true": int(is_true.sum())}

    def read_csv(self, path: str, args: argparse.Namespace) -> pd.DataFrame:
        """Candidates from a CSV: all of them, or the best --topk of each query."""
        pairs, dropped = read_predictions(path, self.queries, self.positives.reference_id, args.drop_unknown)
        present = pairs.query_id.nunique()
        self.rule = "topk" if args.topk else "all"
        if args.topk:
            true = pd.MultiIndex.from_frame(pairs[["query_id", "reference_id"]]).isin(
                pd.MultiIndex.from_frame(self.positives))
            pairs = pairs.iloc[sort_candidates(pairs.score.to_numpy(), true)].groupby("query_id").head(args.topk)
        self.counts = {"n_queries": len(self.queries), "queries_missing": len(self.queries) - present,
                       "predictions_dropped": dropped}
        self.missed = self.positives.assign(score=np.nan)
        return pairs

    def read_h5(self, path: str, args: argparse.Namespace) -> pd.DataFrame:
        """Candidates by search in a descriptor file."""
        with open_descriptors(path, args.allow_contaminated) as file:
            self.attrs |= shown_attrs(file)
            references = file["reference"]
            row_ids, reference_ids = respell(path, (file["query"].ids, self.queries),
                                             (references.ids, self.positives.reference_id))
            known = np.isin(row_ids, self.queries)
            if not known.any():
                raise InputError(f"{path}: no query of the ground truth is in it; queries are {first_three(row_ids)}")
            queries, dropped = file["query"].read()[known], len(np.unique(row_ids[~known]))
            query_ids, regions_of = images_of(row_ids[known])
            image_of = None if file["query"].regions is None else regions_of
            warn_if_collapsed(path, queries, references)
            true = np.empty(len(self.positives), PAIR)
            true["query"] = rows_of(query_ids, self.positives.query_id.to_numpy(str))
            true["reference"] = rows_of(reference_ids, self.positives.reference_id.to_numpy(str))
            absent = true["reference"] < 0
            self.counts = {"n_queries": len(query_ids), "n_references": len(references),
                           "queries_dropped": dropped, "queries_missing": len(self.queries) - len(query_ids),
                           "references_missing": int(absent.sum())}
            there = (true["query"] >= 0) & ~absent
            true = true[there]
            keys = np.sort(true["query"] * np.int64(len(references)) + true["reference"])
            self.rule, options = "global", (args.ngpu, args.memory, True, image_of)
            if args.topk:
                self.rule = "topk"
                found = search_topk(queries, references, min(args.topk, len(references)), keys, *options)
            else:
                found = search(queries, references, 10 * len(query_ids), keys, *options)
            self.missed = self.positives.assign(score=np.nan)
            distances = exact_distances(queries, references, true, image_of)
            self.missed.loc[self.positives.index[there], "score"] = -distances
            return pd.DataFrame({"query_id": query_ids[found["query"]], "score": found["score"],
                                 "reference_id": reference_ids[found["reference"]]})

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision and recall [n] after each candidate."""
        return precision_recall(self.pairs.is_true.to_numpy(), len(self.positives))

    def metrics(self) -> dict:
        """The output: a dict that is ready for JSON."""
        is_true, n = self.pairs.is_true.to_numpy(), len(self.positives)
        recall, at = recall_at_p90(is_true, n)
        result: dict = {"average_precision": micro_ap(is_true, n), "recall_p90": recall}
        if "contaminated" in self.attrs:
            result["contaminated"] = self.attrs["contaminated"]
        result["threshold_p90"] = None if at is None else float(self.pairs.score[at])
        return result | self.counts | {"rule": self.rule} | self.attrs

    def from_score(self, threshold: float) -> dict:
        """What holds from a score on; a dict for the output."""
        found = self.pairs.is_true[self.pairs.score >= threshold]
        return {"precision": float(found.mean()) if len(found) else None, "recall": found.sum() / len(self.positives),
                "pairs": len(found)}


def promised_threshold(args: argparse.Namespace) -> dict:
    """The threshold that the submission's calibration gives for --threshold-precision; a dict for the output.

    Raises InputError where the file carries no calibration, or one that does not reach so far.
    """
    text, promised = None, args.threshold_precision
    if not is_csv(args.submission, args):
        with open_descriptors(args.submission, args.allow_contaminated) as file:
            text, references = file.attrs.get("calibration"), len(file["reference"])
    if text is None:
        raise InputError(f"--threshold-precision {promised:g}: {args.submission} carries no calibration; train.py "
                         "--calibrate measures one, and post-processing voids it")
    calibration = Calibration(text, args.submission, references, args.copies_ratio)
    return {"threshold": calibration.threshold(promised, "--threshold-precision"), "promised": promised,
            "copies_ratio": calibration.copies_ratio}


def is_csv(path: str, args: argparse.Namespace) -> bool:
    """Whether `path` holds scored pairs (--matching) rather than descriptors (--descriptor); by its name otherwise."""
    ending = Path(path).suffix.lower()
    if args.matching or args.descriptor:
        return args.matching
    if ending not in (".csv", ".h5", ".hdf5", ".hdf"):
        raise InputError(f"{path}: neither .csv nor .h5, .hdf5, .hdf (--matching or --descriptor says which it is)")
    return ending == ".csv"


def metrics_per_edit(evaluation: Evaluation, edits: Path) -> list[tuple]:
    """[(edit, queries, positives, AP, recall@P90)]: each edit's own queries, with and without a match, by AP.

    `edits`: CSV query_id, edits (names joined by +).
    """
    try:
        table = read_table(edits, ["query_id", "edits"])
    except InputError as error:  # another file of this name
        warn(f"{error}; the report has no table of edits")
        return []
    query_ids, = respell(edits, (table.query_id, evaluation.queries))
    table = table.assign(query_id=query_ids)
    table = table[table.query_id.isin(evaluation.queries)]
    table = table.assign(edit=table.edits.str.split("+")).explode("edit")
    rows = []
    for edit, queries in table[table.edit != ""].groupby("edit").query_id:
        n = int(evaluation.positives.query_id.isin(queries).sum())
        is_true = evaluation.pairs.is_true[evaluation.pairs.query_id.isin(queries)].to_numpy()
        scores = (micro_ap(is_true, n), recall_at_p90(is_true, n)[0]) if n else (None, None)
        rows.append((edit, queries.nunique(), n, *scores))
    return sorted(rows, key=lambda row: (row[3] is None, row[3]))


def bootstrap(evaluations: list[Evaluation], n: int, seed: int = 0) -> np.ndarray:
    """AP and recall@P90 of `n` resamples of the queries, the same for all evaluations: [evaluations, n, 2].

    The candidates stay those of the whole set; those of a query that is drawn twice count twice.
    """
    queries, rng = evaluations[0].queries, np.random.default_rng(seed)
    results: list[list] = []
    positives = np.searchsorted(queries, evaluations[0].positives.query_id.to_numpy(str))
    columns = [(np.searchsorted(queries, e.pairs.query_id.to_numpy(str)), e.pairs.is_true.to_numpy())
               for e in evaluations]
    while len(results) < n:
        weight = np.bincount(rng.integers(len(queries), size=len(queries)), minlength=len(queries))
        if n_positives := weight[positives].sum():
            resampled = [np.repeat(is_true, weight[query]) for query, is_true in columns]
            results.append([(micro_ap(r, n_positives), recall_at_p90(r, n_positives)[0]) for r in resampled])
    return np.array(results).transpose(1, 0, 2)


def interval(values: np.ndarray) -> list[float]:
    """95 % percentile interval of values [n]."""
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def intervals(evaluations: list[Evaluation], n: int) -> dict:
    """Intervals of AP and recall@P90 of the first evaluation and, where there are two, of first minus second, from `n`
    resamples; a dict for the output."""
    samples = bootstrap(evaluations, n)
    names = ("average_precision", "recall_p90")
    result = {f"{name}_interval": interval(samples[0, :, m]) for m, name in enumerate(names)}
    if len(evaluations) == 1:
        return result
    ours, other = (e.metrics() for e in evaluations)
    comparison = {"file": str(evaluations[1].path), **other}
    for m, name in enumerate(names):
        comparison |= {f"{name}_interval": interval(samples[1, :, m]),
                       f"{name}_difference": ours[name] - other[name],
                       f"{name}_difference_interval": interval(samples[0, :, m] - samples[1, :, m])}
    return result | {"compare": comparison}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submission", help="descriptors (.h5) or pairs (.csv: query_id, reference_id, score)")
    parser.add_argument("ground_truth", help="CSV query_id, reference_id; an empty reference_id means no match")
    g = parser.add_argument_group("protocol")
    track = g.add_mutually_exclusive_group()
    track.add_argument("--matching", action="store_true", help="the submission is a CSV, whatever its name")
    track.add_argument("--descriptor", action="store_true", help="the submission is HDF5, whatever its name")
    g.add_argument("--topk", type=positive, metavar="K", help="candidates are the best K of each query, instead of the "
                   "best 10 x queries over all")
    g.add_argument("--drop-unknown", action="store_true", help="leave out pairs of queries that the ground truth lacks")
    g.add_argument("--allow-contaminated", action="store_true", help="score descriptors of a checkpoint that was "
                   "trained on the ground truth, and mark the result")
    g = parser.add_argument_group("calibration")
    g.add_argument("--threshold-precision", type=fraction, metavar="P", help="tell the threshold at which this "
                   "precision is promised for as many references, and precision and recall there")
    g.add_argument("--copies-ratio", type=fraction, metavar="R", help="fraction of the queries that have a copy "
                   "(default: the calibration's)")
    g = parser.add_argument_group("intervals")
    g.add_argument("--bootstrap", type=positive, metavar="N", help="95 %% intervals from N resamples of the queries")
    g.add_argument("--compare", metavar="OTHER", help="score this file too, with an interval of the difference "
                   "(--bootstrap, 1000 by default)")
    g = parser.add_argument_group("output")
    g.add_argument("--candidates", metavar="FILE", help="write the candidates as CSV query_id, reference_id, score")
    g.add_argument("--report", metavar="DIR", help="write an HTML page with curves, errors and misses, and its PNGs")
    g.add_argument("--picture", metavar="FILE", help="write a PNG of some queries with their top answers (with "
                   "--images)")
    g.add_argument("--images", "--photos", metavar="DIR", help="folder with query_images and reference_images, for "
                   "thumbnails")
    g = parser.add_argument_group("machine")
    g.add_argument("--ngpu", type=int, default=-1, metavar="N", help="GPUs to search on; 0: CPU; default: all")
    g.add_argument("--memory", type=size_in_bytes, default="2G", metavar="SIZE", help="for the search, e.g. 500M; the "
                   "result does not depend on it (default: 2G)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Everything about the flags that can be wrong, before any work."""
    if args.picture and not args.images:
        raise InputError("--picture needs --images DIR")
    if args.images and not (Path(args.images) / "query_images").is_dir():
        raise InputError(f"--images {args.images}: no folder query_images in it")
    inputs = [file for file in (args.submission, args.ground_truth, args.compare) if file]
    for flag in ("candidates", "picture"):
        if getattr(args, flag):
            check_output(f"--{flag}", getattr(args, flag), inputs)
    if args.compare and not is_csv(args.compare, args):
        open_descriptors(args.compare, args.allow_contaminated).file.close()
    args.ngpu = count_gpus(args.ngpu)


def warn_of_missing(evaluations: list[Evaluation]) -> None:
    """Say what makes pairs count as missed, or a comparison unfair."""
    for e in evaluations:
        for name, what in (("queries_missing", "queries of the ground truth are not in"),
                           ("references_missing", "references of true pairs are not in")):
            if e.counts.get(name):
                warn(f"{e.counts[name]:,} {what} {e.path}: their pairs count as missed")
    for name in ("n_queries", "n_references"):
        counts = {e.path: e.counts[name] for e in evaluations if name in e.counts}
        if len(set(counts.values())) > 1:
            warn(f"not comparable: {name} is " + ", ".join(f"{n:,} in {path}" for path, n in counts.items()))


def evaluate(args: argparse.Namespace) -> None:
    """Run the command line."""
    check_args(args)
    report = report_folder(args.report) if args.report else None
    ground_truth = read_ground_truth(args.ground_truth)
    promise = promised_threshold(args) if args.threshold_precision else None
    evaluations = [Evaluation(path, ground_truth, args) for path in (args.submission, args.compare) if path]
    ours = evaluations[0]
    result = ours.metrics()
    if promise:
        result["at_precision"] = promise | ours.from_score(promise["threshold"])
    if args.bootstrap or args.compare:
        result |= intervals(evaluations, args.bootstrap or 1000)
    warn_of_missing(evaluations)
    if args.candidates:
        with replacing(args.candidates) as temporary:
            ours.pairs[["query_id", "reference_id", "score"]].to_csv(temporary, index=False)
    print(json.dumps(result, indent=2), flush=True)
    if args.report or args.picture:
        draw(args, ours, result, report)


def draw(args: argparse.Namespace, evaluation: Evaluation, result: dict, report: OutputFolder | None) -> None:
    """--report and --picture."""
    images = Thumbnails(args.images)
    if report:
        edits = Path(args.ground_truth).with_name("edits.csv")
        with report:
            write_report(report, evaluation, result, images,
                         metrics_per_edit(evaluation, edits) if edits.is_file() else [])
    if args.picture:
        write_picture(args.picture, evaluation, result["threshold_p90"], images)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_main(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
