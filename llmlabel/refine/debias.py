"""Takes out what a source prefers whatever the text says.

Every correction here is one weight for each label: p w, normalised. Votes of label orders (see
`llmlabel.refine.orders`) that hold whole distributions are corrected in the same way, each order by
itself, so that `llmlabel.refine.bias.measure_bias` sees both sides of a correction. No correction
reads gold.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float

from llmlabel.data import require_columns
from llmlabel.engine import Engine
from llmlabel.labelspace import LabelSpace
from llmlabel.refine.orders import (
    answers_in_order,
    is_whole,
    label_orders,
    order_number,
    order_votes,
    refuse_other_prompt,
    with_order_votes,
)
from llmlabel.softlabels import SoftLabels

CONTENT_FREE = ("N/A", "[MASK]", "")
"""The inputs of Zhao et al. 2021."""

_FEWEST_ROWS = 10
_FLOOR = 1e-12
_ZERO = 1e-60  # below every float32
_MOST_STEPS = 10_000

_LogProbs = Float[np.ndarray, "rows labels"]
_Probs = Float[np.ndarray, "rows labels"]
_Weights = Float[np.ndarray, " labels"]
_Shares = Float[np.ndarray, " labels"]


def batch_calibration(dataset: Dataset, labels: LabelSpace) -> Dataset:
    """Removes the mean log-probability of each label over the rows, then normalises again.

    Zhou et al., "Batch Calibration" (arXiv 2309.17249). It helps where labels are about equally
    frequent in the rows, or at least unrelated to what the source prefers; it needs no gold. A row's
    result depends on the rows it is given with. Where rows have `candidates`, the mean of a label is
    that over the rows that may be answered with it.

    Differs from the paper: the mean is taken of log-probabilities, so the correction does not depend
    on how sharp the source is.

    Args:
        dataset: rows with soft labels; rows without one count for nothing and stay without.
        labels: their label space, single-label.
    """
    allowed = _candidates(dataset, labels)

    def weigh(log_probs: _LogProbs, source: str | None) -> _Weights:
        _refuse_few(log_probs, source)
        if allowed is None:
            return -log_probs.mean(axis=0)
        known = ~np.isnan(log_probs)
        return -np.where(known, log_probs, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)

    return _corrected(dataset, labels, weigh, allowed=allowed)


def content_free_calibration(
    dataset: Dataset,
    engine: Engine,
    labels: LabelSpace,
    *,
    prompt: str | Path = "label/direct",
    demonstrations: Sequence[Mapping[str, str]] = (),
    texts: Sequence[str] = CONTENT_FREE,
    orders: int = 1,
) -> Dataset:
    """Divides by what the model answers to texts that say nothing, then normalises again.

    Zhao et al., "Calibrate Before Use" (arXiv 2102.09690), section 4, with W = diag(p_cf)^-1 and
    b = 0. Differs from the paper: W p is normalised, where the paper takes a softmax of it; the most
    probable label is the same.

    Args:
        dataset: rows with soft labels that `engine` gave with the same prompt and demonstrations.
        engine: who labelled the rows.
        labels: their label space, single-label.
        prompt: the prompt file the rows were labelled with.
        demonstrations: those the rows were labelled with.
        texts: the content-free inputs, whose probabilities are averaged.
        orders: number of label orders that the rows were labelled in, whose answers are averaged.

    Raises:
        ValueError: the rows were labelled with another prompt file, or the model gives no label to
            any of the inputs.
    """
    refuse_other_prompt(dataset, prompt, label_orders(labels, orders))

    @functools.cache
    def answer(number: int) -> _Shares:
        soft = answers_in_order(
            *(texts, engine, labels),
            order=label_orders(labels, number + 1)[number],
            prompt=prompt,
            demonstrations=demonstrations,
        )
        read = np.diff(soft.probs.indptr) > 0
        if not read.any():
            raise ValueError(f"{engine.name} gives no label a probability for {list(texts)[:3]}")
        return np.exp(soft.log_dense()[read]).mean(axis=0)

    def weigh(log_probs: _LogProbs, source: str | None) -> _Weights:
        numbers = range(orders) if source is None else [order_number(source)]
        free = np.mean([answer(number) for number in numbers], axis=0)
        return -np.log(np.maximum(free, _FLOOR))

    return _corrected(dataset, labels, weigh)


def domain_context_calibration(
    dataset: Dataset,
    engine: Engine,
    labels: LabelSpace,
    *,
    prompt: str | Path = "label/direct",
    demonstrations: Sequence[Mapping[str, str]] = (),
    texts: int = 20,
    orders: int = 1,
    seed: int = 0,
) -> Dataset:
    """Divides by what the model answers to random words of the rows' own texts.

    Fei et al., "Mitigating Label Biases for In-context Learning" (arXiv 2305.19148), section 5: the
    domain's words alone may already pull towards a label, which `N/A` does not show. See
    `random_domain_texts` for the inputs and `content_free_calibration` for the other arguments.

    Args:
        dataset: rows with `text` and with soft labels.
        engine: who labelled the rows.
        labels: their label space, single-label.
        prompt: the prompt file the rows were labelled with.
        demonstrations: those the rows were labelled with.
        texts: how many random inputs; 20 in the paper.
        orders: number of label orders that the rows were labelled in.
        seed: of the random words.
    """
    return content_free_calibration(
        *(dataset, engine, labels),
        prompt=prompt,
        demonstrations=demonstrations,
        texts=random_domain_texts(dataset, texts=texts, seed=seed),
        orders=orders,
    )


def random_domain_texts(dataset: Dataset, *, texts: int, seed: int) -> list[str]:
    """Texts of words drawn one by one from all words of the rows, as long as the rows on average.

    Differs from the code of arXiv 2305.19148: words keep their case, no full stop is added, and the
    order of the rows does not matter.
    """
    require_columns(dataset, "text")
    counts = Counter(word for text in dataset["text"] for word in text.split())
    if texts < 1 or not counts:
        raise ValueError(
            f"texts={texts} random texts from {len(counts)} different words: need both"
        )
    words = sorted(counts)
    total = counts.total()
    length = max(1, round(total / sum(bool(text.strip()) for text in dataset["text"])))
    shares = np.array([counts[word] for word in words]) / total
    drawn = np.random.default_rng(seed).choice(len(words), size=(texts, length), p=shares)
    return [" ".join(words[word] for word in row) for row in drawn]


def match_prior(
    dataset: Dataset, labels: LabelSpace, *, prior: Mapping[str, float] | None = None
) -> Dataset:
    """Weighs the labels so that the mean prediction over the rows is `prior`.

    Liusie et al., "Mitigating Word Bias in Zero-shot Prompt-based Classifiers" (arXiv 2309.04992),
    prior matching; see `matching_weights`.

    Args:
        dataset: rows with soft labels; rows without one count for nothing and stay without.
        labels: their label space, single-label.
        prior: the share of each label, by id or name, known from elsewhere or by `estimate_prior`;
            all equal, as in the paper, when left out.
    """
    shares = given_shares(prior, labels, "prior")

    def weigh(log_probs: _LogProbs, source: str | None) -> _Weights:
        _refuse_few(log_probs, source)
        return matching_weights(np.exp(log_probs), shares)

    return _corrected(dataset, labels, weigh, floor=_ZERO)


def shift_prior(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    prior: Mapping[str, float] | None = None,
    source_prior: Mapping[str, float] | None = None,
) -> Dataset:
    """Moves posteriors from the label mix that their source believes in to that of the rows.

    Saerens, Latinne and Decaestecker 2002, "Adjusting the Outputs of a Classifier to New a Priori
    Probabilities" (Neural Computation 14), equation 2.4: p prior / source_prior, normalised. Where
    the mix of the rows is not known, EM estimates it; that is exact for a calibrated source only,
    and a biased one has its bias enlarged, so correct by `domain_context_calibration` first.

    Args:
        dataset: rows with soft labels; rows without one count for nothing and stay without.
        labels: their label space, single-label.
        prior: the share of each label in the rows, by id or name; estimated when left out.
        source_prior: the share of each label in what the source learned from; all equal when left
            out, which is also what a content-free correction leaves.
    """
    old = given_shares(source_prior, labels, "source_prior")
    new = None if prior is None else given_shares(prior, labels, "prior")

    def weigh(log_probs: _LogProbs, source: str | None) -> _Weights:
        shares = new
        if shares is None:
            _refuse_few(log_probs, source)
            shares = em_prior(np.exp(log_probs), old)
        with np.errstate(divide="ignore"):  # a label of share 0 is no answer
            return np.log(shares) - np.log(old)

    return _corrected(dataset, labels, weigh, floor=_ZERO)


def estimate_prior(
    dataset: Dataset, labels: LabelSpace, *, source_prior: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The share of each label, by id, that explains the posteriors best; see `shift_prior`.

    Args:
        dataset: rows with soft labels; rows without one count for nothing.
        labels: their label space, single-label.
        source_prior: the share of each label in what the source learned from; all equal when left
            out.
    """
    soft = _single(dataset, labels)
    log_probs = _log_probs(soft, _ZERO)[np.diff(soft.probs.indptr) > 0]
    _refuse_few(log_probs, None)
    shares = em_prior(np.exp(log_probs), given_shares(source_prior, labels, "source_prior"))
    return dict(zip(labels.ids, shares.tolist(), strict=True))


