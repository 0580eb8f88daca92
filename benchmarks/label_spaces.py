"""How long real label spaces take to import, to clean and to write, and what memory they need.

    python benchmarks/label_spaces.py ../shared/data

ICD-10-CM comes out of the wheel of simple-icd-10-cm (downloaded once, not installed) and is left out
where there is no package index. Writes benchmarks/results/label_spaces.md.
"""

import argparse
import gzip
import json
import tempfile
import time
import tracemalloc
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmlabel.labelspace import LabelSpace, load_labels, save_labels
from llmlabel.labelspace.clean import Cleaning, clean_labels
from llmlabel.labelspace.graph import depths
from llmlabel.labelspace.sources import import_labels
from llmlabel.models import fetch

ICD = (
    "wheel:simple-icd-10-cm==1.5.0/simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"
    "#sha256=6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42"
)
SUFFIXES = (".json", ".jsonl", ".csv", ".yaml", ".ttl", ".owl", ".obo")


def hs_codes(folder: Path) -> Cleaning:
    """21 sections, and the chapters, headings and subheadings below them."""
    sections = json.loads((folder / "sections.json").read_text("utf-8"))
    rows = [{"id": id, "name": name} for id, name in sections.items()]
    with gzip.open(folder / "hs_codes.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            parent = row["section"] if row["level"] == 2 else row["parent"]
            rows.append({"id": row["id"], "name": row["text"], "parent": parent})
    return import_labels(rows)


def icd(file: Path) -> Cleaning:
    """Chapters, sections and codes; a section with one code has its id."""
    rows = []
    top = ET.parse(file).getroot().findall("chapter")
    waiting = [(chapter, "chapter", "") for chapter in reversed(top)]
    while waiting:
        node, level, parent = waiting.pop()
        id = str(node.get("id") if level == "section" else node.findtext("name"))
        rows.append({"id": id, "name": node.findtext("desc"), "level": level, "parent": parent})
        for below in ("diag", "section"):
            waiting += [(child, below, id) for child in reversed(node.findall(below))]
    return import_labels(rows)


def ring() -> Cleaning:
    """10,000 labels in a circle, all edges three times."""
    edges = [(f"n{n}", f"n{(n + 1) % 10_000}") for n in range(10_000)]
    return clean_labels([child for child, _ in edges], edges * 3)


def star() -> Cleaning:
    """20,000 children of one parent, which is its own."""
    names = [f"n{n}" for n in range(20_001)]
    return clean_labels(names, [(name, "n0") for name in names])


def tangle() -> Cleaning:
    """5,000 labels and 15,000 edges drawn at random: cycles everywhere."""
    pairs = np.random.default_rng(0).integers(0, 5_000, (15_000, 2)).tolist()
    return clean_labels([f"n{n}" for n in range(5_000)], [(f"n{a}", f"n{b}") for a, b in pairs])


def imported(name: str, make: Callable[[], Cleaning]) -> tuple[str, LabelSpace]:
    """A row of the table: counts, the best of three times, peak memory, changes."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        cleaning = make()
        seconds.append(time.perf_counter() - started)
    tracemalloc.start()
    make()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    labels = cleaning.labels
    several = sum(len(parents) > 1 for parents in labels.parents)
    changes = ", ".join(f"{len(change.items):,} {change.kind}" for change in cleaning.changes)
    row = (
        f"| {name} | {len(labels):,} | {len(labels.roots):,} | {int(depths(labels).max()) + 1:,} | "
        f"{len(labels.leaves):,} | {several:,} | {min(seconds):.2f} | {peak / 2**20:.0f} | "
        f"{changes or 'none'} |"
    )
    return row, labels


def round_trips(name: str, labels: LabelSpace) -> list[str]:
    """A row of the table for each type of file."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in SUFFIXES:
            path = Path(folder) / f"labels{suffix}"
            started = time.perf_counter()
            save_labels(labels, path)
            written = time.perf_counter()
            equal = load_labels(path) == labels
            read = time.perf_counter()
            rows.append(
                f"| {name} | {suffix} | {written - started:.2f} | {read - written:.2f} | "
                f"{path.stat().st_size / 2**20:.1f} | {'yes' if equal else 'NO'} |"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of hs_codes, llms4ol, ...")
    data = parser.parse_args().data
    sources: dict[str, Callable[[], Cleaning]] = {
        "hs_codes with sections": lambda: hs_codes(data / "hs_codes"),
        "hs_codes, the file alone": lambda: import_labels(data / "hs_codes" / "hs_codes.jsonl.gz"),
        "GeoNames": lambda: import_labels(data / "llms4ol" / "taxonomy_geonames.jsonl"),
        "Schema.org": lambda: import_labels(data / "llms4ol" / "taxonomy_schemaorg.jsonl"),
        "clinc150": lambda: import_labels(data / "clinc150_oos" / "taxonomy.json"),
        "goemotions, Ekman": lambda: import_labels(data / "goemotions" / "taxonomy_ekman.json"),
        "finna_yso": lambda: import_labels(data / "finna_yso" / "labels.jsonl.gz"),
        "ring": ring,
        "star": star,
        "tangle": tangle,
    }
    note = "ICD-10-CM: its wheel could not be had, left out."
    try:
        file = Path(fetch(ICD))
        sources = {"ICD-10-CM": lambda: icd(file), **sources}
        note = (
            "ICD-10-CM: the time includes reading 9.7 MB of XML; 12 of its leaves are sections "
            "without a code, all others are codes."
        )
    except FileNotFoundError as error:
        print(f"without ICD-10-CM: {error}")
    rows, spaces = [], {}
    for name, make in sources.items():
        if not data.is_dir() and name not in ("ICD-10-CM", "ring", "star", "tangle"):
            print(f"without {name}: there is no {data}")
            continue
        row, spaces[name] = imported(name, make)
        rows.append(row)
    trips = []
    for name in ("ICD-10-CM", "hs_codes with sections"):
        if name in spaces:
            trips += round_trips(name, spaces[name])
    lines = [
        "# Label spaces: import, cleaning, files",
        "",
        "Written by `python benchmarks/label_spaces.py ../shared/data`. Best of three runs; the peak is "
        f"that of Python's memory while importing, from the file to the label space. {note}",
        "",
        *(f"- {name}: {make.__doc__}" for name, make in sources.items() if make.__doc__),
        "",
        "| source | labels | roots | levels | leaves | several parents | seconds | peak MB | changes |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "Round trips through a file (`save_labels`, then `load_labels`); rdflib reads .ttl and .owl, "
        "PyYAML .yaml, and the time is theirs:",
        "",
        "| source | file | write s | read s | MB | equal |",
        "|---|---|---|---|---|---|",
        *trips,
    ]
    output = Path(__file__).parent / "results" / "label_spaces.md"
    output.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
