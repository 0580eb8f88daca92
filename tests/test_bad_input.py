"""Bad input at the command line: one clear line on stderr, exit code 2, and nothing lost."""

import json
import logging
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import click.testing
import pytest
import typer.testing

from llmlabel import cli, progress
from llmlabel.data import load
from llmlabel.engine.fake import FakeEngine
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels

LABELS = "labels: {call: llmlabel.labelspace.load_labels, source: labels.yaml}\n"
TEXTS = "texts: {call: llmlabel.data.load, path: texts.jsonl}\n"
FAKE = "engine: {call: llmlabel.engine.fake.FakeEngine}\n"
RAW = """raw:
  call: llmlabel.label.direct.label_direct
  dataset: "${texts}"
  engine: "${engine}"
  labels: "${labels}"
"""
FILE = 'file: {call: llmlabel.data.save, dataset: "${raw}", output: labeled.jsonl}\n'
CHAIN = LABELS + TEXTS + FAKE + RAW + FILE
HOSTILE = [
    "cat",
    "catfish",
    "cat, dog",
    "cat: dog?",
    "ca",
    "?",
    "<b>x</b>",
    "$x^2$",
    "{{ x }}",
    "ℵ",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with two texts and three labels; what the command line sets is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # slow, and no machine crashes here
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    for name in ("HF_HUB", "HF_DATASETS"):
        monkeypatch.setenv(f"{name}_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    Path("labels.yaml").write_text("- cat\n- dog\n- no, thing?\n")
    Path("texts.jsonl").write_text('{"text": "a cat"}\n{"text": "the dog"}\n')
    Path("r.yaml").write_text(CHAIN)
    yield tmp_path
    log = logging.getLogger("llmlabel")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    progress.hide()


def llmlabel(*arguments: str) -> click.testing.Result:
    return typer.testing.CliRunner().invoke(cli.app, arguments)


def refused(*arguments: str) -> str:
    """What the command says after `error: `, on one line."""
    done = llmlabel(*(arguments or ("run", "r.yaml")))
    assert done.exit_code == 2, done.output
    said = [line for line in done.stderr.splitlines() if ": computing" not in line]
    assert len(said) == 1, done.stderr
    assert done.stdout == ""
    return said[0].removeprefix("error: ")


def rows(path: str = "labeled.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").split("\n")[:-1]]


# ------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("t.xlsx", b"PK", "texts: t.xlsx: unknown file type '.xlsx'; known are .csv, .tsv, .jsonl"),
        (
            "t.jsonl",
            b'{"body": 1}\n',
            "t.jsonl: there is no column 'text'; say which with text=NAM",
        ),
        ("t.jsonl", b"", "texts: t.jsonl: there are no rows; give a file with at least one"),
        ("t.csv", b"id,text\n", "texts: t.csv: there are no rows; give a file with at least one"),
        ("t.csv", b"id,text\na,x\na,y\n", "data rows 1 and 2 have the same id 'a' (column 'id')"),
        ("t.csv", b"text\nok\ncaf\xe9\n", "data row 2, line 3: the byte 0xe9 at byte offset 3 is"),
        (
            "t.jsonl",
            b'{"text": "caf\xe9"}\n',
            "data row 1, line 1: the byte 0xe9 at byte offset 13",
        ),
        ("t.jsonl", b'{"text": ["a"]}\n', "data row 1: 'text' is the list ['a'], not text; name"),
        ("t.parquet", b"PAR1 and no more", "t.parquet: not a whole Parquet file: "),
    ],
)
def test_a_file_of_texts(here: Path, name: str, content: bytes, line: str) -> None:
    Path(name).write_bytes(content)
    assert line in refused("run", "r.yaml", f"texts.path={name}")


def test_a_file_that_is_not_there(here: Path) -> None:
    line = refused("run", "r.yaml", "texts.path=text.jsonl")
    assert line == "r.yaml: texts.path: no file or folder 'text.jsonl'; did you mean 'texts.jsonl'?"
    assert not Path("runs").exists()


