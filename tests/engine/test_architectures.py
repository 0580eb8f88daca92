"""Models whose heads or masks differ are read right or refused; templates are asked, not guessed."""

from pathlib import Path
from typing import Any

import pytest
from reference.scores import joint_log_prob

from llmlabel.engine.hf import HFEngine
from llmlabel.engine.labeltrie import label_trie
from llmlabel.prompt import chat_text, chat_tokens

LABELS = ("cat", "catfish", "the mat, no?")
CHATS = [
    [{"role": "system", "content": "Name it."}, {"role": "user", "content": text}]
    for text in ("the cat", "business and " * 20)
]


def saved(tmp_path: Path, tokenizer: Any, config: Any) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def small(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {**sizes, **heads, **tokens, "initializer_range": 0.3, **more}


@pytest.mark.parametrize(
    "name", ["qwen2", "gemma2", "granite", "cohere", "mistral", "gemma3_text", "gpt2"]
)
def test_reads_what_the_model_says(tmp_path: Path, tiny_tokenizer: Any, name: str) -> None:
    from transformers import AutoConfig

    more = {
        "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 4096},
        "granite": {"logits_scaling": 4.0},
        "cohere": {"logit_scale": 0.2},
        "mistral": {"sliding_window": 64},
        "gemma3_text": {"sliding_window": 64},
    }.get(name, {})
    config = AutoConfig.for_model(name, vocab_size=len(tiny_tokenizer), **small(**more))
    engine = HFEngine(str(saved(tmp_path, tiny_tokenizer, config)), dtype="float32", max_tokens=400)
    assert engine.max_tokens == {"mistral": 64, "gemma3_text": 64}.get(name, 400)
    trie = label_trie(engine.tokenizer, LABELS)
    got = engine.score(CHATS, LABELS)
    for row, chat in enumerate(CHATS):
        room = engine.max_tokens - int(trie.depths.max())
        prompt, _ = chat_tokens(engine.tokenizer, chat, max_tokens=room)
        for column, (node, end) in enumerate(zip(trie.last_node, trie.last_token, strict=True)):
            reply = [*trie.path(int(node)), int(end)]
            expected = joint_log_prob(engine.model, prompt, reply)
            assert got.log_probs[row, column] == pytest.approx(expected, abs=2e-4)


def test_what_cannot_be_read_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=2)
    folder = saved(tmp_path, tiny_tokenizer, config)
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*VLLMEngine"):
        HFEngine(str(folder), dtype="float32")


@pytest.fixture
def tokenizer(tiny_tokenizer: Any, tmp_path: Path) -> Any:
    """A copy whose template a test may replace."""
    from transformers import AutoTokenizer

    tiny_tokenizer.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_a_template_without_system_role(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert chat_text(tokenizer, CHATS[0]) == (
        "<|im_start|>user\nName it.\n\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_with_a_space_before_and_another_end_after_a_reply(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}:"
        "{% else %} {{ m['content'] }}<|endoftext|>\n{% endif %}{% endfor %}"
    )
    assert tokenizer.eos_token_id == 2
    trie = label_trie(tokenizer, ("cat", "mat"))
    assert trie.last_token.tolist() == [0, 0]  # <|endoftext|>, not the tokenizer's end
    words = [tokenizer.decode(trie.path(int(node))) for node in trie.last_node]
    assert words == [" cat", " mat"]


def test_a_template_that_ends_a_reply_with_nothing(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    trie = label_trie(tokenizer, ("cat", "mat"))
    assert trie.last_token.tolist() == [2, 2]


def test_sentencepiece_like_tokens_are_those_of_the_template(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "▁", "▁cat", "cat", "▁mat", "mat", "[/INST]", "x", "▁x"]
    raw = Tokenizer(models.Unigram([(p, -1.0 if len(p) > 1 else -9.0) for p in pieces], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        additional_special_tokens=["[/INST]"],
        chat_template="{% for m in messages %}{% if m['role'] == 'user' %}<s>{{ m['content'] }}"
        "[/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}",
    )  # fmt: skip
    trie = label_trie(tokenizer, ("cat", "mat"))
    paths = [
        [tokenizer.convert_ids_to_tokens(t) for t in trie.path(int(n))] for n in trie.last_node
    ]
    assert paths == [["▁cat"], ["▁mat"]]
    assert tokenizer.convert_ids_to_tokens(trie.last_token.tolist()) == ["</s>", "</s>"]
