import hashlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, List, Value, concatenate_datasets

from llmlabel import progress
from llmlabel.blocks import Numbered, commit_blocks, map_blocks
from llmlabel.data import with_columns
from llmlabel.files import lock
from llmlabel.labelspace import load_labels


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


def kept(output: Path) -> list[Path]:
    return sorted((output / "blocks").glob("*.parquet"))


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
    assert len(kept(tmp_path / "o")) == 1
    resumed = Lengths()
    table = mapped(texts, resumed, output=tmp_path / "o")
    assert resumed.blocks == [["r4", "r5", "r6", "r7"], ["r8", "r9"]]
    assert table.to_dict() == whole.to_dict()
    again = Lengths()
    assert mapped(texts, again, output=tmp_path / "o").to_dict() == whole.to_dict()
    assert again.blocks == []
    files = [kept(tmp_path / folder) for folder in ("o", "whole")]
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
    files = kept(tmp_path)
    before = [file.read_bytes() for file in files]
    files[0].write_bytes(files[0].read_bytes()[:-9])
    files[1].write_bytes(b"")
    pq.write_table(pq.read_table(files[2]).slice(0, 1), files[2])  # too few rows
    compute = Lengths()
    assert mapped(texts, compute, output=tmp_path).to_dict() == whole.to_dict()
    assert len(compute.blocks) == 3
    assert [file.read_bytes() for file in files] == before


def test_no_wrong_byte_in_a_block_becomes_a_value(tmp_path: Path, texts: Dataset) -> None:
    whole = mapped(texts, Lengths(), output=tmp_path, block_rows=10)
    (file,) = kept(tmp_path)
    content = file.read_bytes()
    end = pq.read_metadata(file).row_group(0).column(1).total_compressed_size
    for place in range(4, 4 + end, 7):  # in the pages
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert mapped(texts, Lengths(), output=tmp_path, block_rows=10).to_dict() == whole.to_dict()


def test_block_names_are_frozen(tmp_path: Path) -> None:
    few = Dataset.from_dict({"id": ["r0", "é"], "text": ["text 0", ""], "more": [[1], None]})
    mapped(few, Lengths(), output=tmp_path / "1")
    mapped(few, Lengths(), output=tmp_path / "2", reads=["more"])
    call = f'["label", {{"key": "k", "llmlabel": "{version("llmlabel")}"}}]'.encode()
    rows = b"".join(
        [
            *(n.to_bytes(8, "little") for n in (2, 2)),
            "r0é".encode(),
            *(n.to_bytes(8, "little") for n in (6, 0)),
            b"text 0",
        ]
    )
    for output, content in (("1", call + rows), ("2", call + b'{"more": [[1], null]}' + rows)):
        name = f"{hashlib.sha256(content).hexdigest()[:24]}.parquet"
        assert [file.name for file in kept(tmp_path / output)] == [name]


def test_block_names_do_not_depend_on_how_arrow_holds_the_rows(
    tmp_path: Path, texts: Dataset
) -> None:
    whole = mapped(texts, Lengths(), output=tmp_path)
    names = kept(tmp_path)
    large = texts.cast_column("text", Value("large_string")).cast_column(
        "id", Value("large_string")
    )
    backwards = list(range(9, -1, -1))
    chunked = concatenate_datasets([texts.select(range(3)), texts.select(range(3, 10))])
    for same in (large, texts.select(backwards).select(backwards), chunked):
        compute = Lengths()
        assert mapped(same, compute, output=tmp_path)["name"][:] == whole["name"][:]
        assert compute.blocks == []
    assert kept(tmp_path) == names


def test_where_one_text_ends_matters(tmp_path: Path) -> None:
    compute = Lengths()
    for ids, rows in (
        (["a", "b"], ["xy", "z"]),
        (["a", "b"], ["x", "yz"]),
        (["ab", ""], ["xy", "z"]),
    ):
        mapped(Dataset.from_dict({"id": ids, "text": rows}), compute, output=tmp_path)
    assert compute.blocks == [["a", "b"], ["a", "b"], ["ab", ""]]


def test_columns_that_are_read_belong_to_a_block(tmp_path: Path, texts: Dataset) -> None:
    def computed(lists: list[list[int] | None]) -> int:
        compute = Lengths()
        rows = with_columns(texts, {"candidates": (lists, List(Value("int32")))})
        mapped(rows, compute, output=tmp_path, reads=["candidates"])
        return len(compute.blocks)

    assert computed([[0]] * 10) == 3
    assert computed([[0]] * 10) == 0
    assert computed([[0]] * 9 + [None]) == 1
    assert computed([[]] * 4 + [[0]] * 6) == 1
    with pytest.raises(ValueError, match="the column 'candidates' is missing"):
        mapped(texts, Lengths(), reads=["candidates"])


# --------------------------------------------------------------------------------- another call


SPACE = load_labels(["bug", "praise", {"id": "q", "name": "question"}])