def test_strange_texts_are_labelled_or_flagged_and_come_back_as_they_were(here: Path) -> None:
    texts = [
        "a\0cat",
        "a\u2028cat",
        "😀👩‍👩‍👧",
        "\u200f\u05e9\u05dc\u05d5\u05dd",
        "",
        " \n",
        "x" * 140_000,
    ]
    lines = [json.dumps({"id": n, "text": text, "error": 5}) for n, text in enumerate(texts)]
    Path("texts.jsonl").write_text("\n".join(lines))
    assert llmlabel("run", "r.yaml").exit_code == 0
    got = rows()
    assert [row["text"] for row in got] == texts
    assert [row["id"] for row in got] == [str(n) for n in range(7)]  # numbers become text
    cut = "text cut: the limit is 10000 characters"
    assert [row["error"] for row in got] == [None] * 4 + ["empty text"] * 2 + [cut]
    assert [len(row["label_ids"]) for row in got] == [3] * 4 + [0] * 2 + [3]
    Path("texts.csv").write_text('text\n"' + "y" * 140_000 + '"\n"a\0cat"\n', "utf-8")
    assert llmlabel("run", "r.yaml", "texts.path=texts.csv").exit_code == 0
    assert [row["text"] for row in rows()] == ["y" * 140_000, "a\0cat"]


# ----------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("- a\n- b\n- a\n", "labels.yaml: labels 1 and 3 have the same id 'a'; give each an id"),
        ("- {id: a, name: x}\n- {id: b, name: x}\n", "'a' and 'b', both roots, have the same name"),
        (
            "- a\n",
            "one label only ('a'), and a choice needs two; for a yes/no question say multila",
        ),
        ("- 1\n- 2\n", "label 1 is the int 1, not text; put it in quotes"),
        ("- {id: a, nme: b}\n- c\n", "label 1 has the unknown key 'nme'; did you mean 'name'?"),
        ("labels: [a, b]\nlabels: [c, d]\n", "line 2: 'labels' is defined twice, first in line 1"),
        ("- [a\n", "labels.yaml: line 2: "),
    ],
)
def test_a_file_of_labels(here: Path, content: str, line: str) -> None:
    Path("labels.yaml").write_text(content)
    assert line in refused()


STEPS = {
    "debias.batch_calibration": "dataset: ${own}",
    "aggregate.aggregate": "sources: {one: ${own}}",
    "select.keep_confident": "dataset: ${own}, share: 0.5",
    "classifier.train_classifier": "dataset: ${own}, model: nobody/reads-it",
    "temperature.fit_temperature": "dataset: ${own}",
    "conformal.fit_conformal": "dataset: ${own}, alpha: 0.5",
    "report.write_report": "sources: {one: ${own}}, student: one, split: null",
}
MODULES = {
    "debias": "refine.debias",
    "aggregate": "refine.aggregate",
    "classifier": "train.classifier",
    "temperature": "calibrate.temperature",
    "conformal": "calibrate.conformal",
}


def step(call: str, arguments: str, labels: str = "${labels}") -> str:
    module, _, name = call.partition(".")
    arguments = arguments.replace("${own}", '"${own}"')
    path = f"llmlabel.{MODULES.get(module, module)}.{name}"
    return f'step: {{call: {path}, {arguments}, labels: "{labels}"}}\n'


def own_rows(labels: list[str], **columns: object) -> None:
    """own.jsonl: 20 rows labelled in a label space, with gold."""
    space = load_labels(labels)
    lines = [
        {
            **{"id": f"r{n}", "text": "a cat", "gold": [n % 2], "label_ids": [n % 2]},
            **{"label_probs": [1.0], "label_space": space.fingerprint, **columns},
        }
        for n in range(20)
    ]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Path("labels.yaml").write_text("- cat\n- dog\n")


OWN = LABELS + "own: {call: llmlabel.data.load, path: own.jsonl}\n"


@pytest.mark.parametrize("call", STEPS)
def test_soft_labels_of_another_space(here: Path, call: str) -> None:
    own_rows(["cat", "mouse"])
    Path("r.yaml").write_text(OWN + step(call, STEPS[call]))
    line = refused()
    assert "the rows carry soft labels of label space" in line
    assert (
        f"but the label space given is {load_labels(['cat', 'dog']).fingerprint}; load the" in line
    )


@pytest.mark.parametrize("call", STEPS)
def test_label_ids_from_elsewhere(here: Path, call: str) -> None:
    own_rows(["cat", "dog"], label_ids="dog")
    Path("r.yaml").write_text(OWN + step(call, STEPS[call]))
    assert "the column 'label_ids' holds string, but the name means list<int32>" in refused()


