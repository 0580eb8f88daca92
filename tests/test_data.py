import csv
import errno
import gzip
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from llmlabel import data
from llmlabel.columns import ADDED_BY, COLUMNS, READABLE
from llmlabel.data import (
    first_words,
    gold_index,
    gold_matrix,
    join,
    label_position,
    load,
    part,
    read_parquet,
    require_columns,
    rows_of,
    save,
    split,
    with_columns,
)
from llmlabel.files import arrow_table, commit
from llmlabel.labelspace import LabelSpace, load_labels

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return write


@pytest.fixture
def labels() -> LabelSpace:
    return load_labels([{"id": "bug", "name": "Bug report"}, "praise", "question"])


@pytest.fixture
def texts() -> Dataset:
    rows = range(10)
    return Dataset.from_dict({"id": [f"r{n}" for n in rows], "text": [f"text {n}" for n in rows]})


def rows(dataset: Dataset) -> list[dict[str, Any]]:
    return list(dataset)


def fails(path: str | Path, message: str, **arguments: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(path, **arguments)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- kinds of input


CSV = 'id,text,stars\nb,"one, two",5\na,three,4\n'
JSONL = (
    '{"id": "b", "text": "one, two", "stars": "5"}\n{"id": "a", "text": "three", "stars": "4"}\n'
)
EXPECTED = [
    {"id": "b", "text": "one, two", "stars": "5"},
    {"id": "a", "text": "three", "stars": "4"},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", CSV),
        ("t.CSV", CSV),
        ("t.csv.gz", CSV),
        ("t.tsv", "id\ttext\tstars\nb\tone, two\t5\na\tthree\t4\n"),
        ("t.tsv.gz", "id\ttext\tstars\nb\tone, two\t5\na\tthree\t4\n"),
        ("t.jsonl", JSONL),
        ("t.ndjson", JSONL),
        ("t.jsonl.gz", JSONL),
        ("t.ndjson.gz", JSONL),
    ],
)
def test_text_files(write: Write, name: str, content: str) -> None:
    path = write(name, content)
    assert rows(load(path)) == EXPECTED
    assert rows(load(str(path))) == EXPECTED


def test_parquet_of_somebody_else(tmp_path: Path) -> None:
    folder = tmp_path / "alpha=0.1"  # must not become a column
    folder.mkdir()
    category = pa.array(["x", None]).dictionary_encode()  # as pandas writes it
    pq.write_table(pa.table({"n": [7, 8], "text": category}), folder / "t.parquet")
    assert rows(load(folder / "t.parquet")) == [
        {"n": 7, "text": "x", "id": "0"},
        {"n": 8, "text": "", "id": "1"},
    ]


def test_saved_dataset(tmp_path: Path, texts: Dataset) -> None:
    texts.select([3, 1]).save_to_disk(tmp_path / "saved")
    assert rows(load(tmp_path / "saved")) == [
        {"id": "r3", "text": "text 3"},
        {"id": "r1", "text": "text 1"},
    ]


def test_saved_dataset_dict_names_its_splits(tmp_path: Path, texts: Dataset) -> None:
    path = tmp_path / "saved"
    datasets.DatasetDict({"train": texts, "test": texts}).save_to_disk(path)
    fails(path, r"holds the splits \['train', 'test'\]; load one, as .*train")
    assert len(load(path / "train")) == 10


def test_class_folders(write: Write, tmp_path: Path, labels: LabelSpace) -> None:
    write("d/praise/2.txt", "good")
    write("d/praise/10.txt", b"caf\xe9")
    write("d/bug/1.txt", "\ufeffcafé")
    write("d/bug/.hidden.txt", "no")
    write("d/bug/notes.md", "no")
    write("d/README.txt", "no")
    loaded = load(tmp_path / "d", gold="label", labels=labels, encoding=["utf-8", "cp1252"])
    assert rows(loaded) == [
        {"id": "bug/1", "text": "café", "label": "bug", "gold": [0]},
        {"id": "praise/10", "text": "café", "label": "praise", "gold": [1]},
        {"id": "praise/2", "text": "good", "label": "praise", "gold": [1]},
    ]
    fails(tmp_path / "d", r"data row 2, .*10\.txt: the byte 0xe9 at byte offset 3 is not utf-8")


def test_folder_with_nothing(tmp_path: Path) -> None:
    fails(tmp_path, r"neither a saved dataset .* nor a folder of class folders")


