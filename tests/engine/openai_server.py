"""A small OpenAI-like server in this process: no model, known probabilities, faults on demand.

`kind` says what it can do: "vllm" reads chosen tokens and tokenizes; "letters" shows the most
probable tokens in the chat API; "plain" shows no probabilities.
"""

import contextlib
import hashlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import numpy as np

from llmlabel.engine.labeltrie import tokens_and_trie
from llmlabel.prompt import Chat, render

MODEL, END = "tiny", 2
PREFERENCE = {"A": 2.0, "B": 0.5}
"""What the pretended model adds to the logits of letters, whatever the text says."""

Fault = Callable[[int, str, dict[str, Any]], str | float | None]
"""(number of the request, path, body) -> what goes wrong; a number is seconds of delay."""


def next_token_log_probs(prompt: list[int], vocabulary: int) -> np.ndarray:
    """The pretended model: random logits that the whole prompt decides."""
    digest = hashlib.sha256(json.dumps(prompt).encode()).digest()
    logits = np.random.default_rng(int.from_bytes(digest[:8])).normal(0, 2, vocabulary)
    return logits - np.logaddexp.reduce(logits)


def option_logits(chat: list[dict[str, str]]) -> dict[str, float]:
    """Letter -> logit: from the text and the option's name, and the model's love of letters."""
    options = [line.split(": ", 1) for line in chat[0]["content"].split("\n") if line[1:3] == ": "]
    text = chat[-1]["content"].split("\n(Reply")[0]
    return {code: label_logit(text, name) + PREFERENCE.get(code, 0.0) for code, name in options}


def label_logit(text: str, label: str) -> float:
    digest = hashlib.sha256(f"{text}|{label}".encode()).digest()
    return 3 * (label.lower() in text.lower()) + int.from_bytes(digest[:6]) / 2**48