@pytest.mark.parametrize(
    "call", ["temperature.fit_temperature", "conformal.fit_conformal", "report.write_report"]
)
@pytest.mark.parametrize("gold", [[2], [-1], [None]])
def test_gold_outside_the_label_space(here: Path, call: str, gold: list[int | None]) -> None:
    own_rows(["cat", "dog"], gold=gold)
    Path("r.yaml").write_text(OWN + step(call, STEPS[call]))
    assert f"row with id 'r0' has the gold label {-1 if gold == [None] else gold[0]}" in refused()


@pytest.mark.parametrize(
    ("alpha", "line"),
    [
        ("0", "alpha must lie strictly between 0 and 1; got 0"),
        ("1.5", "alpha must lie strictly between 0 and 1; got 1.5"),
        (".nan", "alpha must lie strictly between 0 and 1; got nan"),
        ("0.01", "alpha=0.01 needs at least 99 gold rows; there are 20 (label more rows, or allow"),
        ("'0.1'", "r.yaml: step.alpha: '0.1' does not fit float; Input should be a valid number"),
    ],
)
def test_alpha(here: Path, alpha: str, line: str) -> None:
    own_rows(["cat", "dog"])
    Path("r.yaml").write_text(OWN + step("conformal.fit_conformal", "dataset: ${own}"))
    assert line in refused("run", "r.yaml", f"step.alpha={alpha}")


@pytest.mark.parametrize(
    ("weight", "line"),
    [
        ("heavy", "the column 'weight' holds string, but the name means float32: training weight"),
        (-1, "row with id 'r0' has the weight -1; write a number of at least 0, or null for 1"),
    ],
)
def test_weights(here: Path, weight: object, line: str) -> None:
    own_rows(["cat", "dog"], weight=weight)
    for call in ("select.keep_confident", "classifier.train_classifier"):
        Path("r.yaml").write_text(OWN + step(call, STEPS[call]))
        assert line in refused()


def test_a_null_weight_is_one(here: Path) -> None:
    own_rows(["cat", "dog"], weight=None)
    Path("r.yaml").write_text(OWN + step("select.keep_confident", STEPS["select.keep_confident"]))
    assert llmlabel("run", "r.yaml").exit_code == 0
    kept = load("runs/r/step/value.parquet")["weight"][:]
    assert sorted(kept) == [0.0] * 10 + [1.0] * 10


# ---------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            LABELS.replace("load_l", "load_"),
            "no function or class 'load_abels'; did you mean 'load_",
        ),
        (
            LABELS.replace("lspace", "lspcae"),
            "'llmlabel.labelspcae'; did you mean 'llmlabel.labels",
        ),
        (LABELS.replace("source", "sorce"), "has no argument 'sorce'; did you mean 'source'?"),
        (LABELS + RAW, "r.yaml: raw.dataset: ${texts} is not defined; there is labels"),
        (RAW + TEXTS, "r.yaml: raw.dataset: ${texts} is used before its line; move 'texts' up"),
        (LABELS * 2, "r.yaml: line 2: 'labels' is defined twice, first in line 1"),
        ("x: {call: os.system, command: ls}\n", "'os.system' is outside llmlabel; if you trust"),
        ("x: {call: llmlabel.data.re.compile}\n", "there is no module 'llmlabel.data.re'"),
        ("x: {call: llmlabel}\n", "'llmlabel' is a package; write llmlabel.MODULE.FUNCTION"),
        ("x: [", "r.yaml: line 1: "),
        ("- x\n", "r.yaml: a recipe is a mapping of variables; this one is not"),
    ],
)
@pytest.mark.parametrize("command", ["check", "run", "python"])
def test_a_recipe(here: Path, command: str, content: str, line: str) -> None:
    Path("r.yaml").write_text(content)
    assert line in refused(command, "r.yaml")
    assert not Path("runs").exists()


# ----------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("config.json", None, "config.json is missing; copy or download it again"),
        ("config.json", b"{", "model 'm' cannot be loaded (OSError: "),
        ("model.safetensors", None, "no *.safetensors file; copy or download it again"),
        ("model.safetensors", b"1234", "model.safetensors is cut short or damaged; copy or down"),
        ("model.safetensors", b"x" * 9999, "model.safetensors is cut short or damaged; copy or d"),
        ("tokenizer.json", b"{", "model 'm' cannot be loaded ("),
    ],
)
def test_a_model_folder(
    here: Path, tiny_decoder: Path, name: str, content: bytes | None, line: str
) -> None:
    Path("m").mkdir()
    for path in tiny_decoder.iterdir():
        if path.name != name:
            (Path("m") / path.name).symlink_to(path)
    if content is not None:
        (Path("m") / name).write_bytes(content)
    own_rows(["cat", "dog"])
    engine = "engine: {call: llmlabel.engine.hf.HFEngine, model: m}\n"
    train = step("classifier.train_classifier", "dataset: ${own}, model: m")
    for recipe in (LABELS + TEXTS + engine + RAW, OWN + train):
        Path("r.yaml").write_text(recipe)
        assert line in refused()