def test_inside_a_package(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("texts_of_mine/__init__.py", "raise RuntimeError('imported')")
    write("texts_of_mine/inner/t.csv", CSV)
    monkeypatch.syspath_prepend(tmp_path)
    assert rows(load("package:texts_of_mine/inner/t.csv")) == EXPECTED
    assert "texts_of_mine" not in sys.modules
    with pytest.raises(FileNotFoundError, match=r"holds no 'inner/u\.csv'"):
        load("package:texts_of_mine/inner/u.csv")
    with pytest.raises(FileNotFoundError, match=r"pip install no-such-package .*may differ"):
        load("package:no_such_package/t.csv")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in ("owner/name", "name-1.0", "owner/name:test[:10%]"):
        assert rows(load(path)) == [{"text": "x", "id": "0"}]
    assert asked == [("owner/name", "train"), ("name-1.0", "train"), ("owner/name", "test[:10%]")]


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *, split: str) -> Dataset:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError) as caught:
        load("owner/name")
    assert str(caught.value) == (
        "owner/name: no such file or folder here, and the hub did not give a dataset 'owner/name' "
        "with a split 'train' (ConnectionError: no network)"
    )


@pytest.mark.parametrize("name", ["missing.csv", "missing.jsonl.gz", "m.parquet", "a/b/c", "./x/y"])
def test_missing_file_does_not_ask_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load(name)


def test_unknown_suffix(write: Write) -> None:
    fails(write("t.xlsx", "x"), r"unknown file type '\.xlsx'; known are \.csv, \.tsv, \.jsonl")
    fails(write("t.zip.gz", "x"), r"unknown file type")


def test_damaged_files(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(CSV.encode() * 100)[:-20])
    fails(path, r"not a whole \.gz file")
    path.write_bytes(CSV.encode())
    fails(path, r"not a whole \.gz file")
    fails(write("t.parquet", "PAR1"), "not a whole Parquet file")
    with pytest.raises(ValueError, match=r"t\.parquet: not a whole Parquet file"):
        read_parquet(tmp_path / "t.parquet")
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    damaged = bytearray(path.read_bytes())
    damaged[4] ^= 0xFF  # the header of the first page
    fails(write("u.parquet", bytes(damaged)), "not a whole Parquet file")
    with pytest.raises(FileNotFoundError, match=r"missing\.parquet"):
        read_parquet(tmp_path / "missing.parquet")


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.csv", ""), ("t.csv", "id,text\n"), ("t.jsonl", ""), ("t.jsonl", "\n \n"), ("t.tsv", "\n")],
)
def test_no_rows(write: Write, name: str, content: str) -> None:
    fails(write(name, content), "there are no rows")


# ----------------------------------------------------------------------- what stands in a file


def test_csv_keeps_hard_content(write: Write) -> None:
    long = "long " * 40_000  # 200,000 characters; the csv module's own limit is 131,072
    csv.field_size_limit(131_072)
    content = f'\ufefftext,n\r\n"two\nlines ""q""",1\r\nnul\0byte,2\r\n\r\n{long},3\r\nsep\u2028\x0b\x1c,4\r\n,5\r\n'
    loaded = load(write("t.csv", content))
    assert loaded["text"][:] == ['two\nlines "q"', "nul\0byte", long, "sep\u2028\x0b\x1c", ""]
    assert loaded["n"][:] == ["1", "2", "3", "4", "5"]
    assert loaded["id"][:] == ["0", "1", "2", "3", "4"]
    assert csv.field_size_limit() == 131_072


def test_csv_of_an_old_mac(write: Write) -> None:
    assert load(write("t.csv", "text\ra\rb\r"))["text"][:] == ["a", "b"]


def test_csv_errors_name_the_line(write: Write) -> None:
    fails(
        write("t.csv", 'text,n\n"a\nb",1\nc,2,3\n'),
        r"line 4 \(data row 2\) has 3 fields, the header has 2",
    )
    fails(write("t.csv", "text,n\na\n"), r"line 2 \(data row 1\) has 1 fields")
    fails(write("t.csv", "text,n,text\na,1,b\n"), r"the column 'text' 2 times")
    fails(write("t.csv", 'text\na\n"b\nc\n'), r"begins in line 3 is broken")
    fails(write("t.csv", 'text\n"a" b\n'), r"begins in line 2 is broken.*twice")


def test_jsonl_keeps_hard_content(write: Write) -> None:
    content = (
        '\ufeff{"text": "raw\u2028sep", "x": {"a": [1]}}\r\n\n'
        '{"text": "nul\\u0000", "extra": 2}\n'
        '{"text": "half \\ud800 pair \\ud83d\\ude00", "x": {"a": [2, 3]}}\n'
        '{"text":\r null}\n{}\n{"text": "backslash \\\\ud800"}'
    )
    loaded = load(write("t.jsonl", content))
    assert loaded["text"][:] == [
        "raw\u2028sep",
        "nul\0",
        "half \ufffd pair \U0001f600",
        "",
        "",
        "backslash \\ud800",
    ]
    assert loaded["x"][:] == [{"a": [1]}, None, {"a": [2, 3]}, None, None, None]
    assert loaded["extra"][:] == [None, 2, None, None, None, None]
    assert loaded.column_names == ["text", "x", "extra", "id"]


