"""How a prompt is learned in steps, each of which tries some prompts on the same few rows."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from llmlabel import progress
from llmlabel.label.demonstrations import in_turn
from llmlabel.label.promptsearch import (
    WordProbs,
    bdpl_gradient,
    clip_norm,
    draw,
    pmi_ngrams,
    project_to_simplex,
    reinforce_gradient,
)
from llmlabel.label.trials import Learned, Shown, Targets, Trials, common
from llmlabel.prompt import render

Optimiser = Literal["reinforce", "bdpl", "textual"]

_MOST_NORM = 3.0  # of a gradient, as in BDPL's code
_MISTAKES = 3
_MISTAKE_WORDS = 60
_REPLY_TOKENS = 80


@dataclass(frozen=True)
class Settings:
    """The arguments of `llmlabel.label.selftrain.label_selftrain` of the same names."""

    optimiser: Optimiser
    length: int
    search_space: int
    samples: int
    batch_rows: int
    learning_rate: float
    budget_calls: int
    demonstrations: int
    demonstrations_in_training: bool
    reliable: float
    rounds: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """How many rows a step, the check at the end of a round and the look at label orders take."""

    step: int
    check: int
    orders: int


@dataclass(frozen=True)
class Round:
    """What the prompt of a round is learned with, and the last call that it may cost."""

    number: int
    shown: Shown
    targets: Targets
    last_call: int


@dataclass
class Search:
    """What is known about the prompt so far.

    Attributes:
        vocabulary: The n-grams of the word probabilities; none for an instruction.
        probs: Word probabilities.
        candidate: The best prompt of the steps.
        learned: What rows are labelled with: the last candidate that passed the check of a round.
        history: One entry a step.
    """

    vocabulary: list[str]
    probs: WordProbs
    candidate: Learned = field(default_factory=dict)
    learned: Learned = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def begin(trials: Trials, settings: Settings) -> Search:
    """The manual prompt, and words of equal probability at every position.

    Raises:
        ValueError: no two n-grams are frequent in the texts.
    """
    if settings.optimiser == "textual":
        return Search([], np.zeros((0, 0)))
    vocabulary = pmi_ngrams(trials.texts, most=settings.search_space)
    if len(vocabulary) < 2:
        raise ValueError(
            f"label_selftrain: {len(vocabulary)} n-grams occur 5 times in {len(trials.texts)} texts, "
            "too few to make a prompt of; give more texts, or optimiser='textual'"
        )
    uniform = np.full((settings.length, len(vocabulary)), 1 / len(vocabulary))
    return Search(vocabulary, uniform)


def step_calls(settings: Settings, plan: Plan) -> int:
    """Most calls of a step; for an instruction also a critique, rewrites and the present one."""
    if settings.optimiser == "textual":
        return (settings.samples + 1) * (plan.step + 1)
    return settings.samples * plan.step


def learn(
    trials: Trials, settings: Settings, plan: Plan, search: Search, part: Round
) -> dict[str, Any]:
    """Takes steps as long as calls last, then checks on rows drawn anew whether the prompt is better.

    Returns:
        The candidate, its loss and that of the prompt before on the rows of the check.
    """
    step = _instruction_step if settings.optimiser == "textual" else _word_step
    cost, start = step_calls(settings, plan), trials.calls
    last = part.last_call - 2 * plan.check
    with progress.task(f"label_selftrain round {part.number}", last - start, "calls") as advance:
        number = 0
        while (before := trials.calls) + cost <= last:
            number += 1
            rng = np.random.default_rng([settings.seed, part.number, number])
            rows = _draw_rows(trials, part, plan.step, rng)
            note = step(trials, settings, search, part, rows, number)
            search.history.append(
                {"round": part.number, "step": number, "calls": trials.calls, **note}
            )
            advance(trials.calls - before)
    rng = np.random.default_rng([settings.seed, part.number, 0])
    rows = _draw_rows(trials, part, plan.check, rng)
    both = [search.learned, search.candidate]

    def ask() -> dict[str, Any]:
        losses, _ = trials.losses(both, rows, part.shown, part.targets)
        return {"calls": 2 * len(rows), "losses": losses}

    before_loss, loss = trials.once(f"round-{part.number}-check", ask)["losses"]
    if loss < before_loss:
        search.learned = search.candidate
    return {"candidate": search.candidate, "loss": loss, "loss before": before_loss}


def _draw_rows(trials: Trials, part: Round, count: int, rng: np.random.Generator) -> list[int]:
    """Rows with a pseudo-label, the labels in turn; none that the others are shown, if possible."""
    usual = common(part.shown)
    labelled = [row for row in trials.readable if part.targets[row] >= 0]
    able = [row for row in labelled if part.shown[row] == usual] or labelled
    drawn = in_turn([(int(part.targets[row]),) for row in able], seed=int(rng.integers(2**31)))
    return [able[i] for i in drawn[:count]]


def _word_step(
    trials: Trials,
    settings: Settings,
    search: Search,
    part: Round,
    rows: list[int],
    number: int,
) -> dict[str, Any]:
    rng = np.random.default_rng([settings.seed, part.number, number, 1])
    drawn = draw(search.probs, rng.random((settings.samples, settings.length)))
    prompts = [_words(search.vocabulary, prompt) for prompt in drawn.tolist()]

    def ask() -> dict[str, Any]:
        losses, _ = trials.losses(prompts, rows, part.shown, part.targets)
        return {"calls": len(prompts) * len(rows), "losses": losses}

    losses = np.array(trials.once(f"round-{part.number}-step-{number}", ask)["losses"])
    estimate = bdpl_gradient if settings.optimiser == "bdpl" else reinforce_gradient
    gradient = clip_norm(estimate(search.probs, drawn, losses), most=_MOST_NORM)
    search.probs = project_to_simplex(search.probs - settings.learning_rate * gradient)
    search.candidate = _words(search.vocabulary, search.probs.argmax(axis=1).tolist())
    return {"loss": float(losses.mean()), "least": float(losses.min())}


def _words(vocabulary: list[str], prompt: list[int]) -> Learned:
    return {"words": ", ".join(vocabulary[word] for word in prompt)}


def _instruction_step(
    trials: Trials,
    settings: Settings,
    search: Search,
    part: Round,
    rows: list[int],
    number: int,
) -> dict[str, Any]:
    names = trials.labels.names

    def write(prompt: str, times: int, **values: Any) -> list[str]:
        present = trials.chats(rows[:1], search.candidate, part.shown)[0][0]["content"]
        chat = render(f"label/selftrain_{prompt}", text=present, labels=names, **values)
        replies = trials.engine.generate(
            [chat] * times, max_tokens=_REPLY_TOKENS, temperature=1.0, seed=settings.seed
        )
        return [" ".join(reply.text.split()) for reply in replies if reply.finish_reason == "stop"]

    def ask() -> dict[str, Any]:
        (present,), probs = trials.losses([search.candidate], rows, part.shown, part.targets)
        sure = probs[0][np.arange(len(rows)), part.targets[rows]]
        mistakes = [
            {
                "text": " ".join(trials.texts[rows[i]].split()[:_MISTAKE_WORDS]),
                "given": names[probs[0, i].argmax()],
                "expected": names[part.targets[rows[i]]],
            }
            for i in np.argsort(sure, kind="stable")[:_MISTAKES]
        ]
        critique = next(iter(write("critique", 1, mistakes=mistakes)), "")
        rewrites = write("rewrite", settings.samples, critique=critique)
        tried = [text for text in dict.fromkeys(rewrites) if text]
        prompts = [{"instruction": text} for text in tried]
        losses = trials.losses(prompts, rows, part.shown, part.targets)[0] if tried else []
        return {
            "calls": len(rows) * (1 + len(tried)) + 1 + settings.samples,
            "loss": present,
            "critique": critique,
            "tried": dict(zip(tried, losses, strict=True)),
        }

    said = trials.once(f"round-{part.number}-step-{number}", ask)
    best = min(said["tried"], key=said["tried"].__getitem__, default="")
    if best and said["tried"][best] < said["loss"]:
        search.candidate = {"instruction": best}
    return {key: said[key] for key in ("loss", "critique", "tried")}