def test_a_model_that_is_nowhere(here: Path) -> None:
    engine = "engine: {call: llmlabel.engine.hf.HFEngine, model: %s}\n"
    Path("r.yaml").write_text(LABELS + TEXTS + engine % "./gone" + RAW)
    assert "r.yaml: raw: model './gone': no such file or folder; give a path, a hub" in refused()
    Path("r.yaml").write_text(LABELS + TEXTS + engine % "nobody/nothing" + RAW)  # offline
    assert "r.yaml: raw: model 'nobody/nothing' cannot be loaded (OSError: " in refused()


# ------------------------------------------------------------------------------- what a run keeps


@pytest.mark.parametrize(
    ("name", "content", "again"),
    [
        ("raw/value.parquet", b"PAR1", True),
        ("raw/value.parquet", b"", True),
        ("labels/value.json", b'{"ids"', True),
        ("raw/kept.json", b"garbage", False),
        ("raw/kept.json", b'{"fingerprint": 3}', False),
        ("texts/kept.json", b"\xff\xfe", False),
    ],
)
def test_what_is_damaged_is_computed_again(
    here: Path, name: str, content: bytes, again: bool
) -> None:
    assert llmlabel("run", "r.yaml").exit_code == 0
    before = {path: path.read_bytes() for path in Path("runs/r").rglob("*.parquet")}
    labeled = Path("labeled.jsonl").read_bytes()
    (Path("runs/r") / name).write_bytes(content)
    Path("labeled.jsonl").unlink()  # so that the run reads what is kept
    done = llmlabel("run", "r.yaml")
    assert done.exit_code == 0, done.output
    variable = Path(name).parent.name
    assert done.stderr.splitlines()[0].startswith(f"{variable}: computing")
    assert ("again, because what was kept is damaged" in done.stderr.splitlines()[0]) == again
    assert {path: path.read_bytes() for path in Path("runs/r").rglob("*.parquet")} == before
    assert Path("labeled.jsonl").read_bytes() == labeled
    assert llmlabel("run", "r.yaml").stderr == ""


def test_ctrl_c_leaves_committed_blocks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"cat {n}"}) for n in range(20)]
    Path("texts.jsonl").write_text("\n".join(lines))
    score, asked = FakeEngine.score, []

    def press(self: FakeEngine, chats: list, labels: list[str]) -> object:
        asked.append(len(chats))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return score(self, chats, labels)

    monkeypatch.setattr(FakeEngine, "score", press)
    done = llmlabel("run", "r.yaml", "raw.block_rows=8")
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "stopped; the same command continues"
    assert len(list(Path("runs/r/raw/blocks").glob("*.parquet"))) == 2
    assert llmlabel("run", "r.yaml", "raw.block_rows=8").exit_code == 0
    assert asked == [8, 8, 4, 4]  # the two blocks are not asked for again
    assert [row["text"] for row in rows()] == [f"cat {n}" for n in range(20)]


@pytest.fixture
def disk(here: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    (here / "disk").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", here / "disk"], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield Path("disk")
    subprocess.run(["umount", here / "disk"], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk.resolve()], check=True)


def test_a_full_disk_keeps_what_is_committed(here: Path, disk: Path) -> None:
    lines = [json.dumps({"text": f"the cat number {n} sat on the mat"}) for n in range(350)]
    Path("texts.jsonl").write_text("\n".join(lines))
    command = ["run", "r.yaml", "raw.block_rows=32", "--output"]
    assert llmlabel(*command, "runs").exit_code == 0
    expected = Path("labeled.jsonl").read_bytes()
    line = refused(*command, "disk/runs")
    assert line.startswith("r.yaml: raw: the disk of disk/runs/r/raw/")
    assert "is full; what is kept stays: free space, run it again" in line
    blocks = {path: path.read_bytes() for path in disk.rglob("raw/blocks/*.parquet")}
    assert blocks
    assert not list(disk.rglob(".tmp-*"))
    assert "is full; " in refused(*command, "disk/runs")
    remount(disk, "size=4m")
    done = llmlabel(*command, "disk/runs")
    assert done.exit_code == 0, done.output
    assert "labels: computing" not in done.stderr
    assert {path: path.read_bytes() for path in blocks} == blocks
    assert Path("labeled.jsonl").read_bytes() == expected


