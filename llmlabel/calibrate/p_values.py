"""How well the labels of a row conform, as p-values: the sets of every level at once."""

from typing import Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value

from llmlabel.calibrate.conformal import Conformal, checked, kept_scores, tie_draws
from llmlabel.calibrate.provenance import OtherEngine, one_of
from llmlabel.calibrate.quantile import conformal_p_values, row_uniforms
from llmlabel.calibrate.scores import ScoreFunction, stored_scores
from llmlabel.data import require_columns, with_columns
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace


def p_values(
    dataset: Dataset,
    labels: LabelSpace,
    conformal: Conformal,
    *,
    ties: Literal["keep", "draw"] = "draw",
    score: ScoreFunction | None = None,
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Adds `label_p_values`, beside `label_ids`, and `p_value`, the largest of a row.

    The p-value of a label is the share of gold rows whose true label conforms as little as it does;
    the labels with one above any level are the set at that level. A small `p_value` (credibility)
    says that no label fits: the text may be of a kind that is not in the label space.

    Args:
        dataset: New rows.
        labels: The label space of the scores.
        conformal: What `fit_conformal` gave, with its scores.
        ties: "draw" smooths by one number a row, so that p-values of true labels are uniform; "keep"
            gives those whose sets are the ones of the threshold.
        score: The function, if the score is one.
        other_engine: See `predict_sets`.
    """
    one_of("ties", ties, Literal["keep", "draw"])
    require_columns(dataset, "id")
    probs, how = checked(dataset, labels, conformal, score, other_engine)
    calibration = kept_scores(conformal)
    ids = dataset["id"][:]
    rows = np.repeat(np.arange(len(ids)), np.diff(probs.indptr))
    draws = tie_draws(ids, conformal) if ties == "draw" else None
    scores = stored_scores(probs, how, row_uniforms(ids, seed=conformal.seed))
    values = conformal_p_values(scores, calibration, None if draws is None else draws[rows])
    largest = conformal_p_values(np.full(len(ids), np.inf), calibration, draws)  # nothing stored
    np.maximum.at(largest, rows, values)
    lists = arrow_table(dataset.select_columns(["label_ids"]))["label_ids"].combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    given = lists.flatten().to_numpy(zero_copy_only=False)
    aligned = np.empty_like(values)
    aligned[np.lexsort((given, rows))] = values  # `probs` has the ids of a row ascending
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return with_columns(
        dataset,
        {
            "label_p_values": (
                pa.ListArray.from_arrays(offsets, pa.array(aligned)),
                List(Value("float64")),
            ),
            "p_value": (largest, Value("float64")),
        },
    )
