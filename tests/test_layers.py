"""What importing costs, and which module may import which (design: the house, section 2)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmlabel"
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "vllm",
    "sentence_transformers",
    "matplotlib",
    "sklearn",
    "ray",
    "openai",
    "rdflib",
    "fastobo",
    "llguidance",
)
LAYERS = (
    "strictyaml files columns data blocks models labelspace softlabels prompt metrics progress xmc",
    "engine loss refine calibrate select",
    "taxonomy label train report",
    "recipe cli __main__ __init__",
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


@pytest.mark.parametrize(
    "program",
    [
        "import llmlabel",
        "from llmlabel.cli import main; sys.argv = ['llmlabel', '--help']; main()",
        "import runpy; sys.argv = ['llmlabel', 'label', '--help']; runpy.run_module('llmlabel', run_name='__main__')",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(program: str) -> None:
    lines = f"""
import atexit, sys
def report():
    print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules)))
atexit.register(report)
{program}
"""
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def imported(source: str) -> Iterator[str]:
    """The modules of llmlabel that a source imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("llmlabel."))


def wrong_imports(module: str, source: str) -> list[str]:
    """Imports of a module in a higher layer; a name of `llmlabel/__init__.py` is in none."""
    return [
        f"{module} imports {name}"
        for name in imported(source)
        if LEVEL.get(name, len(LAYERS)) > LEVEL[module]
    ]


def test_imports_point_down() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    places = {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files}
    assert len(files) > 25
    assert set(places.values()) <= set(LEVEL), "give a new module its layer"
    for path, place in places.items():
        assert wrong_imports(place, path.read_text(encoding="utf-8")) == [], path


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("data", "from llmlabel.label.direct import label_direct", ["data imports label"]),
        ("data", "def f():\n    import llmlabel.engine.hf", ["data imports engine"]),
        ("engine", "from llmlabel import report", ["engine imports report"]),
        ("train", "if True:\n    from llmlabel.recipe import run", ["train imports recipe"]),
        ("metrics", "import llmlabel.newcomer", ["metrics imports newcomer"]),
        ("label", "from llmlabel.train.classifier import predict\nimport llmlabel.engine", []),
        ("cli", "from llmlabel import data, report", []),
    ],
)
def test_a_bad_import_would_be_found(module: str, source: str, found: list[str]) -> None:
    assert wrong_imports(module, source) == found


def test_modules_of_the_bottom_layer_have_no_circle() -> None:
    needs: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if place in LAYERS[0].split():
            others = set(imported(path.read_text(encoding="utf-8"))) & set(LAYERS[0].split())
            needs[place] = needs.get(place, set()) | (others - {place})
    assert len(needs) >= 8
    while needs:
        free = {name for name, others in needs.items() if not others}
        assert free, f"these import each other: {needs}"
        needs = {name: others - free for name, others in needs.items() if name not in free}
