"""An engine that remembers: no request is sent twice, not even after a crash or a code change."""

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmlabel.engine import Engine, Reply, Scores, Usage
from llmlabel.prompt import Chat


class CachedEngine:
    """Wraps an engine; requests are keyed by engine name, chat and parameters.

    Args:
        engine: the engine that answers what is not yet known.
        path: a SQLite file; made when it is not there, safe for several processes.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine, self.name, self.path = engine, engine.name, path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=60)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, value TEXT)"
            )
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(f"cache {path}: {error}; delete the file or give another") from error

    @property
    def usage(self) -> Usage:
        """What the wrapped engine was asked; nothing where it does not count."""
        return getattr(self.engine, "usage", Usage())

    @property
    def cost(self) -> float | None:
        """Price of that, where the wrapped engine has prices."""
        return getattr(self.engine, "cost", None)

    def close(self) -> None:
        """Closes the file; what was answered stays."""
        self._db.close()

    def generate(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> list[Reply]:
        """Known replies from the file, the others from the engine in one call."""
        asked = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        keys = [self._key("generate", chat, {**asked, "schema": schema}) for chat in chats]
        known = self._read(keys)
        missing = [i for i, key in enumerate(keys) if key not in known]
        if missing:
            new = self.engine.generate([chats[i] for i in missing], schema=schema, **asked)  # type: ignore[arg-type]  # one dict of int and float
            rows = [[r.text, r.finish_reason, r.error] for r in new]
            self._write({keys[i]: row for i, row in zip(missing, rows, strict=True)}, known)
        return [Reply(*known[key]) for key in keys]

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        """Known scores from the file, the others from the engine in one call."""
        keys = [
            self._key("score", chat, [list(labels), candidates and list(candidates[i])])
            for i, chat in enumerate(chats)
        ]
        known = self._read(keys)
        missing = [i for i, key in enumerate(keys) if key not in known]
        if missing:
            some = None if candidates is None else [candidates[i] for i in missing]
            new = self.engine.score([chats[i] for i in missing], labels, candidates=some)
            errors = new.errors or [None] * len(missing)
            unread = [None] * len(missing) if new.unread is None else new.unread.tolist()
            sizes: list[int | None] = [*new.prompt_tokens] or [None] * len(missing)
            rows = [
                [values.tolist(), error, rest, size]
                for values, error, rest, size in zip(
                    new.log_probs, errors, unread, sizes, strict=True
                )
            ]
            self._write({keys[i]: row for i, row in zip(missing, rows, strict=True)}, known)
        log_probs = np.array([known[key][0] for key in keys], dtype=np.float64)
        rest = np.array([known[key][2] or 0.0 for key in keys], dtype=np.float64)
        told = [(*known[key], None)[3] for key in keys]  # older files hold three values
        return Scores(
            log_probs.reshape(len(chats), len(labels)),
            [known[key][1] for key in keys],
            rest if rest.any() else None,
            [] if None in told else told,
        )

    def _key(self, verb: str, chat: Chat, parameters: Any) -> str:
        content = json.dumps([self.name, verb, chat, parameters], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _read(self, keys: list[str]) -> dict[str, Any]:
        found = {}
        for start in range(0, len(keys), 500):  # SQLite's limit of variables per statement is 999
            some = keys[start : start + 500]
            marks = ",".join("?" * len(some))
            query = f"SELECT key, value FROM replies WHERE key IN ({marks})"
            found.update({k: json.loads(v) for k, v in self._db.execute(query, some)})
        return found

    def _write(self, new: dict[str, Any], known: dict[str, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in new.items()]
        try:
            with self._db:
                self._db.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise OSError(f"cache {self.path}: {error}; what was answered before stays") from error
        known.update(new)
