"""Label-supervised tagging: which stretches of a text have which label (named entities and the like).

LS-LLaMA and LS-unLLaMA for tokens (arXiv 2310.01208): backbone -> dropout -> linear head on the first
token of every word -> cross-entropy. A decoder wants `bidirectional`, since what a word is often
stands behind it.

Differs from the paper: a span may be uncertain; sequences of tags are decoded so that a label goes on
only where it has begun; padding is not attended.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from datasets import Dataset, Value
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Tensor

from llmlabel import metrics, models
from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns, rows_of, with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.loss.soft import soft_cross_entropy
from llmlabel.refine.views import SPANS
from llmlabel.select import row_weights
from llmlabel.train.network import load_classifier, padded, student_sha
from llmlabel.train.settings import StudentTraining, settle_student
from llmlabel.train.spans import Word, prob_of, spans_of, tags_of, words_of
from llmlabel.train.student import Rows, Validation, repeated, sha_of, train_student

_Keys = set[tuple[int, int, int]]
"""Start, end and label of spans."""


def train_tagger(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    model: str | Path,
    output: Path,
    validation: Dataset | None = None,
    **training: Unpack[StudentTraining],
) -> Path:
    """Trains a student on labelled spans and writes its folder; `predict_spans` uses it.

    Reads `text`, `spans` and, where present, `weight`. A row whose `spans` are null is left out, one
    with an empty list has none. A span's `prob` is that of its words' tags; what it lacks to 1 is
    that of being outside. Words behind `max_length` tokens are not learned.

    Args:
        dataset: rows with labelled spans.
        labels: their label space.
        model: see `llmlabel.train.classifier.train_classifier`, as for `output`.
        output: see there.
        validation: rows with `spans` that no training row repeats; the epoch whose mean loss on them
            is lowest is kept.
        **training: see `llmlabel.train.settings.StudentTraining`; pooling has no meaning here.

    Raises:
        ValueError: no row can be trained on, a span is outside its text or the labels, or the
            tokenizer does not tell where its tokens stand.
    """
    if "pooling" in training:
        raise ValueError("pooling has no meaning where every token has a label; leave it out")
    settings = settle_student(training) | {"task": "tokens"}
    tokenizer = _tokenizer(str(model))
    tagged = _tagged(dataset, labels, tokenizer, settings, "training")
    rows = Rows(
        tagged.ids,
        tagged.texts,
        csr_array(np.stack([_shares(targets) for targets in tagged.targets])),
        tagged.weights * [len(words) for words in tagged.words],
        len(dataset),
        tagged.kept,
    )

    def losses(logits: Tensor, chosen: list[int]) -> Float[Tensor, " some"]:
        """The mean over the words of each row."""
        places = [[word.token for word in tagged.words[row]] for row in chosen]
        at = [number for number, some in enumerate(places) for _ in some]
        flat = logits[at, [place for some in places for place in some]]
        targets = torch.from_numpy(np.concatenate([tagged.targets[row] for row in chosen]))
        values = soft_cross_entropy(flat, targets.to(flat))
        sums = torch.zeros(len(chosen), dtype=values.dtype, device=values.device)
        sums = sums.index_add(0, torch.tensor(at, device=values.device), values)
        return sums / torch.tensor([len(some) for some in places]).to(sums)

    seen = None
    if validation is not None:
        known = _tagged(validation, labels, tokenizer, settings, "validation")
        has_ids = "id" in validation.column_names
        overlap = repeated([*known.ids] if has_ids else [None] * len(known.ids), known.texts, rows)
        seen = Validation(
            len(known.texts),
            overlap,
            sha_of(known.texts, known.targets),
            lambda tokenizer: _validator(known, tokenizer, settings),
        )
    times = rows.soft.max(axis=0).toarray()
    return train_student(
        rows,
        labels,
        losses,
        settings,
        model=model,
        output=output,
        validation=seen,
        told={
            "labels_without_rows": [labels.ids[label] for label in np.flatnonzero(times == 0)],
            "tags_sha": sha_of([], tagged.targets),
        },
        name="train_tagger",
    )


def predict_spans(
    dataset: Dataset,
    *,
    model: Path,
    pass_tokens: int = 8192,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds `spans`, null for a text without a character; `engine`, and `error` where a text was cut.

    Computes in float32; results do not depend on which rows share a pass.

    Args:
        dataset: rows with `text`.
        model: a folder written by `train_tagger`.
        pass_tokens: padded tokens computed at a time.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks.

    Raises:
        ValueError: the model is another kind of student.
    """
    require_columns(dataset, "text")
    network, tokenizer, card = load_classifier(model)
    if card["settings"].get("task") != "tokens":
        raise ValueError(
            f"model folder {model}: it labels whole texts; use llmlabel.train.classifier.predict, or "
            "give a folder of train_tagger"
        )
    labels = load_labels(model / "labels.json")
    limit = int(card["settings"]["max_length"])
    name = f"student:{models.model_name(card['model'])}:{labels.fingerprint[:8]}"

    def compute(block: Dataset) -> Dataset:
        texts = [text or "" for text in block["text"]]
        read = [_words(tokenizer, text, limit) for text in texts]
        kept = [row for row, text in enumerate(texts) if text.strip()]
        probs = _tag_probs(network, [read[row] for row in kept], pass_tokens)
        found: list[Any] = [None] * len(texts)
        errors: list[str | None] = ["empty text"] * len(texts)
        for row, row_probs in zip(kept, probs, strict=True):
            _, words, tokens = read[row]
            found[row] = spans_of(row_probs, words)
            errors[row] = None
            if tokens > limit:
                errors[row] = f"text cut: {tokens} tokens, the limit is {limit}"
        return with_columns(
            block,
            {
                "spans": (found, SPANS),
                "engine": ([name] * len(texts), Value("string")),
                "error": (errors, Value("string")),
            },
        )

    return map_blocks(
        dataset,
        compute,
        columns=("spans", "engine", "error"),
        key=f"predict_spans {student_sha(model)}",
        output=output,
        block_rows=block_rows,
        name="predict_spans",
    )


