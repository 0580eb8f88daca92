"""The rounds of TnT-LLM at one level: minibatches, what is asked of them, and who answers.

What several runs, and the parents of a level, ask in the same round goes to the engine together.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from llmlabel import progress
from llmlabel.engine import Reply
from llmlabel.prompt import Chat, render
from llmlabel.taxonomy.calls import Answer, Asker
from llmlabel.taxonomy.guardrails import Limits, Proposal
from llmlabel.taxonomy.replies import labels_schema, read_labels, reply_tokens

_log = logging.getLogger(__name__)

# --------------------------------------------------------------------------------- minibatches


def generator(*parts: Any) -> np.random.Generator:
    """Random numbers that depend on these values only."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def minibatches(rows: Sequence[int], size: int, rng: np.random.Generator) -> list[list[int]]:
    """Random batches of `size` rows, every row in one of them.

    A short last batch is filled with rows drawn from all others; fewer rows than `size` are one
    short batch.
    """
    order = rng.permutation(np.asarray(rows, dtype=np.int64)).tolist()
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    if len(batches) > 1 and (lacking := size - len(batches[-1])):
        others = order[: -len(batches[-1])]
        batches[-1] += rng.choice(others, lacking, replace=False).tolist()
    return batches


# -------------------------------------------------------------------------------------- rounds


@dataclass(frozen=True)
class Settings:
    """The arguments of `llmlabel.taxonomy.induce.induce` that prompts and batches depend on."""

    use_case: str
    batch_rows: int
    runs: int
    words: int
    name_words: int
    description_words: int
    remark_words: int
    seed: int


@dataclass(frozen=True)
class Group:
    """What is divided: all texts, or those of one label."""

    parent: str | None
    """Its id."""
    path: tuple[str, ...]
    """Names from the root down to it."""
    rows: list[int]


