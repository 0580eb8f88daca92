"""Committed blocks: work on rows that a crash cannot undo.

A block of rows is computed, written to a temporary file, flushed to the disk and renamed. Its name
carries the call and its rows, so the same call finds it again and another call never does. Beside
the blocks stands, in words, which call they belong to: who resumes with another one, by a change of
the label space for example, learns what differs instead of paying for all rows again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features

from llmlabel import progress
from llmlabel.data import require_columns, with_columns
from llmlabel.files import arrow_table, commit, lock, write_text
from llmlabel.labelspace import LabelSpace

Key = str | Mapping[str, Any]
Numbered = tuple[int, Dataset]
"""The number of a block and its rows."""

_SHOWN = 5
"""Labels that an error names before it only counts the others."""


def map_blocks(
    dataset: Dataset,
    compute: Callable[[Dataset], Dataset],
    *,
    columns: Iterable[str],
    key: Key,
    output: Path | None,
    block_rows: int,
    name: str,
    reads: Sequence[str] = (),
) -> Dataset:
    """Adds columns to a dataset block by block, each kept as soon as it is done.

    The same call after a crash, or with more rows at the end, computes only what is missing.

    Args:
        dataset: rows with `id` and `text`.
        compute: a block of rows -> the same rows with `columns` added or replaced.
        columns: what `compute` adds.
        key: stands for everything but ids and texts that the result depends on. As a mapping from
            words, such as `{"engine": engine.name, "labels": labels}`, to JSON or a label space it
            also protects `output`: what a call with another `key` has begun there is refused. Under
            a text, blocks of other calls simply stay beside.
        output: blocks are kept in its folder `blocks`; None keeps nothing.
        block_rows: rows in a block.
        name: what messages and the progress display call this work.
        reads: columns besides `id` and `text` whose values the result depends on.

    Raises:
        ValueError: there are no rows, two have the same id, `compute` lost or invented some, or
            the blocks in `output` belong to another call.
        RuntimeError: another process works in `output`.
    """

    def compute_all(blocks: Iterator[Numbered]) -> Iterator[Numbered]:
        for number, block in blocks:
            yield number, compute(block).select_columns(["id", *columns])

    return commit_blocks(
        dataset,
        compute_all,
        key=key,
        output=output,
        block_rows=block_rows,
        name=name,
        reads=reads,
    )


def commit_blocks(
    dataset: Dataset,
    compute_all: Callable[[Iterator[Numbered]], Iterable[Numbered]],
    *,
    key: Key,
    output: Path | None,
    block_rows: int,
    name: str,
    reads: Sequence[str] = (),
) -> Dataset:
    """`map_blocks` for one who computes several blocks at a time, in any order.

    Args:
        dataset: see `map_blocks`, as for all but `compute_all`.
        compute_all: the blocks that are missing -> the `id` and the new columns of each. A block is
            committed when it is yielded.
        key: see there.
        output: see there.
        block_rows: see there.
        name: see there.
        reads: see there.

    Raises:
        ValueError: as there, or a block did not come back.
    """
    require_columns(dataset, "id", "text", *reads)
    if not len(dataset):
        raise ValueError(f"{name}: there are no rows to work on")
    if block_rows < 1:
        raise ValueError(f"{name}: block_rows must be at least 1; got {block_rows}")
    rows = arrow_table(dataset.select_columns(["id", "text", *reads]))
    _refuse_same_ids(rows["id"], name)
    spans = [range(at, min(at + block_rows, len(rows))) for at in range(0, len(rows), block_rows)]
    folder = None if output is None else output / "blocks"
    with (
        nullcontext() if folder is None else lock(folder),
        progress.task(name, total=len(rows)) as advance,
    ):
        files = {} if folder is None else _files(folder, key, name, rows, spans)
        tables = {i: table for i, file in files.items() if (table := _kept(file, len(spans[i])))}
        if kept := sum(table.num_rows for table in tables.values()):
            advance(kept)
        missing = [i for i in range(len(spans)) if i not in tables]
        blocks = ((i, dataset.select(spans[i])) for i in missing)
        for i, result in compute_all(blocks) if missing else ():
            table = _checked(result, rows["id"].slice(spans[i].start, len(spans[i])), name)
            if files:
                _keep(files[i], table)
            tables[i] = table
            advance(table.num_rows)
    if lost := [i for i in missing if i not in tables]:
        raise ValueError(f"{name}: {len(lost)} of {len(spans)} blocks did not come back")
    whole = pa.concat_tables([tables.pop(i) for i in range(len(spans))])
    features = Features.from_arrow_schema(whole.schema)
    return with_columns(dataset, {c: (whole[c], features[c]) for c in whole.column_names})


def _refuse_same_ids(ids: pa.ChunkedArray, name: str) -> None:
    if pc.count_distinct(ids, mode="all").as_py() < len(ids):
        id, times = Counter(ids.to_pylist()).most_common(1)[0]
        raise ValueError(f"{name}: {times} rows have the id {id!r}; give each an id of its own")


def _checked(result: Dataset, ids: pa.ChunkedArray, name: str) -> pa.Table:
    """The new columns of a block, when its rows are those that were given."""
    table = arrow_table(result)
    if not table["id"].cast(ids.type).equals(ids):
        raise ValueError(
            f"{name}: {len(result)} rows came back for a block of {len(ids)} rows that begins "
            f"with id {ids[0].as_py()!r}, or in another order; rows in = rows out"
        )
    return table.drop_columns(["id"]).combine_chunks()


# ---------------------------------------------------------------------------- files of the blocks


def _files(
    folder: Path, key: Key, name: str, rows: pa.Table, spans: list[range]
) -> dict[int, Path]:
    """Number of each block -> its file, after a look at whose blocks there are in the folder."""
    call: dict[str, Any] = {"llmlabel": version("llmlabel")}
    if isinstance(key, str):
        call["key"] = key
    else:
        call |= json.loads(json.dumps(key, default=_in_words))
        _refuse_another_call(folder / f"{name}.json", call, name)
    digest = hashlib.sha256(json.dumps([name, call], sort_keys=True).encode())
    return {
        i: folder / f"{_content_sha(digest, rows.slice(span.start, len(span)))}.parquet"
        for i, span in enumerate(spans)
    }


def _content_sha(call: Any, rows: pa.Table) -> str:
    """24 hex digits of a call and of what it reads of a block, however Arrow holds that."""
    content = call.copy()
    own = {name: rows[name].to_pylist() for name in rows.column_names if name not in ("id", "text")}
    if own:
        content.update(json.dumps(own, sort_keys=True, default=str).encode())
    for name in ("id", "text"):  # without a Python object for every row
        column = rows[name].cast(pa.large_string()).combine_chunks()
        lengths = pc.binary_length(column).fill_null(-1)  # null is not ""
        column = column.fill_null("")
        _, offsets, data = column.buffers()
        first, last = np.frombuffer(offsets, np.int64)[[column.offset, column.offset + len(column)]]
        content.update(lengths.to_numpy().astype("<i8").tobytes())
        content.update(b"" if data is None else memoryview(data)[first:last])
    return str(content.hexdigest()[:24])


def _kept(file: Path, rows: int) -> pa.Table | None:
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            table = opened.read()
    except (OSError, pa.ArrowException):  # not there, or damaged: computed again
        return None
    return table if table.num_rows == rows else None


def _keep(file: Path, table: pa.Table) -> None:
    commit(file, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True))


# --------------------------------------------------------------------------------- another call


def _in_words(value: object) -> dict[str, Any]:
    if not isinstance(value, LabelSpace):
        raise TypeError(f"a key of blocks is JSON and label spaces; got {type(value).__name__}")
    return {
        "fingerprint": value.fingerprint,
        "multilabel": value.multilabel,
        "labels": dict(zip(value.ids, value.texts(), strict=True)),
    }


def _refuse_another_call(note: Path, call: dict[str, Any], name: str) -> None:
    """Raises a ValueError that says what differs; where nothing can be lost, writes the note."""
    try:
        before = json.loads(note.read_text("utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict) or not any(note.parent.glob("*.parquet")):
        write_text(note, json.dumps(call, ensure_ascii=False, indent=1))
        return
    differences = _differences(before, call)
    if differences:
        raise ValueError(
            f"{name}: the blocks in {note.parent} were begun by another call: "
            f"{', '.join(differences)}; undo that, give another output folder, or delete "
            f"{note.parent} to begin again"
        )


def _differences(before: dict[str, Any], now: dict[str, Any], place: str = "") -> list[str]:
    said = []
    for part in {**before, **now}:
        old, new = before.get(part), now.get(part)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            if "labels" in old and "labels" in new:
                said.append(f"the label space has changed ({_label_difference(old, new)})")
            else:
                said += _differences(old, new, f"{place}{part}.")
        elif len(f"{old!r}{new!r}") > 200:
            said.append(f"{place}{part} is another")
        else:
            said.append(f"{place}{part} was {old!r} and is {new!r}")
    return said


def _label_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    old, new = before["labels"], now["labels"]
    changes = {
        "added": [f"{id!r}" for id in new if id not in old],
        "gone": [f"{id!r}" for id in old if id not in new],
        "changed": [
            f"{id!r} from {old[id]!r} to {new[id]!r}"
            for id in new
            if old.get(id, new[id]) != new[id]
        ],
    }
    said = [
        f"{what}: {', '.join(some[:_SHOWN])}"
        + (f" and {len(some) - _SHOWN} more" if len(some) > _SHOWN else "")
        for what, some in changes.items()
        if some
    ]
    if before["multilabel"] != now["multilabel"]:
        said.append(f"multilabel: from {before['multilabel']} to {now['multilabel']}")
    if said:
        return "; ".join(said)
    return "other parents" if list(old) == list(new) else "the same labels in another order"
