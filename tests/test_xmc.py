import gzip
import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import List, Value
from scipy.sparse import csr_array

from llmlabel import progress, xmc
from llmlabel.data import label_csr, plain_words, with_columns
from llmlabel.softlabels import SoftLabels
from llmlabel.xmc import files as files_module
from llmlabel.xmc.files import (
    read_features,
    read_label_matrix,
    read_pairs,
    write_matrix,
    write_texts,
)

LABELS = "cat\ndog\nbird\nfish\n"
Content = str | bytes | list[Any]


def folder(place: Path, files: Mapping[str, Content]) -> Path:
    """Files as texts, bytes, or lists of JSON values a line; packed where the name ends in .gz."""
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, list):
            content = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in content)
        raw = content.encode() if isinstance(content, str) else content
        (place / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return place


def counts(out: Path, split: str = "train") -> dict[str, Any]:
    return json.loads((out / "import.json").read_text())["parts"][split]


def told(out: Path) -> dict[str, Any]:
    return json.loads((out / "import.json").read_text())


# --------------------------------------------------------------------------------------- matrices

MATRIX = "4 4\n0:1.00000 2:1\n\n3:1.0\n1:1 0:1e0\n"
TEXTS = "a cat\u2028and a bird\nnothing\x85 here\n\na dog\u000b with a cat\n"
ROWS = [[0, 2], [], [3], [0, 1]]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_folder_of_the_repository_is_read_line_by_line(
    tmp_path: Path, end: str, packed: str
) -> None:
    """Unicode separators end no line, empty lines are rows, the last line may lack its end."""
    files = {"trn_X_Y.txt": MATRIX, "trn_X.txt": TEXTS.rstrip("\n"), "Y.txt": LABELS}
    files |= {"tst_X_Y.txt": "1 4\n2:1\n", "test_raw_texts.txt": "\ufeffa bird\n"}
    source = folder(
        tmp_path / "in", {f"{n}{packed}": t.replace("\n", end) for n, t in files.items()}
    )
    out = xmc.import_xmc(source, tmp_path / "out", block_rows=3)
    rows, space = xmc.xmc_rows(out, split="train"), xmc.xmc_labels(out)
    assert rows.column_names == ["id", "text", "gold"]
    assert rows["id"][:] == ["train-0", "train-1", "train-2", "train-3"]
    assert rows["text"][:] == TEXTS.split("\n")[:4]
    assert rows["gold"][:] == ROWS
    assert space.names == ("cat", "dog", "bird", "fish")
    assert space.multilabel
    assert xmc.xmc_rows(out, split="test")[:] == {
        "id": ["test-0"],
        "text": ["a bird"],
        "gold": [[2]],
    }
    assert counts(out) == {
        "rows": 4,
        "labels": 5,
        "unknown_labels": 0,
        "without_labels": 1,
        "repeated_labels": 0,
        "without_text": 1,
        "without_features": 0,
        "graded": False,
    }
    assert told(out)["labels_without_rows"] == 0
    assert label_csr(rows, space).toarray().tolist() == [
        [1, 0, 1, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [1, 1, 0, 0],
    ]


def test_rows_stay_on_the_disk(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"trn_X_Y.txt": MATRIX, "Y.txt": LABELS})
    rows = xmc.xmc_rows(xmc.import_xmc(source, tmp_path / "out"))
    assert [Path(file["filename"]).name for file in rows.cache_files] == ["train.arrow"]
    assert rows["text"][:] == [""] * 4
    assert counts(tmp_path / "out")["without_text"] == 4


def test_labels_without_names_have_their_numbers(tmp_path: Path) -> None:
    out = xmc.import_xmc(folder(tmp_path / "in", {"trn_X_Y.txt": MATRIX}), tmp_path / "out")
    assert xmc.xmc_labels(out).names == ("#0", "#1", "#2", "#3")
    assert told(out)["changes"][0].startswith("4 x no name (named by its id)")
    assert told(out)["labels_without_rows"] == 0


def test_labels_without_a_name_or_with_that_of_another_keep_their_place(tmp_path: Path) -> None:
    files = {"trn_X_Y.txt": "1 5\n4:1\n", "Y.txt": "cat\n\n cat \nbird\nfish"}
    out = xmc.import_xmc(folder(tmp_path / "in", files), tmp_path / "out")
    space = xmc.xmc_labels(out)
    assert space.names == ("cat (#0)", "#1", "cat (#2)", "bird", "fish")
    assert told(out)["changes"] == [
        "1 x white space (taken from the ends): ' cat ' / 'cat'",
        "1 x no name (named by its id): '#1' / '#1'",
        "2 x repeated name (among siblings, so that the id is added): '#0' / 'cat' / 'cat (#0)'; "
        "'#2' / 'cat' / 'cat (#2)'",
    ]
    assert told(out)["labels_without_rows"] == 4  # zero-shot labels are no error
    assert xmc.xmc_rows(out)["gold"][0] == [4]


SPARSE = "4 6 4\n0,2 0:0.5 5:1\n 1:2.5\n3\n\n"


def test_a_sparse_data_file_has_labels_and_features(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"train.txt": SPARSE, "Y.txt": LABELS})
    out = xmc.import_xmc(source, tmp_path / "out")
    assert xmc.xmc_rows(out)["gold"][:] == [[0, 2], [], [3], []]
    assert (counts(out)["without_labels"], counts(out)["without_features"]) == (2, 2)
    features = read_features(source / "train.txt")
    assert features.dtype == np.float32
    assert features.toarray().tolist() == [
        [0.5, 0, 0, 0, 0, 1],
        [0, 2.5, 0, 0, 0, 0],
        [0] * 6,
        [0] * 6,
    ]
    assert read_label_matrix(source / "train.txt").toarray().tolist() == [
        [1, 0, 1, 0],
        [0] * 4,
        [0, 0, 0, 1],
        [0] * 4,
    ]