@dataclass
class Run:
    """One way through the minibatches of a group."""

    group: Group
    number: int
    batches: list[list[int]]
    proposal: Proposal | None = None
    failure: str | None = None
    seen: list[Proposal] = field(default_factory=list)
    """Every one of its proposals, in order."""
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Level:
    """A level of the taxonomy in work.

    Attributes:
        number: from 1.
        limits: what its labels have to keep to.
        texts: what is shown of each row.
        unsummarised: rows without a summary among those that have one.
        start: labels to begin with, instead of generating some.
        fit: how well each of several proposals fits texts, from 0 to 1; the engine chooses among runs where it is None.
    """

    asker: Asker
    settings: Settings
    number: int
    limits: Limits
    texts: Sequence[str]
    unsummarised: frozenset[int] = frozenset()
    start: Proposal | None = None
    fit: Callable[[Sequence[Proposal], Sequence[str]], list[float]] | None = None

    def divide(self, groups: Sequence[Group]) -> list[tuple[Proposal | None, list[dict[str, Any]]]]:
        """The labels of each group, None where no run found any, and what happened."""
        parts = [self._parts(group) for group in groups]
        runs = [run for _, some in parts for run in some]
        total = sum(len(run.batches) + 1 for run in runs)
        longest = reply_tokens(self._schema("update"))  # a small computer is silent for minutes
        _log.info(
            "induce level %d: %d calls, replies of up to %d tokens", self.number, total, longest
        )
        with progress.task(f"induce level {self.number}", total=total, unit="calls") as advance:
            for batch in range(max(len(run.batches) for run in runs)):
                now = [run for run in runs if batch < len(run.batches)]
                self._round("update" if batch or self.start else "generate", now, batch)
                advance(len(now))
            self._round("review", runs, None)
            advance(len(runs))
        return [
            self._best([run for run in some if run.proposal is not None], some, held_out, number)
            for number, (held_out, some) in enumerate(parts)
        ]

    def _best(
        self, finished: list[Run], runs: Sequence[Run], held_out: Sequence[int], number: int
    ) -> tuple[Proposal | None, list[dict[str, Any]]]:
        history = [entry for run in runs for entry in run.history]
        if len(runs) == 1 or not finished or (self.fit is None and len(finished) == 1):
            return finished[0].proposal if finished else None, history
        if self.fit is None:
            best, entry = self._select(finished, held_out, number)
        else:
            best, entry = self._fittest(finished, held_out)
        return best, [*history, entry]

    def _parts(self, group: Group) -> tuple[list[int], list[Run]]:
        """Rows that no run sees, to choose among runs, and the runs."""
        seed, size = self.settings.seed, self.settings.batch_rows
        rows, held_out = group.rows, list[int]()
        if self.settings.runs > 1:
            order = generator(seed, group.parent, "held out").permutation(rows).tolist()
            share = min(size, len(order) // 5)
            held_out = order[:share] or order  # too few to spare some
            rows = order[share:]
        return held_out, [
            Run(
                group,
                number,
                minibatches(rows, size, generator(seed, group.parent, number)),
                self.start,
                seen=[self.start] if self.start else [],
            )
            for number in range(self.settings.runs)
        ]

    def _round(
        self, step: Literal["generate", "update", "review"], runs: Sequence[Run], batch: int | None
    ) -> None:
        """One step of the runs that are still alive."""
        runs = [run for run in runs if run.failure is None]
        if not runs:
            return
        limits = [self._limits(run.group) for run in runs]
        answers = self.asker.ask(
            step,
            [self._chat(step, run, batch) for run in runs],
            lambda number, text: read_labels(text, limits[number]),
            schema=self._schema(step),
            name=f"{self.number}-{step}" + ("" if batch is None else f"-{batch}"),
        )
        for run, answer in zip(runs, answers, strict=True):
            if step == "review" and answer.cut:  # some of the labels were not read
                answer = replace(answer, value=None, problem=answer.cut)
            before = run.proposal
            run.proposal = answer.value or before
            if run.proposal is None:
                run.failure = (
                    f"{step} on batch {batch} of run {run.number} gave no labels in "
                    f"{answer.attempts} attempts: {answer.problem}; the last reply began "
                    f"{answer.reply.text[:80]!r}"
                )
            if answer.value:
                run.seen.append(answer.value)
            run.history.append(self._entry(run, step, batch, answer, before))

    def _schema(self, step: str) -> dict[str, Any]:
        return labels_schema(
            self.limits, rated=step != "generate", words=self.settings.remark_words
        )

    def _limits(self, group: Group) -> Limits:
        return replace(self.limits, taken=group.path)

    def _chat(self, step: str, run: Run, batch: int | None) -> Chat:
        settings, table = self.settings, "" if run.proposal is None else run.proposal.table()
        text = table if batch is None else self._lines(run.batches[batch])
        return render(
            f"taxonomy/{step}",
            text=text,
            labels=(),
            use_case=settings.use_case,
            parent=" > ".join(run.group.path),
            max_labels=str(self.limits.max_labels),
            name_words=str(settings.name_words),
            description_words=str(settings.description_words),
            remark_words=str(settings.remark_words),
            table=table,
        )

    def _lines(self, rows: Sequence[int]) -> str:
        return "\n".join(f"- {self.texts[row]}" for row in rows)

    def _entry(
        self,
        run: Run,
        step: str,
        batch: int | None,
        answer: Answer[Proposal],
        before: Proposal | None,
    ) -> dict[str, Any]:
        said = answer.value
        old, new = before.names if before else (), run.proposal.names if run.proposal else ()
        notes = [answer.cut] if answer.cut else []
        rows = [] if batch is None else run.batches[batch]
        if bare := len(self.unsummarised.intersection(rows)):
            notes.append(f"{bare} of {len(rows)} texts have no summary: their first words stand in")
        if run.failure:
            notes.append(run.failure)
        return {
            "run": run.number,
            "level": self.number,
            "parent": run.group.parent,
            "step": step,
            "batch": batch,
            "score": said.score if said else None,
            "suggestions": said.suggestions if said else None,
            "explanation": said.explanation if said else None,
            "labels": list(new),
            "added": _without(new, old),
            "removed": _without(old, new),
            "attempts": answer.attempts,
            "problem": answer.problem,
            "notes": notes,
        }

    def _select(
        self, runs: Sequence[Run], held_out: Sequence[int], number: int
    ) -> tuple[Proposal, dict[str, Any]]:
        """The last labels of the run that are most probably the best for the held-out texts."""
        group, count = runs[0].group, len(runs)
        letters = [chr(ord("A") + place) if count <= 26 else str(place) for place in range(count)]
        first = generator(self.settings.seed, group.parent, "positions").permutation(count)
        orders = [np.roll(first, shift) for shift in range(count)]
        tables = [run.proposal.table() for run in runs if run.proposal is not None]
        chats = [
            render(
                "taxonomy/select",
                text=self._lines(held_out),
                labels=letters,
                use_case=self.settings.use_case,
                parent=" > ".join(group.path),
                candidates=[tables[run] for run in order],
            )
            for order in orders
        ]
        said = self.asker.scores(chats, letters, name=f"{self.number}-select-{number}")
        probs = position_free(np.array(said["log_probs"]), np.array(orders))
        best = runs[int(probs.argmax())]
        assert best.proposal is not None
        shares = ", ".join(f"run {run.number}: {p:.3f}" for run, p in zip(runs, probs, strict=True))
        problem = None if probs.any() else "no set got a probability: the first run stays"
        entry = self._choice(best, best.proposal, float(probs.max()), shares, problem)
        entry["notes"] += sorted({error for error in said["errors"] if error})
        return best.proposal, entry

    def _fittest(
        self, runs: Sequence[Run], held_out: Sequence[int]
    ) -> tuple[Proposal, dict[str, Any]]:
        """The labels, of any round of any run, that fit the held-out texts best."""
        assert self.fit is not None
        texts = [self.texts[row] for row in held_out]
        tables = {one.table(): one for run in runs for one in reversed(run.seen)}
        fits = dict(zip(tables, self.fit(list(tables.values()), texts), strict=True))
        seen = [(fits[one.table()], one, run) for run in runs for one in run.seen]
        fit, best, run = max(seen, key=lambda one: one[0])
        said = ", ".join(
            f"run {run.number}: " + " ".join(f"{fits[one.table()]:.3f}" for one in run.seen)
            for run in runs
        )
        return best, self._choice(run, best, fit, said, None)

    def _choice(
        self, run: Run, chosen: Proposal, score: float, said: str, problem: str | None
    ) -> dict[str, Any]:
        before = run.proposal
        run.proposal = chosen
        answer: Answer[Proposal] = Answer(None, 1, problem, Reply("", "stop"))
        entry = self._entry(run, "select", None, answer, before)
        return {**entry, "score": round(100 * score), "explanation": said}


def position_free(
    log_probs: Float[np.ndarray, "orders positions"], orders: Int[np.ndarray, "orders positions"]
) -> Float[np.ndarray, " candidates"]:
    """Probability of each candidate from what was said of positions; zeros where nothing was said.

    The softmax of the mean log-probability. When every candidate stands once at every position, a
    liking for positions that is the same whatever stands there cancels out.

    Args:
        log_probs: of each position in each order.
        orders: the candidate at each position.
    """
    of_candidate = np.empty_like(log_probs)
    np.put_along_axis(of_candidate, orders, log_probs, axis=1)
    mean = of_candidate.mean(axis=0)
    total = np.logaddexp.reduce(mean)
    return np.exp(mean - total) if np.isfinite(total) else np.zeros(len(mean))


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = {name.casefold() for name in others}
    return [name for name in names if name.casefold() not in known]