def matching_weights(probs: _Probs, prior: _Shares) -> _Weights:
    """The log-weight of each label with which the mean of p w / sum(p w) over the rows is `prior`.

    The weights of arXiv 2309.04992, which are unique but for a factor. Each step multiplies a
    weight by prior / mean prediction (proportional fitting); none raises the convex function
    mean(log sum(p w)) - sum(prior log w), whose minimum they are.

    Raises:
        ValueError: the mean prediction is not within 1e-6 of `prior` after 10,000 steps.
    """
    weights = np.ones(len(prior))
    gap = np.inf
    reachable = (probs.any(axis=0) | (prior == 0)).all() and probs[:, prior > 0].any(axis=1).all()
    for _ in range(_MOST_STEPS if reachable else 0):
        mean = weights * (1 / (probs @ weights) @ probs) / len(probs)
        gap = float(np.abs(mean - prior).max())
        # an infinite weight would be needed where one is beyond any ratio of float32 numbers
        if gap < 1e-9 or (weights < 1e-100 * prior).any():
            break
        weights = weights * np.divide(prior, mean, out=np.zeros_like(mean), where=mean > 0)
        weights = weights / weights.max()
    if gap > 1e-6:
        raise ValueError(
            "no weights bring the mean prediction to the prior: too many rows are sure of their "
            "labels; use shift_prior, or soften the labels first"
        )
    with np.errstate(divide="ignore"):  # a label of share 0 is no answer
        return np.log(weights)