def measure_spans(dataset: Dataset, tagged: Dataset, labels: LabelSpace) -> dict[str, Any]:
    """How many of the true spans were found, and of those found are true: whole ones with their label.

    Args:
        dataset: rows with the predicted `spans`; null counts as none.
        tagged: rows of the same ids with the true `spans`; where they are null, nothing is measured.
        labels: their label space.

    Returns:
        JSON: `rows`, `spans` (the true ones), `precision`, `recall` and `f1`; `labels`, the same of
        each label that has a true or a predicted span, by its id.

    Raises:
        ValueError: a row is not in `tagged`, or no row has known spans.
    """
    require_columns(dataset, "id", "spans")
    require_columns(tagged, "id", "spans")
    pairs = [
        (_keys(said or []), _keys(true))
        for said, true in zip(
            dataset["spans"][:], rows_of(dataset, tagged, "tagged")["spans"][:], strict=True
        )
        if true is not None
    ]

    def scores(some: list[tuple[_Keys, _Keys]]) -> dict[str, Any]:
        count = sum(len(true) for _, true in some)
        return {"spans": count, **metrics.span_scores(*zip(*some, strict=True))}

    if not pairs:
        raise ValueError(f"none of the {len(tagged)} rows of tagged has known spans")
    each = {}
    for label, id in enumerate(labels.ids):
        own = [
            ({key for key in said if key[2] == label}, {key for key in true if key[2] == label})
            for said, true in pairs
        ]
        if any(said or true for said, true in own):
            each[id] = scores(own)
    return {"rows": len(pairs), **scores(pairs), "labels": each}


