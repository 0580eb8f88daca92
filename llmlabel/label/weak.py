"""Labeling functions: rules that each vote for a label on some rows and are silent on the others.

What they say goes into the column `votes`, one source a function. `llmlabel.refine.aggregate`
makes soft labels of it. A function that can only vote for one label tells nothing to models that
learn confusion matrices from votes alone: take `majority`, or `dawid_skene` with
`abstention='response'`.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, Required, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex
from datasets import Dataset, Value
from datasets.fingerprint import Hasher
from jaxtyping import Float
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # that of Python 3.11 does not fit pydantic

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import gold_matrix, part, require_columns, with_columns
from llmlabel.engine import Engine
from llmlabel.files import arrow_table
from llmlabel.label.embedding import Encoder, encoder_name, unit_vectors
from llmlabel.label.judge import match_probability
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import find_prompt, prompt_sha, render
from llmlabel.refine.votes import read_votes, vote_lists
from llmlabel.softlabels import VOTES

Kind = Literal["regex", "keywords", "similar_to", "question", "function"]

_PROMPT = "label/question"
_NEITHER = "the model answered neither yes nor no"


@with_config(ConfigDict(extra="forbid"))
class LabelingFunction(TypedDict, total=False):
    """One rule: its name in `votes`, exactly one of the five kinds, the label that it votes for."""

    name: Required[str]
    label: str
    """Id or name; only a `function` may do without, which then says the label itself."""
    regex: str
    """Votes where the text holds a match: the syntax of `re`, `(?i)` ignores case."""
    keywords: Sequence[str]
    """Votes where the text holds one of these as whole words, in any case."""
    similar_to: Sequence[str]
    """Votes where the cosine of the text with the nearest of these reaches `threshold`."""
    question: str
    """Votes where a model answers yes with at least the probability `threshold`."""
    function: Callable[..., Any]
    """Gets the text; returns None, whether its `label` holds, a label, or {label: probability}.

    In a recipe, `{call: ...}` makes one of any package that `--allow` names.
    """
    threshold: float
    """Of a similarity or a question, from -1 to 1; 0.5 when left out."""


def label_weak(
    dataset: Dataset,
    functions: Sequence[LabelingFunction],
    labels: LabelSpace,
    *,
    engine: Engine | None = None,
    encoder: str | Path | Encoder | None = None,
    regex_seconds: float = 1.0,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds `votes`: what each labeling function says about each row, by the names of functions.

    A function that abstains has no entry. A vote has the probability 1, unless a question (that of
    yes, given yes or no) or a Python function gives another. A function that fails on a row does
    not vote there, the row's `error` says why, and the others go on. A text without a character to
    read gets no votes and an `error`. A warning names functions that never vote.

    Args:
        dataset: rows with `id` and `text`, without `votes`.
        functions: see `LabelingFunction`. What a Python function calls in turn is not looked at when
            finished blocks are found again: give another `output` when that has changed.
        labels: what may be voted for.
        engine: who answers questions.
        encoder: path, hub name, `package:` source, or anything with `encode`, for similarities.
        regex_seconds: a regular expression that takes longer on a text fails there. It stops those
            that backtrack without end; by the clock, so keep it far above what a match takes.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: a function is not given as it should be, names an unknown label or needs an
            engine or encoder that is not there, or the rows have votes.
    """
    require_columns(dataset, "id", "text")
    if "votes" in dataset.column_names:
        raise ValueError("the rows have the column votes already; take it away first")
    if not regex_seconds > 0:
        raise ValueError(f"regex_seconds must be above 0; got {regex_seconds}")
    rules = _rules(functions, labels, kept=output is not None)
    asks = _needed(rules, "question", "engine", engine)
    embeds = _needed(rules, "similar_to", "encoder", encoder)
    probe = [text for rule in embeds for text in rule.value]
    voted = map_blocks(
        dataset,
        _reader(rules, labels, engine, encoder, regex_seconds),
        columns=("votes", "error"),
        key={
            "labels": labels,
            "functions": {rule.name: rule.told for rule in rules},
            "engine": engine.name if engine is not None and asks else None,
            "prompt": prompt_sha(_PROMPT) if asks else None,
            "encoder": encoder_name(encoder, probe) if encoder is not None and embeds else None,
            "regex_seconds": regex_seconds,
        },
        block_rows=block_rows,
        output=output,
        name="label_weak",
    )
    _warn_of_silent(voted, [rule.name for rule in rules])
    return voted