def test_jsonl_with_empty_objects_can_be_saved(write: Write, tmp_path: Path) -> None:
    loaded = load(write("t.jsonl", '{"text": "a", "meta": {}}\n'))
    save(loaded, tmp_path / "t.parquet")
    assert rows(read_parquet(tmp_path / "t.parquet")) == [{"text": "a", "meta": None, "id": "0"}]


def test_jsonl_errors_name_the_line(write: Write) -> None:
    good = '{"text": "a"}\n'
    fails(
        write("t.jsonl", good + "\n" + '{"text": "b"\n'), r"line 3 is not JSON.*one object a line"
    )
    fails(write("t.jsonl", good + "[1]\n"), r"line 2 holds a list; write one JSON object")
    fails(
        write("t.jsonl", '{"text": "a", "n": 1}\n{"text": "b"}\n{"text": "c", "n": "x"}\n'),
        r"column 'n' holds values that do not fit together: int \(data row 1\), str \(data row 3\)",
    )
    fails(write("t.jsonl", '{"text": "a"}\n{"text": 5}\n'), r"column 'text'.*int \(data row 2\)")
    fails(write("t.jsonl", '{"text": "a", "n": ' + "9" * 30 + "}\n"), r"column 'n'.*too large")


def test_text_that_is_no_text(write: Write) -> None:
    path = write("t.jsonl", '{"text": null, "n": [1]}\n{"text": 5}\n')
    fails(path, r"data row 2: 'text' is the int 5, not text")
    fails(path, r"data row 1: 'n' is the list \[1\], not text", text="n")
    assert load(write("u.jsonl", '{"text": null}\n'))["text"][:] == [""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            b'text\n"a\nb"\ncaf\xe9\n',
            r"data row 2, line 4: the byte 0xe9 at byte offset 3",
        ),
        ("t.tsv", b"te\xe9xt\na\n", r"the header, line 1: the byte 0xe9 at byte offset 2"),
        (
            "t.jsonl",
            b'{"text": "a"}\n\n{"text": "\xe9"}\n',
            r"data row 2, line 3: the byte 0xe9 at byte offset 10",
        ),
    ],
)
def test_not_utf8(write: Write, name: str, content: bytes, message: str) -> None:
    fails(write(name, content), message + r" is not utf-8; .*encoding: \[utf-8, cp1252\]")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "text\ncafé\n".encode() + b"caf\xe9\n"),
        ("t.jsonl", '{"text": "café"}\n'.encode() + b'{"text": "caf\xe9"}\n'),
    ],
)
def test_encodings_are_tried_in_each_row(write: Write, name: str, content: bytes) -> None:
    loaded = load(write(name, content), encoding=["utf-8", "cp1252"])
    assert loaded["text"][:] == ["café", "café"]
    fails(
        write(name, content.replace(b"\xe9", b"\x81")),
        "not utf-8 or cp1252",
        encoding=["utf-8", "cp1252"],
    )


def test_the_first_encoding_says_where(write: Write) -> None:
    path = write("t.csv", b"text\n\xc3\xa9 \xff\n")
    fails(path, "byte 0xff at byte offset 3 is not utf-8 or ascii", encoding=["utf-8", "ascii"])


def test_other_encodings(write: Write) -> None:
    assert (
        load(write("t.csv", "text\ncaf\xe9\n".encode("cp1252")), encoding="cp1252")["text"][0]
        == "café"
    )
    assert load(write("t.tsv", "text\n漢\n".encode("utf-16")), encoding="utf-16")["text"][0] == "漢"
    path = write("u.csv", "\ufefftext\n漢\n")
    assert load(path, encoding="utf-8-sig")["text"][0] == "漢"
    with pytest.raises(ValueError, match="encoding='utf-9' is unknown; try"):
        load(path, encoding="utf-9")
    with pytest.raises(ValueError, match="encoding='base64' is unknown; try"):
        load(path, encoding="base64")
    with pytest.raises(ValueError, match="encoding='utf-16' cannot be mixed"):
        load(path, encoding=["utf-8", "utf-16"])
    with pytest.raises(ValueError, match=r"encoding=\[\] is empty"):
        load(path, encoding=[])


# ------------------------------------------------------------------------ the contract columns


