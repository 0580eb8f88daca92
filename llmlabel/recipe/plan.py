"""What a recipe would ask of its engines, found without asking them and without writing anything.

Engines are replaced by `llmlabel.engine.plan.PlanEngine`; the steps that ask them run with it, and so
do the cheap steps that these need. What needs a trained model is not planned and says so.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlabel.recipe import keep
from llmlabel.recipe.calls import Call, Recipe, Ref, bind

if TYPE_CHECKING:
    from llmlabel.engine.plan import Asked, PlanEngine

# These compute in seconds and ask no model. What is not needed by a step that asks an engine is
# not run at all.
_CHEAP = ("llmlabel.data.", "llmlabel.labelspace.", "llmlabel.refine.", "llmlabel.select.")


@dataclass(frozen=True)
class PlannedStep:
    """One step that asks an engine."""

    name: str
    rows: int | None = None
    asked: "list[tuple[str, Asked, float | None]]" = field(default_factory=list)
    """Per engine: its name, what it is asked, and the price of that where prices are given."""
    problem: str | None = None
    """Why this is not known."""
    is_kept: bool = False
    finished_blocks: int = 0
    """Blocks in the step's folder; those of the same call are not asked again."""


def plan(
    recipe: Recipe, *, output: Path = Path("runs"), allow: Sequence[str] = ()
) -> list[PlannedStep]:
    """The steps of a recipe that ask an engine, in order, each with what it would ask.

    Args:
        recipe: From `load_recipe`.
        output: The folder of all runs; what is kept there is not computed again.
        allow: Top-level packages besides llmlabel that calls may name; their steps are not planned.

    Raises:
        RecipeError: The recipe does not fit.
    """
    planner = _Planner(bind(recipe, allow=allow), output / recipe.name)
    return [planner.step(name) for name in planner.bound if planner.asks_engine(name)]


class _UnknownError(Exception):
    """Why a value is not known before the run."""


@dataclass(frozen=True)
class _Stand:
    """A planning engine, the call that it stands for, and that engine's prices."""

    engine: "PlanEngine"
    call: Call
    prices: tuple[float | None, float | None]

    def cost(self) -> float | None:
        """Of what was asked, in the unit of the prices, which are of a million tokens."""
        if self.prices == (None, None):
            return None
        prompt, output = (price or 0.0 for price in self.prices)
        asked = self.engine.asked
        return (asked.prompt_tokens * prompt + asked.output_tokens * output) / 1e6


