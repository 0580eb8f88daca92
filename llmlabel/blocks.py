"""Committed blocks: work on rows that a crash cannot undo.

A block of rows is computed, written to a temporary file, flushed to the disk and renamed. Its name
carries the call and its rows, so the same call finds it again and another call never does.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features

from llmlabel import progress
from llmlabel.data import require_columns, with_columns
from llmlabel.files import arrow_table, commit


def map_blocks(
    dataset: Dataset,
    compute: Callable[[Dataset], Dataset],
    *,
    columns: Sequence[str],
    key: str,
    output: Path | None,
    block_rows: int,
    name: str,
) -> Dataset:
    """Adds columns to a dataset block by block, each kept as soon as it is done.

    The same call after a crash, or with more rows at the end, computes only what is missing.

    Args:
        dataset: rows with `id` and `text`.
        compute: a block of rows -> the same rows with `columns` added or replaced.
        columns: what `compute` adds.
        key: stands for everything but ids and texts that the result depends on.
        output: blocks are kept in its folder `blocks`; None keeps nothing.
        block_rows: rows in a block.
        name: what the progress display calls this work.

    Raises:
        ValueError: there are no rows, two have the same id, or `compute` lost or invented some.
    """
    require_columns(dataset, "id", "text")
    if not len(dataset):
        raise ValueError(f"{name}: there are no rows to work on")
    if block_rows < 1:
        raise ValueError(f"{name}: block_rows must be at least 1; got {block_rows}")
    id, times = Counter(dataset["id"][:]).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{name}: {times} rows have the id {id!r}; give each an id of its own")
    tables = []
    with progress.task(name, total=len(dataset)) as advance:
        for start in range(0, len(dataset), block_rows):
            block = dataset.select(range(start, min(start + block_rows, len(dataset))))
            file = None if output is None else _block_file(output, key, block)
            table = None if file is None else _kept(file, len(block))
            if table is None:
                table = _computed(block, compute, columns, name)
                if file is not None:
                    _keep(file, table)
            tables.append(table)
            advance(len(block))
    whole = pa.concat_tables(tables)
    features = Features.from_arrow_schema(whole.schema)
    return with_columns(dataset, {column: (whole[column], features[column]) for column in columns})


def _block_file(output: Path, key: str, block: Dataset) -> Path:
    content = json.dumps([version("llmlabel"), key, block["id"][:], block["text"][:]])
    return output / "blocks" / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.parquet"


def _kept(file: Path, rows: int) -> pa.Table | None:
    try:
        table = pq.read_table(file, partitioning=None)
    except (OSError, pa.ArrowException):  # not there, or damaged: computed again
        return None
    return table if table.num_rows == rows else None


def _computed(
    block: Dataset, compute: Callable[[Dataset], Dataset], columns: Sequence[str], name: str
) -> pa.Table:
    result = compute(block)
    if result["id"][:] != block["id"][:]:
        raise ValueError(
            f"{name}: {len(result)} rows came back for a block of {len(block)} rows that begins "
            f"with id {block[0]['id']!r}, or in another order; rows in = rows out"
        )
    return arrow_table(result.select_columns(list(columns)))


def _keep(file: Path, table: pa.Table) -> None:
    commit(file, lambda temporary: pq.write_table(table, temporary))
