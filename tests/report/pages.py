"""A small run and its report, for the tests of every part of it."""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from datasets import Dataset, List, Value

from llmlabel.calibrate.conformal import Conformal
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.report import write_report
from llmlabel.softlabels import SoftLabels

IDS = ["t1", "t2", "t3", "t4", "r5", "r6"]
TEXTS = ["one", "Hello, World!", "three", "four", "hello world", "six"]
SPLITS = ["test", "test", "test", "test", "train", "train"]
GOLD = [[0], [1], [2], [0], [1], [2]]
STUDENT = [
    [0.8, 0.1, 0.1],
    [0.3, 0.6, 0.1],
    [0.5, 0.1, 0.4],
    [0.9, 0.1, 0.0],
    [0.5, 0.4, 0.1],
    [0.1, 0.1, 0.8],
]
TEACHER = [[0.2, 0.6, 0.2]] * 6
SETS = [[0], [1], [], [0, 1], [0], [2]]
LABELS = load_labels(["alpha", "beta", "gamma"])
CONFORMAL = Conformal(
    alpha=0.25, score="lac", threshold=0.5, rows=100, seed=0, label_space=LABELS.fingerprint
)


def table(probs: list, labels: LabelSpace = LABELS, **columns: tuple) -> Dataset:
    base = Dataset.from_dict({"id": IDS, "text": TEXTS, "split": SPLITS})
    rows = {"gold": (GOLD, List(Value("int32")))} | columns
    rows = {name: column for name, column in rows.items() if column is not None}
    return SoftLabels.from_dense(np.array(probs), labels).add_to(with_columns(base, rows))


def strings(values: list) -> tuple:
    return values, Value("string")


def lists(values: list) -> tuple:
    return values, List(Value("int32"))


def example() -> dict[str, Dataset]:
    errors = strings([None, None, "text cut: 300 tokens", "text cut: 400 tokens", None, None])
    return {
        "raw": table(TEACHER, engine=strings(["fake"] * 6), prompt_sha=strings(["abcd"] * 6)),
        "corrected": table(TEACHER, error=errors, engine=strings(["fake"] * 6)),
        "student": table(STUDENT, set_ids=lists(SETS)),
    }


def report_of(tmp_path: Path, sources: dict[str, Dataset] | None = None, **arguments: object):
    labels = arguments.pop("labels", LABELS)
    conformal = dataclasses.replace(CONFORMAL, label_space=labels.fingerprint)
    settings = {"student": "student", "output": tmp_path / "report", "conformal": conformal}
    settings |= arguments
    report = write_report(sources or example(), labels, **settings)
    html = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert json.loads((tmp_path / "report" / "report.json").read_text("utf-8")) == report
    return report, html


def section(html: str, name: str) -> str:
    """Visible text of a section, white space made one."""
    found = re.search(rf'<section id="{name}">(.*?)</section>', html, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", " ", found[1]).replace("&#8239;", "\u202f")
    return " ".join(text.split())


def svg(uri: str) -> str:
    return base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode()


HOSTILE = "</script><img src=x onerror=alert(1)>{{ 7 * 7 }}{% raw %}\u202e\x00\"'&<b> $x_1$"


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]


def history() -> list[dict]:
    entry = {
        **{"run": 0, "level": 1, "parent": None, "attempts": 1, "problem": None, "notes": []},
        **{"suggestions": None, "explanation": "groups of texts", "added": [], "removed": []},
    }
    return [
        {**entry, "step": "generate", "batch": 0, "score": None, "labels": ["x", "y"]},
        {
            **{**entry, "step": "update", "batch": 1, "score": 62, "labels": ["x", "<i>z"]},
            **{"added": ["<i>z"], "removed": ["y", "w"], "suggestions": "name it better"},
        },
        {
            **{**entry, "step": "review", "batch": None, "score": 71, "labels": ["x", "<i>z"]},
            **{"attempts": 5, "problem": "40 labels, at most 25"},
        },
        {**entry, "step": "select", "batch": None, "score": 0.5, "labels": ["x", "<i>z"]},
    ]