def test_the_text_column_is_named(write: Write) -> None:
    loaded = load(write("t.csv", "id,body\n1,x\n"), text="body")
    assert rows(loaded) == [{"id": "1", "body": "x", "text": "x"}]


def test_missing_text_column(write: Write) -> None:
    fails(
        write("t.csv", "id,txt,n\n1,x,2\n"),
        r"no column 'text'; did you mean text='txt'\? .*id, txt, n",
    )
    fails(
        write("t.csv", "id,body\n1,x\n"), r"no column 'text'; say which with text=NAME\. .*id, body"
    )


def test_another_text_column_is_not_overwritten(write: Write) -> None:
    fails(write("t.csv", "text,body\na,b\n"), r"'body' is to become 'text'.*rename", text="body")
    assert load(write("t.csv", "text,body\na,a\n"), text="body")["text"][:] == ["a"]


def test_ids(write: Write) -> None:
    assert load(write("t.csv", "text\na\nb\n"))["id"][:] == ["0", "1"]
    numbers = load(write("t.jsonl", '{"id": 7, "text": "a"}\n{"id": 8, "text": "b"}\n'))
    assert numbers["id"][:] == ["7", "8"]
    assert numbers.features["id"] == Value("string")
    named = load(write("t.csv", "key,text\nx,a\ny,b\n"), id="key")
    assert rows(named)[1] == {"key": "y", "text": "b", "id": "y"}


def test_bad_ids(write: Write) -> None:
    fails(write("t.csv", "id,text\nx,a\ny,b\nx,c\n"), r"data rows 1 and 3 have the same id 'x'")
    fails(write("t.csv", "id,text\nx,a\n,b\n"), r"data row 2 has an empty id")
    fails(write("t.csv", "kee,text\nx,a\n"), r"no column 'key'; did you mean id='kee'", id="key")
    fails(write("t.csv", "id,key,text\nx,y,a\n"), r"'key' is to become 'id'.*rename", id="key")


def test_gold_strings(write: Write, labels: LabelSpace) -> None:
    path = write("t.csv", "text,topic\na,bug\nb,Bug report\nc,\nd,question\n")
    loaded = load(path, gold="topic", labels=labels)
    assert loaded["gold"][:] == [[0], [0], None, [2]]
    assert loaded["topic"][:] == ["bug", "Bug report", "", "question"]
    assert loaded.features["gold"] == List(Value("int32"))


def test_gold_lists(write: Write, labels: LabelSpace) -> None:
    path = write(
        "t.jsonl",
        '{"text": "a", "gold": ["question", "bug", "question"]}\n{"text": "b", "gold": []}\n'
        '{"text": "c", "gold": null}\n{"text": "d"}\n',
    )
    assert load(path, gold="gold", labels=labels)["gold"][:] == [[2, 0], [], None, None]


def test_gold_of_the_hub(tmp_path: Path, labels: LabelSpace) -> None:
    names = ClassLabel(names=["question", "bug"])
    features = Features({"text": Value("string"), "y": names, "ys": List(names)})
    Dataset.from_dict(
        {"text": ["a", "b"], "y": [1, -1], "ys": [[0, 1], []]}, features=features
    ).save_to_disk(tmp_path / "d")
    assert load(tmp_path / "d", gold="y", labels=labels)["gold"][:] == [[0], None]
    assert load(tmp_path / "d", gold="ys", labels=labels)["gold"][:] == [[2, 0], []]


def test_bad_gold(write: Write, labels: LabelSpace) -> None:
    path = write("t.csv", "id,text,topic\nx,a,bug\ny,b,prais\n")
    fails(
        path,
        r"row with id 'y', column 'topic': unknown label 'prais'; did you mean 'praise'",
        gold="topic",
        labels=labels,
    )
    fails(path, r"no column 'topik'; did you mean gold='topic'", gold="topik", labels=labels)
    with pytest.raises(ValueError, match="gold='topic' needs labels="):
        load(path, gold="topic")
    with pytest.raises(ValueError, match="labels= is given without gold=; name the column"):
        load(path, labels=labels)
    fails(
        write("t.jsonl", '{"text": "a", "gold": [1]}\n'),
        r"id '0', column 'gold': the int 1 is no id or name",
        gold="gold",
        labels=labels,
    )


def test_columns_are_documented() -> None:
    assert set(ADDED_BY) <= set(COLUMNS)
    for name, meaning in COLUMNS.items():
        kind, _, words = meaning.partition(": ")
        assert words, name
        assert kind.removesuffix(" or null") in READABLE, name


