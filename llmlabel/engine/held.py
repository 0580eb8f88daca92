"""Holds a transformers model to JSON of a schema, token by token.

The grammar is llguidance's: written in Rust, one wheel without dependencies for all Pythons, and one of
those that vLLM itself uses.
"""

import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import LogitsProcessor

# A small model that may write blanks between tokens of JSON may write nothing else.
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class HeldToSchema(LogitsProcessor):
    """Forbids each token that the schema does not allow next; for one reply.

    Args:
        tokenizer: of the model.
        schema: a JSON schema.
        prompt_tokens: number of tokens before the reply.
        stops: tokens that end it.

    Raises:
        ValueError: the schema is none, or asks for what cannot be held to.
    """

    def __init__(
        self, tokenizer: Any, schema: dict[str, Any], *, prompt_tokens: int, stops: list[int]
    ) -> None:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_WRITTEN)
        self._matcher = LLMatcher(_tokenizer(tokenizer, tuple(stops)), grammar, log_level=0)
        if self._matcher.is_error():
            raise ValueError(f"a reply cannot be held to this schema: {self._matcher.get_error()}")
        self._stops, self._told = stops, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits of the next token, -inf where it is not allowed."""
        new = input_ids[0, self._told :].tolist()
        self._told += len(new)
        self._matcher.consume_tokens(new)
        if self._matcher.is_stopped():  # everything is written: the reply ends
            allowed = np.zeros(scores.shape[1], dtype=bool)
            allowed[self._stops] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(bits, bitorder="little").astype(bool)[: scores.shape[1]]
            allowed = np.pad(allowed, (0, scores.shape[1] - len(allowed)))  # rows beyond the words
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)


@lru_cache(maxsize=4)
def _tokenizer(tokenizer: Any, stops: tuple[int, ...]) -> LLTokenizer:
    return from_tokenizer(tokenizer, eos_token=list(stops))