def measure_functions(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    functions: Sequence[LabelingFunction] = (),
    split: str | None = None,
) -> dict[str, Any]:
    """Coverage, overlap and conflict of each source in `votes`, and accuracy where gold is known.

    As shares of all rows (Ratner et al. 2017, "Snorkel", arXiv 1711.10160, section 2.2): coverage
    is where the source votes, overlap where another one votes too, conflict where another one votes
    for another label. Accuracy is the share of its votes that are right, on rows with gold. A soft
    vote counts for its most probable label; in a multi-label space, where votes for two labels are
    no conflict, for every label with at least 0.5, and conflict is None.

    Args:
        dataset: rows with `votes`; gold serves for measuring only.
        labels: the label space of both.
        functions: listed even where they never vote.
        split: only rows of this part are measured.

    Returns:
        `rows`, `gold_rows`; `coverage`, `overlap` and `conflict` of all sources together;
        `functions`: name -> `labels` (ids that it votes for), `coverage`, `overlap`, `conflict`,
        `gold_votes` (votes on rows with gold) and `accuracy`, None where that is 0.
    """
    rows = dataset if split is None else part(dataset, split=split)
    if not len(rows):
        raise ValueError("measure_functions: there are no rows to measure")
    votes = read_votes(rows, labels)
    if not labels.multilabel:
        votes = votes.hard()
    names = sorted({*votes.names, *(function["name"] for function in functions)})
    place, sure = np.searchsorted(names, votes.names), votes.prob >= 0.5
    row, source, label = votes.row[sure], place[votes.source[sure]], votes.label[sure]
    right, known = np.zeros(len(row), dtype=bool), np.zeros(len(rows), dtype=bool)
    if "gold" in rows.column_names:
        right = gold_matrix(rows, labels)[row, label]
        known = arrow_table(rows.select_columns(["gold"]))["gold"].is_valid().to_numpy()
    on, by = np.unique(np.stack([row, source]), axis=1)  # once, for however many labels
    voters = np.bincount(on, minlength=len(rows))
    said = np.bincount(np.unique(np.stack([row, label]), axis=1)[0], minlength=len(rows))
    several, differ = voters > 1, said > 1

    def shares(coverage: float, overlap: float, conflict: float) -> dict[str, float | None]:
        alone = None if labels.multilabel else float(conflict)
        return {"coverage": float(coverage), "overlap": float(overlap), "conflict": alone}

    groups = (by, by[several[on]], by[differ[on]], source[known[row]], source[known[row] & right])
    *counts, judged, hits = (np.bincount(of, minlength=len(names)) for of in groups)
    ids: list[list[str]] = [[] for _ in names]
    for number, one in np.unique(np.stack([source, label]), axis=1).T:
        ids[number].append(labels.ids[one])
    found = {
        name: {
            "labels": ids[number],
            **shares(*(of[number] / len(rows) for of in counts)),
            "gold_votes": int(judged[number]),
            "accuracy": float(hits[number] / judged[number]) if judged[number] else None,
        }
        for number, name in enumerate(names)
    }
    whole = shares((voters > 0).mean(), several.mean(), differ.mean())
    return {"rows": len(rows), "gold_rows": int(known.sum()), **whole, "functions": found}


# --------------------------------------------------------------------------------- how it is given


@dataclass(frozen=True)
class _Rule:
    name: str
    kind: Kind
    label: Any
    value: Any  # the compiled pattern, the texts, the question, or the callable
    threshold: float
    told: dict[str, Any]  # what tells it from any other


def _rules(functions: Sequence[LabelingFunction], labels: LabelSpace, *, kept: bool) -> list[_Rule]:
    """By name, so that the order in which functions are given does not matter."""
    rules = [_rule(function, labels, kept=kept) for function in functions]
    names = [rule.name for rule in rules]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two labeling functions have the name {twice!r}; rename one")
    return sorted(rules, key=lambda rule: rule.name)


