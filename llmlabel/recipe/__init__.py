"""A recipe is a YAML file of Python assignments: load it, check it, print it as Python, run it.

Three rules: every top-level key is a variable; a mapping with `call` is a call (dotted path and
keyword arguments); `"${name}"` is an earlier variable. `llmlabel.recipe.calls` knows what a call may
name, `llmlabel.recipe.runner` runs it, `llmlabel.recipe.plan` says before what it would ask of its
engines, `llmlabel.recipe.keep` knows what of a run stays on disk.
"""

import json
import keyword
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmlabel.recipe.calls import Recipe, RecipeError, bind, closest, resolve
from llmlabel.recipe.plan import PlannedStep, plan
from llmlabel.recipe.program import program
from llmlabel.recipe.runner import Results, StepError, run
from llmlabel.strictyaml import read_yaml

__all__ = [
    "PlannedStep",
    "Recipe",
    "RecipeError",
    "Results",
    "StepError",
    "check",
    "load_recipe",
    "plan",
    "resolve",
    "run",
    "to_python",
]


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
    here = Path(__file__).parents[1]
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    files = [file for file in folder.rglob("*.yaml") if file.parent.name != "accelerate"]
    shipped = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    if str(path) in shipped:
        return shipped[str(path)]
    known = f"; shipped are {', '.join(sorted(shipped))}" if shipped else ""
    near = closest(path.stem, shipped)
    raise RecipeError(f"{path}: no such recipe{near if 'mean' in near else ''}{known}")


def _parse(text: str, source: str) -> Any:
    try:
        content = read_yaml(text)
        json.dumps(content)  # a date, a set or a circle is nothing that an argument can be
    except (TypeError, ValueError) as error:
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
            if key not in target:
                whole = f"{'.'.join([name, *keys][:done])}={{{keys[done - 1]}: {text}}}"
                problem = f"the recipe does not set {key!r}; set it whole: '{whole}'"
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