def test_require_columns(texts: Dataset) -> None:
    require_columns(texts, "id", "text")
    with pytest.raises(
        ValueError, match=r"'label_ids' is missing; there are id, text; a labeler such as"
    ):
        require_columns(texts, "text", "label_ids")
    with pytest.raises(ValueError, match=r"'gold' is missing; .*load\(\.\.\., gold=COLUMN"):
        require_columns(texts, "gold")
    with pytest.raises(ValueError, match=r"'price' is missing; there are id, text$"):
        require_columns(texts, "price")


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("label_ids", ["[0]", "[1]"], "string"),  # what a .csv makes of lists
        ("label_ids", [["a"], ["b"]], "list<item: string>"),
        ("label_ids", [[0.5], [1]], "list<item: double>"),
        ("label_probs", [[[1.0]], [[1.0]]], "list<item: list<item: double>>"),
        ("label_space", [1, 2], "int64"),
        ("weight", ["x", "y"], "string"),
        ("weight", [[1.0], [2.0]], "list<item: double>"),
        ("error", [5, 6], "int64"),
        ("votes", [1, 2], "int64"),
        ("text", [1, 2], "int64"),
        ("text", ["a", None], "nulls"),
    ],
)
def test_a_column_of_the_users_with_one_of_our_names(
    name: str, values: list[Any], kind: str
) -> None:
    with pytest.raises(ValueError, match="but the name means") as caught:
        require_columns(Dataset.from_dict({name: values}), name)
    assert str(caught.value).startswith(f"the column {name!r} holds {kind}, but the name means ")
    assert "rename it or write that" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("id", [1, 2]),
        ("label_ids", [[0], []]),
        ("label_ids", [[], []]),
        ("label_ids", [None, None]),
        ("label_probs", [[1], [0.5, 0.5]]),
        ("weight", [1, None]),
        ("error", [None, None]),
        ("votes", [[{"source": "a", "label_id": 1, "prob": 0.5}], []]),
        ("price", [1, 2]),
    ],
)
def test_what_can_be_read_as_the_column_is_taken(name: str, values: list[Any]) -> None:
    require_columns(Dataset.from_dict({name: values}), name)


def test_a_text_without_nulls_may_have_lost_them() -> None:
    require_columns(Dataset.from_dict({"text": ["a", None]}).select([0]), "text")


def test_with_columns_adds_and_replaces(texts: Dataset) -> None:
    chosen = texts.select([4, 2])
    changed = with_columns(
        chosen,
        {
            "text": (["x", "y"], Value("string")),
            "gold": ([[0], []], List(Value("int32"))),
            "weight": (np.array([0.5, 2.0]), Value("float32")),
            "error": (pa.array([None, "e"]), Value("string")),
        },
    )
    assert rows(changed) == [
        {"id": "r4", "text": "x", "gold": [0], "weight": 0.5, "error": None},
        {"id": "r2", "text": "y", "gold": [], "weight": 2.0, "error": "e"},
    ]
    assert changed.features["gold"] == List(Value("int32"))
    assert changed.features["weight"] == Value("float32")
    assert changed.data.num_rows == 2  # no old rows behind the selected ones
    assert chosen.column_names == ["id", "text"]
    retyped = with_columns(changed, {"weight": ([0, 1], ClassLabel(names=["u", "v"]))})
    assert retyped.features["weight"] == ClassLabel(names=["u", "v"])
    with pytest.raises(ValueError, match="column 'weight' has 1 values for 2 rows"):
        with_columns(chosen, {"weight": ([1.0], Value("float32"))})


def golden(golds: list[list[int] | None]) -> Dataset:
    ids = [f"r{n}" for n in range(len(golds))]
    features = Features({"id": Value("string"), "gold": List(Value("int32"))})
    return Dataset.from_dict({"id": ids, "gold": golds}, features=features)


def test_gold_index(labels: LabelSpace) -> None:
    dataset = golden([[2], [], [0], None, [1, 2]])
    assert gold_index(dataset.select(range(4)), labels).tolist() == [2, -1, 0, -1]
    assert gold_index(dataset.select([2, 0]), labels).tolist() == [0, 2]
    with pytest.raises(
        ValueError, match=r"row with id 'r4' has the gold labels \[1, 2\]; multi-label"
    ):
        gold_index(dataset, labels)


def test_gold_matrix(labels: LabelSpace) -> None:
    dataset = golden([[2, 0], [], [1]])
    assert gold_matrix(dataset, labels).tolist() == [
        [True, False, True],
        [False, False, False],
        [False, True, False],
    ]
    with pytest.raises(ValueError, match="'gold' is missing"):
        gold_matrix(dataset.remove_columns("gold"), labels)


