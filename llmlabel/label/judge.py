"""A language model says how probably a candidate, such as a label, matches a query.

Report `probe_auc` on pairs whose truth is known before anything is built on a judge: a weak one
makes things worse than none. Its probabilities are not calibrated across queries.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from llmlabel.blocks import map_blocks
from llmlabel.data import gold_matrix, require_columns, with_columns
from llmlabel.engine import Engine, Scores
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import Chat, find_prompt, prompt_sha, render

JUDGE_COLUMNS = ("match", "match_mass", "match_error", "match_engine", "match_prompt_sha")
"""Probability of a match; that of any answer read; why there is none; who judged with what."""

_EMPTY = "empty query or candidate"
_NEITHER = "the model answered neither yes nor no"
_YES, _NO = ("Yes", "yes", "YES"), ("No", "no", "NO")


def judge(
    dataset: Dataset,
    engine: Engine,
    *,
    query: str = "text",
    candidate: str = "candidate",
    prompt: str | Path = "label/judge",
    block_rows: int = 256,
    output: Path | None = None,
) -> Dataset:
    """Adds `match`: the probability P(yes) / (P(yes) + P(no)) that the candidate meets the query.

    The score of UniME-V2 (arXiv 2510.13515, MLLM-as-a-Judge). Differs from the paper: another
    wording; each answer is the whole reply, not its first token; yes and no are sums over spellings
    ("Yes", "yes", "YES", each also after a space where the tokenizer tells it apart). `match_mass`
    is P(yes) + P(no). Pairs with nothing to read on one side, and pairs that the model answers with
    neither, have null and a `match_error`; a spelling that the engine left unread counts as 0. The
    query stands first in the prompt, so rows of the same query should be neighbours.

    Args:
        dataset: rows with `id` and both texts.
        engine: who judges.
        query: the column of the text that asks.
        candidate: the column of what may meet it.
        prompt: a prompt file or a shipped name; it sees the query as `text`, and `candidate`.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    require_columns(dataset, "id", query, candidate)
    pairs = Dataset.from_dict(
        {
            "id": dataset["id"][:],
            "text": _texts(dataset, query),
            "candidate": _texts(dataset, candidate),
        }
    )
    path, sha = find_prompt(prompt), prompt_sha(prompt)

    def compute(block: Dataset) -> Dataset:
        texts, others = block["text"][:], block["candidate"][:]
        errors: list[str | None] = [_EMPTY] * len(block)
        match, mass = np.full(len(block), np.nan), np.zeros(len(block))
        rows = [row for row in range(len(block)) if texts[row].strip() and others[row].strip()]
        chats = [render(path, text=texts[i], labels=(), candidate=others[i]) for i in rows]
        if chats:
            scores, yes = _score(engine, chats)
            match[rows], mass[rows] = match_probability(scores.log_probs, yes)
            messages = scores.errors or [None] * len(rows)
            for row, message, p in zip(rows, messages, match[rows].tolist(), strict=True):
                errors[row] = message or (_NEITHER if np.isnan(p) else None)
        return with_columns(
            block,
            {
                "match": (pa.array(match, pa.float32(), mask=np.isnan(match)), Value("float32")),
                "match_mass": (mass.astype(np.float32), Value("float32")),
                "match_error": (errors, Value("string")),
                "match_engine": (pa.repeat(engine.name, len(block)), Value("string")),
                "match_prompt_sha": (pa.repeat(sha, len(block)), Value("string")),
            },
        )

    judged = map_blocks(
        pairs,
        compute,
        columns=JUDGE_COLUMNS,
        key=json.dumps(["judge", engine.name, sha]),
        reads=("candidate",),
        block_rows=block_rows,
        output=output,
        name="judge",
    )
    table = arrow_table(judged.select_columns(list(JUDGE_COLUMNS)))
    return with_columns(
        dataset, {name: (table[name], judged.features[name]) for name in JUDGE_COLUMNS}
    )


