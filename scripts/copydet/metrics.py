"""Ground truths, lists of scored pairs, and what is measured on them: micro-AP and recall at 90 % precision."""
from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from copydet.common import InputError, check_file, composed, first_three, warn


FOREIGN = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "a ZIP file or a spreadsheet", b"\x89HDF": "HDF5",
           b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # first bytes -> what is no CSV


def read_table(path: str | Path, columns: list[str]) -> pd.DataFrame:
    """CSV with or without a header -> DataFrame of str with the given columns; its index is the line in the file.

    Columns are separated by commas, by semicolons where the first line has no comma, or by tabs; spaces around fields
    do not count. A header may write `query_id` as Query_ID, QueryID or query; without one columns are taken in order.
    Raises InputError: no such file, empty, no CSV, missing column, a column twice, a header amid the rows.
    """
    check_file(path)
    whole = decode(path, Path(path).read_bytes())
    text = whole.lstrip("\r\n ")
    first = text.partition("\n")[0]
    separator = "\t" if "\t" in first else ";" if ";" in first and "," not in first else ","
    try:
        table = pd.read_csv(io.StringIO(text), sep=separator, header=None, dtype=str, keep_default_na=False,
                            skipinitialspace=True, skip_blank_lines=False)
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty") from None
    except pd.errors.ParserError as error:
        raise InputError(f"{path}: {' '.join(str(error).split()).rpartition('error: ')[2]}") from None
    table = table.fillna("")
    if " " in text or not text.isascii():
        table = table.apply(lambda column: column.str.strip())
    table.index += whole.count("\n", 0, len(whole) - len(text)) + 1
    unnamed = table[table[0] == ""]
    table = table.drop(unnamed.index[(unnamed == "").all(axis=1)])  # empty lines
    if table.empty:
        raise InputError(f"{path} is empty")
    return take_columns(path, table, columns)


def decode(path: str | Path, text: bytes) -> str:
    """Text of a CSV. Raises InputError for what cannot be one."""
    for start, what in FOREIGN.items():
        if text.startswith(start):
            raise InputError(f"{path} is {what}, not a CSV in UTF-8")
    try:
        if (end := text.find(b"\0")) < 0:
            return text.decode("utf-8-sig")
        why = "holds a NUL byte"
    except UnicodeDecodeError as error:
        end, why = error.start, "is not UTF-8"
    line = text.count(b"\n", 0, end) + 1
    raise InputError(f"{path} is no text: line {line} {why}")


