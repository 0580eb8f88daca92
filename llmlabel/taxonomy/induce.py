"""TnT-LLM, phase 1: a language model reads texts in minibatches and proposes a label space."""

import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Value

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns, with_columns
from llmlabel.engine import Engine
from llmlabel.files import lock
from llmlabel.label.direct import label_direct
from llmlabel.label.embedding import Encoder, label_embedding, unit_vectors
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import prompt_sha, render
from llmlabel.refine.debias import batch_calibration
from llmlabel.softlabels import SoftLabels
from llmlabel.taxonomy.calls import Asker
from llmlabel.taxonomy.guardrails import Limits, Proposal, TaxonomyError, first_words, scripts_of
from llmlabel.taxonomy.quality import information
from llmlabel.taxonomy.replies import read_summary, summary_schema
from llmlabel.taxonomy.rounds import Group, Level, Settings

_SCALE = 20.0  # as label_embedding's
_FEWEST_ROWS = 10  # as in llmlabel.refine.debias


@dataclass(frozen=True)
class Taxonomy:
    """Labels that were found in texts, and how.

    Attributes:
        labels: a flat space, or a tree.
        history: one entry per round, in order: `run`, `level`, `parent` (id, null at the roots),
            `step` (generate, update, review, select, name), `batch`, `score` (0 to 100, of the
            labels before the round; of `select`, the probability of the chosen run), `suggestions`,
            `explanation`, `labels` (names after the round), `added`, `removed`, `attempts`,
            `problem` (what was refused last) and `notes`.
    """

    labels: LabelSpace
    history: list[dict[str, Any]]


def labels_of(taxonomy: Taxonomy) -> LabelSpace:
    """The labels of a taxonomy."""
    return taxonomy.labels


def with_other(labels: LabelSpace, *, name: str = "other") -> LabelSpace:
    """The labels and one more for texts that none of them fits.

    TnT-LLM leaves it out of the taxonomy and offers it when texts are labelled.

    Raises:
        ValueError: a label has that id or name already.
    """
    if name in labels.ids or name.casefold() in map(str.casefold, labels.names):
        raise ValueError(f"there is a label {name!r} already; give with_other another name=")
    return LabelSpace(
        ids=(*labels.ids, name),
        names=(*labels.names, name),
        descriptions=(*labels.descriptions, "none of the other labels fits"),
        parents=(*labels.parents, ()),
        multilabel=labels.multilabel,
    )


def summarise(
    dataset: Dataset,
    engine: Engine,
    *,
    use_case: str,
    words: int = 20,
    block_rows: int = 64,
    seed: int = 0,
    output: Path | None = None,
) -> Dataset:
    """Adds `summary`: what each text is about in at most `words` words.

    The first step of TnT-LLM (Wan et al., arXiv 2403.12173). One call a text, but up to five more,
    each 0.1 warmer, while the reply is empty, too long or in another script. A text that stays
    unread has no summary and an `error`; `induce` takes its first words instead and says so. Texts
    of a few words need no summary: leave the step out.

    Differs from the paper: no explanation is asked for, since nobody reads it.

    Args:
        dataset: rows with `id` and `text`.
        engine: who writes.
        use_case: what the taxonomy is for, in a few words.
        words: length of a summary, as 8 characters a word.
        block_rows: rows committed at a time.
        seed: of the sampling.
        output: folder that keeps finished blocks; the same call continues there.
    """
    require_columns(dataset, "id", "text")
    if words < 1:
        raise ValueError(f"words must be at least 1; got {words}")
    asker = Asker(engine, seed)
    schema = summary_schema(words)

    def compute(block: Dataset) -> Dataset:
        texts = block["text"][:]
        readable = [row for row, text in enumerate(texts) if text.strip()]
        answers = asker.ask(
            "summarise",
            [
                render(
                    "taxonomy/summarise",
                    text=texts[row],
                    labels=(),
                    use_case=use_case,
                    words=str(words),
                )
                for row in readable
            ],
            lambda number, reply: read_summary(
                reply, words=words, scripts=scripts_of([texts[readable[number]]])
            ),
            schema=schema,
        )
        summaries: list[str | None] = [None] * len(block)
        errors: list[str | None] = ["empty text"] * len(block)
        for row, answer in zip(readable, answers, strict=True):
            summaries[row] = answer.value
            errors[row] = answer.problem or answer.cut
        return with_columns(
            block, {"summary": (summaries, Value("string")), "error": (errors, Value("string"))}
        )

    return map_blocks(
        dataset,
        compute,
        columns=("summary", "error"),
        key={
            "engine": engine.name,
            "prompt": prompt_sha("taxonomy/summarise"),
            "use_case": use_case,
            "words": words,
            "seed": seed,
        },
        block_rows=block_rows,
        output=output,
        name="summarise",
    )