def _rule(given: Mapping[str, Any], labels: LabelSpace, *, kept: bool) -> _Rule:
    name = given.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"a labeling function has no name: {dict(given)}; give it one")
    where, known = f"labeling function {name!r}", LabelingFunction.__annotations__
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{where} has a part {unknown[0]!r}, not one of {', '.join(known)}")
    kinds: list[Kind] = [kind for kind in get_args(Kind) if kind in given]
    if len(kinds) != 1:
        raise ValueError(f"{where} needs one of {', '.join(get_args(Kind))}; it has {kinds}")
    kind = kinds[0]
    if "label" not in given and kind != "function":
        raise ValueError(f"{where} needs a label, the one that it votes for")
    if "threshold" in given and kind not in ("similar_to", "question"):
        raise ValueError(f"{where}: a threshold has no meaning for {kind}; leave it out")
    threshold = given.get("threshold", 0.5)
    if not (isinstance(threshold, int | float | np.floating) and -1 <= threshold <= 1):  # nor NaN
        raise ValueError(f"{where}: threshold must be a number from -1 to 1; got {threshold!r}")
    try:
        label = labels.index(given["label"]) if "label" in given else None
        value = _value(kind, given[kind])
        # only blocks that are kept have to tell one function from another
        told = {**given, "function": _identity(value)} if kept and kind == "function" else {**given}
    except (ValueError, TypeError, regex.error) as error:
        raise ValueError(f"{where}: {error}") from None
    return _Rule(name, kind, label, value, float(threshold), told)


def _value(kind: Kind, given: Any) -> Any:
    if kind in ("keywords", "similar_to"):
        if isinstance(given, str) or not given or not all(text.strip() for text in given):
            raise ValueError(f"{kind} is a list of at least one text; got {given!r}")
        return _keywords(given) if kind == "keywords" else tuple(given)
    if kind == "function":
        if not callable(given) or inspect.isclass(given):
            raise ValueError(
                f"function must be something to call with a text; got {given!r}; give the function, "
                "or in a recipe {call: ...} of what makes one, with --allow for its package"
            )
        return given
    if not isinstance(given, str) or not given.strip():
        raise ValueError(f"{kind} is a text; got {given!r}")
    return regex.compile(given) if kind == "regex" else given


def _keywords(words: Sequence[str]) -> Any:
    """Whole words, with any blanks between those of one keyword."""
    parts = (r"\s+".join(map(regex.escape, word.split())) for word in words)
    return regex.compile(rf"(?i)(?<!\w)(?:{'|'.join(parts)})(?!\w)")


def _identity(function: Any) -> str:
    """What tells a callable from another: its name, its source and its state."""
    kind = function if inspect.isroutine(function) else type(function)
    name, source = f"{kind.__module__}.{kind.__qualname__}", ""
    with suppress(OSError, TypeError):  # typed at a prompt, or in C
        source = inspect.getsource(kind)
    try:
        return f"{name}@{Hasher.hash([source, function])}"
    except Exception as error:  # whatever pickling somebody's object raises
        raise ValueError(
            f"what it holds cannot be told from another, so its blocks cannot be kept ({error}); "
            "leave output out, or give the object a __reduce__"
        ) from None


def _needed(rules: list[_Rule], kind: Kind, argument: str, given: object) -> list[_Rule]:
    """The rules of a kind that needs an argument, which must be there."""
    if (needs := [rule for rule in rules if rule.kind == kind]) and given is None:
        raise ValueError(f"labeling function {needs[0].name!r} is a {kind}; it needs {argument}=")
    return needs


# ------------------------------------------------------------------------------------ what it says

_Vote = tuple[int, float]
_Said = tuple[list[_Vote], str | None]
"""Labels of one function on one text with their probabilities, and what went wrong."""


