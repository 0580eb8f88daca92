"""Numbers behind a prompt that is learned from losses alone: its words, and how likely each is where.

A prompt is a sequence of positions; each has a categorical distribution over the same words. Drawn
prompts are tried, and their losses say which draws to make more likely.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

WordProbs = Float[np.ndarray, "positions words"]
"""Row by row the probabilities of the words at one position."""
Drawn = Int[np.ndarray, "samples positions"]
"""Which word each sample has at each position."""
Losses = Float[np.ndarray, " samples"]


def pmi_ngrams(
    texts: Iterable[str],
    *,
    most: int,
    min_count: int = 5,
    min_pmi: float = 1.0,
    longest: int = 5,
) -> list[str]:
    """Frequent words and fixed phrases of the texts in lower case, the most frequent first.

    The search space of Diao et al., "Black-Box Prompt Learning" (BDPL, arXiv 2201.08531): a text is
    cut wherever two neighbours have a pointwise mutual information log(N c(ab) / (c(a) c(b))) below
    `min_pmi` nats; the pieces are the n-grams.

    Differs from the reference code: `min_count` is the fewest occurrences, not one less; a piece is
    counted where it stands as a piece, not also inside longer ones; ties go by the alphabet.

    Args:
        texts: what the words are taken from.
        most: n-grams to return.
        min_count: fewest occurrences of an n-gram, and of two neighbours that are to stay together.
        min_pmi: in nats.
        longest: words in an n-gram.
    """
    documents = [words for text in texts if (words := text.lower().split())]
    single = Counter(word for words in documents for word in words)
    pairs = Counter(pair for words in documents for pair in pairwise(words))
    total = pairs.total()
    joined = {
        (a, b)
        for (a, b), count in pairs.items()
        if count >= min_count and math.log(total * count / (single[a] * single[b])) >= min_pmi
    }
    pieces = (piece for words in documents for piece in _pieces(words, joined))
    plain = (_without_marks(" ".join(piece)) for piece in pieces if len(piece) <= longest)
    counts = Counter(piece for piece in plain if piece)
    frequent = [piece for piece, count in counts.items() if count >= min_count]
    return sorted(frequent, key=lambda piece: (-counts[piece], piece))[:most]


def _pieces(words: list[str], joined: set[tuple[str, str]]) -> Iterator[list[str]]:
    piece = words[:1]
    for before, word in pairwise(words):
        if (before, word) not in joined:
            yield piece
            piece = []
        piece.append(word)
    yield piece


def _without_marks(piece: str) -> str:
    """Without what is no letter or digit at its ends."""
    kept = [i for i, character in enumerate(piece) if character.isalnum()]
    return piece[kept[0] : kept[-1] + 1] if kept else ""


def project_to_simplex(values: WordProbs) -> WordProbs:
    """The nearest distribution to each row, in Euclidean distance.

    Duchi et al. 2008, "Efficient Projections onto the l1-Ball for Learning in High Dimensions"
    (ICML), figure 1. Every row sums to 1, also where all values are small; the bisection in the code
    of BDPL leaves such a row below 1.
    """
    falling = -np.sort(-values, axis=1)
    excess = (np.cumsum(falling, axis=1) - 1) / np.arange(1, values.shape[1] + 1)
    kept = (falling > excess).sum(axis=1, keepdims=True)
    projected = np.maximum(values - np.take_along_axis(excess, kept - 1, axis=1), 0)
    return projected / projected.sum(axis=1, keepdims=True)  # 1 to the last bit


def draw(probs: WordProbs, uniforms: Float[np.ndarray, "samples positions"]) -> Drawn:
    """A word for each position of each sample, from numbers that are uniform in [0, 1)."""
    bounds = np.cumsum(probs, axis=1)
    bounds /= bounds[:, -1:]  # 1 exactly: no number lies beyond the last word
    return (uniforms[:, :, None] >= bounds).sum(axis=2)


def reinforce_gradient(probs: WordProbs, drawn: Drawn, losses: Losses) -> WordProbs:
    """Unbiased estimate of the gradient of the expected loss, from at least two samples.

    The score-function estimator (Williams 1992) with the mean loss as baseline: 1 / (I - 1) times
    the sum over the I samples of (L_k - mean L) times the gradient of the log-probability of the
    sample, which is 1 / p for a word that was drawn and 0 for the others.
    """
    return _spread(probs, _drawn_share(probs, drawn, losses))


def bdpl_gradient(probs: WordProbs, drawn: Drawn, losses: Losses) -> WordProbs:
    """The estimator of BDPL's code: 1 / p for a word that was drawn and -1 / p for the others.

    Since L_k - mean L sums to 0 over the samples, this is twice `reinforce_gradient`, no more and
    no less: the same direction with twice the learning rate.

    Differs from the reference code: a word of probability 0, which is never drawn, has the gradient
    0 there too; 1 / 0 makes it NaN in the code.
    """
    share = _drawn_share(probs, drawn, losses)
    return _spread(probs, share - (_advantages(losses).sum() - share))


def clip_norm(gradient: WordProbs, *, most: float) -> WordProbs:
    """The gradient, scaled down where its Euclidean norm as a whole is above `most`."""
    norm = float(np.linalg.norm(gradient))
    return gradient * (most / norm) if norm > most else gradient


def agreement(one: Int[np.ndarray, " rows"], other: Int[np.ndarray, " rows"]) -> float:
    """Cohen's kappa of two answers to the same rows: 1 is always, 0 is what chance alone gives.

    0 where both give one and the same answer to all rows, which chance would too.
    """
    answers = np.union1d(one, other)
    shares = [(given[:, None] == answers).mean(axis=0) for given in (one, other)]
    chance = float(shares[0] @ shares[1])
    return float((one == other).mean() - chance) / (1 - chance) if chance < 1 else 0.0


def _advantages(losses: Losses) -> Losses:
    return (losses - losses.mean()) / (len(losses) - 1)


def _drawn_share(probs: WordProbs, drawn: Drawn, losses: Losses) -> WordProbs:
    """Of each word at each position, the sum of the advantages of the samples that drew it."""
    share = np.zeros_like(probs)
    positions = np.broadcast_to(np.arange(drawn.shape[1]), drawn.shape)
    np.add.at(share, (positions, drawn), _advantages(losses)[:, None])
    return share


def _spread(probs: WordProbs, share: WordProbs) -> WordProbs:
    return np.divide(share, probs, out=np.zeros_like(probs), where=probs > 0)