@pytest.mark.parametrize("read", [gold_index, gold_matrix])
def test_gold_outside_the_labels(read: Callable[..., Any], labels: LabelSpace) -> None:
    with pytest.raises(
        ValueError, match=r"row with id 'r1' has the gold label 3, but there are only 3"
    ):
        read(golden([[0], [3]]), labels)
    with pytest.raises(ValueError, match=r"gold label -1"):
        read(golden([[-1]]), labels)
    with pytest.raises(ValueError, match=r"row with id 'r2' has the gold label -1"):
        read(golden([[], [1], [None]]), labels)  # what JSON may hold
    names = Dataset.from_dict({"id": ["a"], "gold": ["bug"]})
    with pytest.raises(ValueError, match=r"'gold' holds string, but the name means list<int32>"):
        read(names, labels)


# ------------------------------------------------------------------------ choosing and joining


def test_first_words() -> None:
    dataset = Dataset.from_dict({"n": [1, 2, 3], "text": ["  a\tb \n c d", "a", ""]})
    assert rows(first_words(dataset, words=3)) == [
        {"n": 1, "text": "a b c"},
        {"n": 2, "text": "a"},
        {"n": 3, "text": ""},
    ]
    with pytest.raises(ValueError, match=r"words must be at least 1.*got 0"):
        first_words(dataset, words=0)


SHARES = {"train": 0.6, "valid": 0.1, "test": 0.3}


def test_split_follows_the_hash() -> None:
    dataset = Dataset.from_dict({"text": ["Hello, World!", "a", "b", "c", "d"]})
    expected = []
    for normalised in ("hello world", "a", "b", "c", "d"):
        digest = hashlib.sha256(f"7:{normalised}".encode()).hexdigest()
        point = int(digest[:12], 16) / 16**12
        expected.append("train" if point < 0.6 else "valid" if point < 0.7 else "test")
    assert split(dataset, shares=SHARES, seed=7)["split"][:] == expected
    assert len(set(expected)) > 1