def began(folder: Path, texts: Dataset, **key: Any) -> None:
    """A call that is stopped in its second block."""
    with pytest.raises(KeyboardInterrupt):
        mapped(texts, Lengths(dies_at="r5"), output=folder, key=key)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["bug", "praise"], "gone: 'q'"),
        ([*SPACE.names[:2], {"id": "q", "name": "question"}, "spam"], "added: 'spam'"),
        (["bug", "praise", {"id": "q", "name": "ask"}], "changed: 'q' from 'question' to 'ask'"),
        (
            ["bug", "praise", {"id": "q", "name": "question", "description": "asks"}],
            "changed: 'q' from 'question' to 'question: asks'",
        ),
        (["bugs", "praise", {"id": "q", "name": "question"}], "added: 'bugs'; gone: 'bug'"),
        (["praise", "bug", {"id": "q", "name": "question"}], "the same labels in another order"),
        (["bug", "praise", {"id": "q", "name": "question", "parent": "bug"}], "other parents"),
        (
            ["bug", "praise", {"id": "q", "name": "question"}, *"abcdefgh"],
            "added: 'a', 'b', 'c', 'd', 'e' and 3 more",
        ),
        (
            {"labels": ["bug", "praise", {"id": "q", "name": "question"}], "multilabel": True},
            "multilabel: from False to True",
        ),
    ],
)
def test_another_label_space_is_refused_and_what_differs_is_said(
    tmp_path: Path, texts: Dataset, changed: Any, says: str
) -> None:
    began(tmp_path, texts, engine="e", labels=SPACE)
    files = {file: file.read_bytes() for file in (tmp_path / "blocks").iterdir()}
    compute = Lengths()
    with pytest.raises(ValueError, match="the label space has changed") as error:
        mapped(texts, compute, output=tmp_path, key={"engine": "e", "labels": load_labels(changed)})
    assert str(error.value) == (
        f"label: the blocks in {tmp_path}/blocks were begun by another call: the label space has "
        f"changed ({says}); undo that, give another output folder, or delete {tmp_path}/blocks to "
        "begin again"
    )
    assert compute.blocks == []
    assert {file: file.read_bytes() for file in (tmp_path / "blocks").iterdir()} == files
    mapped(texts, compute, output=tmp_path, key={"engine": "e", "labels": SPACE})
    assert compute.blocks == [["r4", "r5", "r6", "r7"], ["r8", "r9"]]


def test_all_that_differs_is_said(
    tmp_path: Path, texts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    began(tmp_path, texts, engine="one", given={"a": 1, "b": "x" * 200}, labels=SPACE)
    key = {"engine": "two", "given": {"a": 2, "b": "y" * 200}, "labels": SPACE}
    monkeypatch.setattr("llmlabel.blocks.version", lambda name: "99.1")
    says = (
        r"llmlabel was '.*' and is '99\.1', engine was 'one' and is 'two', given\.a was 1 and is 2, "
        r"given\.b is another; undo that"
    )
    with pytest.raises(ValueError, match=says):
        mapped(texts, Lengths(), output=tmp_path, key=key)


def test_rows_and_the_size_of_blocks_may_change(tmp_path: Path, texts: Dataset) -> None:
    key = {"labels": SPACE}
    for rows, size in ((range(8), 4), (range(10), 4), (range(10), 5), (range(3), 1)):
        table = mapped(texts.select(rows), Lengths(), output=tmp_path, key=key, block_rows=size)
        assert table["name"][:] == [NAMES[row] for row in rows]
    mapped(texts, Lengths(), output=tmp_path, key={"labels": "others"}, name="another step")


def test_a_call_that_has_kept_nothing_may_change(tmp_path: Path, texts: Dataset) -> None:
    for engine in ("wrong", "wrong too", "right"):
        compute = Lengths(dies_at=None if engine == "right" else "r0")
        key = {"engine": engine}
        if engine == "right":
            assert mapped(texts, compute, output=tmp_path, key=key)["name"][:] == NAMES
        else:
            with pytest.raises(KeyboardInterrupt):
                mapped(texts, compute, output=tmp_path, key=key)
    with pytest.raises(ValueError, match="engine was 'right' and is 'wrong'"):
        mapped(texts, Lengths(), output=tmp_path, key={"engine": "wrong"})


def test_a_damaged_note_is_written_again(tmp_path: Path, texts: Dataset) -> None:
    key = {"labels": SPACE}
    whole = mapped(texts, Lengths(), output=tmp_path, key=key)
    note = tmp_path / "blocks" / "label.json"
    content = note.read_text()
    for damaged in (b"", b"[]", content.encode()[:-9]):
        note.write_bytes(damaged)
        compute = Lengths()
        assert mapped(texts, compute, output=tmp_path, key=key).to_dict() == whole.to_dict()
        assert compute.blocks == []
        assert note.read_text() == content


def test_a_key_is_json_and_label_spaces(tmp_path: Path, texts: Dataset) -> None:
    with pytest.raises(TypeError, match="a key of blocks is JSON and label spaces; got PosixPath"):
        mapped(texts, Lengths(), output=tmp_path, key={"prompt": tmp_path})


# ----------------------------------------------------------------------------- rows in = rows out


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
    assert kept(tmp_path) == []
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


def test_several_blocks_at_a_time_in_any_order(tmp_path: Path, texts: Dataset) -> None:
    given: dict[str, Any] = {"key": "k", "output": tmp_path, "block_rows": 4, "name": "label"}
    asked: list[int] = []

    def named(numbered: Numbered) -> Numbered:
        asked.append(numbered[0])
        return numbered[0], Lengths()(numbered[1]).select_columns(["id", "name"])

    def backwards_but_the_first(blocks: Iterator[Numbered]) -> Iterator[Numbered]:
        for done, one in enumerate(list(blocks)[:0:-1]):
            assert len(kept(tmp_path)) == done  # committed as soon as yielded
            yield named(one)

    with pytest.raises(ValueError, match="label: 1 of 3 blocks did not come back"):
        commit_blocks(texts, backwards_but_the_first, **given)
    table = commit_blocks(texts, lambda blocks: map(named, blocks), **given)
    assert asked == [2, 1, 0]
    assert table["name"][:] == NAMES
    assert table["text"][:] == texts["text"][:]


def test_the_processes_of_one_launch_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lock(tmp_path):
        with pytest.raises(RuntimeError, match="another process is running in"), lock(tmp_path):
            pass
        monkeypatch.setenv("RANK", "1")
        with lock(tmp_path):
            pass
