"""Soft labels in few bytes a row: `compress` writes a store, `restore` reads it back.

A store is a folder with one Parquet file `labels.parquet`, a row key and a fixed number of bytes
for each row, or, for `llmlabel.refine.projector.LowRank`, with one file for all rows. Its header
names the codec, the version of the format and the label space; what does not fit is refused.
`restore` gives back `id` and the columns of the soft label; `llmlabel.data.join` adds them to the
texts.

All works block by block. The memory of `compress_blocks` and `restore_blocks` does not grow with the
rows; `restore` returns all rows at once, and for `TwoDistances` `compress` keeps some 240 bytes a row
to find partners.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from jaxtyping import Int, Shaped

from llmlabel.data import require_columns
from llmlabel.files import arrow_table, commit, in_memory
from llmlabel.labelspace import LabelSpace
from llmlabel.refine import projector
from llmlabel.refine.codecs import (
    Dense,
    Rest,
    StoredRow,
    TopK,
    TwoDistances,
    decode,
    encode,
    most_probable,
    partners,
    payload_type,
)
from llmlabel.refine.projector import LowRank
from llmlabel.softlabels import SoftLabels

FORMAT_VERSION = 1
"""Raised whenever bytes written before mean something else."""

_FILE = "labels.parquet"
_HEADER = b"llmlabel"
_BLOCK_VALUES = 10_000_000

Codec = StoredRow | LowRank
_CODECS = {codec.__name__: codec for codec in (TopK, Dense, TwoDistances)}


@dataclass(frozen=True)
class StoreSize:
    """What a store costs.

    Attributes:
        codec: How it was compressed.
        rows: Number of rows.
        payload_bytes: Of one row, without its key; 0 for a projector.
        file_bytes: Of the whole file.
        bytes_per_row: `file_bytes` / `rows`, keys and header included.
    """

    codec: str
    rows: int
    payload_bytes: int
    file_bytes: int
    bytes_per_row: float


def compress(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    codec: Codec,
    output: Path,
    block_rows: int = 20_000,
) -> Path:
    """Writes the soft labels of all rows to a store; a row without one stays without one.

    Args:
        dataset: rows with `id` and soft labels.
        labels: their label space.
        codec: how they are stored; `LowRank` needs the column `vector` too.
        output: folder of the store.
        block_rows: rows in memory at a time.

    Returns:
        `output`.

    Raises:
        ValueError: a row is refused by `SoftLabels.from_dataset`, or the codec needs a single-label
            space.
    """
    require_columns(dataset, "id")
    if isinstance(codec, LowRank):
        return projector.write(
            dataset, labels, codec, output, version=FORMAT_VERSION, block_rows=block_rows
        )
    partner = None
    if isinstance(codec, TwoDistances):
        found = [
            most_probable(SoftLabels.from_dataset(rows, labels))
            for rows in _blocks(dataset, block_rows)
        ]
        partner = np.concatenate([np.zeros(0, np.int64), *found])
        labelled = np.flatnonzero(partner >= 0)
        ids = np.array(dataset["id"][:], dtype=object)[labelled].tolist()
        partner[labelled] = partner[labelled[partners(ids, seed=codec.seed)]]
    return compress_blocks(
        _blocks(dataset, block_rows), labels, codec=codec, output=output, partner=partner
    )


def compress_blocks(
    blocks: Iterable[Dataset],
    labels: LabelSpace,
    *,
    codec: StoredRow,
    output: Path,
    partner: Int[np.ndarray, " rows"] | None = None,
) -> Path:
    """`compress` of rows that never are in one dataset.

    Args:
        blocks: datasets with `id` and soft labels, read once.
        labels: their label space.
        codec: how they are stored.
        output: folder of the store.
        partner: for `TwoDistances`, the second label of each row.
    """
    if isinstance(codec, TwoDistances) and (partner is None or labels.multilabel):
        raise ValueError("TwoDistances needs a single-label space, and the label of each partner")
    kind = payload_type(codec, labels)
    header = {
        "version": FORMAT_VERSION,
        "codec": {"name": type(codec).__name__, **dataclasses.asdict(codec)},
        "label_space": labels.fingerprint,
    }
    fields = [pa.field("id", pa.string()), pa.field("payload", pa.binary(kind.itemsize))]
    schema = pa.schema(fields, metadata={_HEADER: json.dumps(header).encode()})

    def write(temporary: Path) -> None:
        start = 0
        with pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            column_encoding={"id": "DELTA_BYTE_ARRAY", "payload": "PLAIN"},
        ) as writer:
            for rows in blocks:
                soft = SoftLabels.from_dataset(rows, labels)
                end = start + len(rows)
                second = partner[start:end] if partner is not None else None
                payload = _payload(encode(soft, codec, labels, partner=second), soft)
                ids = arrow_table(rows.select_columns(["id"]))["id"].cast(pa.string())
                writer.write_table(pa.table([ids, payload], schema=schema))
                start = end

    commit(output / _FILE, write)
    return output


def restore(
    store: Path,
    labels: LabelSpace,
    *,
    rest: Rest = "smooth",
    texts: Dataset | None = None,
    anchors: Dataset | None = None,
) -> Dataset:
    """The rows of a store, as `id` and soft label.

    Args:
        store: folder that `compress` wrote.
        labels: the label space of the soft labels that were compressed.
        rest: what becomes of the probability that a row's stored labels leave, in a single-label
            space. "smooth" spreads it evenly over the other labels, as FKD's marginal smoothing
            does, so that each row has all of them; "renormalise" gives it to the stored ones;
            "missing" leaves it out, which keeps a row of many labels small.
        texts: for a projector, the rows to label, with their `vector`.
        anchors: for a projector, the `vector` of each label, as in `LowRank`.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the store is broken, or of another label space or version of the format.
    """
    if (store / projector.FILE).is_file():
        block_rows = max(_BLOCK_VALUES // len(labels), 1)
        return projector.read(
            store, labels, texts, anchors, version=FORMAT_VERSION, block_rows=block_rows
        )
    blocks = [arrow_table(block) for block in restore_blocks(store, labels, rest=rest)]
    return in_memory(pa.concat_tables(blocks))


def restore_blocks(
    store: Path, labels: LabelSpace, *, rest: Rest = "smooth", block_rows: int = 20_000
) -> Iterator[Dataset]:
    """`restore`, `block_rows` rows at a time; at least one block, if an empty one."""
    file, header = _open(store, labels)
    settings = dict(header["codec"])
    codec = _CODECS[settings.pop("name")](**settings)
    kind = payload_type(codec, labels)
    if rest == "smooth" or isinstance(codec, Dense):  # all labels of a row are in memory then
        block_rows = min(block_rows, max(_BLOCK_VALUES // len(labels), 1))
    if (width := file.schema_arrow.field("payload").type.byte_width) != kind.itemsize:
        raise ValueError(f"{store}: a row has {width} bytes, {codec} has {kind.itemsize}")
    batches = file.iter_batches(block_rows) if file.metadata.num_rows else [_empty(file)]
    for batch in batches:
        # a null takes its place in the buffer of a column of fixed width
        column = batch.column("payload").fill_null(bytes(kind.itemsize))
        raw = column.buffers()[1]
        first = column.offset * kind.itemsize
        size = len(column) * kind.itemsize
        payload = np.frombuffer(raw, np.uint8)[first : first + size].view(kind)
        present = batch.column("payload").is_valid().to_numpy(zero_copy_only=False)
        soft = decode(payload, codec, labels, present=present, rest=rest)
        yield soft.add_to(in_memory(pa.table({"id": batch.column("id")})))


def store_size(store: Path) -> StoreSize:
    """What the store costs in bytes."""
    if (store / projector.FILE).is_file():
        header, size = projector.header(store), (store / projector.FILE).stat().st_size
        rows, payload = int(header["rows"]), 0
    else:
        file, header = _open(store, None)
        rows, size = file.metadata.num_rows, (store / _FILE).stat().st_size
        payload = file.schema_arrow.field("payload").type.byte_width
    return StoreSize(
        codec=header["codec"]["name"],
        rows=rows,
        payload_bytes=payload,
        file_bytes=size,
        bytes_per_row=size / max(rows, 1),
    )


# ------------------------------------------------------------------------------------ the file


def _payload(payload: Shaped[np.ndarray, " rows"], soft: SoftLabels) -> pa.Array:
    """The payloads as a column of fixed width, null for a row without a soft label."""
    mask = np.diff(soft.probs.indptr) == 0
    valid = pa.py_buffer(np.packbits(~mask, bitorder="little").tobytes())
    data = pa.py_buffer(payload.tobytes())
    kind = pa.binary(payload.dtype.itemsize)
    return pa.Array.from_buffers(kind, len(payload), [valid, data], null_count=int(mask.sum()))


def _open(store: Path, labels: LabelSpace | None) -> tuple[pq.ParquetFile, dict[str, Any]]:
    path = store / _FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{store}: no compressed labels are there; give a folder of compress"
        )
    try:
        file = pq.ParquetFile(path, pre_buffer=False)  # a buffer would grow with the rows read
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}); compress again") from None
    metadata = file.schema_arrow.metadata or {}
    if _HEADER not in metadata:
        raise ValueError(f"{path}: these are no compressed labels; give a folder of compress")
    header = json.loads(metadata[_HEADER])
    projector.check_header(path, header, labels, version=FORMAT_VERSION)
    return file, header


def _empty(file: pq.ParquetFile) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=file.schema_arrow)


def _blocks(dataset: Dataset, block_rows: int) -> Iterator[Dataset]:
    for start in range(0, len(dataset), block_rows):
        yield dataset.select(range(start, min(start + block_rows, len(dataset))))