class _Planner:
    def __init__(self, bound: dict[str, Any], folder: Path) -> None:
        self.bound, self.folder = bound, folder
        self.values: dict[str, Any] = {}
        self.unknown: dict[str, str] = {}
        self.engines: list[_Stand] = []
        marks: dict[str, str] = {}
        for name, value in bound.items():
            marks[name], _ = keep.fingerprint(value, marks)
        self.marks = marks

    def asks_engine(self, name: str) -> bool:
        value = self.bound[name]
        return isinstance(value, Call) and not _is_engine(value) and any(self._engines_of(value))

    def _engines_of(self, value: Any) -> Iterator[Call]:
        """The engines among the arguments of a call."""
        if isinstance(value, Call):
            value = value.arguments
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, Ref):
                part = self.bound[part.name]
            if isinstance(part, Call) and _is_engine(part):
                yield part
            elif isinstance(part, dict | list):
                yield from self._engines_of(part)

    def step(self, name: str) -> PlannedStep:
        from llmlabel.engine.plan import Asked

        if self._is_kept(name):
            return PlannedStep(name, is_kept=True)
        blocks = len(list((self.folder / name / "blocks").glob("*.parquet")))
        try:
            arguments = self._arguments(name)
            for stand in self.engines:  # earlier steps, which these arguments may need, asked too
                stand.engine.asked = Asked()
            self._run(name, arguments)
        except _UnknownError as problem:
            return PlannedStep(name, problem=str(problem), finished_blocks=blocks)
        rows = next((len(a) for a in arguments.values() if _is_table(a)), None)
        asked = [
            (stand.engine.name, stand.engine.asked, stand.cost())
            for stand in self.engines
            if stand.engine.asked.chats
        ]
        return PlannedStep(name, rows, asked, finished_blocks=blocks)

    def _is_kept(self, name: str) -> bool:
        kept = keep.read_kept(self.folder / name, self.marks[name])
        return kept is not None and keep.is_whole(self.folder / name, kept)

    def _value(self, name: str) -> Any:
        """A variable, each computed once."""
        if name in self.unknown:
            raise _UnknownError(self.unknown[name])
        if name not in self.values:
            value = self.bound[name]
            if isinstance(value, Call) and self._is_kept(name):
                self.values[name] = keep.load_kept(self.folder / name, returns=value.returns)
            elif isinstance(value, Call) and not _is_engine(value):
                self._run(name, self._arguments(name))
            else:
                self.values[name] = self._evaluate(name, value)
        return self.values[name]

    def _arguments(self, name: str) -> dict[str, Any]:
        call: Call = self.bound[name]
        own = {key: part for key, part in call.arguments.items() if key != "output"}
        self._refuse(name, call)
        return {key: self._evaluate(name, part) for key, part in own.items()}

    def _run(self, name: str, arguments: dict[str, Any]) -> None:
        call: Call = self.bound[name]
        try:
            self.values[name] = call.function(**arguments)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            self.unknown[name] = f"{name}: {line}"
            raise _UnknownError(self.unknown[name]) from error

    def _refuse(self, name: str, call: Call) -> None:
        """Before a call that takes long, writes, or may do anything."""
        parameter = inspect.signature(call.function).parameters.get("output")
        must_write = parameter is not None and parameter.default is parameter.empty
        asks = any(self._engines_of(call)) and call.path.startswith("llmlabel.")
        if must_write or call.returns is None or not (asks or call.path.startswith(_CHEAP)):
            self.unknown[name] = f"it needs {name}, which is not computed for a plan"
            raise _UnknownError(self.unknown[name])

    def _evaluate(self, name: str, value: Any) -> Any:
        if isinstance(value, Ref):
            return self._value(value.name) if value.is_call else self._evaluate(name, value.value)
        if isinstance(value, dict):
            return {key: self._evaluate(name, part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._evaluate(name, part) for part in value]
        if not isinstance(value, Call):
            return value
        if _is_engine(value):
            return self._engine(value)
        self._refuse(name, value)
        arguments = {key: self._evaluate(name, part) for key, part in value.arguments.items()}
        return value.function(**arguments)

    def _engine(self, call: Call) -> Any:
        from llmlabel.engine.plan import PlanEngine

        for inner in self._engines_of(call):  # such as the one that a cache wraps
            return self._engine(inner)
        for stand in self.engines:
            if stand.call is call:
                return stand.engine
        given = {**call.defaults, **call.arguments}
        plain = {key: part.value if isinstance(part, Ref) else part for key, part in given.items()}
        name = call.path.rpartition(".")[2]
        prices = (plain.get("input_price"), plain.get("output_price"))
        # A server whose tokens have a price is taken for one that does not read chosen tokens.
        by_letters = plain.get("reading") == "codes" or (
            plain.get("reading") == "auto" and prices != (None, None)
        )
        source = plain.get("tokenizer") if "reading" in plain else plain.get("model")
        engine = PlanEngine(
            f"{name} {plain['model']}" if plain.get("model") else name,
            tokenizer=_tokenizer(source),
            orders=int(plain["orders"]) if by_letters else None,
        )
        self.engines.append(_Stand(engine, call, prices))
        return engine


def _is_engine(call: Call) -> bool:
    cls = call.function
    return inspect.isclass(cls) and all(hasattr(cls, verb) for verb in ("generate", "score"))


def _is_table(value: Any) -> bool:
    return type(value).__name__ == "Dataset"


def _tokenizer(source: Any) -> Any:
    """The tokenizer in a folder on this machine; nothing is downloaded or converted for a plan."""
    from llmlabel.models import local_path

    if not isinstance(source, str | Path):
        return None
    try:
        folder = local_path(source)
    except OSError:
        return None
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (ValueError, OSError):
        return None
    return tokenizer if tokenizer.chat_template is not None else None