def test_graded_relevances_are_soft_labels(tmp_path: Path) -> None:
    """0 is kept as known not to be true; what is there twice has the higher one."""
    files = {"trn_X_Y.txt": "3 4\n0:0.25 2:1 1:0\n\n3:.5 3:0.75\n", "Y.txt": LABELS}
    out = xmc.import_xmc(folder(tmp_path / "in", files), tmp_path / "out", block_rows=1)
    rows, space = xmc.xmc_rows(out), xmc.xmc_labels(out)
    assert rows["gold"][:] == [[0, 2], [], [3]]
    assert rows["label_ids"][:] == [[2, 0, 1], [], [3]]
    assert rows["label_probs"][:] == [[1.0, 0.25, 0.0], [], [0.75]]
    soft = SoftLabels.from_dataset(rows, space)
    assert soft.probs.toarray().tolist() == [[0.25, 0, 1, 0], [0] * 4, [0, 0, 0, 0.75]]
    assert (counts(out)["graded"], counts(out)["repeated_labels"]) == (True, 1)


def test_a_row_of_unknown_labels_has_no_relevances(tmp_path: Path) -> None:
    lines = [
        {"id": "a", "text": "x", "labels": ["cat", "dog"], "target_rel": [0.5, 1.0]},
        {"id": "b", "text": "y", "labels": None},
        {"id": "c", "text": "z", "labels": []},
    ]
    source = folder(tmp_path / "in", {"rows.jsonl": lines, "labels.txt": LABELS})
    out = xmc.import_xmc(
        source / "rows.jsonl", tmp_path / "out", labels=source / "labels.txt", block_rows=2
    )
    rows = xmc.xmc_rows(out)
    assert rows["gold"][:] == [[0, 1], None, []]
    assert rows["label_ids"][:] == [[1, 0], None, []]
    assert rows["label_probs"][:] == [[1.0, 0.5], None, []]
    soft = SoftLabels.from_dataset(rows, xmc.xmc_labels(out))
    assert soft.probs.toarray().tolist() == [[0.5, 1, 0, 0], [0] * 4, [0] * 4]


