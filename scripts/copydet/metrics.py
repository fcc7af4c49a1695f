"""Ground truths, lists of scored pairs, and what is measured on them: micro-AP and recall at 90 % precision."""
from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from copydet.common import InputError, first_three


def read_table(path: str | Path, columns: list[str], optional: Collection[str] = ()) -> pd.DataFrame:
    """CSV with or without a header -> DataFrame of str with the given columns; its index is the line in the file.

    Without a header the columns are taken in order; those in `optional` may be missing. Raises InputError: no such
    file, empty, no CSV, missing column.
    """
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    try:
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, skipinitialspace=True)
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    table.index += 1
    if "query_id" in table.iloc[0].tolist():
        table = table.iloc[1:].set_axis(table.iloc[0].tolist(), axis=1)
    else:
        table.columns = columns[:table.shape[1]] + [f"column {i + 1}" for i in range(len(columns), table.shape[1])]
    missing = [column for column in columns if column not in table and column not in optional]
    if missing:
        raise InputError(f"{path}: missing column {', '.join(missing)}")
    return table[columns]


def at_lines(table: pd.DataFrame, wrong: np.ndarray) -> str:
    """The rows of `table` marked in `wrong`, bool [n] -> "line 3 (Q1, R7), ..."."""
    rows = table[wrong].iloc[:, :2].itertuples()
    return first_three([f"line {line} ({', '.join(pair)})" for line, *pair in rows])


def read_ground_truth(path: str | Path) -> tuple[np.ndarray, pd.DataFrame]:
    """CSV query_id,reference_id (empty: no match) -> (query ids [n], sorted; DataFrame of the positive pairs).

    Raises InputError: missing column, a pair given twice, no positive pair at all.
    """
    table = read_table(path, ["query_id", "reference_id"])
    positives = table[table.reference_id != ""]
    if positives.empty:
        raise InputError(f"{path}: the ground truth has no positive pair")
    if (twice := positives.duplicated().values).any():
        raise InputError(f"{path}: pair given twice: {at_lines(positives, twice)}")
    return np.unique(table.query_id.to_numpy(str)), positives


def read_predictions(path: str | Path, queries: np.ndarray, drop_unknown: bool = False) -> tuple[pd.DataFrame, int]:
    """CSV query_id,reference_id,score -> (DataFrame with float scores, number of rows dropped).

    Args:
        queries: query ids [n] of the ground truth.
        drop_unknown: leave out the rows of other queries.

    Raises InputError: missing column, score that is no finite number, a pair given twice, unknown query.
    """
    table = read_table(path, ["query_id", "reference_id", "score"])
    scores = pd.to_numeric(table.score, errors="coerce").to_numpy(float)
    if (wrong := ~np.isfinite(scores)).any():
        raise InputError(f"{path}: score is not a finite number: {at_lines(table, wrong)}")
    if (twice := table.duplicated(["query_id", "reference_id"]).values).any():
        raise InputError(f"{path}: pair given twice: {at_lines(table, twice)}")
    unknown = ~table.query_id.isin(queries).values
    if unknown.any() and not drop_unknown:
        raise InputError(f"{path}: query not in the ground truth (--drop-unknown leaves such rows out): "
                         f"{at_lines(table, unknown)}")
    return table.assign(score=scores)[~unknown], int(unknown.sum())


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
