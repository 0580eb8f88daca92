"""What people should look at in the time that they have."""

import re

import numpy as np
from datasets import Dataset
from jaxtyping import Float

from llmlabel.data import require_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.select import id_ranks, with_selection
from llmlabel.softlabels import SoftLabels


def review_queue(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    budget_seconds: float,
    seconds_per_row: float = 5.0,
    seconds_per_word: float = 0.25,
) -> Dataset:
    """Takes the rows that repair most expected errors per second of reading, until the time is used.

    Return on investment of an annotation, Haertel et al. 2008 ("Return on Investment for Active
    Learning"): benefit over cost. The benefit is the probability that the row's label is wrong, 1
    minus the largest probability, so these should be calibrated; a row without a label counts as
    wrong, and one whose `set_ids` hold a single label as decided. In a multi-label space it is the
    expected number of wrong decisions at 0.5. `select_score` is errors per minute, and `chosen`
    gives the queue. Rows that no longer fit are passed over for cheaper ones.

    Args:
        dataset: rows with `text` and soft labels, perhaps with `set_ids`.
        labels: their label space.
        budget_seconds: time of all people together.
        seconds_per_row: to decide and click.
        seconds_per_word: to read; 0.25 is a reading speed of 240 words a minute.

    Raises:
        ValueError: the budget does not pay for a single row, or a time is negative.
    """
    require_columns(dataset, "text")
    if not (seconds_per_row > 0 and seconds_per_word >= 0):
        raise ValueError(
            f"seconds_per_row must be above 0 and seconds_per_word at least 0; got {seconds_per_row} "
            f"and {seconds_per_word}"
        )
    errors = expected_errors(SoftLabels.from_dataset(dataset, labels))
    if "set_ids" in dataset.column_names and not labels.multilabel:
        sure = [some is not None and len(some) == 1 for some in dataset["set_ids"][:]]
        errors = np.where(sure, 0.0, errors)
    words = np.array([len(re.findall(r"\S+", text)) for text in dataset["text"][:]])
    seconds = seconds_per_row + seconds_per_word * words
    if len(seconds) and budget_seconds < seconds.min():
        raise ValueError(
            f"budget_seconds={budget_seconds} does not pay for one row, the cheapest takes "
            f"{seconds.min():.1f} s"
        )
    scores = 60 * errors / seconds
    taken, left = np.zeros(len(dataset), dtype=bool), budget_seconds
    for row in np.lexsort((id_ranks(dataset), -scores)):
        if errors[row] > 0 and seconds[row] <= left:
            taken[row] = True
            left -= seconds[row]

    def reason(row: int) -> str | None:
        text = f"{errors[row]:.2f} expected errors in {seconds[row]:.0f} s"
        return text if taken[row] else None

    return with_selection(dataset, taken, scores, reason)


def expected_errors(soft: SoftLabels) -> Float[np.ndarray, " rows"]:
    """How many decisions on a row are wrong, if its probabilities are right."""
    if soft.multilabel:
        wrong = soft.probs.astype(np.float64).copy()
        wrong.data = np.minimum(wrong.data, 1 - np.minimum(wrong.data, 1))
        errors = np.asarray(wrong.sum(axis=1)).ravel()
    else:
        errors = 1 - np.minimum(soft.probs.max(axis=1).toarray().ravel().astype(np.float64), 1)
    return np.where(np.diff(soft.probs.indptr) > 0, errors, 1.0)
