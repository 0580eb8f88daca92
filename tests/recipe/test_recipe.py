"""Reading recipes, overrides, and the program that a recipe stands for."""

import ast
import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from llmlabel import recipe as recipes
from llmlabel.recipe import RecipeError, check, load_recipe, run, to_python

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str, name: str = "small.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def failure(path: Path | str, overrides: list[str] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides or [])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ YAML


def test_scalars_are_what_a_person_reads(tmp_path: Path) -> None:
    text = """
rate: 1e-4
large: 1E5
signed: -2.5e+3
point: .5
whole: 1.
count: 1_000
zero: 0
code: 007
norway: no
switch: on
truth: true
nothing: null
empty:
time: 12:30
day: 2024-01-31
limit: .inf
merge: <<
quoted: "1e-4"
"""
    values = load_recipe(write(tmp_path, text)).assignments
    assert values == {
        "rate": 0.0001,
        "large": 100000.0,
        "signed": -2500.0,
        "point": 0.5,
        "whole": 1.0,
        "count": 1000,
        "zero": 0,
        "code": "007",
        "norway": "no",
        "switch": "on",
        "truth": True,
        "nothing": None,
        "empty": None,
        "time": "12:30",
        "day": "2024-01-31",
        "limit": math.inf,
        "merge": "<<",
        "quoted": "1e-4",
    }
    assert [type(values[key]) for key in ("rate", "large", "whole", "zero")] == [
        float,
        float,
        float,
        int,
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' is defined twice, first in line 1"),
        ("a:\n  call: f\n  x: 1\n  x: 2\n", "line 4: 'x' is defined twice, first in line 3"),
        ("a: [{x: 1,\n  x: 2}]\n", "line 2: 'x' is defined twice, first in line 1"),
        ("a: 1\nb: [2\n", "line 3: expected ',' or ']', but got '<stream end>'"),
        ("- a\n- b\n", "a recipe is a mapping of variables; this one is not"),
        ("", "a recipe is a mapping of variables; this one is not"),
        ("my-name: 1\n", "'my-name' is not a variable name"),
        ("class: 1\n", "'class' is not a variable name"),
        ("1: 1\n", "1 is not a variable name"),
        ("a: !!set {x: null}\n", "Object of type set is not JSON serializable"),
        ("a: &here [*here]\n", "Circular reference detected"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    assert failure(write(tmp_path, text)) == f"small.yaml: {line}"


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [touch never]",
        "!!python/object/new:os.system [touch never]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object:llmlabel.labelspace.LabelSpace {}",
        "!include other.yaml",
    ],
)
def test_tags_run_nothing(tmp_path: Path, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, f"a: {tag}\n")
    assert "line 1: could not determine a constructor for the tag" in failure(path)
    small = write(tmp_path, "a: 1\n", "ok.yaml")
    assert "could not determine a constructor" in failure(small, [f"a={tag}"])
    assert not (tmp_path / "never").exists()


def test_a_file_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_bytes(b"a: \xff\n")
    assert failure(path) == "small.yaml: not UTF-8 at byte 3"


# ------------------------------------------------------------------------------- where and what


def test_a_name_without_suffix_is_a_shipped_recipe() -> None:
    recipe = load_recipe("quickstart")
    assert recipe.name == "quickstart"
    assert recipe.path == ROOT / "recipes" / "quickstart.yaml"


def test_an_unknown_recipe_names_the_closest_and_all() -> None:
    line = failure("quickstrat")
    assert line.startswith("quickstrat: no such recipe; did you mean 'quickstart'?; shipped are ")
    assert failure("elsewhere/quickstart.yaml").startswith("elsewhere/quickstart.yaml: no such")


def test_the_wheel_has_its_recipes_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes" / "papers").mkdir(parents=True)
    write(tmp_path / "recipes" / "papers", "a: 1\n", "tnt.yaml")
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "recipe" / "__init__.py"))
    assert load_recipe("papers/tnt").assignments == {"a": 1}
    assert "shipped are papers/tnt" in failure("quickstart")


OVERRIDDEN = """
seed: 0
texts: {call: llmlabel.data.load, path: old.jsonl}
parts: {call: llmlabel.data.split, dataset: "${texts}", shares: {train: 0.8, test: 0.2}}
"""