def _reader(
    rules: list[_Rule],
    labels: LabelSpace,
    engine: Engine | None,
    encoder: str | Path | Encoder | None,
    regex_seconds: float,
) -> Callable[[Dataset], Dataset]:
    """A block of rows -> the block with what all rules say."""

    @cache  # not before a block has to be computed
    def ready() -> Encoder:
        assert encoder is not None  # or refused above
        return models.load_encoder(encoder)

    @lru_cache(maxsize=len(rules) + 1)  # the rules' own texts, and those of the block
    def vectors(texts: tuple[str, ...]) -> Float[np.ndarray, "texts width"]:
        return unit_vectors(ready(), texts)

    def says(rule: _Rule, texts: tuple[str, ...]) -> list[_Said]:
        if rule.kind == "question" and engine is not None:
            return _ask(rule, engine, texts)
        if rule.kind == "similar_to":
            near = (vectors(texts) @ vectors(rule.value).T).max(axis=1)
            return [([(rule.label, 1.0)] if one else [], None) for one in near >= rule.threshold]
        return [_apply(rule, text, labels, regex_seconds) for text in texts]

    def compute(block: Dataset) -> Dataset:
        texts = block["text"][:]
        rows = [row for row, text in enumerate(texts) if text.strip()]
        read = tuple(texts[row] for row in rows)
        votes: list[tuple[int, str, int, float]] = []
        errors = [[] if text.strip() else ["empty text"] for text in texts]
        for rule in rules if rows else ():
            for row, (given, error) in zip(rows, says(rule, read), strict=True):
                votes += [(row, rule.name, label, prob) for label, prob in given]
                errors[row] += [f"{rule.name}: {error}"] if error else []
        columns = list(zip(*votes, strict=True)) or [()] * 4
        entries = pa.table(dict(zip(("source", "label_id", "prob"), columns[1:], strict=True)))
        lists = vote_lists(np.array(columns[0], dtype=np.int64), entries, rows=len(block))
        told = ["; ".join(some) or None for some in errors]
        return with_columns(block, {"votes": (lists, VOTES), "error": (told, Value("string"))})

    return compute


def _apply(rule: _Rule, text: str, labels: LabelSpace, regex_seconds: float) -> _Said:
    """What a pattern or a Python function says about one text."""
    try:
        if rule.kind == "function":
            return _answers(rule.value(text), rule, labels), None
        limit = regex_seconds if rule.kind == "regex" else None  # which costs a little time
        return [(rule.label, 1.0)] if rule.value.search(text, timeout=limit) else [], None
    except Exception as error:  # whatever a user's function raises
        if rule.kind == "regex" and isinstance(error, TimeoutError):
            return [], f"the regular expression took longer than {regex_seconds:g} s"
        return [], f"{type(error).__name__}: {error}"


def _answers(answer: Any, rule: _Rule, labels: LabelSpace) -> list[_Vote]:
    if isinstance(answer, bool | np.bool_ | None):
        if answer and rule.label is None:
            raise ValueError("it says yes, but has no label; give it one, or return the label")
        return [(rule.label, 1.0)] if answer else []
    if isinstance(answer, str):
        return [(labels.index(answer), 1.0)]
    if not isinstance(answer, Mapping):
        wanted = "None, true or false, a label, or {label: probability}"
        raise TypeError(f"it returned the {type(answer).__name__} {answer!r}, not {wanted}")
    probs = [(labels.index(label), float(prob)) for label, prob in answer.items()]
    if len({label for label, _ in probs}) < len(probs):
        raise ValueError(f"it returned {dict(answer)}, which names one label twice")
    total = sum(prob for _, prob in probs)
    if not all(0 <= prob <= 1 for _, prob in probs) or (total > 1 + 1e-6 and not labels.multilabel):
        raise ValueError(f"it returned {dict(answer)}, which are no probabilities")
    return [(label, prob) for label, prob in probs if prob > 0]


def _ask(rule: _Rule, engine: Engine, texts: Sequence[str]) -> list[_Said]:
    path = find_prompt(_PROMPT)
    chats = [render(path, text=text, labels=(), question=rule.value) for text in texts]
    scores = engine.score(chats, ("yes", "no"))
    yes, _ = match_probability(scores.log_probs, np.array([True, False]))
    messages = scores.errors or [None] * len(texts)
    return [
        ([(rule.label, p)] if p >= rule.threshold else [], why or (_NEITHER if p != p else None))
        for p, why in zip(yes.tolist(), messages, strict=True)  # p != p: NaN
    ]


def _warn_of_silent(dataset: Dataset, names: list[str]) -> None:
    table = arrow_table(dataset.select_columns(["votes", "error"]))
    votes = table["votes"].combine_chunks().flatten()
    fired = pc.unique(pc.struct_field(votes, "source")).to_pylist()
    if silent := [name for name in names if name not in fired]:
        some = ", ".join(map(repr, silent[:3])) + f" and {len(silent) - 3} more" * (len(silent) > 3)
        warnings.warn(
            f"label_weak: {some} of {len(names)} functions never vote on these {len(dataset)} rows, "
            f"{len(table) - table['error'].null_count} of which have an error; reword or remove them",
            stacklevel=3,
        )
