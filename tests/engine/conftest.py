"""Fixtures of the tests that ask a server."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from engine.openai_server import (
    FakeServer,
    chats,
    joint,
)

from llmlabel.engine import server as server_module
from llmlabel.engine.openai import OpenAIEngine


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, no key, and no proxy between the tests and their servers."""
    monkeypatch.setattr(server_module, "_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(server_module, "_MOST_SECONDS", 0.1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def serve(tiny_tokenizer: Any) -> Iterator[Callable[..., FakeServer]]:
    servers: list[FakeServer] = []

    def serve(kind: str = "vllm", **options: Any) -> FakeServer:
        servers.append(FakeServer(tiny_tokenizer, kind=kind, **options).__enter__())
        return servers[-1]

    yield serve
    for server in servers:
        server.kill()


@pytest.fixture
def exact(tokenizer_folder: str) -> Callable[..., OpenAIEngine]:
    def exact(server: FakeServer, **options: Any) -> OpenAIEngine:
        given = {"tokenizer": tokenizer_folder, "max_missing": 0.0, **options}
        return OpenAIEngine(server.url, **given)

    return exact


@pytest.fixture(scope="module")
def shared(tiny_tokenizer: Any, tokenizer_folder: str) -> Iterator[OpenAIEngine]:
    with FakeServer(tiny_tokenizer) as server:
        yield OpenAIEngine(server.url, tokenizer=tokenizer_folder)


@pytest.fixture(scope="module")
def truth(tiny_tokenizer: Any) -> np.ndarray:
    return joint(tiny_tokenizer, chats())