def test_overrides_replace_variables_and_arguments(tmp_path: Path) -> None:
    overrides = [
        "seed=7",
        "texts.path=new=1.jsonl",
        "texts.text=title",
        "parts.shares.test=1e-1",
        "parts.seed=${seed}",
    ]
    recipe = load_recipe(write(tmp_path, OVERRIDDEN), overrides)
    assert recipe.assignments == {
        "seed": 7,
        "texts": {"call": "llmlabel.data.load", "path": "new=1.jsonl", "text": "title"},
        "parts": {
            "call": "llmlabel.data.split",
            "dataset": "${texts}",
            "shares": {"train": 0.8, "test": 0.1},
            "seed": "${seed}",
        },
    }
    whole = load_recipe(write(tmp_path, OVERRIDDEN), ["texts={call: a.b, c: [1]}"])
    assert whole.assignments["texts"] == {"call": "a.b", "c": [1]}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seeds=7", "override 'seeds=7': no variable 'seeds'; did you mean 'seed'?"),
        ("text.path=x", "override 'text.path=x': no variable 'text'; did you mean 'texts'?"),
        ("seed", "override 'seed' is not name=value"),
        ("seed.low=1", "override 'seed.low=1': seed is not a call or a mapping"),
        (
            "parts.share.x=1",
            "override 'parts.share.x=1': the recipe does not set 'share'; set it whole: "
            "'parts.share={x: 1}'",
        ),
    ],
)
def test_an_override_that_fits_nothing(tmp_path: Path, override: str, line: str) -> None:
    assert failure(write(tmp_path, OVERRIDDEN), [override]) == f"small.yaml: {line}"


def test_an_override_that_is_no_yaml_or_has_a_key_twice(tmp_path: Path) -> None:
    path = write(tmp_path, OVERRIDDEN)
    assert failure(path, ["seed=[1"]).startswith("override 'seed=[1': line 1: expected")
    assert "'a' is defined twice" in failure(path, ["seed={a: 1, a: 2}"])


# ------------------------------------------------------------------------------------ as a program


CHAIN = """
labels: {call: llmlabel.labelspace.load_labels, source: labels.yaml}
minimum: 3
texts: {call: llmlabel.data.load, path: texts.jsonl}
short: {call: llmlabel.data.first_words, dataset: "${texts}", words: "${minimum}"}
parts:
  call: llmlabel.data.split
  dataset: "${short}"
  shares: {train: 0.5, test: 0.5}
  seed: 3
train: {call: llmlabel.data.part, dataset: "${parts}", split: [train]}
load: {call: llmlabel.labelspace.save_labels, labels: "${labels}", path: saved/out.json}
"""


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "labels: [bug, 'no']\n", "labels.yaml")
    rows = [f'{{"id": "r{i}", "text": "one two {i} four"}}' for i in range(10)]
    write(tmp_path, "\n".join(rows) + "\n", "texts.jsonl")
    return write(tmp_path, CHAIN, "chain.yaml")


def test_the_program_is_readable(chain: Path) -> None:
    overrides = ["short.words=1000000", "parts.seed=123456789"]
    expected = '''"""The recipe chain.yaml as a program, written by `llmlabel python`."""

from pathlib import Path

from llmlabel.data import first_words, part, split
from llmlabel.data import load as data_load
from llmlabel.labelspace import load_labels, save_labels


def main() -> dict[str, object]:
    """Computes every variable of the recipe."""
    labels = load_labels(source="labels.yaml")
    minimum = 3
    texts = data_load(path="texts.jsonl")
    short = first_words(dataset=texts, words=1000000)
    parts = split(dataset=short, shares={"train": 0.5, "test": 0.5}, seed=123456789)
    train = part(dataset=parts, split=["train"])
    load = save_labels(labels=labels, path=Path("saved/out.json"))
    return locals()


if __name__ == "__main__":  # engines and trainers start processes that import this file
    main()
'''
    assert to_python(load_recipe(chain, overrides)) == expected


