"""What each bias correction does to a small model: accuracy, NLL, ECE, label-order sensitivity.

    python benchmarks/debias.py --cache /tmp/debias.sqlite

SmolLM2-135M in bfloat16 reads 300 rows of each set in four label orders; its labels in the first order
are corrected, and so are the votes of each order. Gold serves for measuring only. A prior is uniform,
estimated from the rows' predictions, or (in the set whose label mix is skewed on purpose) counted on
other rows that were drawn in the same way. Writes benchmarks/results/debias.md from all sets that
were asked for; with --cache nothing is read twice.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset, List, Value

from llmlabel.data import first_words, gold_index, load, with_columns
from llmlabel.engine import Engine
from llmlabel.engine.cache import CachedEngine
from llmlabel.engine.hf import HFEngine
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.models import SMOLLM2
from llmlabel.refine.bias import BiasReport, measure_bias
from llmlabel.refine.debias import (
    batch_calibration,
    content_free_calibration,
    domain_context_calibration,
    match_prior,
    shift_prior,
)
from llmlabel.refine.orders import OrderSensitivity, read_orders

HERE = Path(__file__).parent
CLINC = HERE.parents[1] / "shared" / "data" / "clinc150_oos" / "clinc150_oos.jsonl"
KEPT = {"business": 1.0, "sports": 0.6, "politics": 0.3, "entertainment": 0.15, "tech": 0.1}
"""Share of each section's articles that the skewed set is drawn from."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows to label and how."""

    title: str
    rows: Dataset
    labels: LabelSpace
    demonstrations: list[dict[str, str]]
    prior: dict[str, float] | None = None
    """The label mix, counted on other rows."""


def bbc(rows: int, seed: int) -> Case:
    """The quickstart's label space, demonstrations and first 25 words."""
    labels, demonstrations, articles = _quickstart()
    chosen = np.random.default_rng(seed).permutation(len(articles))[:rows]
    title = "BBC News, 5 sections, 5 demonstrations"
    return Case(title, articles.select(chosen), labels, demonstrations)


def skewed(rows: int, seed: int) -> Case:
    """The same, with some sections rare; their mix is counted on as many other rows."""
    labels, demonstrations, articles = _quickstart()
    rng = np.random.default_rng(seed)
    gold = gold_index(articles, labels)
    kept = np.array([KEPT[id] for id in labels.ids])
    pool = rng.permutation(np.flatnonzero(rng.uniform(size=len(gold)) < kept[gold]))
    counts = np.bincount(gold[pool[rows : 2 * rows]], minlength=len(labels)) + 1
    prior = dict(zip(labels.ids, (counts / counts.sum()).tolist(), strict=True))
    title = "BBC News, skewed: many of business and sports, few of the rest"
    return Case(title, articles.select(pool[:rows]), labels, demonstrations, prior)


def clinc(rows: int, seed: int) -> Case:
    """The 10 domains of CLINC150 from their names alone, test rows that are in scope."""
    table = load(CLINC)
    table = table.select([i for i, row in enumerate(table) if row["split"] == "test"])
    table = table.select([i for i, row in enumerate(table) if row["domain"] != "oos"])
    chosen = table.select(np.random.default_rng(seed).permutation(len(table))[:rows])
    ids = sorted(set(table["domain"]))
    labels = load_labels([{"id": id, "name": id.replace("_", " ")} for id in ids])
    gold = [[labels.index(domain)] for domain in chosen["domain"]]
    chosen = with_columns(chosen, {"gold": (gold, List(Value("int32")))})
    return Case("CLINC150, 10 domains, no demonstrations", chosen, labels, [])


CASES: dict[str, Callable[[int, int], Case]] = {"bbc": bbc, "skewed": skewed, "clinc": clinc}


