"""The command line: what a person sees, and the exit codes."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import click.testing
import pytest
import typer.testing

from llmlabel import cli, progress

STEPS = """
import logging, os, time, warnings
from typing import Any

def report(rows: int) -> dict[str, Any]:
    warnings.warn("a third party's [red]warning[/red]")
    logging.getLogger("somebody").warning("noise")
    return {"summary": {"rows [all]": rows, "accuracy": 0.876543, "name": "student"}, "more": 1}

def stop() -> int:
    raise KeyboardInterrupt

def bug() -> int:
    raise KeyError("unforeseen")

def refuse(value: int) -> int:
    raise ValueError(f"value {value} is too small; give more\\nsecond line")

class Meter:
    # Stands for an engine that counts.
    cost = 0.125
    def __init__(self, computed: int = 0):
        from llmlabel.engine import Usage
        self.usage = Usage(computed_tokens=computed)

def ask(engine: Meter) -> int:
    engine.usage.requests += 1200
    engine.usage.prompt_tokens += 34567
    engine.usage.output_tokens += 1200
    return 1

def ask_and_fail(engine: Meter, answer: int) -> int:
    engine.usage.requests += 1
    raise ValueError("too much")

def slow(seconds: float) -> int:
    print("started", flush=True)
    time.sleep(seconds)
    return 1
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the package `shop`; what the command line sets in a process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # slow, and no machine crashes here
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "steps.py").write_text(STEPS)
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    for name in (
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
        "TQDM_DISABLE",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    path, log = list(sys.path), logging.getLogger("llmlabel")
    yield tmp_path
    sys.path[:] = path
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    progress.hide()
    for name in ("shop", "shop.steps"):
        sys.modules.pop(name, None)


def llmlabel(*arguments: str) -> click.testing.Result:
    return typer.testing.CliRunner().invoke(cli.app, arguments)


def write(text: str) -> str:
    Path("small.yaml").write_text(text)
    return "small.yaml"


LABELS = "labels: {call: llmlabel.labelspace.load_labels, source: [bug, praise]}\n"


def test_a_run_prints_its_variables_and_then_what_is_kept(shop: Path) -> None:
    done = llmlabel("run", write(LABELS), "--output", "out")
    assert done.exit_code == 0, done.output
    assert done.stderr == "labels: computing\n"
    (line,) = [line.split() for line in done.stdout.splitlines() if "labels" in line]
    seconds = line.pop(5)
    assert re.fullmatch(r"\d\.\d", seconds)
    assert line == ["│", "labels", "│", "computed", "│", "│", "out/small/labels", "│"]
    again = llmlabel("run", "small.yaml", "--output", "out")
    assert f"│ labels   │ kept  │ {seconds}     │ out/small/labels │" in again.stdout
    assert again.stderr == ""
    forced = llmlabel("run", "small.yaml", "--output", "out", "--force")
    assert "computed" in forced.stdout


def test_a_summary_is_printed_as_a_table_and_others_are_quiet(shop: Path) -> None:
    recipe = write("numbers: {call: shop.steps.report, rows: 3}\n")
    done = llmlabel("run", recipe, "numbers.rows=12", "--allow", "shop")
    assert done.exit_code == 0, done.output
    rows = [line.strip("│ ").split("│") for line in done.stdout.splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert ["rows [all]", "12"] in cells
    assert ["accuracy", "0.8765"] in cells
    assert ["name", "student"] in cells
    assert "third party" not in done.output


def test_overrides_apply_and_allow_is_needed(shop: Path) -> None:
    recipe = write("numbers: {call: shop.steps.report, rows: 3}\n")
    done = llmlabel("run", recipe)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "error: small.yaml: numbers: 'shop.steps.report' is outside llmlabel; "
        "if you trust the package, add --allow shop\n"
    )
    assert not Path("runs").exists()


def test_check_runs_nothing_and_names_a_typo(shop: Path) -> None:
    done = llmlabel("check", write(LABELS))
    assert (done.exit_code, done.stdout) == (0, "small.yaml: 1 variables fit; nothing was run\n")
    assert not Path("runs").exists()
    done = llmlabel("check", "small.yaml", "labels.sorce=x")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "error: small.yaml: labels: llmlabel.labelspace.load_labels has no argument 'sorce'; "
        "did you mean 'source'?\n"
    )