def test_the_program_gives_the_values_of_a_run(chain: Path, tmp_path: Path) -> None:
    recipe = load_recipe(chain)
    program = write(tmp_path, to_python(recipe), "program.py")
    values: dict[str, Any] = runpy.run_path(str(program))["main"]()
    assert (tmp_path / "saved" / "out.json").is_file()
    results = run(recipe)
    assert list(results) == list(values)
    assert results["labels"] == values["labels"]
    assert results["labels"].ids == ("bug", "no")
    assert results["minimum"] == values["minimum"] == 3
    for name in ("texts", "short", "parts", "train"):
        assert results[name].to_dict() == values[name].to_dict()
        assert results[name].features == values[name].features
    assert results["short"]["text"][0] == "one two 0"
    assert 0 < len(results["train"]) < 10


def test_long_calls_take_a_line_per_argument_and_output_is_written_out(
    chain: Path, tmp_path: Path
) -> None:
    steps = tmp_path / "toolbox_python"
    steps.mkdir()
    source = """
from pathlib import Path
def train(rows: list[float], *, pair: tuple[int, ...], names: dict[str, str], output: Path) -> Path:
    return output
def use(model: Path) -> None: pass
"""
    write(steps, source, "steps.py")
    text = """
folder: somewhere
model:
  call: toolbox_python.steps.train
  rows: [0.1, .inf, 1e-30]
  pair: [1]
  names: {first: "a \\"quoted\\" name that is quite long", second: "${folder}"}
used: {call: toolbox_python.steps.use, model: "${folder}"}
nested: {call: toolbox_python.steps.use, model: {call: toolbox_python.steps.train, rows: [], pair: [], names: {}}}
"""
    recipe = load_recipe(write(tmp_path, text, "long.yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        source = to_python(recipe, Path("out"), allow=["toolbox_python"])
        assert (
            """
    folder = "somewhere"
    model = train(
        rows=[0.1, float("inf"), 1e-30],
        pair=(1,),
        names={"first": "a \\"quoted\\" name that is quite long", "second": folder},
        output=Path("out/long/model"),
    )
    used = use(model=Path(folder))
    nested = use(model=train(rows=[], pair=(), names={}, output=Path("out/long/nested/model")))
"""
            in source
        )
        ast.parse(source)
        program = write(tmp_path, source, "long.py")
        values = runpy.run_path(str(program))["main"]()
    assert values["model"] == Path("out/long/model")


def test_check_runs_nothing(chain: Path, tmp_path: Path) -> None:
    check(load_recipe(chain))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chain.yaml",
        "labels.yaml",
        "texts.jsonl",
    ]


@pytest.mark.parametrize("variables", ["", "adapters: {r: 4}\nearly: {beta: 0.5}\n"])
def test_mappings_that_are_read_as_dataclasses_are_calls_in_the_program(
    tmp_path: Path, variables: str
) -> None:
    text = """
labels: {call: llmlabel.labelspace.load_labels, source: [x, y]}
rows: {call: llmlabel.data.load, path: rows.jsonl}
student:
  call: llmlabel.train.classifier.train_classifier
  dataset: ${rows}
  labels: ${labels}
  model: m
  lora: {r: 4}
  early_learning: {beta: 0.5}
"""
    if variables:  # which a parameter reads, too, as what it is for
        text = text.replace("lora: {r: 4}", "lora: ${adapters}")
        text = variables + text.replace("g: {beta: 0.5}", "g: ${early}")
    program = to_python(load_recipe(write(tmp_path, text)))
    assert 'lora=LoRA(r=4, alpha=32, dropout=0.1, targets="all-linear"),' in program
    assert "early_learning=EarlyLearning(penalty_weight=3.0, beta=0.5, top_k=None)," in program
    assert "from llmlabel.train.network import LoRA\n" in program
    compile(program, "program.py", "exec")


def test_lists_that_are_read_as_tuples_are_tuples_in_the_program(tmp_path: Path) -> None:
    text = """
edges: [0.1, 0.9]
source: [x, y]
labels: {call: llmlabel.labelspace.load_labels, source: "${source}"}
rows: {call: llmlabel.data.load, path: rows.jsonl}
taught:
  call: llmlabel.refine.adapt.adapt_bands
  dataset: ${rows}
  labels: ${labels}
  statistic: max
  cuts: ${edges}
  actions: [drop, soften, keep]
"""
    recipe = load_recipe(write(tmp_path, text))
    program = to_python(recipe)
    assert "cuts=(0.1, 0.9)," in program
    assert 'actions=("drop", "soften", "keep"),' in program
    assert "source=source" in program  # a list stays the variable
