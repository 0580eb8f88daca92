"""The calls of a recipe: what a dotted path may name, and whether its arguments fit.

Nothing here runs a step: `bind` turns the values of a YAML file into `Call` and `Ref` trees that
are known to fit the signatures, or raises one line that says where and what to write instead.
"""

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import json
import re
import sys
import types
import typing
from abc import ABCMeta
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_ELSEWHERE = ("package:", "wheel:")
_RUNNERS = ("llmlabel.recipe.", "llmlabel.cli.")
_LEFT_OUT = object()  # default of a parameter that only its function knows


class RecipeError(ValueError):
    """A recipe that cannot run as it is written; one line."""


@dataclass(frozen=True)
class Recipe:
    """A recipe as YAML gives it, with its overrides applied."""

    name: str
    path: Path
    assignments: dict[str, Any]


@dataclass(frozen=True)
class Ref:
    """An earlier variable; `value` is what this use reads when it is not the result of a call."""

    name: str
    is_call: bool
    value: Any = None


@dataclass(frozen=True)
class Call:
    """A function and arguments that fit its signature."""

    path: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    defaults: dict[str, Any]
    """Of the parameters that the recipe leaves out."""
    files: frozenset[str]
    """Parameters whose content on disk is an input."""
    returns: Any
    makes_output: bool
    """It keeps files and the recipe does not say where."""


@dataclass
class _Scope:
    recipe: Recipe
    allow: Sequence[str]
    check_files: bool
    bound: dict[str, Any] = field(default_factory=dict)

    def error(self, where: str, problem: str) -> RecipeError:
        return RecipeError(f"{self.recipe.path.name}: {where}: {problem}")


def bind(recipe: Recipe, *, allow: Sequence[str] = (), check_files: bool = True) -> dict[str, Any]:
    """The variables of a recipe as trees of plain values, `Ref` and `Call`; runs nothing.

    Args:
        recipe: What to bind.
        allow: Top-level packages besides llmlabel that calls may name.
        check_files: Whether files and prompts must exist.

    Raises:
        RecipeError: The first thing that does not fit.
    """
    scope = _Scope(recipe, allow, check_files)
    for name, value in recipe.assignments.items():
        scope.bound[name] = _value(scope, name, value, Any)
    return scope.bound