def em_prior(probs: _Probs, source_prior: _Shares) -> _Shares:
    """The label mix that maximises the likelihood of the rows, by EM from `source_prior` on.

    Saerens et al. 2002, equation 2.9: the new mix is the mean posterior under the old one. No step
    lowers the mean of log sum(mix p / source_prior). It ends when no share moves by 1e-9.
    """
    likelihood = probs / source_prior
    mix = source_prior
    for _ in range(_MOST_STEPS):
        before, mix = mix, em_step(likelihood, mix)
        if np.abs(mix - before).max() < 1e-9:
            break
    return mix


def em_step(likelihood: _Probs, mix: _Shares) -> _Shares:
    """One step of `em_prior`; `likelihood` may have any factor of its own in each row."""
    mix = mix * (1 / (likelihood @ mix) @ likelihood) / len(likelihood)
    return mix / mix.sum()


def _corrected(
    dataset: Dataset,
    labels: LabelSpace,
    weigh: Callable[[_LogProbs, str | None], _Weights],
    *,
    floor: float = _FLOOR,
    allowed: Bool[np.ndarray, "rows labels"] | None = None,
) -> Dataset:
    """Soft labels and votes of label orders, each with the weights that `weigh` finds for them.

    `weigh` sees the log-probabilities of the rows that have some, NaN where a label is not
    `allowed`, and the source of the votes.
    """

    def weighted(soft: SoftLabels, source: str | None) -> SoftLabels:
        has_label = np.diff(soft.probs.indptr) > 0
        if not has_label.any():
            return soft
        log_probs = _log_probs(soft, floor)
        shown = log_probs if allowed is None else np.where(allowed, log_probs, np.nan)
        log_probs = log_probs + weigh(shown[has_label], source)
        # A label that is not stored stays so, and what it would get is the missing mass.
        spread = SoftLabels.from_scores(log_probs, labels).dense()
        probs = np.where(soft.dense() > 0, spread, 0.0)
        if lost := int((has_label & ~probs.any(axis=1)).sum()):
            raise ValueError(
                f"{lost} rows are sure of labels of share 0; give these a share above 0"
            )
        return SoftLabels.from_dense(probs, labels)

    done = weighted(_single(dataset, labels), None).add_to(dataset)
    votes = order_votes(dataset, labels)
    whole = {name: weighted(one, name) for name, one in votes.items() if is_whole(one)}
    return with_order_votes(done, whole)


