"""The command line: run a recipe, check it, print it as Python; and verbs for the shipped ones.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llmlabel.labelspace import LabelSpace
    from llmlabel.recipe import PlannedStep, Recipe, Results

_VERBS = ("label", "taxonomy", "train", "calibrate", "report")
_SHOWN = 400  # characters of a turn's start and of its end in a plan
_INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended

app = typer.Typer(
    name="llmlabel",
    help="Many texts and few or no labels to a model that can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_RecipePath = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME[.ARGUMENT]=VALUE",
        help="Replaces a variable, or an argument of its call; values are YAML.",
        show_default=False,
    ),
]
_Output = Annotated[Path, typer.Option(help="The folder of all runs.")]
_Allow = Annotated[
    list[str] | None,
    typer.Option(help="A package besides llmlabel that the recipe may call.", show_default=False),
]
_Force = Annotated[bool, typer.Option("--force", help="Compute everything again.")]
_Plan = Annotated[
    bool,
    typer.Option("--plan", help="Show what the engines would be asked and its price; run nothing."),
]


def main() -> None:
    """The entry point of `llmlabel`."""
    app()


def _version(value: bool) -> bool:  # noqa: FBT001  (the signature of a typer callback)
    if value:
        from importlib.metadata import version

        typer.echo(f"llmlabel {version('llmlabel')}")
        raise typer.Exit
    return value


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: _RecipePath,
    overrides: _Overrides = None,
    output: _Output = Path("runs"),
    allow: _Allow = None,
    *,
    force: _Force = False,
    plan: _Plan = False,
) -> None:
    """Runs a recipe; the same command again continues where it stopped."""
    if plan:
        _show_plan(recipe, overrides or [], output, allow or [])
    else:
        _run(recipe, overrides or [], output, allow or [], force=force)


@app.command()
def check(recipe: _RecipePath, overrides: _Overrides = None, allow: _Allow = None) -> None:
    """Checks a recipe against the signatures of what it calls, without running anything."""
    with _errors_in_one_line():
        from llmlabel.recipe import check as check_recipe

        loaded = _load(recipe, overrides or [], allow or [])
        check_recipe(loaded, allow or [])
        typer.echo(f"{loaded.path.name}: {len(loaded.assignments)} variables fit; nothing was run")


@app.command()
def python(
    recipe: _RecipePath,
    overrides: _Overrides = None,
    output: _Output = Path("runs"),
    allow: _Allow = None,
) -> None:
    """Prints a recipe as a Python program that computes the same."""
    with _errors_in_one_line():
        from llmlabel.recipe import to_python

        loaded = _load(recipe, overrides or [], allow or [])
        typer.echo(to_python(loaded, output, allow=allow or []), nl=False)


def _verb(name: str) -> Callable[..., None]:
    def verb(
        overrides: _Overrides = None,
        output: _Output = Path("runs"),
        allow: _Allow = None,
        *,
        force: _Force = False,
        plan: _Plan = False,
    ) -> None:
        run(name, overrides, output, allow, force=force, plan=plan)

    verb.__doc__ = f"Runs the shipped recipe {name}.yaml; `llmlabel python {name}` prints it."
    return verb


for _name in _VERBS:
    app.command(_name)(_verb(_name))


@app.command()
def labels(
    file: Annotated[Path, typer.Argument(help="A label file, a table or an ontology.")],
    *,
    save: Annotated[
        Path | None, typer.Option(help="Write the labels in the format of this file's suffix.")
    ] = None,
    diff: Annotated[
        Path | None, typer.Option(help="Show what this newer version of the file changes.")
    ] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Levels to show.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Labels to show below one.")] = 50,
) -> None:
    """Shows the labels of a file as a tree, converts them, or compares two versions."""
    with _errors_in_one_line():
        from llmlabel.labelspace import save_labels
        from llmlabel.labelspace.show import printable, tree_text
        from llmlabel.labelspace.versions import describe, diff_labels

        shown = _read_labels(file)
        if save is not None:
            save_labels(shown, save)
            typer.echo(f"{save}: {len(shown):,} labels")
        if diff is not None:
            newer = _read_labels(diff)
            changes = describe(diff_labels(shown, newer), shown, newer)
            typer.echo("\n".join(map(printable, changes)) or "no changes")
        if save is None and diff is None:
            width = max(_console().width, 40)
            typer.echo(tree_text(shown, depth=depth, width=width, most_children=most))


def _read_labels(file: Path) -> "LabelSpace":
    """The labels of any kind of file; what had to be changed to read it is told on stderr."""
    from llmlabel.labelspace import files, load_labels, ontologies
    from llmlabel.labelspace.show import printable
    from llmlabel.labelspace.sources import import_labels

    # Of an ontology load_labels does not tell what it leaves out.
    if files.suffix(file) not in ontologies.SUFFIXES:
        try:
            return load_labels(file)
        except ValueError:  # it is no label file, or a broken one
            pass
    cleaning = import_labels(file)
    for change in cleaning.summary().splitlines():
        typer.echo(printable(f"{file}: {change}"), err=True)
    return cleaning.labels


def _run(recipe: str, overrides: list[str], output: Path, allow: list[str], *, force: bool) -> None:
    with _errors_in_one_line():
        from llmlabel import progress
        from llmlabel.recipe import run as run_recipe

        loaded = _load(recipe, overrides, allow)
        progress.show()
        results = run_recipe(loaded, output=output, allow=allow, force=force)
        if os.environ.get("RANK", "0") == "0":
            _show(loaded, results, output / loaded.name)


def _show_plan(recipe: str, overrides: list[str], output: Path, allow: list[str]) -> None:
    """What each step would ask, and how its first prompt reads."""
    with _errors_in_one_line():
        from llmlabel.recipe import plan

        loaded = _load(recipe, overrides, allow)
        steps = plan(loaded, output=output, allow=allow)
        columns = ("step", "rows", "engine", "chats", "prompts", "prompt tokens", "output tokens")
        table = _table(*columns, "cost", title=loaded.path.name)
        for step in steps:
            if step.is_kept or step.problem:
                table.add_row(step.name, "", "kept" if step.is_kept else "not planned")
            for engine, asked, cost in step.asked:
                about = "" if asked.is_exact else "about "
                table.add_row(
                    step.name,
                    "" if step.rows is None else f"{step.rows:,}",
                    engine,
                    f"{asked.chats:,}",
                    f"{asked.requests:,}",
                    f"{about}{asked.prompt_tokens:,.0f}",
                    f"at most {asked.output_tokens:,}",
                    "" if cost is None else f"{about}{cost:.2g}",
                )
        _console().print(table)
        for step in steps:
            _show_planned(step)
        typer.echo("nothing was asked and nothing was written")


def _show_planned(step: "PlannedStep") -> None:
    if step.problem:
        typer.echo(f"{step.name}: not planned: {step.problem}")
    if step.finished_blocks:
        typer.echo(
            f"{step.name}: {step.finished_blocks} finished blocks are kept; those of this very call "
            "are not asked again"
        )
    for _, asked, _ in step.asked:
        typer.echo(f"{step.name}: the first prompt")
        for turn in asked.first or []:
            shown = turn["content"]
            if len(shown) > 2 * _SHOWN:
                shown = f"{shown[:_SHOWN]} [...] {shown[-_SHOWN:]}"
            typer.echo(f"  {turn['role']}: " + shown.replace("\n", "\n    "))


def _load(recipe: str, overrides: list[str], allow: list[str]) -> "Recipe":
    from llmlabel.recipe import load_recipe

    if allow:
        sys.path.append(str(Path.cwd()))  # at the end: it can hide nothing that is installed
    return load_recipe(recipe, overrides)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """What went wrong, on stderr, for a person; only what nobody foresaw shows its traceback."""
    _quiet()
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; the same command continues", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:  # without its number
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        lines = text.splitlines() or [type(error).__name__]
        typer.echo(f"error: {lines[0]}", err=True)
        raise typer.Exit(2) from None


def _quiet() -> None:
    """Other libraries say nothing unless the environment asks; ours say what a run does."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for bars in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{bars}_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="llmlabel")
        warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    log = logging.getLogger("llmlabel")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def _show(recipe: "Recipe", results: "Results", folder: Path) -> None:
    """The variables of a run, and the numbers of every result that has a `summary`."""
    from llmlabel.recipe.keep import read_json

    console = _console()
    table = _table("variable", "state", "seconds", "where", title=recipe.path.name)
    notes: dict[str, Any] = (read_json(folder / "run.json") or {})["variables"]
    for name, note in notes.items():
        if note["state"] in ("kept", "computed"):
            seconds = f"{note['seconds']:.1f}" if "seconds" in note else ""
            where = str(folder / name) if note.get("kind") else ""
            table.add_row(name, note["state"], seconds, where)
    console.print(table)
    for name, note in notes.items():
        value = results[name] if note.get("kind") == "json" else None
        if isinstance(value, dict) and isinstance(value.get("summary"), dict):
            summary = _table(name, "")
            for key, number in value["summary"].items():
                shown = f"{number:.4g}" if isinstance(number, float) else str(number)
                summary.add_row(str(key), shown)
            console.print(summary)
    for name, note in notes.items():
        if note["state"] == "built" and (used := note.get("usage")):
            computed = used["computed_tokens"]
            own = f" ({computed:,} computed)" if computed else ""
            cost = "" if used["cost"] is None else f", cost {used['cost']:.4g}"
            typer.echo(
                f"{name}: {used['requests']:,} requests, {used['prompt_tokens']:,} prompt tokens{own}, "
                f"{used['output_tokens']:,} output tokens{cost}"
            )


def _console() -> "Console":
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160  # a log has no width of its own
    return Console(width=width, markup=False, highlight=False, emoji=False)


def _table(*columns: str, title: str | None = None) -> "Table":
    from rich.table import Table

    return Table(*columns, title=title)
