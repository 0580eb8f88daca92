"""A prompt and soft labels that a language model learns from its own answers, without any gold.

The model is a black box: it is asked for probabilities of labels (`score`) and for texts
(`generate`), nothing else.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from jaxtyping import Float

from llmlabel import metrics
from llmlabel.data import plain_words, require_columns, with_columns
from llmlabel.engine import Engine
from llmlabel.files import arrow_table, lock, write_text
from llmlabel.label.demonstrations import choose_demonstrations, own_demonstrations
from llmlabel.label.promptsearch import agreement
from llmlabel.label.promptsteps import Optimiser, Plan, Round, Settings, begin, learn, step_calls
from llmlabel.label.trials import Shown, Trials, centred, common
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import prompt_sha
from llmlabel.refine.aggregate import aggregate
from llmlabel.refine.orders import label_orders
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels

_MOST_BATCH = 32
_CHECK_ROWS = 40
_ORDER_ROWS = 50
_FEWEST_ROWS = 10  # as in llmlabel.refine.debias


def label_selftrain(  # noqa: PLR0913 - each knob of a training is an override of a recipe
    dataset: Dataset,
    engine: Engine,
    labels: LabelSpace,
    *,
    optimiser: Optimiser = "reinforce",
    prompt: str | Path = "label/selftrain",
    length: int = 10,
    search_space: int = 50,
    samples: int = 20,
    batch_rows: int = 8,
    learning_rate: float = 0.5,
    budget_calls: int = 8000,
    demonstrations: int = 8,
    demonstrations_in_training: bool = True,
    reliable: float = 0.2,
    rounds: int = 2,
    seed: int = 0,
    block_rows: int = 256,
    output: Path | None = None,
) -> Dataset:
    """Adds pseudo-labels that are learned together with a prompt, from unlabelled rows alone.

    Zhang et al., arXiv 2410.03124. The model labels all rows with the manual prompt. Each round then
    takes demonstrations from the rows it is surest of (see `reliable_rows`), learns a prompt whose
    answers, with these demonstrations in the context, have a low cross-entropy against the
    pseudo-labels, and labels all rows anew with that prompt and the demonstrations. Pseudo-labels
    are the mean log-probabilities over all times the rows were labelled. The two versions of the
    paper learn different prompts:

    - `reinforce` (version 1): a word at each of `length` positions, from a categorical distribution
      over the texts' own n-grams (see `llmlabel.label.promptsearch`). A step draws `samples`
      prompts, tries them on the same rows and moves the distributions along the gradient that is
      estimated from their losses; the most probable words make the prompt. `bdpl` is the same with
      the estimator of BDPL's code.
    - `textual` (version 2, PAPO): an instruction. A step lets the model criticise it in view of the
      worst rows and rewrite it `samples` times; the rewrite of least loss stays if it beats it.

    The model prefers some labels whatever the text says. That is taken out before rows are ranked,
    in the loss and in the result (see `llmlabel.refine.debias.batch_calibration`), if answers in two
    label orders agree more without it than with it, beyond chance: no gold decides.

    Differs from the paper, of which the abstracts and the code of BDPL are known to us: the rule for
    reliable rows, the label preferences, the mean over rounds; a plain projected gradient step, since
    the weight decay of AdamW would act on probabilities; and a prompt is dropped again at the end of
    a round if its loss on rows drawn anew is not below that of the prompt before.

    A row is never its own demonstration. A text without a character to read gets no label and an
    `error`. With `output`, answers are kept as soon as they are there and the same call continues
    with the same result; `selftrain.json` in it tells the prompt, the demonstrations, the word
    probabilities, the reliable rows, and the loss by calls.

    Args:
        dataset: rows with `id` and `text`.
        engine: who labels, and for `textual` writes.
        labels: what may be answered, single-label.
        optimiser: how the prompt is learned.
        prompt: a prompt file or a shipped name; it shows `words` and `instruction` where given.
        length: positions of the prompt.
        search_space: n-grams that a position may have.
        samples: prompts that are tried in a step.
        batch_rows: rows that each is tried on; more where there are more labels, up to 32.
        learning_rate: of the word probabilities.
        budget_calls: most chats that the engine is given in all, to score or to answer.
        demonstrations: texts shown before every text.
        demonstrations_in_training: whether they are also shown while the prompt is learned, which
            is the point of the paper.
        reliable: share of the rows that demonstrations are taken from.
        rounds: how often reliable rows, prompt and pseudo-labels are renewed.
        seed: of all that is drawn.
        block_rows: rows committed at a time when all are labelled.
        output: folder that keeps answers; the same call continues there.

    Raises:
        ValueError: the space is multi-label, no row has a text, no n-gram is frequent, or
            `budget_calls` is too small to label the rows and take a step in every round.
    """
    settings = Settings(
        *(optimiser, length, search_space, samples, batch_rows, learning_rate, budget_calls),
        *(demonstrations, demonstrations_in_training, reliable, rounds, seed),
    )
    _check(settings, labels)
    require_columns(dataset, "id", "text")
    ids = [str(id) for id in dataset["id"][:]]
    order = sorted(range(len(ids)), key=ids.__getitem__)  # nothing depends on the order of rows
    rows = dataset.select_columns(["id", "text"]).select(order)
    trials = Trials(engine, labels, prompt, rows, asdict(settings), block_rows, output)
    with nullcontext() if output is None else lock(output):
        labelled = _train(trials, settings)
    found = arrow_table(labelled.select_columns(list(LABEL_COLUMNS)).select(np.argsort(order)))
    return with_columns(
        dataset, {name: (found[name], labelled.features[name]) for name in LABEL_COLUMNS}
    )


def reliable_rows(
    probs: Float[np.ndarray, "rows labels"], ids: Sequence[str], *, share: float
) -> list[int]:
    """The most probable `share` of the rows, no label with more than its even part of them.

    Equally probable rows are taken by id; rows of zeros, which nobody could read, are none.
    """
    best, confidence = probs.argmax(axis=1), probs.max(axis=1)
    most = math.ceil(share * (confidence > 0).sum() / probs.shape[1] - 1e-9)
    taken: list[int] = []
    for label in range(probs.shape[1]):
        mine = np.flatnonzero((best == label) & (confidence > 0)).tolist()
        taken += sorted(mine, key=lambda row: (-confidence[row], ids[row]))[:most]
    return sorted(taken)


# ------------------------------------------------------------------------------------- the rounds


def _train(trials: Trials, settings: Settings) -> Dataset:
    plan, search = _plan(trials, settings), begin(trials, settings)
    nothing: Shown = [[]] * len(trials.rows)
    manual = trials.label_all({}, nothing, name="round-0")
    if not any(manual["label_ids"][:]):
        raise ValueError(
            f"label_selftrain: {trials.engine.name} gives no label a probability for any of "
            f"{len(trials.readable)} texts, so there is nothing to learn from"
        )
    preference = _label_preference(trials, manual, nothing, plan.orders, settings.seed)
    trials.corrects = preference["agreement without"] > preference["agreement with"]
    found, notes = {"manual": trials.corrected(manual)}, []
    for number in range(1, settings.rounds + 1):
        belief = aggregate(found, trials.labels)
        probs = SoftLabels.from_dataset(belief, trials.labels).dense()
        chosen = reliable_rows(probs, trials.ids, share=settings.reliable)
        shown = _demonstrations(trials, belief.select(chosen), settings, number)
        left = settings.rounds - number + 1
        spare = settings.budget_calls - trials.calls - left * len(trials.readable)
        part = Round(
            number,
            shown if settings.demonstrations_in_training else nothing,
            metrics.predicted(probs),
            trials.calls + spare // left,
        )
        checked = learn(trials, settings, plan, search, part)
        now = trials.label_all(search.learned, shown, name=f"round-{number}")
        found[f"round {number}"] = trials.corrected(now)
        notes.append(
            {
                **checked,
                "learned": search.learned,
                "demonstrations": common(shown),
                "reliable": {trials.ids[i]: trials.labels.ids[probs[i].argmax()] for i in chosen},
            }
        )
    if trials.output is not None:
        report = {
            "optimiser": settings.optimiser,
            "calls": trials.calls,
            "label preference": {**preference, "taken out": trials.corrects},
            "rounds": notes,
            "history": search.history,
            "vocabulary": search.vocabulary,
            "word probabilities": search.probs.tolist(),
        }
        write_text(
            trials.output / "selftrain.json", json.dumps(report, ensure_ascii=False, indent=1)
        )
    return _result(trials, found, now, notes)


def _plan(trials: Trials, settings: Settings) -> Plan:
    """Raises a ValueError when the budget does not suffice for one step in every round."""
    rows, labels = len(trials.readable), len(trials.labels)
    if not rows:
        raise ValueError(f"label_selftrain: none of the {len(trials.texts)} rows has a text")
    plan = Plan(
        min(max(settings.batch_rows, min(2 * labels, _MOST_BATCH)), rows),
        min(_CHECK_ROWS, rows),
        min(max(_ORDER_ROWS, 2 * labels), rows),
    )
    each = step_calls(settings, plan) + 2 * plan.check + rows
    if (needed := rows + plan.orders + settings.rounds * each) > settings.budget_calls:
        raise ValueError(
            f"budget_calls={settings.budget_calls} is too small: with {rows} rows and "
            f"rounds={settings.rounds} at least {needed} are needed; raise it, or lower rounds, "
            "samples or batch_rows"
        )
    return plan


def _label_preference(
    trials: Trials, manual: Dataset, nothing: Shown, rows: int, seed: int
) -> dict[str, float]:
    """Agreement of two label orders on some rows, with the model's label preference and without.

    Where rows are too few to tell, both are 0.
    """
    if rows < max(_FEWEST_ROWS, 2 * len(trials.labels)):
        return {"agreement with": 0.0, "agreement without": 0.0}
    some = np.sort(np.random.default_rng([seed, 0]).permutation(trials.readable)[:rows]).tolist()
    order = label_orders(trials.labels, 2)[1]

    def ask() -> dict[str, Any]:
        answers = trials.answers(trials.chats(some, {}, nothing, order=order))
        return {"calls": len(some), "log_probs": answers.tolist()}

    other = np.array(trials.once("orders", ask)["log_probs"])
    own = SoftLabels.from_dataset(manual, trials.labels).log_dense()[some]
    return {
        "agreement with": agreement(own.argmax(axis=1), other.argmax(axis=1)),
        "agreement without": agreement(centred(own).argmax(axis=1), centred(other).argmax(axis=1)),
    }


def _demonstrations(trials: Trials, pool: Dataset, settings: Settings, number: int) -> Shown:
    different = {plain_words(text) or text.strip() for text in pool["text"][:]}
    most = min(settings.demonstrations, len(different))
    if not most:
        return [[]] * len(trials.rows)
    chosen = choose_demonstrations(
        *(trials.rows, pool, trials.labels),
        n=most,
        method="fixed",
        answers="soft",
        seed=settings.seed + number,
    )
    return own_demonstrations(chosen, trials.labels) or []


def _result(
    trials: Trials, found: dict[str, Dataset], last: Dataset, notes: list[dict[str, Any]]
) -> Dataset:
    """The mean of all times the rows were labelled; mass and errors are of the last time."""
    soft = SoftLabels.from_dataset(aggregate(found, trials.labels), trials.labels)
    learned = [[note["learned"], note["demonstrations"]] for note in notes]
    content = json.dumps([prompt_sha(trials.prompt), learned])
    sha = hashlib.sha256(content.encode()).hexdigest()[:16]
    return with_columns(
        soft.add_to(last), {"prompt_sha": (pa.repeat(sha, len(last)), Value("string"))}
    )


def _check(settings: Settings, labels: LabelSpace) -> None:
    if labels.multilabel:
        raise ValueError(
            "label_selftrain needs labels that exclude each other; in a multi-label space use "
            "llmlabel.label.direct.label_direct"
        )
    least = {"length": 1, "search_space": 2, "samples": 2, "batch_rows": 1, "rounds": 1}
    if settings.optimiser == "textual":
        least["samples"] = 1  # no gradient is estimated from them
    for name, value in {**least, "demonstrations": 0}.items():
        if (given := getattr(settings, name)) < value:
            raise ValueError(f"{name} must be at least {value}; got {given}")
    if not 0 < settings.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be above 0; got {settings.learning_rate}")
    if not 0 < settings.reliable <= 1:
        raise ValueError(f"reliable must be above 0 and at most 1; got {settings.reliable}")
