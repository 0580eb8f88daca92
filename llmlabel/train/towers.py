"""The encoders of texts and labels, and vectors that are pushed back through them piece by piece."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from llmlabel import models
from llmlabel.train.network import padded

_SIMILAR = 0.75
"""A text shorter than this share of the longest of its pass begins another one, against padding."""

_PADDED = 256
"""Texts tokenised at a time."""

_WORTH_A_PASS = 512
"""Tokens that a pass has before."""


class Towers(torch.nn.Module):
    """A sentence-transformers model for texts, and the same or another one for labels."""

    def __init__(self, texts: Any, labels: Any | None = None) -> None:
        super().__init__()
        self.texts = texts
        self.labels = texts if labels is None else labels

    @property
    def shared(self) -> bool:
        """Whether one model reads both."""
        return self.labels is self.texts


def load_tower(source: str | Path, *, max_length: int) -> Any:
    """A sentence-transformers model whose weights can be trained.

    Raises:
        ValueError: it does not read tokens by attention, so that nothing here would train it.
    """
    from sentence_transformers import SentenceTransformer

    path = models.fetch(source)
    with models.loading(source):
        tower = SentenceTransformer(path, device="cpu")  # the loop moves it to its process's device
    limit = getattr(tower, "max_seq_length", None)
    if limit is None or not callable(getattr(tower, "tokenizer", None)):
        raise ValueError(
            f"model {source}: it has no transformer that reads tokens; a dual encoder needs one, such "
            "as all-MiniLM-L6-v2"
        )
    tower.max_seq_length = min(limit, max_length)
    return tower.float()


def tokens_of(tower: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as the tower's `encode` would read it: with its prompt, cut at its limit."""
    found: list[list[int]] = []
    for start in range(0, len(texts), _PADDED):
        given = _read(tower, list(texts[start : start + _PADDED]))
        pairs = zip(given["input_ids"], given["attention_mask"].bool(), strict=True)
        found += [ids[mask].tolist() for ids, mask in pairs]
    return found


def _read(tower: Any, texts: list[str]) -> dict[str, Any]:
    prompt = tower.prompts.get(tower.default_prompt_name) if tower.default_prompt_name else None
    return dict(tower.preprocess(texts, prompt=prompt))


@dataclass(eq=False)
class Encoded:
    """Vectors of length 1, and the way back to the weights that made them.

    Where all texts together have no more tokens than a pass may have, their graphs are kept. Else they
    are computed without, and computed again, with the same random numbers, when gradients go back: the
    gradient cache of Gao et al. (arXiv 2101.06983), which DEXML uses (arXiv 2310.10636).
    """

    vectors: Float[Tensor, "texts width"]
    """A leaf; what its `grad` holds is what `backward` takes."""
    tokens: int
    """Computed so far, without padding."""
    _again: Callable[[Sequence[int]], Tensor] = field(repr=False)
    _chunks: list[tuple[int, list[int]]] = field(repr=False)
    """Seed and different texts of each pass."""
    _place: Int[Tensor, " texts"] = field(repr=False)
    """Of each text among the different ones."""
    _kept: list[Tensor] = field(default_factory=list, repr=False)
    """The vectors of each pass with their graph."""

    def backward(self) -> None:
        """Adds the gradients of the weights."""
        if self.vectors.grad is None:
            return
        count = sum(len(chosen) for _, chosen in self._chunks)
        gradient = self.vectors.new_zeros(count, self.vectors.shape[1])
        gradient.index_add_(0, self._place, self.vectors.grad)
        if self._kept:
            torch.autograd.backward(self._kept, [gradient[chosen] for _, chosen in self._chunks])
            return
        for seed, chosen in self._chunks:
            torch.manual_seed(seed)
            torch.autograd.backward(self._again(chosen), gradient[chosen])
        self.tokens *= 2


def encode(
    tower: Any,
    tokens: Sequence[list[int]],
    *,
    pass_tokens: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    keep_graph: bool = True,
) -> Encoded:
    """Vectors of texts, in passes of at most so many padded tokens, longest first.

    Texts of the same tokens are computed once.

    Args:
        tower: a sentence-transformers model.
        tokens: of each text.
        pass_tokens: a single text may have more.
        seed: of dropout.
        dtype: number format of the computation; vectors are float32.
        keep_graph: whether graphs may be kept where they are small enough.
    """
    device = next(tower.parameters()).device
    number_of = {own: n for n, own in enumerate(dict.fromkeys(map(tuple, tokens)))}
    place = torch.tensor([number_of[tuple(own)] for own in tokens], dtype=torch.long, device=device)
    unique = [list(own) for own in number_of]
    told = {n: v for n, v in _read(tower, ["a"]).items() if not isinstance(v, Tensor)}

    def compute(chosen: Sequence[int]) -> Tensor:
        ids, mask = padded([unique[row] for row in chosen])
        inputs = told | {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            found: Tensor = tower(inputs)["sentence_embedding"]
        return normalize(found.float(), dim=1)

    lengths = [len(own) for own in unique]
    chunks = [
        (int(np.random.SeedSequence([seed, n]).generate_state(1)[0]), rows)
        for n, rows in enumerate(passes(lengths, pass_tokens))
    ]
    vectors = torch.zeros(len(unique), tower.get_embedding_dimension(), device=device)
    few = sum(len(rows) * lengths[rows[0]] for _, rows in chunks) <= pass_tokens
    kept = []
    with nullcontext() if keep_graph and few else torch.no_grad():
        for chunk_seed, rows in chunks:
            torch.manual_seed(chunk_seed)
            found = compute(rows)
            vectors[rows] = found.detach()
            if found.requires_grad:
                kept.append(found)
    leaf = vectors[place].requires_grad_()
    return Encoded(leaf, sum(lengths), compute, chunks, place, kept)


def passes(lengths: Sequence[int], pass_tokens: int) -> Iterator[list[int]]:
    """Rows of similar length, longest first, as many at a time as fit when padded."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    part: list[int] = []
    for row in order:
        longest = lengths[part[0]] if part else 0
        is_full = (len(part) + 1) * longest > pass_tokens
        is_short = lengths[row] < _SIMILAR * longest and len(part) * longest >= _WORTH_A_PASS
        if part and (is_full or is_short):
            yield part
            part = []
        part.append(row)
    if part:
        yield part