class FakeServer(ThreadingHTTPServer):
    """Used as a context; `kill` ends it at once, with all its connections."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        kind: str = "vllm",
        port: int = 0,
        fault: Fault | None = None,
        root: str = MODEL,
        most_top: int = 20,
        said: str | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.tokenizer, self.kind, self.root, self.most_top = tokenizer, kind, root, most_top
        self.fault: Fault = fault or (lambda number, path, body: None)
        self.said = said
        self.trouble = "trouble"
        self.models = [MODEL]
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str] = set()
        self.in_flight = self.most_in_flight = 0  # prompts
        self.lock, self.released = threading.Lock(), threading.Event()
        self.connections: set[socket.socket] = set()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def prompts(self) -> list[list[int]]:
        """Of all exact reads, each prompt of a request for itself."""
        bodies = [body for _, body in self.requests if "logprob_token_ids" in body]
        return [prompt for body in bodies for prompt in body["prompt"]]

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        self.released.set()
        if self.thread.is_alive():
            self.shutdown()
        self.server_close()
        with self.lock:
            for connection in list(self.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has gone


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections.add(self.connection)

    def finish(self) -> None:
        with self.server.lock:
            self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def answer(self, body: dict[str, Any]) -> None:
        server, prompt = self.server, body.get("prompt")
        prompts = len(prompt) if isinstance(prompt, list) else 1
        with server.lock:
            number = len(server.requests)
            server.requests.append((self.path, body))
            server.keys.add(self.headers.get("authorization", ""))
            server.in_flight += prompts
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            fault = server.fault(number, self.path, body)
            if isinstance(fault, float):
                server.released.wait(fault)
                fault = None
            self.respond(fault, body)
        finally:
            with server.lock:
                server.in_flight -= prompts

    def respond(self, fault: str | None, body: dict[str, Any]) -> None:
        name, _, value = (fault or "").partition(":")
        if name == "status":
            status, _, after = value.partition(":")
            message = {"error": {"message": f"{self.server.trouble} {status}"}}
            return self.send(
                json.dumps(message), int(status), {"retry-after": after} if after else {}
            )
        if name == "hang":
            self.server.released.wait(float(value))
            self.close_connection = True
            return None
        status, content = _content(self.server, self.path, body)
        if name == "garbage":
            return self.send("<html>Bad gateway</html>")
        if name == "empty":
            return self.send("{}")
        if name in ("lost", "clamped", "logit"):
            _spoil(content, name)
        text = json.dumps(content)
        if name == "truncate":
            self.send_response(200)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2].encode())
            self.close_connection = True
            return None
        return self.send(text, status)

    def send(self, text: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _content(server: FakeServer, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    if path == "/v1/models":
        more = {"root": server.root, "max_model_len": 4096} if server.kind == "vllm" else {}
        return 200, {"data": [{"id": name, **more} for name in server.models]}
    if path == "/tokenize" and server.kind == "vllm":
        return 200, {"tokens": server.tokenizer(body["prompt"], add_special_tokens=False).input_ids}
    if path == "/v1/completions" and server.kind == "vllm":
        return _completion(server, body)
    if path == "/v1/chat/completions":
        return _chat(server, body)
    return 404, {"error": {"message": f"no such path: {path}"}}


def _completion(server: FakeServer, body: dict[str, Any]) -> tuple[int, Any]:
    ids = body.get("logprob_token_ids")
    if ids is not None and (len(ids) > 128 or body.get("logprobs") is None):
        return 400, {"error": {"message": "at most 128 logprob_token_ids"}}
    choices, written = [], 0
    for index, prompt in enumerate(body["prompt"]):
        if len(prompt) > 4096:
            return 400, {"error": {"message": "maximum context length is 4096 tokens"}}
        if ids is None:
            choices.append({"index": index, "text": _reply(server, body), "finish_reason": "stop"})
            continue
        shown, tokens = [], []
        while len(tokens) < body["max_tokens"] and END not in tokens:
            log_probs = next_token_log_probs(prompt + tokens, len(server.tokenizer))
            allowed = body.get("allowed_token_ids") or range(len(log_probs))
            tokens.append(max(allowed, key=lambda token: log_probs[token]))
            shown.append({f"token_id:{t}": float(log_probs[t]) for t in [*ids, tokens[-1]]})
        logprobs = {"top_logprobs": shown, "tokens": [f"token_id:{token}" for token in tokens]}
        written += len(tokens)
        choices.append(
            {"index": index, "text": "x", "logprobs": logprobs, "finish_reason": "length"}
        )
    used = sum(map(len, body["prompt"]))
    usage = {"prompt_tokens": used, "completion_tokens": written}
    return 200, {"choices": choices[::-1], "usage": usage}  # in an order of its own


def _reply(server: FakeServer, body: dict[str, Any]) -> str:
    if server.said is not None:
        return server.said
    if "response_format" in body or "structured_outputs" in body:
        return "{}"
    drawn = body.get("seed") if body.get("temperature") else None
    return hashlib.sha256(
        json.dumps([body.get("messages", body.get("prompt")), drawn]).encode()
    ).hexdigest()


def _chat(server: FakeServer, body: dict[str, Any]) -> tuple[int, Any]:
    chat = body["messages"]
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    choice["message"] = {"role": "assistant", "content": _reply(server, body)}
    if body.get("logprobs") and server.kind != "plain":
        if body["top_logprobs"] > server.most_top:
            return 400, {"error": {"message": f"top_logprobs must be at most {server.most_top}"}}
        logits = option_logits(chat)
        # Half of a letter's probability comes with a blank before it; other tokens take a tenth.
        scale = math.log(0.9) - float(np.logaddexp.reduce(list(logits.values()) or [0.0]))
        shown = {}
        for code, logit in logits.items():
            for token in (code, f" {code}"):
                shown[token] = logit + scale + math.log(0.5)
        shown |= {"The": math.log(0.07), "I": math.log(0.02), "Label": math.log(0.01)}
        best = sorted(shown.items(), key=lambda one: -one[1])[: body["top_logprobs"]]
        top = [{"token": token, "logprob": value} for token, value in best]
        choice["logprobs"] = {
            "content": [{"token": best[0][0], "logprob": best[0][1], "top_logprobs": top}]
        }
    words = sum(len(turn["content"].split()) for turn in chat)
    details = {"cached_tokens": 1}
    usage = {"prompt_tokens": words, "completion_tokens": 1, "prompt_tokens_details": details}
    return 200, {"choices": [choice], "usage": usage}


def _spoil(content: Any, name: str) -> None:
    """Takes one log-probability away, or makes it what no log-probability is."""
    value = {"lost": None, "clamped": -9999.0, "logit": 3.5}[name]
    for choice in content.get("choices", []):
        logprobs = choice.get("logprobs") or {}
        for shown in logprobs.get("top_logprobs", []):
            for token in list(shown)[:1]:
                del shown[token]
                if value is not None:
                    shown[token] = value
        for step in logprobs.get("content", []):
            if value is None:
                step["top_logprobs"] = []
            else:
                step["top_logprobs"][-1]["logprob"] = value


def storm(seconds: float, *, fault: str, after: int = 0) -> Fault:
    """A fault of every request from number `after` on, for some seconds."""
    began: list[float] = []

    def at(number: int, path: str, body: dict[str, Any]) -> str | None:
        if number < after:
            return None
        began.append(time.monotonic())
        return fault if time.monotonic() - began[0] < seconds else None

    return at


# What the tests of the engine ask of it.

LABELS = ["cat", "catfish", "business", "sports"]
TEXTS = [f"a text about {word} number {i}" for i, word in enumerate(["cats", "money"] * 3)]


def chats(texts: list[str] = TEXTS, labels: list[str] = LABELS) -> list[Chat]:
    return [render("label/direct", text=text, labels=labels) for text in texts]


def joint(tokenizer: Any, asked: list[Chat], labels: list[str] = LABELS) -> np.ndarray:
    """The slow twin: one label after the other, one token after the other."""
    trie, rows, _ = tokens_and_trie(tokenizer, asked, labels, max_tokens=2048)
    paths = [
        [*trie.path(int(node)), int(token)]
        for node, token in zip(trie.last_node, trie.last_token, strict=True)
    ]
    values = [
        [
            sum(
                next_token_log_probs(ids + path[:at], len(tokenizer))[path[at]]
                for at in range(len(path))
            )
            for path in paths
        ]
        for ids in rows
    ]
    return np.array(values)
