"""`label_direct` on many machines: Ray Data, with one engine in each of its actors.

Ray moves the blocks and starts dead actors again. What comes back is committed by the process that
called, with the files and the promises of `llmlabel.blocks`: only that process needs the folder.
"""

import importlib.util
import inspect
import logging
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from datasets import Dataset

from llmlabel.blocks import Numbered, commit_blocks
from llmlabel.engine import Engine
from llmlabel.files import arrow_table, in_memory
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import LabelSpace
from llmlabel.models import content_sha
from llmlabel.prompt import prompt_sha

_OURS = ("dataset", "engine", "labels", "block_rows", "output")
_PER_ROW = ("candidates", "demonstrations")
"""Columns that `label_direct` heeds where they are there."""


def label_at_scale(
    dataset: Dataset,
    engine: str | type,
    labels: LabelSpace,
    *,
    engine_args: Mapping[str, Any] | None = None,
    actors: int,
    per_actor: Mapping[str, float] | None = None,
    block_rows: int = 256,
    output: Path | None = None,
    **options: Any,
) -> Dataset:
    """What `label_direct` adds, computed by engines in `actors` processes of a Ray cluster.

    Finished blocks are not sent again. An actor that dies is started again and its blocks with it.
    Without a running Ray (`ray.init(...)`, or its address in `RAY_ADDRESS`) the cluster is this
    machine, for as long as the call takes.

    Args:
        dataset: rows with `id` and `text`.
        engine: the engine's class, which is called in each actor; in a recipe the dotted path of one
            of `llmlabel.engine`.
        labels: what may be answered.
        engine_args: the arguments that make the engine; paths must be good in every actor.
        actors: how many engines.
        per_actor: what Ray reserves for each, such as `{"num_gpus": 1}`; default one CPU. `num_cpus`
            is also the number of threads where `OMP_NUM_THREADS` says nothing else.
        block_rows: rows sent and committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
        options: further arguments of `label_direct`, as JSON and paths of prompts.

    Raises:
        ImportError: Ray Data is not installed.
        ValueError: as `label_direct` and `llmlabel.blocks.map_blocks`, or an engine without a name.
        RuntimeError: an engine failed; finished blocks stay.
    """
    if actors < 1:
        raise ValueError(f"actors must be at least 1; got {actors}")
    engine_args = dict(engine_args or {})
    path = _path(engine)
    if unknown := set(options) - (set(inspect.signature(label_direct).parameters) - {*_OURS}):
        raise ValueError(f"label_direct has no option {sorted(unknown)[0]!r} to pass on")
    _require_ray()
    label = {"engine": engine, "engine_args": engine_args, "labels": labels, "options": options}
    reads = [name for name in _PER_ROW if name in dataset.column_names]
    return commit_blocks(
        dataset,
        partial(
            _label, sent=["id", "text", *reads], label=label, actors=actors, per_actor=per_actor
        ),
        key={
            "engine": path,
            "engine_args": {name: _content(value) for name, value in engine_args.items()},
            "labels": labels,
            "options": {**options, "prompt": _prompts(options.get("prompt"), labels)},
        },
        output=output,
        block_rows=block_rows,
        name="label_at_scale",
        reads=reads,
    )


def _path(engine: str | type) -> str:
    """The dotted path of an engine's class, which is not imported: its packages may be elsewhere."""
    if isinstance(engine, type):
        return f"{engine.__module__}.{engine.__qualname__}"
    module, _, name = engine.rpartition(".")
    if (
        not module.startswith("llmlabel.engine.")
        or not importlib.util.find_spec(module)
        or not name
    ):
        raise ValueError(
            f"engine={engine!r} is no path such as llmlabel.engine.vllm.VLLMEngine; in Python give "
            "the class itself"
        )
    return engine


def _content(value: Any) -> Any:
    """JSON that changes when the folder of a model here does."""
    if isinstance(value, str | Path) and (place := Path(value)).is_dir():
        return {"name": place.name, "content": content_sha(place)}
    return str(value) if isinstance(value, Path) else value


def _prompts(prompt: Any, labels: LabelSpace) -> list[str]:
    if prompt is None:
        prompt = "label/applies" if labels.multilabel else "label/direct"
    return [prompt_sha(one) for one in (prompt if isinstance(prompt, list) else [prompt])]


def _require_ray() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"label_at_scale runs on Ray Data ({error}): pip install 'llmlabel[scale]'; without it, "
            "label_direct does the same in one process"
        ) from None


# ------------------------------------------------------------------------------------------- Ray


def _label(
    blocks: Iterator[Numbered],
    *,
    sent: list[str],
    label: dict[str, Any],
    actors: int,
    per_actor: Mapping[str, float] | None,
) -> Iterator[Numbered]:
    """Each block with what `label_direct` adds, in the order in which the actors are done.

    A block is one row of Ray's, as bytes, so that Ray neither cuts it nor reads it.
    """
    import ray

    reserved: dict[str, Any] = dict(per_actor or {"num_cpus": 1})
    with _cluster():
        given: list[Any] = [
            ray.put(_row(number, block.select_columns(sent))) for number, block in blocks
        ]
        labelled = ray.data.from_arrow_refs(given).map_batches(
            _Labeler,
            fn_constructor_kwargs=label,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(given))),
            **reserved,
        )
        for row in labelled.iter_batches(batch_size=1, batch_format="pyarrow"):
            if trace := row["error"][0].as_py():
                what = trace.strip().splitlines()[-1]
                raise RuntimeError(f"an engine failed: {what}") from RuntimeError(trace)
            yield _block(row)


class _Labeler:
    """What runs in an actor; an error is handed over as text, since Ray would bury it in its own."""

    def __init__(
        self, engine: str | type, engine_args: dict[str, Any], labels: LabelSpace, options: Any
    ) -> None:
        self.made_by, self.engine_args = engine, engine_args
        self.labels, self.options = labels, options
        self.engine: Engine | None = None

    def __call__(self, row: pa.Table) -> pa.Table:
        number, block = _block(row)
        try:
            if self.engine is None:
                self.engine = _made(self.made_by, self.engine_args)
            labelled = label_direct(
                block, self.engine, self.labels, block_rows=len(block), **self.options
            )
        except Exception:
            return _row(number, block.select([]), error=traceback.format_exc())
        given = [name for name in block.column_names if name != "id"]
        return _row(number, labelled.remove_columns(given))


def _made(engine: str | type, engine_args: dict[str, Any]) -> Engine:
    if isinstance(engine, type):
        return cast("Engine", engine(**engine_args))
    module, _, name = engine.rpartition(".")
    made = getattr(importlib.import_module(module), name, None)
    # Only what is defined there: a recipe must not reach what an engine's module imports.
    if not isinstance(made, type) or made.__module__ != module:
        raise ValueError(f"engine={engine!r} is no class that is defined in {module}")
    return cast("Engine", made(**engine_args))


def _row(number: int, block: Dataset, *, error: str = "") -> pa.Table:
    table, sink = arrow_table(block), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    return pa.table({"number": [number], "rows": [content], "error": [error]})


def _block(row: pa.Table) -> Numbered:
    content = row["rows"][0].as_py()
    return row["number"][0].as_py(), in_memory(pa.ipc.open_stream(content).read_all())


@contextmanager
def _cluster() -> Iterator[None]:
    """The Ray that is running, or one for this call; without its words about plans and bars."""
    import ray

    starts = not ray.is_initialized()
    if starts:
        own: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        log.setLevel(before[1])
        if starts:
            ray.shutdown()
