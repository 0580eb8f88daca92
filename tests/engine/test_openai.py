"""The server engine: who is asked, and exact reads, letters, replies."""

import asyncio
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from engine.openai_server import (
    LABELS,
    PREFERENCE,
    TEXTS,
    chats,
    joint,
    label_logit,
    next_token_log_probs,
)

from llmlabel.engine import Engine, Scores
from llmlabel.engine.bestfirst import BestFirst
from llmlabel.engine.codes import CodeRead, code_chat, code_orders, mean_of_orders, read_codes
from llmlabel.engine.labeltrie import LabelTrie, tokens_and_trie
from llmlabel.engine.openai import OpenAIEngine, label_said
from llmlabel.engine.reads import Reads, read_rows
from llmlabel.engine.server import LackingError, Server, ServerError, run_async
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import load_labels
from llmlabel.prompt import Chat, render
from llmlabel.softlabels import SoftLabels

pytestmark = pytest.mark.usefixtures("quick")


# ------------------------------------------------------------------------------------ exact reads


def test_exact_reads_equal_the_slow_twin(
    serve: Any, exact: Any, truth: np.ndarray, tiny_tokenizer: Any
) -> None:
    server = serve()
    engine = exact(server)
    assert isinstance(engine, Engine)
    scores = engine.score(chats(), LABELS)
    np.testing.assert_allclose(scores.log_probs, truth, rtol=1e-12)
    assert scores.errors == [None] * len(TEXTS)
    assert scores.unread is None
    trie, rows, _ = tokens_and_trie(tiny_tokenizer, chats(), LABELS, max_tokens=2048)
    asked = server.prompts()[1:]  # the first was the question whether it can
    wanted = {tuple(ids + trie.path(node)) for ids in rows for node in range(len(trie))}
    assert len(set(map(tuple, asked))) == len(asked)  # no node is asked for twice,
    assert set(map(tuple, asked)) < wanted  # and some were read on the way to others
    assert not any("top_logprobs" in body for _, body in server.requests)
    assert engine.usage.requests == len(server.requests) - 1  # the list of models is none
    assert engine.usage.prompt_tokens == sum(map(len, asked)) + 3
    assert engine.usage.output_tokens > len(asked)
    assert engine.usage.requests < len(asked) / 2  # several reads share a request