def test_the_disk_that_is_full_is_the_one_that_is_named(here: Path, disk: Path) -> None:
    (disk / "filler").write_bytes(b"x" * 65_536)
    line = refused("run", "r.yaml", "file.output=disk/labeled.jsonl")
    assert line.startswith("r.yaml: file: the disk of disk/labeled.jsonl is full; what is kept")


def test_a_folder_that_is_read_only(here: Path, disk: Path) -> None:
    remount(disk, "ro")
    assert refused("run", "r.yaml", "--output", "disk/runs") == (
        "the run folder disk/runs/r cannot be written (Read-only file system); "
        "give another --output"
    )
    line = refused("run", "r.yaml", "file.output=disk/labeled.jsonl")
    assert line.startswith("r.yaml: file: Read-only file system: disk/labeled.jsonl (details: ")


# ---------------------------------------------------------------------------------- the whole chain

REST = """
labeled: {call: llmlabel.refine.debias.batch_calibration, dataset: "${raw}", labels: "${labels}"}
vectors:
  call: llmlabel.label.embedding.label_embedding
  dataset: "${texts}"
  encoder: ENCODER
  labels: "${labels}"
both:
  call: llmlabel.refine.aggregate.aggregate
  sources: {"an LLM, a: b?": "${labeled}", <i>: "${vectors}"}
  labels: "${labels}"
student:
  call: llmlabel.train.classifier.train_classifier
  dataset: "${both}"
  labels: "${labels}"
  model: DECODER
  num_train_epochs: 1
predicted: {call: llmlabel.train.classifier.predict, dataset: "${texts}", model: "${student}"}
conformal:
  call: llmlabel.calibrate.conformal.fit_conformal
  dataset: "${predicted}"
  labels: "${labels}"
sets:
  call: llmlabel.calibrate.conformal.predict_sets
  dataset: "${predicted}"
  labels: "${labels}"
  conformal: "${conformal}"
report:
  call: llmlabel.report.write_report
  sources: {"an LLM, a: b?": "${labeled}", Student: "${sets}"}
  labels: "${labels}"
  student: Student
  split: null
  model: "${student}"
"""


def test_hostile_labels_and_texts_pass_the_whole_chain(
    here: Path, tiny_decoder: Path, tiny_encoder: Path
) -> None:
    texts = ["cat " * 2_000, "", "<|im_end|> a\0cat\u2028", "😀", "\u05e9\u05dc\u05d5\u05dd"]
    texts += [f"row {n}: the cat sat on the mat" for n in range(10)]
    lines = [json.dumps({"text": text, "gold": [n % 10]}) for n, text in enumerate(texts)]
    Path("texts.jsonl").write_text("\n".join(lines))
    Path("labels.json").write_text(json.dumps(HOSTILE))
    engine = f"engine: {{call: llmlabel.engine.hf.HFEngine, model: {tiny_decoder}}}\n"
    rest = REST.replace("ENCODER", str(tiny_encoder)).replace("DECODER", str(tiny_decoder))
    Path("r.yaml").write_text(CHAIN.replace(FAKE, engine) + rest)
    done = llmlabel("run", "r.yaml", "labels.source=labels.json")
    assert done.exit_code == 0, done.output
    labels = load_labels(HOSTILE)
    for name, cut in {
        "labeled": "text cut: the prompt had",
        "vectors": "text cut: 2001 tokens, the limit is 128",
        "sets": "text cut: 2001 tokens, the limit is 256",
    }.items():
        table = load(f"runs/r/{name}/value.parquet")
        assert table["text"][:] == texts
        assert table["error"][0].startswith(cut)
        assert table["error"][1:] == ["empty text"] + [None] * 13
        labelled = SoftLabels.from_dataset(table, labels).dense().sum(axis=1)
        assert labelled.round(5).tolist() == [1, 0] + [1] * 13
    report = json.loads(Path("runs/r/report/report.json").read_text("utf-8"))
    assert [entry["name"] for entry in report["provenance"]["labels"]] == HOSTILE
    page = Path("runs/r/report/report.html").read_text("utf-8")
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "<b>x</b>" not in page
