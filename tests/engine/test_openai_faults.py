"""Every fault that a server may have: rows in are rows out, and no label is invented."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from engine.openai_server import (
    LABELS,
    TEXTS,
    Fault,
    chats,
    storm,
)

from llmlabel.engine.openai import OpenAIEngine
from llmlabel.engine.server import ServerError
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels

pytestmark = pytest.mark.usefixtures("quick")


PASSING = [
    "garbage",
    "empty",
    "truncate",
    "status:500",
    "status:503:0.01",
    "status:429:0.05",
    "lost",
]


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("kind", ["vllm", "letters"])
def test_a_fault_that_passes_changes_nothing(
    serve: Any, exact: Any, truth: np.ndarray, fault: str, kind: str
) -> None:
    at = {"on": False}
    bad = iter(range(2 if fault == "lost" else 4))  # a read is given up after three

    def fails(number: int, path: str, body: dict[str, Any]) -> str | None:
        return fault if at["on"] and number % 2 == 0 and next(bad, None) is not None else None

    server = serve(kind, fault=fails)
    engine = exact(server) if kind == "vllm" else OpenAIEngine(server.url)
    expected = truth if kind == "vllm" else engine.score(chats(), LABELS).log_probs
    at["on"] = True
    scores = engine.score(chats(), LABELS)
    np.testing.assert_allclose(scores.log_probs, expected, rtol=1e-12)
    assert scores.errors == [None] * len(TEXTS)
    assert next(bad, None) is None  # the faults did happen


def test_a_storm_of_429_is_waited_for_as_long_as_it_says(
    serve: Any, exact: Any, truth: np.ndarray
) -> None:
    server = serve()
    engine = exact(server)
    calm, start = len(server.requests), time.monotonic()
    server.fault = storm(0.6, fault="status:429:0.3")
    scores = engine.score(chats(), LABELS)
    assert time.monotonic() - start > 0.6
    np.testing.assert_allclose(scores.log_probs, truth, rtol=1e-12)
    refused = len(server.requests) - calm - engine.usage.requests + calm - 1
    assert refused <= 3 * 32  # nobody hammers a server that asks for a pause


def test_a_pause_that_is_too_long_is_an_error_at_once(serve: Any, exact: Any) -> None:
    server = serve()
    engine = exact(server, patience_seconds=5.0)
    server.fault = lambda number, path, body: "status:429:3600"
    start = time.monotonic()
    with pytest.raises(ServerError, match="asks to wait 3600 s"):
        engine.score(chats(), LABELS)
    assert time.monotonic() - start < 2


def test_a_server_that_hangs(serve: Any, exact: Any, truth: np.ndarray) -> None:
    server = serve()
    engine = exact(server, timeout_seconds=0.3)
    began = len(server.requests)
    server.fault = lambda number, path, body: "hang:5" if number - began < 3 else None
    scores = engine.score(chats(), LABELS)
    np.testing.assert_allclose(scores.log_probs, truth, rtol=1e-12)


def test_killed_in_the_middle_and_started_again(serve: Any, exact: Any, truth: np.ndarray) -> None:
    calm = exact(serve(), in_flight=4)
    calm.score(chats(), LABELS)
    server = serve()
    engine = exact(server, in_flight=4)
    began, again, probed = len(server.requests), [], []
    _, probe = engine.served.known_good

    def dies(number: int, path: str, body: dict[str, Any]) -> float | None:
        if number - began == 10:
            threading.Thread(target=restart).start()
            return 1.0
        return None

    def restart() -> None:
        server.kill()
        time.sleep(0.3)
        again.append(serve(port=server.server_address[1], fault=ill_until_probed))

    def ill_until_probed(number: int, path: str, body: dict[str, Any]) -> str | None:
        probed.append(body == probe)
        return None if any(probed) else "status:500"

    server.fault = dies
    scores = engine.score(chats(), LABELS)
    np.testing.assert_allclose(scores.log_probs, truth, rtol=1e-12)
    assert scores.errors == [None] * len(TEXTS)
    assert again[0].prompts()  # both have answered
    # Beside the reads, a client that fails often asks whether the server answers anything at all.
    answered = engine.usage.output_tokens - sum(probed)
    assert answered == calm.usage.output_tokens  # no read was counted twice


@pytest.mark.parametrize("fault", ["status:500", "garbage", "refused"])
def test_a_server_that_stays_broken_is_an_error_and_not_rows_without_labels(
    serve: Any, exact: Any, fault: str
) -> None:
    server = serve()
    engine = exact(server, patience_seconds=0.5, in_flight=4)
    if fault == "refused":
        server.kill()
    else:
        server.fault = lambda number, path, body: fault
    start, before = time.monotonic(), len(server.requests)
    with pytest.raises(ServerError, match="run the same command again") as caught:
        engine.score(chats(), LABELS)
    assert server.url in str(caught.value)
    assert time.monotonic() - start < 3
    assert len(server.requests) - before < 200


def poison(tokenizer: Any, row: int, fault: str) -> Fault:
    """A fault of the requests about one of the texts."""
    ids = tokenizer(f"number {row}\n", add_special_tokens=False).input_ids

    def at(number: int, path: str, body: dict[str, Any]) -> str | None:
        starts = [(p, i) for p in body.get("prompt", ()) for i in range(len(p) - len(ids))]
        in_chat = f"number {row}\n" in json.dumps(body.get("messages", "")).replace("\\n", "\n")
        return fault if in_chat or any(p[i : i + len(ids)] == ids for p, i in starts) else None

    return at


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("status:500", "HTTP 500: trouble 500"),
        ("status:400", "HTTP 400: trouble 400"),
        ("garbage", "unreadable answer"),
        ("truncate", "no connection"),
        ("lost", "the server lost the log-probability of a label's token"),
        ("clamped", "the server gave -9999 as a log-probability"),
        ("logit", "the server gave 3.5 as a log-probability"),
    ],
)
def test_one_row_that_the_server_cannot_bear_is_one_error(
    serve: Any, exact: Any, truth: np.ndarray, tiny_tokenizer: Any, fault: str, message: str
) -> None:
    server = serve()
    engine = exact(server, patience_seconds=3.0)
    server.fault = poison(tiny_tokenizer, 5, fault)
    before = len(server.requests)
    scores = engine.score(chats(), LABELS)
    assert (scores.log_probs[5] == -np.inf).all()
    assert scores.unread is not None
    assert scores.unread[5] == 1
    assert message in str(scores.errors[5])
    assert server.url not in str(scores.errors[5])
    others = [row for row in range(len(TEXTS)) if row != 5]
    np.testing.assert_allclose(scores.log_probs[others], truth[others], rtol=1e-12)
    assert [scores.errors[row] for row in others] == [None] * len(others)
    assert len(server.requests) - before < 200


def test_in_letters_too(serve: Any, tiny_tokenizer: Any) -> None:
    server = serve("letters")
    engine = OpenAIEngine(server.url)
    expected = engine.score(chats(), LABELS)
    server.fault = poison(tiny_tokenizer, 5, "clamped")
    scores = engine.score(chats(), LABELS)
    assert (scores.log_probs[5] == -np.inf).all()
    assert scores.errors[5] == "the server gave -9999 as a log-probability"
    others = [row for row in range(len(TEXTS)) if row != 5]
    np.testing.assert_array_equal(scores.log_probs[others], expected.log_probs[others])


def test_rows_in_are_rows_out(serve: Any, exact: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Through `label_direct`: an error names what happened, and the row has no label."""
    server = serve()
    engine = exact(server)
    server.fault = poison(tiny_tokenizer, 3, "lost")
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(len(TEXTS))], "text": TEXTS})
    labels = load_labels(LABELS)
    labelled = label_direct(rows, engine, labels, output=tmp_path, block_rows=4)
    assert labelled["id"][:] == rows["id"][:]
    soft = SoftLabels.from_dataset(labelled, labels)
    assert np.flatnonzero(soft.dense().sum(axis=1) == 0).tolist() == [3]
    assert [row for row, error in enumerate(labelled["error"][:]) if error] == [3]
    assert "lost the log-probability" in labelled["error"][3]


def test_replies_that_cannot_be_had(serve: Any, tiny_tokenizer: Any) -> None:
    server = serve("plain", said="cat")
    engine = OpenAIEngine(server.url, reading="generate")
    server.fault = poison(tiny_tokenizer, 2, "status:400")
    replies = engine.generate(chats()[:4], max_tokens=5)
    assert [reply.error is None for reply in replies] == [True, True, False, True]
    assert (replies[2].text, replies[2].finish_reason) == ("", "error")
    assert engine.score(chats()[:4], LABELS).errors[2] == "HTTP 400: trouble 400"