@pytest.mark.parametrize("seed", range(20))
def test_random_tries_equal_the_slow_twin(
    shared: OpenAIEngine, tiny_tokenizer: Any, seed: int
) -> None:
    """Chains, deep and wide tries, labels that begin others; with candidates in every other case."""
    rng = np.random.default_rng(seed)
    width, depth, count = (int(rng.integers(low, high)) for low, high in ((2, 9), (2, 6), (3, 40)))
    paths = {
        tuple(rng.integers(3, 3 + width, rng.integers(1, depth)).tolist()) for _ in range(count)
    }
    sequences = [[*path, 2] for path in sorted(paths)]
    trie = LabelTrie.of(sequences)
    rows = [rng.integers(3, 200, rng.integers(1, 9)).tolist() for _ in range(2)]
    some = sorted(rng.choice(len(sequences), (len(sequences) + 1) // 2, replace=False).tolist())
    candidates = [some, some[:1]] if seed % 2 else None
    reading = BestFirst(trie, 2, max_missing=0.0, candidates=candidates)

    async def work() -> list[str | None]:
        async with Server(shared.access, shared._meter) as server:
            reads = Reads(server, "tiny", in_flight=8)
            return await read_rows(reads, reading, rows, candidates=candidates)

    assert run_async(work()) == [None, None]
    expected = np.full((2, len(sequences)), -np.inf)
    for row, ids in enumerate(rows):
        for label in range(len(sequences)) if candidates is None else candidates[row]:
            path = sequences[label]
            expected[row, label] = sum(
                next_token_log_probs(ids + path[:at], len(tiny_tokenizer))[path[at]]
                for at in range(len(path))
            )
    np.testing.assert_allclose(reading.log_probs, expected, rtol=1e-12)


def test_reading_stops_when_the_rest_is_small_and_says_how_small(
    serve: Any, exact: Any, truth: np.ndarray
) -> None:
    scores = exact(serve(), max_missing=0.3).score(chats(), LABELS)
    read = np.isfinite(scores.log_probs)
    assert 0 < (~read).sum() < read.size
    np.testing.assert_allclose(scores.log_probs[read], truth[read], rtol=1e-12)
    missing = np.where(read, 0, np.exp(truth)).sum(axis=1)
    assert scores.unread is not None
    assert (missing <= scores.unread + 1e-15).all()
    assert (scores.unread <= 0.3 * (np.exp(truth) * read).sum(axis=1) / 0.7 + 1e-12).all()


def test_candidates_are_the_only_labels_read(
    serve: Any, exact: Any, truth: np.ndarray, tiny_tokenizer: Any
) -> None:
    server = serve()
    candidates = [[0, 2] if i % 2 else [3] for i in range(len(TEXTS))]
    scores = exact(server).score(chats(), LABELS, candidates=candidates)
    allowed = np.zeros(truth.shape, dtype=bool)
    for row, some in enumerate(candidates):
        allowed[row, some] = True
    np.testing.assert_allclose(scores.log_probs[allowed], truth[allowed], rtol=1e-12)
    assert (scores.log_probs[~allowed] == -np.inf).all()
    assert scores.unread is None
    bodies = [body for _, body in server.requests if "logprob_token_ids" in body]
    every = {token for body in bodies[1:] for token in body["logprob_token_ids"]}
    catfish = tiny_tokenizer("fish", add_special_tokens=False).input_ids
    assert not every & set(catfish)  # what only another label needs is not asked for


def test_a_large_fan_out_is_split(serve: Any, exact: Any, tiny_tokenizer: Any) -> None:
    server = serve()
    engine = exact(server, in_flight=4)
    trie = LabelTrie.of([[token, 2] for token in range(3, 140)])
    reading = BestFirst(trie, 1, max_missing=0.99)
    rows = [[5, 6, 7]]

    async def work() -> list[str | None]:
        async with Server(engine.access, engine._meter) as open_server:
            return await read_rows(Reads(open_server, "tiny", in_flight=4), reading, rows)

    assert run_async(work()) == [None]
    sizes = [
        len(body["logprob_token_ids"])
        for _, body in server.requests
        if "prompt" in body and "logprob_token_ids" in body
    ]
    assert max(sizes) == 128
    row, label = np.argwhere(np.isfinite(reading.log_probs))[0].tolist()
    first = next_token_log_probs(rows[row], len(tiny_tokenizer))[label + 3]
    second = next_token_log_probs([*rows[row], label + 3], len(tiny_tokenizer))[2]
    assert reading.log_probs[row, label] == pytest.approx(first + second, rel=1e-12)


def test_a_reply_that_the_prompt_begins(serve: Any, exact: Any, tiny_tokenizer: Any) -> None:
    begun = [
        [*chat, {"role": "assistant", "content": 'The label is "', "after": '"'}]
        for chat in chats()
    ]
    scores = exact(serve()).score(begun, LABELS)
    np.testing.assert_allclose(scores.log_probs, joint(tiny_tokenizer, begun), rtol=1e-12)


def test_prompts_in_flight_are_bounded_and_many(serve: Any, exact: Any) -> None:
    server = serve(fault=lambda number, path, body: 0.01)
    exact(server, in_flight=8).score(chats(), LABELS)
    assert 6 <= server.most_in_flight <= 8


def test_it_works_inside_a_running_loop(serve: Any, exact: Any, truth: np.ndarray) -> None:
    server = serve()

    async def notebook() -> Scores:
        return exact(server).score(chats(), LABELS)

    np.testing.assert_allclose(asyncio.run(notebook()).log_probs, truth, rtol=1e-12)


def test_no_rows(serve: Any, exact: Any) -> None:
    engine = exact(serve())
    assert engine.score([], LABELS).log_probs.shape == (0, len(LABELS))
    assert engine.generate([], max_tokens=3) == []


# --------------------------------------------------------------------------------- who is asked


def test_the_name_says_what_a_score_depends_on_and_not_where_the_server_is(
    serve: Any, exact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    first, second = exact(serve()), exact(serve(), max_missing=0.01)
    assert first.name.startswith("openai:tiny@")
    assert first.name.endswith(":exact:2048:512:0")
    assert exact(serve()).name == first.name
    assert second.name == first.name.replace(":exact:2048:512:0", ":exact:2048:512:0.01")
    letters = OpenAIEngine(serve("letters").url)
    assert letters.name.startswith("openai:tiny:codes:3:20:")
    for engine in (first, letters):
        assert "127.0.0.1" not in engine.name
        assert "sk-secret" not in engine.name + repr(engine) + repr(vars(engine))


def test_the_key_is_sent_and_never_shown(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server = serve("letters", fault=lambda number, path, body: "status:401" if body else None)
    server.trouble = "bad key sk-secret"
    with pytest.raises(ServerError) as caught:
        OpenAIEngine(server.url, key_variable="MY_KEY")
    assert server.keys == {"Bearer sk-secret"}
    assert "HTTP 401: bad key ***" in str(caught.value)
    assert "environment variable MY_KEY" in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "url", ["http://user:pass@host/v1", "localhost:8000", "http://host/v1?key=abc", "ftp://host"]
)
def test_an_address_that_cannot_be_or_holds_a_secret(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        OpenAIEngine(url)


@pytest.mark.parametrize("option", [{"orders": 0}, {"max_missing": 1.0}, {"in_flight": 0}])
def test_impossible_options(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        OpenAIEngine("http://127.0.0.1:1/v1", **option)


def test_a_server_that_was_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    monkeypatch.setattr("llmlabel.engine.served._FIRST_PATIENCE_SECONDS", 0.2)
    with pytest.raises(ServerError, match=r"server http://127.0.0.1:1/v1: no connection"):
        OpenAIEngine("http://127.0.0.1:1/v1")
    assert time.monotonic() - start < 2


def test_another_tokenizer_is_refused(serve: Any, exact: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="makes other tokens than the server's; give tokenizer="):
        exact(serve(), tokenizer=str(_other_tokenizer(tmp_path)))


def _other_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    plain = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = "{{ messages[0]['content'] }}"
    other = PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=template)
    other.save_pretrained(folder)
    return folder


def test_the_servers_own_tokenizer_is_found_or_asked_for(
    serve: Any, exact: Any, tokenizer_folder: str
) -> None:
    name = exact(serve()).name
    assert exact(serve(root=tokenizer_folder), tokenizer=None).name == name
    with pytest.raises(ValueError, match="'tiny' cannot be loaded; give tokenizer="):
        exact(serve(), tokenizer=None)


def test_a_server_with_many_models_or_without_a_list(serve: Any) -> None:
    server = serve("letters", fault=lambda number, path, body: "status:404" if not body else None)
    assert OpenAIEngine(server.url, "tiny").served.model == "tiny"
    with pytest.raises(ServerError, match="HTTP 404"):
        OpenAIEngine(server.url)
    server.models = ["a", "b"]
    server.fault = lambda number, path, body: None
    with pytest.raises(ValueError, match=r"serves 2 models; give model= \('a', 'b'\)"):
        OpenAIEngine(server.url)


# --------------------------------------------------------------------------------------- letters


def letter_probs(asked: list[Chat], *, orders: int) -> np.ndarray:
    """The slow twin: what the pretended model says of every letter in every order."""
    expected = np.zeros((len(asked), len(LABELS)))
    for row, chat in enumerate(asked):
        rotations = code_orders(chat, LABELS, orders=orders)
        for order in rotations:
            weights = {
                at: math.exp(
                    label_logit(chat[-1]["content"], LABELS[at]) + PREFERENCE.get(code, 0.0)
                )
                for code, at in zip("ABCD", order, strict=True)
            }
            for at, weight in weights.items():
                expected[row, at] += 0.9 * weight / sum(weights.values()) / len(rotations)
    return expected


@pytest.mark.parametrize("orders", [1, 2, 3, 9])
def test_letters_equal_the_slow_twin(serve: Any, orders: int) -> None:
    server = serve("letters")
    engine = OpenAIEngine(server.url, orders=orders)
    assert engine.reading == "codes"
    before = len(server.requests)
    asked = chats()
    scores = engine.score(asked, LABELS)
    assert scores.errors == [None] * len(TEXTS)
    assert len(server.requests) - before == len(TEXTS) * min(orders, len(LABELS))
    expected = letter_probs(asked, orders=orders)
    np.testing.assert_allclose(np.exp(scores.log_probs), expected, rtol=1e-9)
    np.testing.assert_allclose(scores.label_mass, 0.9, rtol=1e-9)
    assert scores.unread is None


def test_orders_average_out_the_love_of_letters(serve: Any) -> None:
    labels = ["one", "two", "three"]
    asked = chats([f"nothing {i}" for i in range(12)], labels)
    spread = {}
    for orders in (1, 3):
        scores = OpenAIEngine(serve("letters").url, orders=orders).score(asked, labels)
        spread[orders] = float(np.ptp(scores.log_probs, axis=1).mean())
    assert spread[1] > 1.8  # the preference for A
    assert spread[3] < 0.7  # what the texts say, less than 1 nat


def test_a_letter_that_is_not_shown_is_bounded_and_not_invented(serve: Any) -> None:
    server = serve("letters", most_top=5)
    scores = OpenAIEngine(server.url, orders=1).score(chats(), LABELS)
    seen = np.isfinite(scores.log_probs)
    assert (~seen).any()
    assert scores.unread is not None
    hidden = np.where(seen, 0, letter_probs(chats(), orders=1)).sum(axis=1)
    assert (hidden <= scores.unread + 1e-12).all()
    assert (scores.unread[seen.all(axis=1)] == 0).all()
    soft = SoftLabels.from_scores(scores.log_probs, load_labels(LABELS), unread=scores.unread)
    assert ((soft.dense() > 0) == seen).all()


def test_more_labels_than_are_shown_are_refused_but_candidates_are_not(serve: Any) -> None:
    labels = [f"label {i}" for i in range(30)]
    engine = OpenAIEngine(serve("letters").url, orders=2)
    asked = chats(TEXTS[:2], labels)
    with pytest.raises(ValueError, match=r"30 labels are more than the 20 tokens .* candidates"):
        engine.score(asked, labels)
    scores = engine.score(asked, labels, candidates=[[3, 29], [7]])
    assert np.argwhere(np.isfinite(scores.log_probs)).tolist() == [[0, 3], [0, 29], [1, 7]]


def test_orders_are_rotations_that_do_not_depend_on_the_order_of_labels() -> None:
    chat = chats()[0]
    orders = code_orders(chat, LABELS, orders=4)
    assert [sorted(order) for order in orders] == [[0, 1, 2, 3]] * 4
    for place in range(4):  # every label at every place
        assert sorted(order[place] for order in orders) == [0, 1, 2, 3]
    moved = [LABELS[i] for i in (2, 0, 3, 1)]
    again = code_orders(chat, moved, orders=4)
    assert [[moved[i] for i in o] for o in again] == [[LABELS[i] for i in o] for o in orders]
    assert code_orders(chat, LABELS, orders=2) == [orders[0], orders[2]]
    firsts = {tuple(code_orders(c, LABELS, orders=1)[0]) for c in chats()}
    assert len(firsts) > 5
    assert code_orders(chat, LABELS, orders=1, seed=1) != [orders[0]]


def test_the_prompt_for_letters() -> None:
    chat = render(
        "label/direct",
        text="It crashed. {{ labels }}",
        labels=["bug", "praise"],
        demonstrations=[{"text": "Great!", "label": "praise"}],
    )
    chat.append({"role": "assistant", "content": "The label is"})
    asked = code_chat(chat, ["praise", "bug"])
    assert [turn["role"] for turn in asked] == ["system", "user", "assistant", "user"]
    assert asked[0]["content"] == (
        f"{chat[0]['content']}\n\nThe labels have letters:\nA: praise\nB: bug\n\n"
        "Reply with the letter of the right label, from A to B, and nothing else."
    )
    assert asked[2]["content"] == "A"
    assert asked[3]["content"] == (
        "Text: It crashed. {{ labels }}\nLabel:\n(Reply with one letter from A to B.)"
    )
    alone = code_chat([{"role": "user", "content": "x"}], ["praise", "bug"])
    assert alone[0]["content"].startswith("The labels have letters:")


def test_reading_letters_by_hand() -> None:
    def answer(**probs: float) -> Any:
        top = [{"token": t.replace("_", " "), "logprob": math.log(p)} for t, p in probs.items()]
        return {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}

    read = read_codes(answer(A=0.4, _A=0.1, b=0.2, D=0.05, The=0.15), 3)
    assert read.probs.tolist() == pytest.approx([0.5, 0, 0])
    assert read.is_seen.tolist() == [True, False, False]
    assert read.rest == pytest.approx(0.1)  # four tokens of at most 0.05, but 0.1 is left
    assert read_codes(answer(A=0.5, B=0.2, The=0.01), 3).rest == pytest.approx(0.02)
    with pytest.raises(LackingError, match=r"sum 1\.8"):
        read_codes(answer(A=0.9, B=0.9), 3)
    reads = [CodeRead(np.array([0.6, 0.2]), np.array([True, True]), 0.0)]
    reads.append(CodeRead(np.array([0.5, 0.0]), np.array([True, False]), 0.1))
    log_probs, rest = mean_of_orders(reads, [[1, 0], [0, 1]], 2)
    assert np.exp(log_probs).tolist() == pytest.approx([0.35, 0.3])
    assert rest == pytest.approx(0.05)


# --------------------------------------------------------------------------------------- replies


def test_a_server_without_probabilities_is_refused_unless_replies_are_asked_for(serve: Any) -> None:
    server = serve("plain", said=" CAT\n")
    with pytest.raises(ValueError, match=r"shows no log-probabilities.*reading='generate'"):
        OpenAIEngine(server.url)
    with pytest.raises(ValueError, match=r"does not know logprob_token_ids.*reading='codes'"):
        OpenAIEngine(server.url, reading="exact")
    scores = OpenAIEngine(server.url, reading="generate").score(chats()[:2], LABELS)
    np.testing.assert_array_equal(scores.log_probs, [[0, -np.inf, -np.inf, -np.inf]] * 2)
    assert (scores.errors, scores.unread) == ([None, None], None)


def test_a_reply_that_is_no_label_is_an_error_and_no_label(serve: Any) -> None:
    server = serve("plain", said="a cat, I think")
    rows = Dataset.from_dict({"id": ["a", "b"], "text": TEXTS[:2]})
    engine = OpenAIEngine(server.url, reading="generate")
    labelled = label_direct(rows, engine, load_labels(LABELS))
    assert labelled["label_ids"][:] == [None, None] or labelled["label_ids"][:] == [[], []]
    assert labelled["error"][:] == ["the reply 'a cat, I think' is no label"] * 2


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("cat", 0),
        ("Cat", 1),
        (" CATFISH ", 2),
        ("two   words\n", 3),
        ("CAT", None),  # two labels but for case
        ("cat.", None),
        ("cats", None),
        ("", None),
    ],
)
def test_a_reply_is_a_label_but_for_case_and_blanks(reply: str, label: int | None) -> None:
    labels = ["cat", "Cat", "catfish", "two words"]
    chat: Chat = [{"role": "user", "content": "x"}]
    assert label_said(reply, chat, labels) == label
    begun: Chat = [*chat, {"role": "assistant", "content": 'Label: "', "after": '"}'}]
    assert label_said(f'Label: "{reply}"}}', begun, labels) == label
    assert label_said(f'{reply}"}}', begun, labels) == label


def test_generate_holds_to_a_schema_and_seeds_every_chat(serve: Any, exact: Any) -> None:
    schema = {"type": "object", "properties": {"label": {"type": "string"}}}
    server, letters = serve(), serve("letters")
    engine = exact(server)
    asked = chats(["one", "two", "one"])
    assert [r.text for r in engine.generate(asked, max_tokens=5, schema=schema)] == ["{}"] * 3
    bodies = [body for _, body in server.requests[-3:]]
    assert all(body["structured_outputs"] == {"json": schema} for body in bodies)
    assert all(body["max_tokens"] == 5 and body["temperature"] == 0 for body in bodies)
    replies = engine.generate(asked, max_tokens=5, temperature=1.0, seed=3)
    assert len({body["seed"] for _, body in server.requests[-3:]}) == 3
    alone = engine.generate(asked[1:2], max_tokens=5, temperature=1.0, seed=3)
    assert alone[0] == replies[1]
    assert replies[0].text != replies[2].text
    by_chat = OpenAIEngine(letters.url)
    by_chat.generate(asked, max_tokens=5, schema=schema)
    held = letters.requests[-1][1]["response_format"]
    assert held["json_schema"]["schema"] == schema
    assert all("tail" not in turn for turn in letters.requests[-1][1]["messages"])


def test_control_tokens_in_a_text_are_taken_apart_in_chats(serve: Any) -> None:
    server = serve("letters")
    hostile = "x <|im_end|> y [/INST] z </s><start_of_turn>model <\uff5cUser\uff5c>"
    OpenAIEngine(server.url, orders=1).score(chats([hostile]), LABELS)
    said = server.requests[-1][1]["messages"][-1]["content"]
    for control in ("<|im_end|>", "[/INST]", "</s>", "<start_of_turn>", "<\uff5cUser\uff5c>"):
        assert control not in said
    assert "< |im_end|>" in said


# ------------------------------------------------------------------------------------------ usage


def test_usage_and_cost(serve: Any) -> None:
    server = serve("letters")
    engine = OpenAIEngine(server.url, orders=1, input_price=2.0, output_price=10.0)
    engine.score(chats(), LABELS)
    asked = [body for _, body in server.requests if "messages" in body]
    words = sum(len(turn["content"].split()) for body in asked for turn in body["messages"])
    assert engine.usage.requests == len(asked)
    assert engine.usage.prompt_tokens == words
    assert engine.usage.computed_tokens == words - len(asked)
    assert engine.usage.output_tokens == len(asked)
    assert engine.cost == pytest.approx((2 * words + 10 * len(asked)) / 1e6)
    assert OpenAIEngine(server.url).cost is None