def measured(case: Case, engine: Engine, *, orders: int) -> dict[str, BiasReport]:
    """A report for each correction of one reading of the rows."""
    labels = case.labels
    asked = {"demonstrations": case.demonstrations}
    raw = label_direct(case.rows, engine, labels, **asked)
    raw = read_orders(raw, engine, labels, orders=orders, rows=len(raw), **asked)
    domain = domain_context_calibration(raw, engine, labels, **asked)
    after = {
        "batch calibration": batch_calibration(raw, labels),
        "content-free": content_free_calibration(raw, engine, labels, **asked),
        "domain-context": domain,
        "match prior: uniform": match_prior(raw, labels),
        "shift prior: by EM": shift_prior(raw, labels),
        "domain-context, then shift prior: by EM": shift_prior(domain, labels),
    }
    if case.prior:
        after["match prior: counted on other rows"] = match_prior(raw, labels, prior=case.prior)
        after["batch, then shift prior: counted on other rows"] = shift_prior(
            batch_calibration(raw, labels), labels, prior=case.prior
        )
    return {name: measure_bias(raw, rows, labels) for name, rows in after.items()}


def section(title: str, reports: dict[str, BiasReport]) -> str:
    """A table of one set in Markdown."""
    first = next(iter(reports.values()))
    assert first.before is not None
    lines = [
        f"## {title}",
        "",
        f"{first.gold_rows} rows. Gold mix {_mix(first.mix_gold or {})}; "
        f"predicted mix before {_mix(first.mix_before)}.",
        "",
        "| correction | accuracy | change, 95 % | verdict | NLL | ECE | order flips | order distance |",
        "|---|---|---|---|---|---|---|---|",
        f"| none | {first.before.accuracy:.3f} | | | {first.before.nll:.3f} | "
        f"{first.before.ece:.3f} | {_order(first.order_before)} |",
    ]
    for name, found in reports.items():
        assert found.after is not None
        assert found.gain_interval is not None
        low, high = found.gain_interval
        lines.append(
            f"| {name} | {found.after.accuracy:.3f} | {low:+.3f} to {high:+.3f} | {found.verdict} | "
            f"{found.after.nll:.3f} | {found.after.ece:.3f} | {_order(found.order_after)} |"
        )
    return "\n".join(lines) + "\n"


def _quickstart() -> tuple[LabelSpace, list[dict[str, str]], Dataset]:
    recipe = yaml.safe_load((HERE.parent / "recipes" / "quickstart.yaml").read_text("utf-8"))
    labels = load_labels(recipe["labels"]["source"])
    articles = load(
        recipe["articles"]["path"], gold="label", labels=labels, encoding=["utf-8", "cp1252"]
    )
    short = first_words(articles, words=recipe["short"]["words"])
    return labels, recipe["llm_raw"]["demonstrations"], short


def _mix(mix: dict[str, float]) -> str:
    return ", ".join(f"{label} {share:.2f}" for label, share in mix.items())


def _order(found: OrderSensitivity | None) -> str:
    if found is None or found.distance is None:
        return "| "
    return f"{found.flips:.3f} | {found.distance:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--orders", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows")
    parser.add_argument("--cache", type=Path, help="SQLite file of what the model answered")
    arguments = parser.parse_args()
    intro = (
        "# Bias corrections on SmolLM2-135M\n\n"
        f"`python benchmarks/debias.py --rows {arguments.rows} --orders {arguments.orders}`. Order flips: "
        "share of rows whose most probable label is not the same in all label orders; order "
        "distance: mean total variation between two orders. The change of accuracy has the exact "
        "interval of the rows that changed (McNemar). No correction reads gold.\n"
    )
    parts = [intro]
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or Path(folder) / "replies.sqlite"
        engine = CachedEngine(HFEngine(SMOLLM2, dtype="bfloat16"), cache)
        for name in arguments.sets:
            if name == "clinc" and not CLINC.is_file():
                print(f"{CLINC.name} is absent: skipped")
                continue
            case = CASES[name](arguments.rows, arguments.seed)
            parts.append(section(case.title, measured(case, engine, orders=arguments.orders)))
            print(parts[-1], flush=True)
        engine.close()
    (HERE / "results" / "debias.md").write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
