"""Which rows to label next: how unsure a model is of a row, and how much sources disagree on it."""

import numpy as np
from jaxtyping import Float, Int

from llmlabel.softlabels import SoftLabels


def margins(soft: SoftLabels) -> Float[np.ndarray, " rows"]:
    """Probability of the first label minus that of the second, Scheffer et al. 2001.

    0 for a row without a soft label. In a multi-label space twice the distance of the label nearest
    to 0.5 from it, Brinker 2003 (BinMin); a label not stored counts as 0.
    """
    if soft.multilabel:
        distance = soft.probs.copy()
        distance.data = 1 - np.abs(2 * distance.data - 1)
        return 1 - distance.max(axis=1).toarray().ravel().astype(np.float64)
    two = soft.top(2).probs.astype(np.float64)
    first = two.max(axis=1).toarray().ravel()
    return 2 * first - np.asarray(two.sum(axis=1)).ravel()


def vote_entropy(
    answers: Int[np.ndarray, "rows sources"],
) -> Float[np.ndarray, " rows"]:
    """Entropy of the sources' answers to each row over its maximum, Dagan and Engelson 1995.

    An answer is any number that is equal for equal answers; -1 is no answer. The maximum is the
    logarithm of the number of sources: 1 when each says something else.
    """
    given = answers >= 0
    same = (answers[:, :, None] == answers[:, None, :]) & given[:, None, :]
    votes = np.maximum(given.sum(axis=1, keepdims=True), 1)
    share = np.where(given, same.sum(axis=2) / votes, 1.0)
    entropy = -(np.log(share) * given).sum(axis=1) / votes[:, 0]
    return entropy / np.log(max(answers.shape[1], 2))
