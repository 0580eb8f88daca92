"""A recipe is a YAML file of Python assignments: load it, check it, print it as Python, run it.

Three rules: every top-level key is a variable; a mapping with `call` is a call (dotted path and
keyword arguments); `"${name}"` is an earlier variable. `llmlabel.calls` knows what a call may
name, `llmlabel.runner` runs it, `llmlabel.keep` knows what of a run stays on disk.
"""

import json
import keyword
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llmlabel.calls import Recipe, RecipeError, bind, closest, resolve
from llmlabel.program import program
from llmlabel.runner import Results, StepError, run

__all__ = [
    "Recipe",
    "RecipeError",
    "Results",
    "StepError",
    "check",
    "load_recipe",
    "resolve",
    "run",
    "to_python",
]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars, so that `1e-4` is a number and `no` a word; a key twice is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (declared so in PyYAML)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002  (the signature of PyYAML)
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            line = key_node.start_mark.line + 1
            if key in lines:
                raise RecipeError(
                    f"line {line}: {key!r} is defined twice, first in line {lines[key]}"
                )
            lines[key] = line
        return super().construct_mapping(node, deep=deep)


for _tag, _first, _pattern in [
    ("null", ["~", "n", "N", ""], r"~|null|Null|NULL|"),
    ("bool", list("tTfF"), r"true|True|TRUE|false|False|FALSE"),
    ("int", list("-+0123456789"), r"[-+]?(0|[1-9][0-9_]*)"),
    ("float", list("-+.0123456789"), r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?"),
    ("float", list("-+0123456789"), r"[-+]?[0-9]+[eE][-+]?[0-9]+"),
    ("float", list("-+."), r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
]:
    _tag_name, _whole = f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(_tag_name, _whole, _first)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, or the shipped recipe of that name.

    Args:
        path: A file, or a name without suffix.
        overrides: `name=value` replaces a variable, `name.argument=value` sets an argument of a
            call or a key of a mapping; values are YAML.

    Raises:
        RecipeError: No such recipe, not a list of assignments, or an override that fits nothing.
    """
    file = _find(Path(path))
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file.name}: not UTF-8 at byte {error.start}") from None
    assignments = _parse(text, file.name)
    if not isinstance(assignments, dict) or not assignments:
        raise RecipeError(f"{file.name}: a recipe is a mapping of variables; this one is not")
    for name in assignments:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise RecipeError(f"{file.name}: {name!r} is not a variable name")
    for override in overrides:
        _override(assignments, override, file.name)
    return Recipe(file.stem, file, assignments)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    here = Path(__file__).parent
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    shipped = {p.relative_to(folder).with_suffix("").as_posix(): p for p in folder.rglob("*.yaml")}
    if str(path) in shipped:
        return shipped[str(path)]
    known = f"; shipped are {', '.join(sorted(shipped))}" if shipped else ""
    near = closest(path.stem, shipped)
    raise RecipeError(f"{path}: no such recipe{near if 'mean' in near else ''}{known}")


def _parse(text: str, source: str) -> Any:
    try:
        content = yaml.load(text, Loader=_Loader)
        json.dumps(content)  # a date, a set or a circle is nothing that an argument can be
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(f"{source}: {line}{error.problem or error.context}") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise RecipeError(f"{source}: {str(error).splitlines()[0]}") from None
    return content


def _override(assignments: dict[str, Any], override: str, source: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"{source}: override {override!r} is not name=value")
    value = _parse(text, f"override {override!r}")
    name, *keys = path.split(".")
    if name not in assignments:
        raise RecipeError(
            f"{source}: override {override!r}: no variable {name!r}{closest(name, assignments)}"
        )
    target: Any = assignments
    for done, key in enumerate([name, *keys][:-1], start=1):
        if not isinstance(target.get(key), dict):
            problem = f"{'.'.join([name, *keys][:done])} is not a call or a mapping"
            raise RecipeError(f"{source}: override {override!r}: {problem}")
        target = target[key]
    target[[name, *keys][-1]] = value


def check(recipe: Recipe, allow: Sequence[str] = ()) -> None:
    """Whether every call fits its signature and every file is there; runs nothing.

    Raises:
        RecipeError: One line about the first thing that does not fit.
    """
    bind(recipe, allow=allow)


def to_python(recipe: Recipe, output: Path = Path("runs"), *, allow: Sequence[str] = ()) -> str:
    """The recipe as a program that computes the same values as `run`, without keeping them."""
    bound = bind(recipe, allow=allow, check_files=False)
    title = f"The recipe {recipe.path.name} as a program, written by `llmlabel python`."
    return program(bound, title=title, output=output / recipe.name)