def resolve(call: str, allow: Sequence[str] = ()) -> Callable[..., Any]:
    """The public function or class that a dotted path names in the module that defines it.

    Raises:
        RecipeError: It is private, imported from elsewhere, outside llmlabel and `allow`, or absent.
    """
    module_name, _, name = call.rpartition(".")
    package = call.partition(".")[0]
    if package not in ("llmlabel", *allow):
        trust = f"; if you trust the package, add --allow {package}" if module_name else ""
        raise RecipeError(f"{call!r} is outside llmlabel{trust}")
    if not module_name:
        raise RecipeError(f"{call!r} is a package; write llmlabel.MODULE.FUNCTION")
    if any(part.startswith("_") for part in call.split(".")):
        raise RecipeError(f"{call!r} is private; a recipe calls public names")
    if call.startswith(_RUNNERS):
        raise RecipeError(f"{call!r} runs recipes; a recipe calls steps")
    module = _import(module_name, call)
    found = getattr(module, name, None)
    home = getattr(found, "__module__", None)
    if not (inspect.isfunction(found) or inspect.isclass(found)) or not isinstance(home, str):
        known = [key for key, value in vars(module).items() if _is_public(key, value, module_name)]
        raise RecipeError(
            f"{module_name} defines no function or class {name!r}{closest(name, known)}"
        )
    if home != module_name:
        hint = f"; write {home}.{name}" if home.partition(".")[0] == package else ""
        raise RecipeError(f"{call!r} is not defined in {module_name}{hint}")
    return found


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error line: the nearest known name, or what there is."""
    known = sorted(set(known))
    if near := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {near[0]!r}?"
    more = ", ..." if len(known) > 12 else ""
    return f"; there is {', '.join(known[:12])}{more}" if known else ""


def install_hint(error: ImportError) -> str:
    """One line for a package that is not installed, with the extra that brings it."""
    package = (error.name or "").partition(".")[0]
    if not package:
        return str(error)
    try:
        requirements = importlib.metadata.requires("llmlabel") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if extra and re.match(rf"{re.escape(package)}\b", requirement.replace("-", "_")):
            return f"needs {package}: pip install 'llmlabel[{extra[1]}]'"
    return f"needs {package}: pip install {package.replace('_', '-')}"


def _is_public(name: str, value: Any, module_name: str) -> bool:
    defined = inspect.isfunction(value) or inspect.isclass(value)
    return defined and value.__module__ == module_name and not name.startswith("_")


def _import(module_name: str, call: str) -> types.ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            own = missing.partition(".")[0] == module_name.partition(".")[0]
            problem = f"cannot be imported: {error}" if own else install_hint(error)
            raise RecipeError(f"{module_name} {problem}") from error
        root = importlib.import_module("llmlabel").__path__[0]
        files = [*Path(root).rglob("[!_]*.py"), *Path(root).glob("*/__init__.py")]
        modules = [
            ".".join(("llmlabel", *path.relative_to(root).with_suffix("").parts))
            for path in (file.parent if file.stem == "__init__" else file for file in files)
        ]
        near = closest(module_name, modules) if module_name.startswith("llmlabel") else ""
        raise RecipeError(f"there is no module {module_name!r}{near}") from None
    except ImportError as error:
        raise RecipeError(f"{module_name} cannot be imported: {error}") from error


def _value(scope: _Scope, where: str, value: Any, annotation: Any) -> Any:
    if isinstance(value, str) and _REFERENCE.search(value):
        return _reference(scope, where, value, annotation)
    if isinstance(value, dict) and "call" in value:
        call = _call(scope, where, value)
        _must_fit(scope, where, call.path, call.returns, annotation)
        return call
    if not _has_parts(value):
        return _plain(scope, where, value, annotation)
    _must_fit(scope, where, "this", type(value), annotation)
    part = _part_annotation(annotation)
    if isinstance(value, dict):
        return {key: _value(scope, f"{where}.{key}", v, part) for key, v in value.items()}
    return [_value(scope, f"{where}.{i}", v, part) for i, v in enumerate(value)]


def _has_parts(value: Any) -> bool:
    """Whether a reference or a call is somewhere inside."""
    if isinstance(value, dict):
        return "call" in value or any(_has_parts(part) for part in value.values())
    if isinstance(value, list):
        return any(_has_parts(part) for part in value)
    return isinstance(value, str) and bool(_REFERENCE.search(value))


def _reference(scope: _Scope, where: str, text: str, annotation: Any) -> Ref:
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise scope.error(where, f"{text!r}: a reference must be the whole value, without text")
    name = match[1]
    if name not in scope.bound:
        if name in scope.recipe.assignments:
            raise scope.error(where, f"{text} is used before its line; move {name!r} up")
        raise scope.error(where, f"{text} is not defined{closest(name, scope.bound)}")
    target = scope.bound[name]
    if isinstance(target, Call):
        _must_fit(scope, where, text, target.returns, annotation)
        return Ref(name, is_call=True)
    value = _value(scope, where, scope.recipe.assignments[name], annotation)
    return Ref(name, is_call=False, value=value)


def _call(scope: _Scope, where: str, mapping: dict[str, Any]) -> Call:
    path = mapping["call"]
    if not isinstance(path, str):
        raise scope.error(where, f"call: {path!r} is not a dotted path")
    try:
        function = resolve(path, scope.allow)
    except RecipeError as error:
        raise scope.error(where, str(error)) from error.__cause__
    signature = _signature(function)
    parameters = signature.parameters.items()
    named = {n: p for n, p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(p.kind == p.VAR_KEYWORD for _, p in parameters)
    given = {name: value for name, value in mapping.items() if name != "call"}
    for name in given:
        if name not in named and not takes_any:
            raise scope.error(where, f"{path} has no argument {name!r}{closest(name, named)}")
    left_out = [p for name, p in named.items() if name not in given and name != "output"]
    if missing := [p.name for p in left_out if p.default is p.empty]:
        raise scope.error(where, f"{path} needs the argument {missing[0]!r}")
    annotations = {name: named[name].annotation if name in named else Any for name in given}
    # A class makes something live and a function without a result writes: their paths are no inputs
    reads = not inspect.isclass(function) and signature.return_annotation is not None
    files = {name for name, p in named.items() if reads and _is_file(p) and name != "output"}
    arguments = {}
    for name, value in given.items():
        arguments[name] = _value(scope, f"{where}.{name}", value, annotations[name])
        if scope.check_files:
            _check_exists(scope, f"{where}.{name}", name, arguments[name], files)
    return Call(
        path,
        function,
        arguments,
        defaults={p.name: p.default for p in left_out if p.default is not _LEFT_OUT},
        files=frozenset(files),
        returns=function if inspect.isclass(function) else signature.return_annotation,
        makes_output="output" in named and "output" not in given,
    )


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """With annotations as types; one that only a type checker can read stays a string."""
    names = vars(sys.modules[function.__module__])

    def read(annotation: Any) -> Any:
        if annotation is inspect.Signature.empty:
            return Any
        try:
            return eval(annotation, names) if isinstance(annotation, str) else annotation
        except (NameError, TypeError):
            return annotation

    signature = inspect.signature(function)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        annotation = read(parameter.annotation)
        if typing.get_origin(annotation) is typing.Unpack:  # **settings: Unpack[a TypedDict]
            [settings] = typing.get_args(annotation)
            parameters += [
                inspect.Parameter(name, parameter.KEYWORD_ONLY, default=_LEFT_OUT, annotation=kind)
                for name, kind in typing.get_type_hints(settings).items()
            ]
        else:
            parameters.append(parameter.replace(annotation=annotation))
    return inspect.Signature(parameters, return_annotation=read(signature.return_annotation))


def _is_file(parameter: inspect.Parameter) -> bool:
    return parameter.name != "prompt" and "Path" in re.findall(
        r"\w+", inspect.formatannotation(parameter.annotation)
    )


def _check_exists(scope: _Scope, where: str, name: str, value: Any, files: set[str]) -> None:
    top = value.value if isinstance(value, Ref) else value
    for leaf in _leaves(value):
        is_named = isinstance(leaf, str) and (leaf is top or name == "prompt")
        if not isinstance(leaf, Path) and not is_named:
            continue
        if name == "prompt":
            from llmlabel.prompt import find_prompt

            try:
                find_prompt(leaf)
            except (OSError, ValueError) as error:
                raise scope.error(where, str(error)) from error
        elif name in files and not _is_elsewhere(leaf) and not _exists(leaf):
            folder = Path(leaf).parent
            near = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            hint = closest(Path(leaf).name, near)
            raise scope.error(where, f"no file or folder {str(leaf)!r}{hint}")


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Ref):
        return _leaves(value.value)
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _is_elsewhere(path: str | Path) -> bool:
    """In a package, a wheel, or on the hub: `owner/name` where a name, not only a path, may stand."""
    hub = isinstance(path, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:\w+)?", path)
    if hub and not Path(path).parent.is_dir() and not re.fullmatch(r"\.[a-z]+", Path(path).suffix):
        return True
    return str(path).startswith(_ELSEWHERE)


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name longer than the file system allows
        return False


def _plain(scope: _Scope, where: str, value: Any, annotation: Any) -> Any:
    """The value as the parameter reads it: a string becomes a Path, a list a tuple, and no more."""
    if annotation is Any or isinstance(annotation, str):
        return value
    try:
        return _adapter(annotation).validate_json(json.dumps([value]), strict=True)[0]
    except PydanticUserError:  # not a type that pydantic knows
        return value
    except SchemaError:  # a protocol: nothing in YAML is one
        reason = "give a reference such as ${engine}"
    except ValidationError as error:
        first = error.errors()[0]
        reference = first["type"] in ("is_instance_of", "needs_python_object")
        reason = "give a reference such as ${name}" if reference else first["msg"]
        if first["type"] == "unexpected_keyword_argument":
            name = str(first["loc"][-1])
            kinds = filter(dataclasses.is_dataclass, _classes(annotation))
            known = [field.name for kind in kinds for field in dataclasses.fields(kind)]
            reason = f"it has no {name!r}{closest(name, known)}"
    raise scope.error(where, f"{value!r} does not fit {_show(annotation)}; {reason}")


def _adapter(annotation: Any) -> Any:  # a TypeAdapter, which beartype does not read
    # Of a list, for a dataclass alone takes no configuration and would drop keys it does not have.
    config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    return TypeAdapter(list[annotation], config=config)


def _must_fit(scope: _Scope, where: str, what: str, given: Any, wanted: Any) -> None:
    have, want = _classes(given), _classes(wanted)
    if have and want and not any(issubclass(h, w) for h in have for w in want):
        raise scope.error(where, f"{what} is a {_show(given)}; expected {_show(wanted)}")


def _classes(annotation: Any) -> tuple[type, ...]:
    """The plain classes of an annotation; empty when it may be anything that only a run can tell."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        members = [_classes(member) for member in typing.get_args(annotation)]
        return tuple(c for m in members for c in m) if all(members) else ()
    if origin is typing.Annotated:
        return _classes(typing.get_args(annotation)[0])
    if annotation is None:
        return (types.NoneType,)
    cls = origin or annotation
    if cls is float:
        return (float, int)
    return (cls,) if type(cls) in (type, ABCMeta) else ()


def _part_annotation(annotation: Any) -> Any:
    """The type of the items of a list or of the values of a mapping."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [_part_annotation(member) for member in typing.get_args(annotation)]
        return next((part for part in parts if part is not Any), Any)
    parts = [part for part in typing.get_args(annotation) if part is not ...]
    return parts[-1] if parts and _classes(annotation) else Any


def _show(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"\b(?:\w+\.)+", "", text)