class _Tagged:
    """Rows with the tags of their words."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.kept: list[int] = []
        self.tokens: list[list[int]] = []
        self.words: list[list[Word]] = []
        self.targets: list[Float[np.ndarray, "words tags"]] = []
        self.weights: Float[np.ndarray, " rows"] = np.zeros(0)


def _tagged(
    dataset: Dataset, labels: LabelSpace, tokenizer: Any, settings: dict[str, Any], what: str
) -> _Tagged:
    require_columns(dataset, "text", "spans")
    found, weights = _Tagged(), row_weights(dataset)
    ids = (
        dataset["id"][:]
        if "id" in dataset.column_names
        else [f"row {row}" for row in range(len(dataset))]
    )
    for row, (id, text, spans) in enumerate(
        zip(ids, dataset["text"][:], dataset["spans"][:], strict=True)
    ):
        if spans is None or weights[row] == 0:
            continue
        for span in spans:
            _check(span, id, text or "", labels)
        tokens, words, _ = _words(tokenizer, text or "", settings["max_length"])
        if not words:
            continue
        found.ids.append(str(id))
        found.texts.append(text)
        found.kept.append(row)
        found.tokens.append(tokens)
        found.words.append(words)
        found.targets.append(tags_of(spans, words, labels=len(labels)))
    if not found.kept:
        raise ValueError(
            f"none of the {len(dataset)} {what} rows has a text, spans and a weight above 0"
        )
    found.weights = weights[found.kept]
    return found


def _check(span: dict[str, Any], id: Any, text: str, labels: LabelSpace) -> None:
    if absent := {"start", "end", "label_id"} - set(span):
        raise ValueError(
            f"row with id {id!r}: a span has no {min(absent)!r}; it has {', '.join(map(str, span))}"
        )
    start, end, label, prob = span["start"], span["end"], span["label_id"], prob_of(span)
    if not 0 <= start < end <= len(text):
        raise ValueError(
            f"row with id {id!r}: the span from {start} to {end} is not in its text of {len(text)} "
            "characters"
        )
    if not 0 <= label < len(labels):
        raise ValueError(
            f"row with id {id!r}: a span has the label {label}, but the labels are 0 to "
            f"{len(labels) - 1}; give the label space of these spans"
        )
    if not 0 <= prob <= 1:
        raise ValueError(f"row with id {id!r}: a span has the probability {prob}")


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    source = models.fetch(model)
    with models.loading(model):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.is_fast:
        raise ValueError(
            f"model {model}: its tokenizer does not tell where its tokens stand; give a model with a "
            "fast tokenizer"
        )
    return tokenizer


def _words(tokenizer: Any, text: str, limit: int) -> tuple[list[int], list[Word], int]:
    """The tokens that are read, the words whose first token is among them, the tokens of all."""
    read = tokenizer(text, return_offsets_mapping=True, verbose=False)
    total = len(read["input_ids"])
    if total > limit:
        read = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=limit)
    return read["input_ids"], words_of(read.word_ids(), read["offset_mapping"], text), total


def _shares(targets: Float[np.ndarray, "words tags"]) -> Float[np.ndarray, " labels"]:
    """The highest probability of each label in a row."""
    best: Float[np.ndarray, " labels"] = np.maximum(targets[:, 1::2], targets[:, 2::2]).max(axis=0)
    return best


@torch.inference_mode()
def _tag_probs(
    network: Any, read: list[tuple[list[int], list[Word], int]], pass_tokens: int
) -> list[Float[np.ndarray, "words tags"]]:
    """Of each word of each row; in passes of at most so many padded tokens."""
    found: list[Any] = [None] * len(read)
    device = next(network.parameters()).device
    order = sorted(range(len(read)), key=lambda row: (-len(read[row][0]), row))
    while order:
        count = max(1, pass_tokens // max(1, len(read[order[0]][0])))
        chosen, order = order[:count], order[count:]
        inputs = [part.to(device) for part in padded([read[row][0] for row in chosen])]
        probs = network(*inputs).double().softmax(dim=2).cpu().numpy()
        for number, row in enumerate(chosen):
            found[row] = probs[number, [word.token for word in read[row][1]]]
    return found


def _validator(
    known: _Tagged, tokenizer: Any, settings: dict[str, Any]
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Mean loss of a word, and F1 of whole spans."""
    read = list(zip(known.tokens, known.words, [0] * len(known.tokens), strict=True))
    gold = [_keys(spans_of(t, w)) for t, w in zip(known.targets, known.words, strict=True)]

    def validate(network: torch.nn.Module) -> dict[str, float]:
        probs = _tag_probs(network, read, settings["pass_tokens"])
        values = [
            -(targets * np.log(np.clip(some, 1e-12, 1.0))).sum(axis=1)
            for targets, some in zip(known.targets, probs, strict=True)
        ]
        said = [_keys(spans_of(some, w)) for some, w in zip(probs, known.words, strict=True)]
        scores = metrics.span_scores(said, gold)
        return {"loss": float(np.concatenate(values).mean()), "span_f1": scores["f1"]}

    return validate


def _keys(spans: list[dict[str, Any]]) -> _Keys:
    return {(span["start"], span["end"], span["label_id"]) for span in spans}