def match_probability(
    log_probs: Float[np.ndarray, "pairs answers"], yes: Bool[np.ndarray, " answers"]
) -> tuple[Float[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
    """P(yes) / (P(yes) + P(no)) and P(yes) + P(no); NaN where both are 0 or unknown.

    Args:
        log_probs: of the spellings as the reply.
        yes: which spellings mean yes; the others mean no.
    """
    agree = np.logaddexp.reduce(log_probs[:, yes], axis=1)
    total = np.logaddexp.reduce(log_probs, axis=1)
    read = np.isfinite(total)
    with np.errstate(invalid="ignore"):  # -inf - -inf, where nothing was read
        match = np.where(read, np.exp(agree - total), np.nan)
    return match, np.where(read, np.minimum(np.exp(total), 1.0), 0.0)


def probe_pairs(
    dataset: Dataset, labels: LabelSpace, *, negatives: int = 1, seed: int = 0
) -> Dataset:
    """Pairs of a text and a label whose truth is known: columns `text`, `candidate`, `is_match`.

    Each true label of a row with gold, and per row `negatives` labels drawn at random from those
    that are not true for it; candidates read "name: description". What is drawn for a row depends
    on its `id` and the seed only.
    """
    require_columns(dataset, "id", "text")
    true, texts = gold_matrix(dataset, labels), labels.texts()
    pairs: dict[str, list[Any]] = {"id": [], "text": [], "candidate": [], "is_match": []}
    for row in np.flatnonzero(true.any(axis=1)).tolist():
        id, text = dataset[row]["id"], dataset[row]["text"]
        digest = hashlib.sha256(json.dumps([seed, id]).encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8]))
        others = np.flatnonzero(~true[row])
        drawn = rng.choice(others, size=min(negatives, len(others)), replace=False)
        for label in [*np.flatnonzero(true[row]).tolist(), *drawn.tolist()]:
            pairs["id"].append(f"{id}/{labels.ids[label]}")
            pairs["text"].append(text)
            pairs["candidate"].append(texts[label])
            pairs["is_match"].append(bool(true[row, label]))
    return Dataset.from_dict(pairs)


def probe_auc(dataset: Dataset, *, truth: str = "is_match") -> dict[str, float]:
    """How well `match` tells true pairs from false ones: report it before the judge is used.

    Returns:
        `auc`: probability that a true pair is judged higher than a false one, a tie counts half;
        `positives` and `negatives`: judged pairs; `unread`: pairs without a judgement, left out.

    Raises:
        ValueError: there is no judged true pair, or no judged false one.
    """
    require_columns(dataset, "match", truth)
    judged = np.array([np.nan if p is None else p for p in dataset["match"][:]], dtype=np.float64)
    given = dataset[truth][:]
    if None in given:
        raise ValueError(f"probe_auc: the truth of row {given.index(None)} in {truth!r} is null")
    is_true, read = np.array(given, dtype=bool), ~np.isnan(judged)
    positives, negatives = int(is_true[read].sum()), int((~is_true[read]).sum())
    if not positives or not negatives:
        raise ValueError(
            f"probe_auc needs judged pairs of both kinds; there are {positives} true and "
            f"{negatives} false ones in {truth!r}"
        )
    ranks = rankdata(judged[read])
    wins = ranks[is_true[read]].sum() - positives * (positives + 1) / 2
    return {
        "auc": float(wins / (positives * negatives)),
        "positives": positives,
        "negatives": negatives,
        "unread": int((~read).sum()),
    }


def _score(engine: Engine, chats: list[Chat]) -> tuple[Scores, Bool[np.ndarray, " answers"]]:
    """Scores of the spellings, and which of them mean yes."""
    plain = [*_YES, *_NO]
    spaced = [*plain, *(f" {answer}" for answer in plain)]
    try:
        answers, scores = spaced, engine.score(chats, spaced)
    except ValueError:  # a tokenizer that reads both as one word: labels with the same tokens
        answers, scores = plain, engine.score(chats, plain)
    return scores, np.array([answer.strip() in _YES for answer in answers])


def _texts(dataset: Dataset, name: str) -> list[str]:
    kind = dataset.features[name]
    if not isinstance(kind, Value) or kind.dtype not in ("string", "large_string"):
        raise ValueError(f"the column {name!r} holds {kind}; texts are needed")
    return [text or "" for text in dataset[name][:]]