def test_an_id_of_null_is_none(tmp_path: Path) -> None:
    lines = [
        {"id": None, "text": "x", "labels": ["cat"]},
        {"id": None, "uid": "u", "text": "x", "labels": ["cat"]},
        {"uid": None, "text": "y", "labels": ["dog"]},
        {"id": 0, "uid": "u", "text": "y", "labels": ["dog"]},
    ]
    source = folder(tmp_path / "in", {"rows.jsonl": lines, "labels.txt": LABELS})
    out = xmc.import_xmc(source / "rows.jsonl", tmp_path / "out", labels=source / "labels.txt")
    assert xmc.xmc_rows(out)["id"][:] == ["all-0", "u", "all-2", "0"]


@pytest.mark.parametrize("name", ["trn_filter_labels.txt", "filter_labels_train.txt.gz"])
def test_pairs_of_the_filter_are_a_column(tmp_path: Path, name: str) -> None:
    files = {"trn_X_Y.txt": MATRIX, "Y.txt": LABELS, name: "3 1\n0 3\n0 0\n3 1\n"}
    rows = xmc.xmc_rows(xmc.import_xmc(folder(tmp_path / "in", files), tmp_path / "out"))
    assert rows["excluded_ids"][:] == [[0, 3], [], [], [1]]
    assert xmc.excluded_pairs(rows).tolist() == [[0, 0], [0, 3], [3, 1]]
    assert xmc.excluded_pairs(rows.select([3, 1])).tolist() == [[0, 1]]
    files[name] = ""
    rows = xmc.xmc_rows(xmc.import_xmc(folder(tmp_path / "in", files), tmp_path / "out"))
    assert rows["excluded_ids"][:] == [[], [], [], []]


# ------------------------------------------------------------------------------------------- JSON

LBL = [
    {"uid": "B1", "title": "cat", "content": "a small tiger"},
    {"uid": "B2", "title": "dog", "content": ""},
    {"uid": "B3", "title": "cat"},
]


def test_the_json_of_sets_with_label_features(tmp_path: Path) -> None:
    files = {
        "trn.json.gz": [
            {"uid": "A1", "title": "one\u2028two", "content": "", "target_ind": [2, 0]},
            {"uid": "A2", "title": "", "content": "text", "target_ind": [], "target_rel": []},
            {"uid": "A3", "title": "t", "content": "c", "target_ind": [1], "target_rel": [1.0]},
            {"uid": "A4", "title": None},
        ],
        "tst.json": '{"uid": "A1", "title": "half \\ud800 a pair", "target_ind": [1]}\n\n',
        "lbl.json.gz": LBL,
        "filter_labels_test.txt": "0 0\n",
    }
    source = folder(tmp_path / "in" / "raw_text", files).parent
    out = xmc.import_xmc(source, tmp_path / "out")
    space = xmc.xmc_labels(out)
    assert space.ids == ("B1", "B2", "B3")
    assert space.names == ("cat (B1)", "dog", "cat (B3)")
    assert space.descriptions == ("a small tiger", "", "")
    train = xmc.xmc_rows(out, split="train")
    assert train["id"][:] == ["A1", "A2", "A3", "A4"]
    assert train["text"][:] == ["one\u2028two", "text", "t\nc", ""]
    assert train["gold"][:] == [[0, 2], [], [1], None]
    test = xmc.xmc_rows(out, split="test")[:]
    assert test["text"] == ["half \ufffd a pair"]
    assert test["excluded_ids"] == [[0]]
    assert (counts(out)["unknown_labels"], counts(out)["without_labels"]) == (1, 1)


