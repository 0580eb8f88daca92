"""A recipe as a Python program: what `llmlabel python` prints."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmlabel.recipe.calls import Call, RecipeError, Ref

_WIDTH = 100
_Names = dict[tuple[str, str], str]
"""(module, name) -> the name it is imported under."""


def program(bound: dict[str, Any], *, title: str, output: Path) -> str:
    """Source that computes the variables in their order.

    Args:
        bound: The variables, from `llmlabel.recipe.calls.bind`.
        title: First line of the docstring.
        output: The run's folder; each variable that keeps files has one below it.
    """
    names = _import_names(bound)
    body = ""
    for name, value in bound.items():
        source = _source(value, names, output / name, indent=4, column=len(name) + 7)
        body += f"    {name} = {source}\n"
    path = names.pop(("pathlib", "Path"))
    blocks = [_imports({("pathlib", "Path"): path}) if f"{path}(" in body else "", _imports(names)]
    imports = "\n\n".join(block for block in blocks if block)
    return f'''"""{title}"""

{imports}


def main() -> dict[str, object]:
    """Computes every variable of the recipe."""
{body}    return locals()


if __name__ == "__main__":  # engines and trainers start processes that import this file
    main()
'''


def _import_names(bound: dict[str, Any]) -> _Names:
    """Two functions may share a name, or a variable may have it: then the module goes before."""
    names: _Names = {}
    taken = {*bound, "main"}
    for path in dict.fromkeys([*_called(list(bound.values())), "pathlib.Path"]):
        module, _, name = path.rpartition(".")
        alias = name
        while alias in taken:
            alias = f"{module.rpartition('.')[2]}_{alias}"
        taken.add(alias)
        names[module, name] = alias
    return names


def _imports(names: _Names) -> str:
    """One sorted line per module, and one per name that is imported under another."""
    lines: dict[tuple[str, str], str] = {}
    for module in {module for module, _ in names}:
        plain = sorted(name for (m, name), alias in names.items() if m == module and name == alias)
        line = f"from {module} import {', '.join(plain)}"
        if len(line) > _WIDTH:
            line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in plain) + ")"
        if plain:
            lines[module, plain[0]] = line
    for (module, name), alias in names.items():
        if name != alias:
            lines[module, name] = f"from {module} import {name} as {alias}"
    return "\n".join(lines[key] for key in sorted(lines))


def _as_call(value: Any) -> Any:
    """A mapping that a parameter has read as a dataclass is written as a call of its class."""
    if isinstance(value, Call | Ref) or not dataclasses.is_dataclass(value):
        return value
    kind, fields = type(value), [field.name for field in dataclasses.fields(value)]
    arguments = {name: getattr(value, name) for name in fields}
    path = f"{kind.__module__}.{kind.__qualname__}"
    return Call(path, kind, arguments, {}, frozenset(), kind, makes_output=False)


def _called(value: Any) -> Iterator[str]:
    value = _as_call(value.value if isinstance(value, Ref) else value)
    if isinstance(value, Call):
        yield value.path
        value = value.arguments
    if isinstance(value, dict):
        value = list(value.values())
    for part in value if isinstance(value, list | tuple) else []:
        yield from _called(part)


def _source(value: Any, names: _Names, output: Path, *, indent: int, column: int) -> str:
    """Source of one value that starts at `column` in a line indented by `indent`."""
    value = _as_call(value)
    if isinstance(value, Call | dict | list | tuple):
        return _source_of_parts(value, names, output, indent=indent, column=column)
    if isinstance(value, Ref):
        if _is_read(value.value):
            return _source(value.value, names, output, indent=indent, column=column)
        path = names["pathlib", "Path"]
        return f"{path}({value.name})" if isinstance(value.value, Path) else value.name
    if isinstance(value, Path):
        return f"{names['pathlib', 'Path']}({_quoted(value.as_posix())})"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    raise RecipeError(f"a {type(value).__name__} cannot be written as Python; call its class")


def _is_read(value: Any) -> bool:
    """Whether a parameter reads what is in the file as something else: tuples or a dataclass."""
    if isinstance(value, tuple) or _as_call(value) is not value:
        return True
    parts = list(value.values()) if isinstance(value, dict) else value
    return isinstance(parts, list) and any(_is_read(part) for part in parts)


def _source_of_parts(
    value: Call | dict[str, Any] | list[Any] | tuple[Any, ...],
    names: _Names,
    output: Path,
    *,
    indent: int,
    column: int,
) -> str:
    opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
    heads: list[tuple[str, Any, Path]]
    if isinstance(value, Call):
        module, _, name = value.path.rpartition(".")
        opening = f"{names[module, name]}("
        arguments = {**value.arguments, **({"output": output} if value.makes_output else {})}
        heads = [(f"{key}=", part, output / key) for key, part in arguments.items()]
    elif isinstance(value, dict):
        opening, closing = "{", "}"
        heads = [(f"{_quoted(key)}: ", part, output / str(key)) for key, part in value.items()]
    else:
        heads = [("", part, output / str(i)) for i, part in enumerate(value)]
    inner = indent + 4
    parts = [
        head + _source(part, names, below, indent=inner, column=inner + len(head))
        for head, part, below in heads
    ]
    comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
    line = f"{opening}{', '.join(parts)}{comma}{closing}"
    if "\n" not in line and column + len(line) < _WIDTH:
        return line
    lines = "".join(f"{' ' * inner}{part},\n" for part in parts)
    return f"{opening}\n{lines}{' ' * indent}{closing}"


def _quoted(text: Any) -> str:
    """A string in double quotes; JSON's escapes are Python's too."""
    return json.dumps(text, ensure_ascii=False) if isinstance(text, str) else repr(text)