def test_python_prints_the_program(shop: Path) -> None:
    done = llmlabel("python", write(LABELS))
    assert done.exit_code == 0, done.output
    assert '    labels = load_labels(source=["bug", "praise"])\n' in done.stdout
    assert done.stdout.endswith("    main()\n")


METER = "engine: {call: shop.steps.Meter}\n"
ASK = METER + 'x: {call: shop.steps.ask, engine: "${engine}"}\n'


def test_what_an_engine_was_asked_and_its_price_are_printed_and_kept(shop: Path) -> None:
    done = llmlabel("run", write(ASK), "--allow", "shop")
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(
        "\nengine: 1,200 requests, 34,567 prompt tokens, 1,200 output tokens, cost 0.125\n"
    )

    def usage() -> dict[str, float]:
        return json.loads(Path("runs/small/run.json").read_text())["variables"]["engine"]["usage"]

    spent = {"requests": 1200, "prompt_tokens": 34567, "computed_tokens": 0}
    assert usage() == {**spent, "output_tokens": 1200, "cost": 0.125}
    again = llmlabel("run", "small.yaml", "--allow", "shop")
    assert "requests" not in again.stdout  # nothing was asked
    assert usage()["requests"] == 1200
    failing = ASK + 'y: {call: shop.steps.ask_and_fail, engine: "${engine}", answer: "${x}"}\n'
    told = llmlabel("run", write(failing), "engine.computed=7", "--allow", "shop")
    assert told.exit_code == 2
    assert usage() == {**spent, "requests": 1201, "computed_tokens": 7} | {
        "output_tokens": 1200,
        "cost": 0.125,
    }


def test_a_plan_shows_what_would_be_asked_and_writes_nothing(shop: Path) -> None:
    (shop / "texts.csv").write_text("text\n" + "a cat\n" * 12 + f"{'long ' * 400}\n")
    recipe = write(
        LABELS
        + "texts: {call: llmlabel.data.load, path: texts.csv}\n"
        + "engine: {call: llmlabel.engine.openai.OpenAIEngine, base_url: 'http://127.0.0.1:1/v1', "
        + "model: small, reading: codes, input_price: 1.0}\n"
        + "raw: {call: llmlabel.label.direct.label_direct, dataset: '${texts}', "
        + "engine: '${engine}', labels: '${labels}'}\n"
    )
    before = sorted(shop.rglob("*"))
    done = llmlabel("run", recipe, "--plan")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("│ raw")]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[:5] == ["raw", "13", "OpenAIEngine small", "13", "26"]
    assert cells[5].startswith("about ")
    assert cells[6] == "at most 26"
    assert float(cells[7].removeprefix("about ")) == pytest.approx(
        float(cells[5].removeprefix("about ").replace(",", "")) / 1e6, rel=0.05
    )
    assert (
        "\nraw: the first prompt\n  system: Read the user's text and name its label.\n"
        in done.stdout
    )
    assert done.stdout.endswith("\nnothing was asked and nothing was written\n")
    assert [path for path in sorted(shop.rglob("*")) if "__pycache__" not in str(path)] == before
    wrong = llmlabel("run", recipe, "--plan", "raw.min_mass=3")
    assert "raw: not planned: raw: min_mass is a probability" in wrong.stdout
    assert llmlabel("run", recipe, "--plan", "raw.order=0").exit_code == 2


@pytest.mark.parametrize("verb", ["label", "taxonomy", "train", "calibrate", "report"])
def test_a_verb_is_the_shipped_recipe_of_its_name(
    shop: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shop / "recipes").mkdir()
    (shop / "recipes" / f"{verb}.yaml").write_text(LABELS)
    monkeypatch.setattr("llmlabel.recipe.__file__", str(shop / "recipe" / "__init__.py"))
    done = llmlabel(verb, "labels.source=[one, two, three]", "--output", "out")
    assert done.exit_code == 0, done.output
    kept = json.loads((shop / "out" / verb / "labels" / "value.json").read_text())
    assert kept["ids"] == ["one", "two", "three"]
    help_text = " ".join(llmlabel(verb, "--help").stdout.replace("│", " ").split())
    assert f"Runs the shipped recipe {verb}.yaml; `llmlabel python {verb}` prints it." in help_text