def test_rows_of_ones_own_with_names_ids_and_splits(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "text": "x", "labels": ["p1", "dog"], "split": "train"},
        {"id": "b", "text": "y", "labels": [], "split": "test"},
        {"id": "c", "text": "z", "labels": ["p1"], "split": "test", "target_rel": [0.5]},
    ]
    labels = [
        {"label": "p1", "name": "cat", "aliases": ["kissa", "katt"], "name_sv": None, "n": 3},
        {"label": "p2", "name": "dog", "description": "It barks.", "name_sv": "hund", "n": 4},
    ]
    source = folder(tmp_path / "in", {"rows.jsonl.gz": rows, "labels.jsonl": labels})
    out = xmc.import_xmc(
        source / "rows.jsonl.gz",
        tmp_path / "out",
        labels=source / "labels.jsonl",
        aliases=["aliases", "name_sv"],
    )
    space = xmc.xmc_labels(out)
    assert space.texts() == ["cat: also kissa, katt", "dog: also hund. It barks."]
    assert told(out)["changes"] == ["1 x unused column (not read): 'n'"]
    assert xmc.xmc_rows(out, split="train")["gold"][:] == [[0, 1]]
    assert xmc.xmc_rows(out, split="test")["label_probs"][:] == [[], [0.5]]
    assert sorted(path.name for path in out.iterdir()) == [
        *("import.json", "labels.json", "test.arrow", "train.arrow")
    ]


def test_labels_of_another_file_are_numbered_too(tmp_path: Path) -> None:
    files = {"trn_X_Y.txt": "1 2\n1:1\n", "names.csv": "id,name\np1,cat\np2,dog\n"}
    files["names.jsonl"] = '{"id": "q1", "name": "cat"}\n\n{"id": "q2", "name": "dog"}\n'
    source = folder(tmp_path / "in", files)
    for name, ids in (("names.csv", ("p1", "p2")), ("names.jsonl", ("q1", "q2"))):
        out = xmc.import_xmc(source, tmp_path / "out", labels=source / name)
        assert xmc.xmc_labels(out).ids == ids
        assert xmc.xmc_rows(out)["gold"][:] == [[1]]


def test_words_of_test_rows_that_stand_in_train_can_be_counted(tmp_path: Path) -> None:
    train, test = [{"text": "A cat!"}, {"text": "dog"}], [{"text": "a CAT"}, {"text": "bird"}]
    source = folder(tmp_path, {"trn.json": train, "tst.json": test, "Y.txt": LABELS})
    out = xmc.import_xmc(source, tmp_path / "out")
    texts = [xmc.xmc_rows(out, split=name)["text"][:] for name in ("train", "test")]
    seen = set(map(plain_words, texts[0]))
    assert [plain_words(text) in seen for text in texts[1]] == [True, False]