def induce(  # noqa: PLR0913 - each knob of a run is an override of a recipe
    dataset: Dataset,
    engine: Engine,
    *,
    use_case: str,
    max_labels: int | list[int] = 25,
    levels: int = 1,
    min_texts: int = 50,
    batch_rows: int = 200,
    runs: int = 1,
    words: int = 20,
    name_words: int = 10,
    description_words: int = 30,
    remark_words: int = 30,
    encoder: str | Path | Encoder | None = None,
    start: LabelSpace | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> Taxonomy:
    """Finds the labels of texts by reading them in minibatches.

    TnT-LLM, phase 1 (Wan et al., arXiv 2403.12173): labels are generated from the first minibatch,
    rated and updated with every further one, and reviewed without texts at the end: N texts in
    batches of B are ceil(N / B) + 1 calls. With `runs`, the texts are shuffled as many times; a
    fifth of them, at most a batch, is held out, and of the runs' last labels those stay that the
    model finds most probably the best for these. An `encoder` chooses among the labels of all rounds
    instead: those that tell it most about a text (see `llmlabel.taxonomy.quality.information`). With `levels`, texts are assigned to the labels found, and
    every label with `min_texts` texts is divided in the same way.

    Replies are held to a JSON schema where the engine can do that; else JSON, a Markdown table and
    a list of `name: description` are read. A reply is refused that cannot be read, has too many
    labels, a name twice or of a label above, texts that are too long, a name for what is left over,
    the format example, or the letters of another script (see `llmlabel.taxonomy.guardrails`). It is
    asked for again up to five times, each 0.1 warmer and with another seed. When all fail: repeated
    names are taken once, where nothing else was wrong; else an update or a review leaves the labels
    as they were, a run without labels drops out, and a label whose texts gave none stays a leaf.

    Differs from the paper, of which an account of the appendix is known to us: no top_p, which an
    engine has not; a run is judged at its end and not every few updates, and by the probability of
    its position, averaged over all rotations; a last batch is filled with texts that are not in it.

    Args:
        dataset: rows with `id` and `text`; `summary`, where it is there, is read instead of `text`.
        engine: who proposes.
        use_case: what the labels are for, in a few words.
        max_labels: at most so many labels, or children of a label; several numbers are by level.
        levels: depth of the taxonomy.
        min_texts: a label with fewer texts is not divided.
        batch_rows: texts shown in a call.
        runs: how often to begin anew.
        words: every text is shown up to so many words; fewer let more texts fit into the prompt.
        name_words: length of a name, as 8 characters a word, like the next two.
        description_words: length of a description.
        remark_words: length of explanations and suggestions.
        encoder: who chooses among the labels of all rounds, where there are several runs, and
            assigns texts to labels between two levels; the engine when it is not given.
        start: labels to begin with, for example those of `llmlabel.taxonomy.cluster`: no labels are
            generated, and all batches update these.
        seed: of shuffling and sampling.
        output: folder that keeps every call as soon as it is answered; the same call continues there.

    Raises:
        TaxonomyError: no run found labels.
        ValueError: a setting is impossible, or no row has a text.
    """
    limits = _limits_by_level(max_labels, levels, name_words, description_words)
    least = {"min_texts": min_texts, "batch_rows": batch_rows, "runs": runs, "words": words}
    for name, value in {**least, "remark_words": remark_words}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if start is not None and len(start) > limits[0][0]:
        raise ValueError(f"start has {len(start)} labels, and max_labels is {limits[0][0]}")
    settings = Settings(
        use_case, batch_rows, runs, words, name_words, description_words, remark_words, seed
    )
    texts = _shown(dataset, words)
    with nullcontext() if output is None else lock(output):
        asker = Asker(engine, seed, output)
        ready = models.load_encoder(encoder)
        first = None if start is None else Proposal(start.names, start.descriptions)
        return _Growth(asker, settings, texts, min_texts, ready, first).grow(limits)


def _limits_by_level(
    max_labels: int | Sequence[int], levels: int, name_words: int, description_words: int
) -> list[tuple[int, int, int]]:
    if levels < 1:
        raise ValueError(f"levels must be at least 1; got {levels}")
    most = [max_labels] * levels if isinstance(max_labels, int) else list(max_labels)
    if len(most) != levels:
        raise ValueError(f"max_labels={most} needs one number for each of levels={levels}")
    if min(most) < 2:
        raise ValueError(
            f"max_labels must be at least 2, else there is no choice; got {max_labels}"
        )
    if min(name_words, description_words) < 1:
        raise ValueError(
            f"name_words and description_words must be at least 1; got {name_words} and "
            f"{description_words}"
        )
    return [(count, name_words, description_words) for count in most]


# ------------------------------------------------------------------------------- level by level


@dataclass(frozen=True)
class _Texts:
    """What is shown of the rows that have anything to show, in the order of their ids."""

    ids: list[str]
    shown: list[str]
    unsummarised: frozenset[int]


def _shown(dataset: Dataset, words: int) -> _Texts:
    require_columns(dataset, "id", "text")
    summarised = "summary" in dataset.column_names
    summaries = dataset["summary"][:] if summarised else [None] * len(dataset)
    rows = sorted(
        (str(id), summary or text, summarised and not summary)
        for id, text, summary in zip(dataset["id"][:], dataset["text"][:], summaries, strict=True)
    )
    kept = [row for row in rows if row[1].strip()]
    if not kept:
        raise ValueError(f"induce: none of the {len(dataset)} rows has a text")
    return _Texts(
        [id for id, _, _ in kept],
        [first_words(text, words) for _, text, _ in kept],
        frozenset(row for row, (_, _, bare) in enumerate(kept) if bare),
    )


@dataclass
class _Growth:
    """A taxonomy in the making."""

    asker: Asker
    settings: Settings
    texts: _Texts
    min_texts: int
    encoder: Encoder | None
    start: Proposal | None

    def grow(self, limits: Sequence[tuple[int, int, int]]) -> Taxonomy:
        scripts, shown = scripts_of(self.texts.shown), self.texts.shown
        found, history = list[tuple[str, str, str, str | None]](), list[dict[str, Any]]()
        groups = [Group(None, (), list(range(len(shown))))]
        for number, most in enumerate(limits, start=1):
            level = Level(
                self.asker,
                self.settings,
                number,
                Limits(*most, scripts),
                shown,
                self.texts.unsummarised,
                self.start if number == 1 else None,
                None if self.encoder is None else partial(self._fit, most[0]),
            )
            below = list[Group]()
            for place, (group, (proposal, told)) in enumerate(
                zip(groups, level.divide(groups), strict=True)
            ):
                history += told
                if proposal is None:
                    if group.parent is None:
                        raise TaxonomyError(_no_labels(told))
                    continue  # a leaf, and the history tells why
                new = new_ids(proposal.names, group.parent)
                parent = [group.parent] * len(new)
                found += zip(new, proposal.names, proposal.descriptions, parent, strict=True)
                if number < len(limits):
                    rows = self._assigned(group, proposal, f"{number}-{place}")
                    below += [
                        Group(id, (*group.path, name), some)
                        for id, name, some in zip(new, proposal.names, rows, strict=True)
                        if len(some) >= self.min_texts
                    ]
            groups = below
            if not groups:
                break
        ids, names, descriptions, parents = zip(*found, strict=True)
        above = tuple(() if parent is None else (parent,) for parent in parents)
        return Taxonomy(LabelSpace(ids, names, descriptions, above), history)

    def _fit(self, most: int, proposals: Sequence[Proposal], texts: Sequence[str]) -> list[float]:
        """How much labels tell the encoder about the texts, of what `most` labels could."""
        assert self.encoder is not None
        vectors, fits = unit_vectors(self.encoder, texts), []
        for proposal in proposals:
            logits = _SCALE * vectors @ unit_vectors(self.encoder, _space(proposal).texts()).T
            probs = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
            fits.append(information(probs) / math.log(most))
        return fits

    def _assigned(self, group: Group, proposal: Proposal, name: str) -> list[list[int]]:
        """The rows of each label."""
        labels = _space(proposal)
        rows = Dataset.from_dict(
            {
                "id": [self.texts.ids[row] for row in group.rows],
                "text": [self.texts.shown[row] for row in group.rows],
            }
        )
        output = None if self.asker.output is None else self.asker.output / "assigned" / name
        if self.encoder is None:
            labelled = label_direct(rows, self.asker.engine, labels, output=output)
            if sum(map(bool, labelled["label_ids"][:])) >= max(_FEWEST_ROWS, 2 * len(labels)):
                labelled = batch_calibration(labelled, labels)
        else:
            labelled = label_embedding(rows, self.encoder, labels, output=output)
        probs = SoftLabels.from_dataset(labelled, labels).dense()
        best = np.where(probs.any(axis=1), probs.argmax(axis=1), -1)
        return [
            [group.rows[i] for i in np.flatnonzero(best == label)] for label in range(len(labels))
        ]


def _space(proposal: Proposal) -> LabelSpace:
    names = proposal.names
    return LabelSpace(names, names, proposal.descriptions, ((),) * len(names))


def _no_labels(history: Sequence[dict[str, Any]]) -> str:
    failures = [note for entry in history for note in entry["notes"] if "gave no labels" in note]
    more = f" (so did {len(failures) - 1} more runs)" if len(failures) > 1 else ""
    return (
        f"induce: {failures[0]}{more}; lower max_labels or batch_rows, allow more words, or take a "
        "larger model"
    )


def new_ids(names: Sequence[str], parent: str | None) -> list[str]:
    """One id a name, readable and unique: `billing`, and below it `billing/refunds`."""
    ids: list[str] = []
    for name in names:
        slug = "-".join(re.findall(r"\w+", name.casefold())) or "label"
        id = slug if parent is None else f"{parent}/{slug}"
        twins = sum(
            one == id or re.fullmatch(rf"{re.escape(id)}~\d+", one) is not None for one in ids
        )
        ids.append(f"{id}~{twins + 1}" if twins else id)
    return ids