def test_split_shares_and_seed() -> None:
    dataset = Dataset.from_dict({"text": [f"text {n}" for n in range(4000)]})
    first = split(dataset, shares=SHARES)["split"][:]
    for name, share in SHARES.items():  # 5 standard deviations
        assert abs(first.count(name) - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5
    assert first != split(dataset, shares=SHARES, seed=1)["split"][:]


def test_split_depends_on_words_only(texts: Dataset) -> None:
    names = dict(zip(texts["text"], split(texts, shares=SHARES)["split"], strict=True))
    assert len(set(names.values())) > 1
    reversed_rows = split(texts.select(range(9, -1, -1)), shares=SHARES)
    assert dict(zip(reversed_rows["text"], reversed_rows["split"], strict=True)) == names
    shouted = Dataset.from_dict({"text": [f" {text.upper()}!?" for text in texts["text"]]})
    assert split(shouted, shares=SHARES)["split"][:] == list(names.values())


def test_split_at_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.from_dict({"text": ["0.0", "0.25", "0.5", "0.9999999999"]})
    monkeypatch.setattr(data, "_point", lambda text, seed: float(text))
    shares = {"train": 0.25, "valid": 0.25, "test": 0.5 - 9e-10}  # 1 within what is allowed
    assert split(dataset, shares=shares)["split"][:] == ["train", "valid", "test", "test"]


def test_bad_split(texts: Dataset) -> None:
    with pytest.raises(ValueError, match=r"shares must sum to 1; .* sum to 0\.9"):
        split(texts, shares={"train": 0.6, "test": 0.3})
    with pytest.raises(ValueError, match="must have names"):
        split(texts, shares={"": 0.5, "test": 0.5})
    with pytest.raises(ValueError, match="above 0"):
        split(texts, shares={"train": 1.5, "test": -0.5})
    with pytest.raises(ValueError, match="shares must sum to 1"):
        split(texts, shares={})
    with pytest.raises(ValueError, match="there is a column 'split' already"):
        split(split(texts, shares=SHARES), shares=SHARES)
    with pytest.raises(ValueError, match="above 0"):
        split(texts, shares={"train": float("nan"), "test": 0.5})


def test_part() -> None:
    dataset = Dataset.from_dict({"n": [0, 1, 2, 3], "split": ["test", "train", "test", "valid"]})
    assert part(dataset, split="test")["n"][:] == [0, 2]
    both = part(dataset, split=["valid", "test"])
    assert both["n"][:] == [0, 2, 3]
    assert both.data.num_rows == 3  # no old rows behind the chosen ones
    with pytest.raises(
        ValueError, match=r"no split 'dev'; .*\{'test': 2, 'train': 1, 'valid': 1\}"
    ):
        part(dataset, split=["test", "dev"])
    with pytest.raises(ValueError, match="'split' is missing"):
        part(dataset.remove_columns("split"), split="test")


def test_join(texts: Dataset) -> None:
    right = Dataset.from_dict(
        {"id": ["r2", "r0", "r1"], "weight": [2.0, 0.0, 1.0], "gold": [[2], [], [1]]}
    )
    left = texts.select([1, 2])
    joined = join(left, right, columns=["weight", "gold"])
    assert rows(joined) == [
        {"id": "r1", "text": "text 1", "weight": 1.0, "gold": [1]},
        {"id": "r2", "text": "text 2", "weight": 2.0, "gold": [2]},
    ]
    assert joined.features["gold"] == right.features["gold"]
    with pytest.raises(
        ValueError, match=r"7 of 10 ids have no row to join, the first are \['r3', 'r4', 'r5'\]"
    ):
        join(texts, right, columns=["weight"])
    with pytest.raises(ValueError, match="the column 'weight' is in both; rename"):
        join(joined, right, columns=["weight"])
    with pytest.raises(ValueError, match="'price' is missing"):
        join(left, right, columns=["price"])
    twice = Dataset.from_dict({"id": ["r1", "r2", "r2"], "weight": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="the id 'r2' is there more than once"):
        join(left, twice, columns=["weight"])


def test_rows_of(texts: Dataset) -> None:
    other = Dataset.from_dict({"id": ["r2", "q", "r0", "r1"], "n": [2, 9, 0, 1]})
    assert rows_of(texts.select([1, 2]), other, "other")["n"][:] == [1, 2]
    with pytest.raises(ValueError, match="the row with id 'r3' is not in other; add it there too"):
        rows_of(texts, other, "other")
    with pytest.raises(ValueError, match="the id 'r0' is more than once in other; remove one"):
        rows_of(texts.select([1]), other.select([0, 2, 3, 2]), "other")
    for one, two in ((texts.remove_columns("id"), other), (texts, other.remove_columns("id"))):
        with pytest.raises(ValueError, match="the column 'id' is missing"):
            rows_of(one, two, "other")


def test_label_position(labels: LabelSpace) -> None:
    assert [label_position(one, labels) for one in ("bug", "Bug report", "question")] == [0, 0, 2]
    with pytest.raises(ValueError, match="the int 1 is no id or name of a label"):
        label_position(1, labels)


def test_arrow_table_holds_the_chosen_rows(texts: Dataset) -> None:
    assert arrow_table(texts.select([5, 2]))["id"].to_pylist() == ["r5", "r2"]
    assert arrow_table(texts.select([])).schema.names == ["id", "text"]
    assert arrow_table(texts.with_format("numpy", columns=["id"])).schema.names == ["id", "text"]


# ------------------------------------------------------------------------------------- writing


@pytest.fixture
def table() -> Dataset:
    features = Features(
        {
            "id": Value("string"),
            "text": Value("string"),
            "label_ids": List(Value("int32")),
            "label_probs": List(Value("float32")),
            "kind": ClassLabel(names=["u", "v"]),
            "votes": List({"source": Value("string"), "prob": Value("float32")}),
        }
    )
    return Dataset.from_dict(
        {
            "id": ["a", "b", "c"],
            "text": ["x\u2028y\0", 'q"u,o\nte', ""],
            "label_ids": [[2, 0], [], None],
            "label_probs": [[0.7, 0.1], [], None],
            "kind": [1, 0, None],
            "votes": [[{"source": "s", "prob": 0.5}], [], None],
        },
        features=features,
    )


def test_parquet_round_trip(tmp_path: Path, table: Dataset) -> None:
    save(table, tmp_path / "t.parquet")
    back = read_parquet(tmp_path / "t.parquet")
    assert back.features == table.features
    assert rows(back) == rows(table)
    assert rows(load(tmp_path / "t.parquet")) == rows(table)
    assert (
        Dataset.from_parquet(str(tmp_path / "t.parquet"), cache_dir=str(tmp_path)).features
        == table.features
    )


def test_parquet_bytes_depend_on_the_rows_alone(tmp_path: Path, table: Dataset) -> None:
    save(table, tmp_path / "1.parquet")
    expected = (tmp_path / "1.parquet").read_bytes()
    chunked = datasets.concatenate_datasets([table.select([0]), table.select([1, 2])])
    same = [
        table,
        read_parquet(tmp_path / "1.parquet"),
        table.select([2, 1, 0]).select([2, 1, 0]),
        chunked,
    ]
    for n, dataset in enumerate(same):
        save(dataset, tmp_path / "2.parquet")
        assert (tmp_path / "2.parquet").read_bytes() == expected, n
    save(table.select([0, 2, 1]), tmp_path / "2.parquet")
    assert (tmp_path / "2.parquet").read_bytes() != expected


def test_parquet_pages_do_not_depend_on_chunks(tmp_path: Path) -> None:
    # Parquet looks at the size of a page after each chunk: only long columns can tell.
    texts = [f"{n:06d} " * 100 for n in range(4000)]
    whole = Dataset.from_dict({"text": texts})
    chunks = [Dataset.from_dict({"text": part}) for part in (texts[:1500], texts[1500:])]
    save(whole, tmp_path / "1.parquet")
    save(datasets.concatenate_datasets(chunks), tmp_path / "2.parquet")
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


def test_jsonl_round_trip(tmp_path: Path, table: Dataset) -> None:
    save(table.select([1, 0]), tmp_path / "t.jsonl")
    assert (tmp_path / "t.jsonl").read_bytes().count(b"\n") == 2
    assert rows(load(tmp_path / "t.jsonl")) == rows(table.select([1, 0]))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_holds_lists_as_json(tmp_path: Path, table: Dataset, suffix: str) -> None:
    save(table, tmp_path / f"t{suffix}")
    back = load(tmp_path / f"t{suffix}")
    assert back["text"][:] == table["text"][:]
    assert back["label_ids"][:] == ["[2, 0]", "[]", ""]
    assert json.loads(back["votes"][0]) == [{"source": "s", "prob": 0.5}]
    assert back["kind"][:] == ["1", "0", ""]


def test_save_folder(tmp_path: Path, table: Dataset) -> None:
    folder = tmp_path / "deep" / "t"
    save(table, folder)
    assert rows(datasets.load_from_disk(str(folder))) == rows(table)
    save(load(folder).select([0]), folder)  # over itself
    assert load(folder)["id"][:] == ["a"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["t"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    with pytest.raises(ValueError, match="other: the folder holds other things; give a new folder"):
        save(table, other)
    assert (other / "precious").read_text() == "x"


def test_save_unknown_suffix(tmp_path: Path, table: Dataset) -> None:
    with pytest.raises(ValueError, match=r"cannot save as '\.xlsx'; use \.parquet"):
        save(table, tmp_path / "t.xlsx")


def test_commit_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.txt"
    seen = []
    commit(path, lambda temporary: seen.append(temporary) or temporary.write_text("one"))
    commit(path, lambda temporary: temporary.write_text("two"))
    assert path.read_text() == "two"
    assert [entry.name for entry in path.parent.iterdir()] == ["t.txt"]
    assert seen[0].parent == path.parent
    assert seen[0].suffix == ".txt"
    assert str(os.getpid()) in seen[0].name


@pytest.mark.parametrize(
    "failure", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.EIO, "x")]
)
def test_commit_that_fails_leaves_the_old_file(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "t.txt"
    path.write_text("old")

    def write_half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise failure

    with pytest.raises(type(failure)) as caught:
        commit(path, write_half)
    assert caught.value is failure
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_commit_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for text in ("one", "two"):

        def write_folder(temporary: Path, text: str = text) -> None:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / text).write_text(text)

        commit(path, write_folder)
    assert [file.name for file in (path / "inner").iterdir()] == ["two"]

    def write_half(temporary: Path) -> None:
        temporary.mkdir()
        (temporary / "half").write_text("ha")
        raise RuntimeError("x")

    with pytest.raises(RuntimeError, match="x"):
        commit(path, write_half)
    assert (path / "inner" / "two").read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named_and_not_the_temporary_file(
    tmp_path: Path,
) -> None:
    def refuse(temporary: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(temporary))

    with pytest.raises(OSError, match="Read-only") as caught:
        commit(tmp_path / "t.txt", refuse)
    assert caught.value.filename == str(tmp_path / "t.txt")


def test_a_full_disk_as_safetensors_says_it(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    def write_until_full(temporary: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="the disk is full") as caught:
        commit(tmp_path / "t.safetensors", write_until_full)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path: Path, number: int) -> None:
    path = tmp_path / "t.txt"
    path.write_text("old")

    def write_until_full(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError(number, "No space left on device")

    with pytest.raises(OSError, match=r"the disk is full; what is kept stays: .*t\.txt") as caught:
        commit(path, write_until_full)
    assert caught.value.errno == number
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_save_on_a_full_disk(
    tmp_path: Path, table: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_table(table: pa.Table, path: Path) -> None:
        path.write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    save(table, tmp_path / "t.parquet")
    monkeypatch.setattr(pq, "write_table", write_table)
    with pytest.raises(OSError, match=r"the disk is full; .*t\.parquet"):
        save(table.select([0]), tmp_path / "t.parquet")
    assert rows(read_parquet(tmp_path / "t.parquet")) == rows(table)
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
