"""What a recipe may call, and what `check` says before anything runs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmlabel.data import load, split
from llmlabel.labelspace import load_labels
from llmlabel.recipe.calls import Call, Recipe, RecipeError, Ref, bind, install_hint, resolve

LABELS = {"call": "llmlabel.labelspace.load_labels", "source": ["bug", "praise"]}


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "tickets.jsonl"
    path.write_text(json.dumps({"id": "a", "text": "It crashed."}) + "\n")
    return {"call": "llmlabel.data.load", "path": str(path)}


def problem(**assignments: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        bind(Recipe("label", Path("label.yaml"), assignments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------- what may be called


def test_a_public_function_and_a_class_resolve() -> None:
    assert resolve("llmlabel.labelspace.load_labels") is load_labels
    assert resolve("llmlabel.labelspace.LabelSpace").__name__ == "LabelSpace"


@pytest.mark.parametrize(
    "call",
    [
        "os.system",
        "posix.system",
        "subprocess.run",
        "builtins.eval",
        "builtins.exec",
        "eval",
        "importlib.import_module",
        "llmlabelx.data.load",
        "llmlabel.data.os.system",  # through an imported module
        "llmlabel.data.os",
        "llmlabel.models.subprocess.run",
        "llmlabel.data.Path",  # imported, not defined
        "llmlabel.data.load.__globals__",
        "llmlabel.data.load.__class__",
        "llmlabel.data.__builtins__.eval",
        "llmlabel.data.__loader__",
        "llmlabel.__main__.main",
        "llmlabel.models._download_wheel",  # private
        "llmlabel._hidden.f",
        "llmlabel.data",  # a module
        "llmlabel.data.COLUMNS",  # a value
        "llmlabel.labelspace.LabelSpace.index",  # a method
        "llmlabel.recipe.run",  # would open more packages than --allow
        "llmlabel.recipe.runner.run",
        "llmlabel.recipe.load_recipe",
        "llmlabel.recipe.calls.resolve",
        "llmlabel.cli.main",
        "llmlabel..data.load",
        "llmlabel.",
        ".os.system",
        "",
    ],
)
def test_nothing_else_resolves(call: str) -> None:
    with pytest.raises(RecipeError):
        resolve(call)


def test_allow_opens_one_package_under_the_same_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "opened").mkdir()
    source = (
        "from os import system\nfrom shutil import copy\nclass Own: pass\ndef _private(): pass\n"
    )
    (tmp_path / "opened" / "steps.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("opened.steps.Own", ["opened"]).__name__ == "Own"
    for call in ("system", "copy", "_private"):
        with pytest.raises(RecipeError, match=r"no function or class|not defined|private"):
            resolve(f"opened.steps.{call}", ["opened"])
    with pytest.raises(
        RecipeError, match=r"'opened.steps.Own' is outside llmlabel; .*--allow opened"
    ):
        resolve("opened.steps.Own")
    with pytest.raises(RecipeError, match="no function or class 'system'"):
        resolve("os.system", ["os"])  # a builtin, defined in posix
    monkeypatch.delitem(sys.modules, "opened.steps")


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            "llmlabel.labelspace.load_label",
            "llmlabel.labelspace defines no function or class 'load_label'; did you mean 'load_labels'?",
        ),
        (
            "llmlabel.labelspaces.load_labels",
            "there is no module 'llmlabel.labelspaces'; did you mean 'llmlabel.labelspace'?",
        ),
        (
            "llmlabel.softlabels.LabelSpace",
            "'llmlabel.softlabels.LabelSpace' is not defined in llmlabel.softlabels; "
            "write llmlabel.labelspace.LabelSpace",
        ),
    ],
)
def test_a_typo_in_a_call_names_the_closest(call: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(call)
    assert str(caught.value) == line


def test_a_missing_dependency_names_the_extra() -> None:
    missing = ModuleNotFoundError("No module named 'vllm'", name="vllm")
    assert install_hint(missing) == "needs vllm: pip install 'llmlabel[vllm]'"
    missing = ModuleNotFoundError("No module named 'my_tools.x'", name="my_tools.x")
    assert install_hint(missing) == "needs my_tools: pip install my-tools"
    assert install_hint(ImportError("our own words")) == "our own words"


def test_a_module_whose_dependency_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy").mkdir()
    (tmp_path / "needy" / "steps.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"^needy.steps needs surely_not_installed: pip install"):
        resolve("needy.steps.run", ["needy"])


# ------------------------------------------------------------------------------------- what fits


def test_bound_values_are_what_the_functions_read(texts: dict[str, Any]) -> None:
    recipe = {
        "seed": 3,
        "texts": texts,
        "labels": LABELS,
        "parts": {
            "call": "llmlabel.data.split",
            "dataset": "${texts}",
            "shares": {"a": 1},
            "seed": "${seed}",
        },
    }
    bound = bind(Recipe("label", Path("label.yaml"), recipe))
    parts = bound["parts"]
    assert bound["seed"] == 3
    assert parts.function is split
    assert parts.arguments == {
        "dataset": Ref("texts", is_call=True),
        "shares": {"a": 1.0},
        "seed": Ref("seed", is_call=False, value=3),
    }
    assert isinstance(parts.arguments["shares"]["a"], float)
    assert bound["texts"].function is load
    assert bound["texts"].defaults["encoding"] == "utf-8"
    assert bound["texts"].files == {"path"}
    assert not bound["texts"].makes_output
    assert isinstance(bound["labels"], Call)


def test_paths_become_paths_and_output_is_filled_in(tmp_path: Path) -> None:
    saved = {
        "call": "llmlabel.labelspace.save_labels",
        "labels": "${labels}",
        "path": str(tmp_path / "new.json"),  # written, so it need not be there
    }
    bound = bind(Recipe("r", Path("r.yaml"), {"labels": LABELS, "saved": saved}))
    assert bound["saved"].arguments["path"] == tmp_path / "new.json"
    assert bound["saved"].files == frozenset()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda r: r["texts"].update(pth="x"),
            "texts: llmlabel.data.load has no argument 'pth'; did you mean 'path'?",
        ),
        (lambda r: r["texts"].pop("path"), "texts: llmlabel.data.load needs the argument 'path'"),
        (
            lambda r: r["short"].update(words="ten"),
            "short.words: 'ten' does not fit int; Input should be a valid integer",
        ),
        (
            lambda r: r["short"].update(words="25"),
            "short.words: '25' does not fit int; Input should be a valid integer",
        ),
        (
            lambda r: r["short"].update(words=True),
            "short.words: True does not fit int; Input should be a valid integer",
        ),
        (
            lambda r: r["short"].update(words="${n}"),
            "short.words: 'many' does not fit int; Input should be a valid integer",
        ),
        (
            lambda r: r["short"].update(dataset="tickets"),
            "short.dataset: 'tickets' does not fit Dataset; give a reference such as ${name}",
        ),
        (
            lambda r: r["short"].update(dataset="${text}"),
            "short.dataset: ${text} is not defined; did you mean 'texts'?",
        ),
        (
            lambda r: r["short"].update(dataset="${late}"),
            "short.dataset: ${late} is used before its line; move 'late' up",
        ),
        (
            lambda r: r["short"].update(dataset="${short}"),
            "short.dataset: ${short} is used before its line; move 'short' up",
        ),
        (
            lambda r: r["short"].update(dataset="the ${texts}"),
            "short.dataset: 'the ${texts}': a reference must be the whole value, without text",
        ),
        (
            lambda r: r["short"].update(dataset="${labels}"),
            "short.dataset: ${labels} is a LabelSpace; expected Dataset",
        ),
        (
            lambda r: r["short"].update(dataset=LABELS),
            "short.dataset: llmlabel.labelspace.load_labels is a LabelSpace; expected Dataset",
        ),
        (
            lambda r: r["short"].update(dataset=["${texts}"]),
            "short.dataset: this is a list; expected Dataset",
        ),
        (
            lambda r: r["mixed"]["sources"].update(one="${labels}"),
            "mixed.sources.one: ${labels} is a LabelSpace; expected Dataset",
        ),
        (
            lambda r: r["labels"].update(call="os.system"),
            "labels: 'os.system' is outside llmlabel; if you trust the package, add --allow os",
        ),
        (lambda r: r["labels"].update(call=3), "labels: call: 3 is not a dotted path"),
        (
            lambda r: r["labels"].update(call="llmlabel"),
            "labels: 'llmlabel' is a package; write llmlabel.MODULE.FUNCTION",
        ),
    ],
)
def test_one_line_for_each_mistake(
    change: Callable[[dict[str, Any]], Any], line: str, texts: dict[str, Any]
) -> None:
    recipe = {
        "n": "many",
        "labels": dict(LABELS),
        "texts": texts,
        "short": {"call": "llmlabel.data.first_words", "dataset": "${texts}", "words": 25},
        "mixed": {
            "call": "llmlabel.refine.aggregate.aggregate",
            "sources": {"one": "${short}"},
            "labels": "${labels}",
        },
        "late": 3,
    }
    bind(Recipe("label", Path("label.yaml"), recipe))  # without the change it fits
    change(recipe)
    assert problem(**recipe) == f"label.yaml: {line}"


def test_a_protocol_takes_a_reference_and_no_text(texts: dict[str, Any]) -> None:
    recipe = {
        "labels": LABELS,
        "texts": texts,
        "engine": {"call": "llmlabel.engine.fake.FakeEngine"},
        "cached": {
            "call": "llmlabel.engine.cache.CachedEngine",
            "engine": "${engine}",
            "path": "replies.db",  # made when it is not there
        },
    }
    bound = bind(Recipe("label", Path("label.yaml"), recipe))
    assert bound["cached"].arguments["path"] == Path("replies.db")
    recipe["cached"] = recipe["cached"] | {"engine": "fake"}
    assert problem(**recipe) == (
        "label.yaml: cached.engine: 'fake' does not fit Engine; give a reference such as ${name}"
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"lora": {"rr": 4}},
            "student.lora: {'rr': 4} does not fit LoRA; it has no 'rr'; did you mean 'r'?",
        ),
        (
            {"early_learning": {"penalty": 2.0}},
            "student.early_learning: {'penalty': 2.0} does not fit EarlyLearning | None; "
            "it has no 'penalty'; did you mean 'penalty_weight'?",
        ),
        (
            {"lora": {"r": "four"}},
            "student.lora: {'r': 'four'} does not fit LoRA; Input should be a valid integer",
        ),
    ],
)
def test_a_mapping_that_is_read_as_settings_has_only_their_keys(
    texts: dict[str, Any], settings: dict[str, Any], line: str
) -> None:
    student = {
        "call": "llmlabel.train.classifier.train_classifier",
        "dataset": "${texts}",
        "labels": "${labels}",
        "model": "owner/name",
    }
    assert problem(labels=LABELS, texts=texts, student=student | settings) == f"label.yaml: {line}"


def test_a_missing_file_names_its_neighbour(texts: dict[str, Any]) -> None:
    path = texts["path"].replace("tickets", "ticket")
    line = problem(texts=texts | {"path": path})
    assert line == (
        f"label.yaml: texts.path: no file or folder {path!r}; did you mean 'tickets.jsonl'?"
    )
    for elsewhere in ("package:corpus/x.csv", "owner/name", "owner/name:train"):
        bind(Recipe("r", Path("r.yaml"), {"texts": texts | {"path": elsewhere}}))
    assert "no file or folder 'data/x.jsonl'" in problem(texts=texts | {"path": "data/x.jsonl"})


def test_a_prompt_is_looked_up(texts: dict[str, Any]) -> None:
    recipe = {
        "labels": LABELS,
        "texts": texts,
        "engine": {"call": "llmlabel.engine.fake.FakeEngine"},
        "labeled": {
            "call": "llmlabel.label.direct.label_direct",
            "dataset": "${texts}",
            "engine": "${engine}",
            "labels": "${labels}",
            "prompt": "label/direct",
        },
    }
    bound = bind(Recipe("label", Path("label.yaml"), recipe))
    assert bound["labeled"].makes_output
    recipe["labeled"] = recipe["labeled"] | {"prompt": "label/dirct"}
    assert problem(**recipe).startswith("label.yaml: labeled.prompt: prompt 'label/dirct': no such")