def take_columns(path: str | Path, table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """`columns` of a table without names, whose first row may be a header; as for `read_table`."""
    names, wanted = [short(name) for name in table.iloc[0]], [short(column) for column in columns]
    if wanted[0] in names:
        column = table[names.index(wanted[0])]
        header, *again = table.index[column == column.iloc[0]]
        if again:
            raise InputError(f"{path}: line {again[0]} is the header of line {header} again")
        table = table.iloc[1:]
    else:
        names = wanted[:table.shape[1]]
    for column, name in zip(columns, wanted):
        if names.count(name) > 1:
            raise InputError(f"{path}: column {column} twice")
    if missing := [column for column, name in zip(columns, wanted) if name not in names]:
        raise InputError(f"{path}: missing column {', '.join(missing)}")
    return table[[names.index(name) for name in wanted]].set_axis(columns, axis=1)


def short(name: str) -> str:
    """Name of a column, however it is written: "Query_ID", "QueryID", "query" -> "query"."""
    return re.sub(r"[\W_]", "", name.lower()).removesuffix("id")


def at_lines(table: pd.DataFrame, wrong: np.ndarray) -> str:
    """The rows of `table` marked in `wrong`, bool [n] -> "line 3 (Q1, R7), ..."."""
    rows = table[wrong].iloc[:, :2].itertuples()
    return first_three([f"line {line} ({', '.join(pair)})" for line, *pair in rows])


def check_ids(path: str | Path, table: pd.DataFrame, column: str) -> None:
    """Raise InputError naming the lines where `column` is empty."""
    if (empty := (table[column] == "").to_numpy()).any():
        raise InputError(f"{path}: empty {column}: {at_lines(table, empty)}")


def read_ground_truth(path: str | Path) -> tuple[np.ndarray, pd.DataFrame]:
    """CSV query_id,reference_id (empty: no match) -> (query ids [n], sorted; DataFrame of the positive pairs).

    Raises InputError: missing column, a pair given twice, a query with and without a match, no positive pair at all.
    """
    table = read_table(path, ["query_id", "reference_id"])
    check_ids(path, table, "query_id")
    unmatched = (table.reference_id == "").to_numpy()
    positives = table[~unmatched]
    if positives.empty:
        raise InputError(f"{path}: the ground truth has no positive pair")
    if (twice := positives.duplicated().to_numpy()).any():
        raise InputError(f"{path}: pair given twice: {at_lines(positives, twice)}")
    if (both := unmatched & table.query_id.isin(positives.query_id).to_numpy()).any():
        raise InputError(f"{path}: without a match here, with one in another line: {at_lines(table, both)}")
    return np.unique(table.query_id.to_numpy(str)), positives


def read_predictions(path: str | Path, queries: np.ndarray, references: Iterable[str],
                     drop_unknown: bool = False) -> tuple[pd.DataFrame, int]:
    """CSV query_id,reference_id,score -> (DataFrame with float scores, number of rows dropped).

    Args:
        queries, references: query ids [n] of the ground truth, reference ids [p] of its positive pairs.
        drop_unknown: leave out the rows of other queries.

    Raises InputError: missing column, empty id, score that is no finite number, a pair given twice, unknown query.
    """
    table = read_table(path, ["query_id", "reference_id", "score"])
    check_ids(path, table, "query_id")
    check_ids(path, table, "reference_id")
    query_ids, reference_ids = respell(path, (table.query_id, queries), (table.reference_id, references))
    table = table.assign(query_id=query_ids, reference_id=reference_ids)
    scores = pd.to_numeric(table.score, errors="coerce").to_numpy(float)
    if (wrong := ~np.isfinite(scores)).any():
        raise InputError(f"{path}: score is not a finite number: {at_lines(table, wrong)}: "
                         f"{first_three(table.score[wrong].tolist())}")
    if (twice := table.duplicated(["query_id", "reference_id"]).to_numpy()).any():
        raise InputError(f"{path}: pair given twice: {at_lines(table, twice)}")
    unknown = ~table.query_id.isin(queries).to_numpy()
    if unknown.any() and not drop_unknown:
        raise InputError(f"{path}: query not in the ground truth (--drop-unknown leaves such rows out): "
                         f"{at_lines(table, unknown)}")
    return table.assign(score=scores)[~unknown], int(unknown.sum())


def respell(path: str | Path, *columns: tuple[Any, Iterable[str]]) -> list[Any]:
    """Ids [n] of each of the columns (ids [n], known ones), as the known ones are spelled where they differ only in
    Unicode's form ("é" is one character or two) or in spaces around them. Two ids never become one; one warning."""
    result, told = [], []
    for ids, known in columns:
        there, known = set(ids.tolist()), set(known)
        names = "".join(there | known)
        new = {} if names.isascii() and " " not in names else respelled(there - known, known - there)
        told += sorted(new)
        result.append(np.array([new.get(name, name) for name in ids.tolist()]) if new else ids)
    if told:
        warn(f"{path}: ids in another form of Unicode than elsewhere, or with spaces around them, count as the same: "
             f"{first_three(told)}")
    return result


def respelled(unknown: set[str], known: set[str]) -> dict[str, str]:
    """Unknown name -> the known one that it is when both are composed; none at all where two would become one."""
    spelling = {composed(name): name for name in known}
    new = {name: spelling[composed(name)] for name in unknown if composed(name) in spelling}
    return new if len(set(new.values())) == len(new) else {}


def sort_candidates(scores: np.ndarray, is_true: np.ndarray) -> np.ndarray:
    """Scores [n] and bool [n] -> order [n] by falling score; among equal scores false pairs come first, which is the
    worst case."""
    return np.lexsort((is_true, -scores))


def precision_recall(is_true: np.ndarray, n_positives: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall [n] after each of the sorted candidates (bool [n])."""
    hits = np.cumsum(is_true)
    return hits / np.arange(1, len(hits) + 1), hits / n_positives


def micro_ap(is_true: np.ndarray, n_positives: int) -> float:
    """Sum of (recall_k - recall_{k-1}) * precision_k over the sorted candidates (bool [n])."""
    precision, _ = precision_recall(is_true, n_positives)
    return float(precision[is_true].sum() / n_positives)


def recall_at_p90(is_true: np.ndarray, n_positives: int) -> tuple[float, int | None]:
    """(largest recall at which precision is 0.9 or more, index of that one of the sorted candidates, bool [n]);
    (0.0, None) if there is none."""
    precision, recall = precision_recall(is_true, n_positives)
    reached = np.where(precision >= 0.9, recall, 0.0)
    if not reached.any():
        return 0.0, None
    return float(reached.max()), int(reached.argmax())