TREE = """
- animal
- {id: cat, parent: animal, description: purrs}
- {id: tabby, parent: cat}
- {id: c2, name: dog, parent: animal}
"""


def test_labels_are_shown_as_a_tree(shop: Path) -> None:
    done = llmlabel("labels", write(TREE))
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "animal",
        "├── cat  purrs",
        "│   └── tabby",
        "└── dog  [c2]",
    ]
    done = llmlabel("labels", "small.yaml", "--depth", "1")
    assert done.stdout == "animal ... 2 more\n"
    done = llmlabel("labels", "small.yaml", "--depth", "2", "--most", "1")
    assert done.stdout.splitlines()[1:] == ["├── cat ... 1 more  purrs", "└── ... 1 more"]


def test_labels_are_converted_and_what_was_cleaned_is_told(shop: Path) -> None:
    (shop / "wild.csv").write_text(
        "id,parent\nanimal,\ncat,animal\ncat,animal\ndog,animal\ndog,dog\n"
    )
    done = llmlabel("labels", "wild.csv", "--save", "tidy.yaml")
    assert done.exit_code == 0, done.output
    assert done.stdout == "tidy.yaml: 3 labels\n"
    told = [line.split(" (")[0] for line in done.stderr.splitlines()]
    assert "wild.csv: 1 x repeated edge" in told
    assert "wild.csv: 1 x self-loop" in told
    shown = llmlabel("labels", "tidy.yaml")
    assert shown.stderr == ""
    assert shown.stdout == "animal\n├── cat\n└── dog\n"
    refused = llmlabel("labels", "tidy.yaml", "--save", "tidy.xyz")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: tidy.xyz: ")
    assert not (shop / "tidy.xyz").exists()


def test_what_an_ontology_leaves_out_is_told(shop: Path) -> None:
    (shop / "wild.ttl").write_text(
        "@prefix skos: <http://www.w3.org/2004/02/skos/core#> .\n"
        "@prefix owl: <http://www.w3.org/2002/07/owl#> .\n"
        "@prefix y: <http://y.org/> .\n"
        'y:cat a skos:Concept ; skos:prefLabel "cat"@en .\n'
        'y:dog a skos:Concept ; skos:prefLabel "dog"@en .\n'
        'y:dodo a skos:Concept ; skos:prefLabel "dodo"@en ; owl:deprecated true .\n'
    )
    done = llmlabel("labels", "wild.ttl")
    assert done.exit_code == 0, done.output
    assert done.stdout == "cat  [http://y.org/cat]\ndog  [http://y.org/dog]\n"
    assert done.stderr == "wild.ttl: 1 x deprecated (left out): 'http://y.org/dodo'\n"


def test_a_misspelt_key_of_a_label_file_is_named(shop: Path) -> None:
    done = llmlabel("labels", write("labels: [{id: a}, {id: b}]\nmultilable: true\n"))
    assert done.exit_code == 2
    assert "unknown key 'multilable'; did you mean 'multilabel'" in done.stderr


def test_two_versions_of_labels_are_compared(shop: Path) -> None:
    newer = TREE.replace("{id: tabby, parent: cat}", "{id: fish, parent: animal}")
    (shop / "newer.yaml").write_text(newer.replace("name: dog", 'name: "hot\\e[31m dog"'))
    done = llmlabel("labels", write(TREE), "--diff", "newer.yaml")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "renamed 'c2': name 'dog' -> 'hot\\x1b[31m dog'",
        "added 'fish' below 'animal'",
        "removed 'tabby' from 'cat'",
    ]
    assert llmlabel("labels", "small.yaml", "--diff", "small.yaml").stdout == "no changes\n"
    (shop / "newer.yaml").write_text("\n".join(reversed(TREE.strip().split("\n"))))
    done = llmlabel("labels", "small.yaml", "--diff", "newer.yaml")
    assert done.stdout == "also changed: order of labels; move old rows with carry_over\n"