# ---------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("seed", range(20))
def test_matrices_are_read_as_they_were_written(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, width, labels = rng.integers(1, 30, 3)
    values = rng.normal(size=(rows, width)).astype(np.float32) * (rng.random((rows, width)) < 0.3)
    gold = csr_array((rng.random((rows, labels)) < 0.2).astype(np.float32))
    features = csr_array(values * np.float32(10.0 ** rng.integers(-20, 20)))
    write_matrix(features, tmp_path / "X_Xf.txt")
    write_matrix(features, tmp_path / "train.txt", labels=gold)
    for file in ("X_Xf.txt", "train.txt"):
        found = read_features(tmp_path / file)
        assert found.shape == features.shape
        assert (found != features).nnz == 0
    assert (read_label_matrix(tmp_path / "train.txt") != gold).nnz == 0


def test_a_block_of_empty_rows_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_BLOCK_LINES", 2)
    rows = ["0:1", "", "", " ", "", "2:0.5", "", "", "1:3"]
    expected = np.zeros((9, 3))
    expected[[0, 5, 8], [0, 2, 1]] = 1, 0.5, 3
    (tmp_path / "f.txt").write_text("\n".join(["9 3", *rows]) + "\n")
    np.testing.assert_array_equal(read_features(tmp_path / "f.txt").toarray(), expected)
    (tmp_path / "f.txt").write_text("3 3\n\n\n\n")
    assert read_label_matrix(tmp_path / "f.txt").nnz == 0
    (tmp_path / "f.txt").write_text("3 5 3\n 4:1\n 0:2\n\n")  # rows without a label
    assert read_label_matrix(tmp_path / "f.txt").nnz == 0


def test_what_is_exported_is_imported_again(tmp_path: Path) -> None:
    files = {"trn_X_Y.txt": "3 4\n0:0.25 2:1\n\n3:0.3\n", "Y.txt": LABELS, "trn_X.txt": "a\nb\nc\n"}
    out = xmc.import_xmc(folder(tmp_path / "in", files), tmp_path / "out")
    rows, space = xmc.xmc_rows(out), xmc.xmc_labels(out)
    features = csr_array(np.array([[0.0, 2.0], [0, 0], [1, 0]]))
    again = xmc.export_xmc(rows, space, tmp_path / "again", relevance=True, features=features)
    back = xmc.xmc_rows(xmc.import_xmc(again, tmp_path / "out2"))
    assert back[:] == rows[:]
    assert (again / "train.txt").read_text() == "3 2 4\n0,2 1:2\n\n3 0:1\n"
    write_texts(["two\r\nlines", "one"], tmp_path / "t.txt")
    assert (tmp_path / "t.txt").read_bytes() == b"two lines\none\n"
    with pytest.raises(ValueError, match=r"train.txt: 2 rows of features and 3 of labels; both"):
        xmc.export_xmc(rows, space, tmp_path / "again", features=features[:2])
    with pytest.raises(ValueError, match="split must be one of train, test; got 'dev'"):
        xmc.export_xmc(rows, space, tmp_path / "again", split="dev")
    xmc.export_xmc(rows, space, again)
    assert (again / "trn_X_Y.txt").read_text() == "3 4\n0:1 2:1\n\n3:1\n"
    unknown = with_columns(rows, {"gold": ([[0], None, [3]], List(Value("int32")))})
    with pytest.raises(ValueError, match="gold of 1 of 3 rows is unknown; take them out"):
        xmc.export_xmc(unknown, space, again)


# -------------------------------------------------------------------------------------- bad input

ONE = {"Y.txt": LABELS}
BAD: list[tuple[dict[str, Content], str]] = [
    (
        {"trn_X_Y.txt": "0:1 2:1\n"},
        "trn_X_Y.txt: line 1: '0:1 2:1' is no header; put `rows labels`",
    ),
    ({"trn_X_Y.txt": ""}, "trn_X_Y.txt: line 1: '' is no header"),
    ({"trn_X_Y.txt": "0 4\n"}, "there are no rows; give files with at least one"),
    (
        {"trn_X_Y.txt": "2 4\n0:1\n"},
        "line 1 says 2 rows, but there are only 1; copy the file again",
    ),
    ({"trn_X_Y.txt": "1 4\n0:1\n\n1:1\n"}, "line 4: '1:1' is after the 1 rows that line 1 says"),
    (
        {"trn_X_Y.txt": "2 4\n0:1\n4:1\n"},
        "line 3: there is no label 4; there are 4, numbered from 0",
    ),
    ({"trn_X_Y.txt": "1 4\n0:1 x:1\n"}, "line 2: 'x:1' is not number:value, as in `12:0.5`"),
    ({"trn_X_Y.txt": "1 4\n0:nan\n"}, "line 2: '0:nan' is not number:value"),
    (
        {"trn_X_Y.txt": "1 4\n0:3\n"},
        "line 2: the relevance 3 of label 0 is not from 0 to 1; divide",
    ),
    (
        {"trn_X_Y.txt": "1 3\n0:1\n"},
        "line 1 says 3 labels, but .*Y.txt has 4; give the files of one",
    ),
    ({"train.txt": "1 2 4\n0,x 1:1\n"}, "line 2: '0,x' is no list of labels, as in `3,12`"),
    (
        {"trn_X_Y.txt": MATRIX, "trn_X.txt": "a\nb\n"},
        "trn_X.txt has 2 lines, but .*trn_X_Y.txt has more rows",
    ),
    (
        {"trn_X_Y.txt": "1 4\n0:1\n", "trn_X.txt": "a\nb\n"},
        "trn_X.txt: line 2: 'b' is after the last row of .*trn_X_Y.txt",
    ),
    (
        {"trn_X_Y.txt": "1 4\n0:1\n", "trn_X.txt": b"caf\xe9\n"},
        "trn_X.txt: line 1: the byte 0xe9 at byte 3 is not utf-8; say what it is, for example",
    ),
    (
        {"trn_X_Y.txt": MATRIX, "trn_filter_labels.txt": "0 1\n1 2 3\n"},
        "trn_filter_labels.txt: line 2: '1 2 3' is not `row label`, as in `7 12`",
    ),
    (
        {"trn_X_Y.txt": MATRIX, "trn_filter_labels.txt": "0 4\n"},
        "trn_filter_labels.txt: there is no label 4; there are 4, numbered from 0",
    ),
    (
        {"trn_X_Y.txt": MATRIX, "trn_filter_labels.txt": "4 0\n"},
        "trn_filter_labels.txt: there is no row 4 in .*trn_X_Y.txt",
    ),
    ({"trn.json": "[1]\n"}, r"trn.json: line 1: '\[1\]' is no JSON object; write {...}"),
    ({"trn.json": '{"title": "a"\n'}, "trn.json: line 1 is not JSON: .*; write one object a line"),
    ({"trn.json": [{"title": "a", "target_ind": [9]}]}, "line 1: there is no label 9; there are 4"),
    ({"trn.json": [{"title": "a", "target_ind": [-1]}]}, "line 1: there is no label -1"),
    ({"trn.json": [{"title": "a", "target_ind": ["0"]}]}, "line 1: '0' in target_ind is no number"),
    ({"trn.json": [{"title": "a", "target_ind": 3}]}, "line 1: the labels are 3; write a list"),
    (
        {"trn.json": [{"title": "a", "target_ind": [1], "target_rel": [1, 1]}]},
        r"line 1: 1 labels, but target_rel is \[1, 1\]; one for each",
    ),
    (
        {"trn.json": [{"title": "a", "target_ind": [1], "target_rel": ["1"]}]},
        "line 1: '1' in target_rel is no number",
    ),
    ({"trn.json": [{"title": 5}]}, "trn.json: line 1: title is 5, no text; put it in quotes"),
    ({"trn.json": [{"body": "a"}]}, "trn.json: no row has a `text` or a `title`; rename the key"),
    (
        {"trn.json": [{"text": "a", "labels": ["cats"]}]},
        "line 1: unknown label 'cats'; did you mean",
    ),
    ({"trn.json": [{"text": "a", "labels": [5]}]}, "line 1: the int 5 is no id or name of a label"),
    (
        {"trn.json": [{"uid": name, "title": "a"} for name in "xyx"]},
        "rows 1 and 3 of train have the same id 'x'; make ids unique",
    ),
    ({"trn.json.gz": b""}, "there are no rows"),
    ({"trn.json": [{"title": "a"}], "Y.txt": b"caf\xe9\n"}, "Y.txt: line 1: the byte 0xe9"),
    ({"trn.json": [{"title": "a"}], "Y.txt": ""}, "Y.txt: there are no labels"),
    (
        {"trn.json": [{"title": "a"}], "lbl.json": [LBL[0], LBL[1], LBL[0]]},
        "lbl.json: 1 of 3 labels have no id of their own, such as 'B1', so that the numbers",
    ),
]


@pytest.mark.parametrize(("files", "message"), BAD)
def test_what_is_broken_is_named(tmp_path: Path, files: dict[str, Content], message: str) -> None:
    source = folder(tmp_path / "in", {**ONE, **files})
    with pytest.raises(ValueError, match=message) as failure:
        xmc.import_xmc(source, tmp_path / "out")
    assert "\n" not in str(failure.value)
    assert str(source) in str(failure.value)
    assert [path.name for path in (tmp_path / "out").glob("*")] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 2\n2:1\n", "line 2: 2:1: line 1 says 2 columns, numbered from 0; mend"),
        ("2 2\n0:1\n1:1 0:1 1:2\n", "line 3: 1:2: the number is there twice; keep one"),
        (
            "1 4294967296\n2147483648:1\n",
            "line 2: 2147483648:1: a number must be below 2\\^31; num",
        ),
        ("1 2\n0:1e39\n", "line 2: 0:1e[+]39: too large for float32; divide all values"),
        ("1 2\n0:1e999\n", "line 2: 0:inf: too large for float32"),
        ("1 2\n0:1 1:2:3\n", "line 2: '1:2:3' is not number:value"),
        ("1 2\n0:1 1\n", "line 2: '1' is not number:value"),
        ("1 2\n-1:1\n", "line 2: '-1:1' is not number:value"),
    ],
)
def test_broken_features_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "f.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_features(tmp_path / "f.txt")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"rows.jsonl": [{"text": "a"}], "x.csv": "a\n"})
    with pytest.raises(
        FileNotFoundError, match=r"no trn.json, trn_X_Y.txt, train.txt or train.jsonl"
    ):
        xmc.import_xmc(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no lbl.json, labels.jsonl or Y.txt; give it as labels="):
        xmc.import_xmc(source / "rows.jsonl", tmp_path / "out")
    with pytest.raises(ValueError, match=r"x.csv: not a .jsonl file; give one, or the folder"):
        xmc.import_xmc(source / "x.csv", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"none.txt: no such label file"):
        xmc.import_xmc(source / "rows.jsonl", tmp_path / "out", labels=source / "none.txt")
    with pytest.raises(
        FileNotFoundError, match=r"import.json is missing; give a folder of import_xmc"
    ):
        xmc.xmc_rows(source)
    (source / "Y.txt").write_text(LABELS)
    (source / "Y.jsonl").write_text('{"name": "cat"}\n')
    with pytest.raises(ValueError, match=r"Y.jsonl: no label has 'fi', which aliases= asks for"):
        xmc.import_xmc(source / "rows.jsonl", tmp_path, labels=source / "Y.jsonl", aliases=["fi"])
    with pytest.raises(ValueError, match="encoding='utf-16' has no plain line ends; save"):
        xmc.import_xmc(source / "rows.jsonl", tmp_path, encoding="utf-16")
    with pytest.raises(ValueError, match="block_rows must be at least 1; got 0"):
        xmc.import_xmc(source / "rows.jsonl", tmp_path, block_rows=0)
    out = xmc.import_xmc(source / "rows.jsonl", tmp_path / "out", labels=source / "Y.txt")
    assert xmc.xmc_rows(out, split="all")["text"][:] == ["a"]
    with pytest.raises(ValueError, match=r"split='train', but the splits are all"):
        xmc.xmc_rows(out, split="train")
    (source / "rows.jsonl").write_text('{"text": "a", "split": "../a"}\n')
    with pytest.raises(ValueError, match=r"line 1: split '../a' is no plain word, such as train"):
        xmc.import_xmc(source / "rows.jsonl", tmp_path / "out", labels=source / "Y.txt")
    assert xmc.xmc_rows(out)["text"][:] == ["a"]  # what failed leaves what was there


def test_a_gz_file_that_is_not_whole_is_named(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"trn_X_Y.txt": MATRIX, "Y.txt.gz": LABELS * 99})
    whole = (source / "Y.txt.gz").read_bytes()
    (source / "Y.txt.gz").write_bytes(whole[:-12])
    with pytest.raises(ValueError, match=r"Y.txt.gz: not a whole .gz file .*; copy or download it"):
        xmc.import_xmc(source, tmp_path / "out")