def _candidates(dataset: Dataset, labels: LabelSpace) -> Bool[np.ndarray, "rows labels"] | None:
    """Whether each row may be answered with each label; None where all rows may with all."""
    if "candidates" not in dataset.column_names:
        return None
    require_columns(dataset, "candidates")
    allowed = np.ones((len(dataset), len(labels)), dtype=bool)
    for row, some in enumerate(dataset["candidates"][:]):
        if some is not None:
            allowed[row] = np.isin(np.arange(len(labels)), some)
    return allowed


def _log_probs(soft: SoftLabels, floor: float) -> _LogProbs:
    log_probs = soft.log_dense(floor=floor)
    return np.where(log_probs > np.log(_ZERO), log_probs, -np.inf)


def _single(dataset: Dataset, labels: LabelSpace) -> SoftLabels:
    if labels.multilabel:
        raise ValueError(
            "bias correction compares labels that exclude each other; in a multi-label space use the "
            "labels as they are (in recipes/label.yaml: labeled='${raw}')"
        )
    return SoftLabels.from_dataset(dataset, labels)


def _refuse_few(log_probs: _LogProbs, source: str | None) -> None:
    rows, labels = log_probs.shape
    if rows < (needed := max(_FEWEST_ROWS, labels)):
        what = "a soft label" if source is None else f"votes of {source!r}"
        raise ValueError(
            f"only {rows} rows have {what}, and their mean says nothing below {needed}; give more "
            "rows, or use the labels as they are"
        )


def given_shares(given: Mapping[str, float] | None, labels: LabelSpace, name: str) -> _Shares:
    """Shares of the labels, in their order, from a mapping of ids or names; equal ones for None."""
    if given is None:
        return np.full(len(labels), 1 / len(labels))
    shares = np.full(len(labels), np.nan)
    for label, share in given.items():
        shares[labels.index(label)] = share
    if (missing := np.flatnonzero(np.isnan(shares))).size:
        raise ValueError(f"{name} has no share for the label {labels.ids[missing[0]]!r}; give all")
    least = np.nextafter(0, 1) if name == "source_prior" else 0
    if not (shares >= least).all() or not abs(shares.sum() - 1) < 1e-3:
        raise ValueError(
            f"{name} must be shares that sum to 1, {'above' if least else 'none below'} 0; got "
            f"{dict(given)}, which sum to {shares.sum():.6g}"
        )
    return shares / shares.sum()
