import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Value

from llmlabel import progress
from llmlabel.blocks import map_blocks
from llmlabel.data import with_columns


@pytest.fixture
def texts() -> Dataset:
    rows = range(10)
    return Dataset.from_dict({"id": [f"r{n}" for n in rows], "text": [f"text {n}" for n in rows]})


def mapped(dataset: Dataset, compute: Callable[[Dataset], Dataset], **given: Any) -> Dataset:
    arguments = {"columns": ["name", "n"], "output": None, "key": "k", "block_rows": 4}
    return map_blocks(dataset, compute, **{**arguments, "name": "label", **given})


class Lengths:
    """Computes something and remembers the ids of each block that it was called with."""

    def __init__(self, *, dies_at: str | None = None) -> None:
        self.blocks: list[list[str]] = []
        self.dies_at = dies_at

    def __call__(self, block: Dataset) -> Dataset:
        self.blocks.append(block["id"][:])
        if self.dies_at in block["id"][:]:
            raise KeyboardInterrupt
        names = [id.upper() for id in block["id"]]
        return with_columns(
            block,
            {"name": (names, Value("string")), "n": ([len(block)] * len(block), Value("int64"))},
        )


NAMES = [f"R{n}" for n in range(10)]


def test_blocks_without_output(texts: Dataset) -> None:
    compute = Lengths()
    table = mapped(texts, compute)
    assert (table["name"][:], table["n"][:]) == (NAMES, [4] * 8 + [2] * 2)
    assert compute.blocks == [[f"r{n}" for n in block] for block in (range(4), range(4, 8), (8, 9))]


def test_blocks_see_the_chosen_rows(texts: Dataset) -> None:
    table = mapped(texts.select([7, 3, 5]), Lengths(), block_rows=2)
    assert table["name"][:] == ["R7", "R3", "R5"]


def test_blocks_resume(tmp_path: Path, texts: Dataset) -> None:
    whole = mapped(texts, Lengths(), output=tmp_path / "whole")
    killed = Lengths(dies_at="r5")
    with pytest.raises(KeyboardInterrupt):
        mapped(texts, killed, output=tmp_path / "o")
    assert len(list((tmp_path / "o" / "blocks").iterdir())) == 1
    resumed = Lengths()
    table = mapped(texts, resumed, output=tmp_path / "o")
    assert resumed.blocks == [["r4", "r5", "r6", "r7"], ["r8", "r9"]]
    assert table.to_dict() == whole.to_dict()
    again = Lengths()
    assert mapped(texts, again, output=tmp_path / "o").to_dict() == whole.to_dict()
    assert again.blocks == []
    files = [sorted((tmp_path / folder / "blocks").iterdir()) for folder in ("o", "whole")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_blocks_of_other_input_are_not_reused(tmp_path: Path, texts: Dataset) -> None:
    def computed(dataset: Dataset, key: str = "k") -> int:
        compute = Lengths()
        table = mapped(dataset, compute, output=tmp_path, key=key)
        assert table["name"][:] == [id.upper() for id in dataset["id"]]
        return len(compute.blocks)

    assert computed(texts) == 3
    assert computed(texts) == 0
    assert computed(texts, key="other") == 3
    assert computed(texts.select([1, 0, *range(2, 10)])) == 1  # the first block in another order
    changed = ["changed", *texts["text"][1:]]
    assert computed(with_columns(texts, {"text": (changed, Value("string"))})) == 1
    assert computed(texts.select(range(9))) == 1  # the last block is shorter


def test_damaged_blocks_are_computed_again(tmp_path: Path, texts: Dataset) -> None:
    whole = mapped(texts, Lengths(), output=tmp_path)
    files = sorted((tmp_path / "blocks").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-9])
    files[1].write_bytes(b"")
    pq.write_table(pq.read_table(files[2]).slice(0, 1), files[2])  # too few rows
    compute = Lengths()
    assert mapped(texts, compute, output=tmp_path).to_dict() == whole.to_dict()
    assert len(compute.blocks) == 3


def test_block_names_are_frozen(tmp_path: Path, texts: Dataset) -> None:
    mapped(texts.select([0, 1]), Lengths(), output=tmp_path)
    content = f'["{version("llmlabel")}", "k", ["r0", "r1"], ["text 0", "text 1"]]'.encode()
    name = f"{hashlib.sha256(content).hexdigest()[:24]}.parquet"
    assert [file.name for file in (tmp_path / "blocks").iterdir()] == [name]


def test_blocks_with_nothing_but_nulls_fit_the_others(texts: Dataset) -> None:
    def compute(block: Dataset) -> Dataset:
        first = block["id"][0] == "r0"
        errors = [None if first else "e"] * len(block)
        return with_columns(block, {"error": (errors, Value("string"))})

    table = mapped(texts, compute, columns=["error"], block_rows=8)
    assert table["error"][:] == [None] * 8 + ["e", "e"]


def test_rows_in_are_rows_out(tmp_path: Path, texts: Dataset) -> None:
    for lossy in ([0, 1], [1, 0, 2, 3]):
        with pytest.raises(
            ValueError, match=r"label: \d rows came back for a block of 4 .* 'r0'.* rows in = rows"
        ):
            mapped(texts, lambda block: Lengths()(block.select(lossy)), output=tmp_path)  # noqa: B023
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="label: there are no rows"):
        mapped(texts.select([]), Lengths())
    with pytest.raises(ValueError, match="block_rows must be at least 1; got 0"):
        mapped(texts, Lengths(), block_rows=0)
    twice = texts.select([0, 1, 0])
    with pytest.raises(ValueError, match="label: 2 rows have the id 'r0'; give each an id"):
        mapped(twice, Lengths())


def test_blocks_report_progress(texts: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Task:
        def __init__(self, name: str, total: int) -> None:
            seen.append((name, total))

        def __enter__(self) -> Callable[[int], None]:
            return seen.append

        def __exit__(self, *_: object) -> None:
            seen.append("end")

    monkeypatch.setattr(progress, "task", Task)
    mapped(texts, Lengths())
    assert seen == [("label", 10), 4, 4, 2, "end"]