def test_other_encodings_are_tried_line_by_line(tmp_path: Path) -> None:
    files: dict[str, Content] = {
        "trn_X_Y.txt": "2 2\n0:1\n1:1\n",
        "Y.txt": b"caf\xe9\nna\xc3\xafve\n",
    }
    files["trn_X.txt"] = b"\xe9t\xe9\n\xc3\xa9t\xc3\xa9\n"
    source = folder(tmp_path / "in", files)
    out = xmc.import_xmc(source, tmp_path / "out", encoding=["utf-8", "cp1252"])
    assert xmc.xmc_rows(out)["text"][:] == ["été", "été"]
    assert xmc.xmc_labels(out).names == ("café", "naïve")


def test_pairs_and_rows_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n")
    assert read_pairs(tmp_path / "p.txt").shape == (0, 2)
    (tmp_path / "m.txt").write_text("0 3\n")
    assert read_features(tmp_path / "m.txt").shape == (0, 3)


def test_long_files_tell_how_far_they_are(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    rows = "".join(f"{row % 4}:1\n" for row in range(25_000))
    source = folder(tmp_path / "in", {"trn_X_Y.txt": f"25000 4\n{rows}", "Y.txt": LABELS})
    stream = io.StringIO()
    request.addfinalizer(progress.hide)
    progress.show(stream=stream, first_seconds=0.0, every_seconds=0.0)
    xmc.import_xmc(source, tmp_path / "out")
    size = (source / "trn_X_Y.txt").stat().st_size
    found = [line.split(" bytes")[0] for line in stream.getvalue().splitlines()]
    shares = [line.removeprefix("read trn_X_Y.txt ") for line in found if "trn_X_Y" in line]
    assert found[0] == "read Y.txt 18/18"
    assert shares[-1] == f"{size}/{size}"
    assert len(shares) >= 3
    assert sorted(shares, key=lambda share: int(share.split("/")[0])) == shares


# ----------------------------------------------------------------------------------------- memory

GROWTH = """
import resource, sys
from pathlib import Path
from llmlabel.xmc import import_xmc
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
small, large, out = map(Path, sys.argv[1:])
import_xmc(small, out / "small", block_rows=2000)
before = most()
import_xmc(large, out / "large", block_rows=2000)
print(most() - before)
"""


def test_more_rows_than_memory(tmp_path: Path) -> None:
    """200,000 rows of 60 MB grow the process by a few MB beyond what 4,000 of them need."""
    text = "a text of a row that is as long as the title of a book or of a thing to buy, " * 4
    for name, rows in (("small", 4_000), ("large", 200_000)):
        labels = "".join(f"{row % 7}:1 {row % 11 + 7}:1\n" for row in range(rows))
        files = {"trn_X_Y.txt": f"{rows} 18\n{labels}", "trn_X.txt": f"{text}\n" * rows}
        folder(tmp_path / name, {**files, "Y.txt": "".join(f"label {n}\n" for n in range(18))})
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            GROWTH,
            *(str(tmp_path / name) for name in ("small", "large", "out")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = xmc.xmc_rows(tmp_path / "out" / "large")
    assert len(rows) == 200_000
    assert rows[199_999]["gold"] == [199_999 % 7, 199_999 % 11 + 7]
    assert (tmp_path / "out" / "large" / "train.arrow").stat().st_size > 60e6
    assert int(done.stdout) < 24