def test_labels_that_cannot_be_read_are_one_line(shop: Path) -> None:
    done = llmlabel("labels", "absent.yaml")
    assert done.exit_code == 2
    assert done.stderr == (
        "error: absent.yaml: no such label file; give a path or a list of labels\n"
    )
    done = llmlabel("labels", write("- one\n"))
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "one label only" in done.stderr


@pytest.mark.parametrize(
    ("call", "code", "line"),
    [
        (
            "refuse, value: 2",
            2,
            "error: small.yaml: x: value 2 is too small; give more (details: runs/small/error.log)",
        ),
        ("stop", 130, "stopped; the same command continues"),
    ],
)
def test_what_goes_wrong_is_one_line(shop: Path, call: str, code: int, line: str) -> None:
    recipe = write(f"{LABELS}x: {{call: shop.steps.{call}}}\n")
    done = llmlabel("run", recipe, "--allow", "shop")
    assert done.exit_code == code
    assert done.stderr == f"labels: computing\nx: computing\n{line}\n"
    assert done.stdout == ""
    again = llmlabel("run", recipe, "--allow", "shop")
    assert again.stderr == f"x: computing\n{line}\n"  # the labels are kept


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("absent.yaml", "error: absent.yaml: no such recipe"),
        ("quickstar", "error: quickstar: no such recipe; did you mean 'quickstart'?"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check", "python"])
def test_an_unknown_recipe(shop: Path, command: str, recipe: str, line: str) -> None:
    done = llmlabel(command, recipe)
    assert done.exit_code == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_written(shop: Path) -> None:
    (shop / "out").write_text("a file")
    done = llmlabel("run", write(LABELS), "--output", "out")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert "out" in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_rank_is_silent(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llmlabel("run", write(LABELS)).exit_code == 0
    monkeypatch.setenv("RANK", "1")
    done = llmlabel("run", "small.yaml")
    assert (done.exit_code, done.output) == (0, "")


# ----------------------------------------------------------------------------- as a real process


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(shop: Path) -> Start:
    def start(*arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "llmlabel", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=shop)

    return start


def test_help_and_version_answer_at_once(start: Start) -> None:
    before = os.times()
    out, _ = start("--help").communicate()
    after = os.times()
    own = ("run", "check", "python", "labels")
    for command in (*own, "label", "taxonomy", "train", "calibrate", "report"):
        assert f"│ {command} " in out
    # Of the processor, not of the clock: the machine may be busy with other things
    seconds = after.children_user + after.children_system
    assert 0 < seconds - before.children_user - before.children_system < 0.5
    assert start("--version").communicate()[0].startswith("llmlabel 0.")


def test_a_bug_shows_its_traceback(start: Start) -> None:
    process = start("run", write("x: {call: shop.steps.bug}\n"), "--allow", "shop")
    _, err = process.communicate()
    assert process.returncode == 1
    assert "Traceback" in err
    assert err.endswith("KeyError: 'unforeseen'\n")


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(start: Start) -> None:
    recipe = write(LABELS + "x: {call: shop.steps.slow, seconds: 60}\n")
    first = start("run", recipe, "--allow", "shop")
    assert first.stdout is not None
    assert first.stdout.readline() == "started\n"
    second = start("run", recipe, "--allow", "shop")
    _, err = second.communicate()
    assert second.returncode == 2
    assert err == (
        "error: another process is running in runs/small; wait for it, or give another --output\n"
    )
    first.kill()
    first.communicate()
    third = start("run", recipe, "x.seconds=0", "--allow", "shop")
    out, err = third.communicate()
    assert third.returncode == 0, err
    assert err == "x: computing\n"
    assert "kept" in out


def test_ctrl_c_stops_with_one_line(start: Start) -> None:
    import signal

    process = start("run", write("x: {call: shop.steps.slow, seconds: 60}\n"), "--allow", "shop")
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err == "x: computing\nstopped; the same command continues\n"


def test_other_bars_are_off(shop: Path) -> None:
    program = (
        "from llmlabel import cli; cli._quiet()\n"
        "import tqdm.auto, datasets\n"
        "for _ in tqdm.auto.tqdm(range(3)): pass\n"
        "datasets.Dataset.from_dict({'a': [1]}).map(lambda row: row)\n"
    )
    names = ("TQDM", "HF_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(names)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
