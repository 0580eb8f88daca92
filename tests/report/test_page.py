import json
import re
from pathlib import Path

from datasets import Value
from report.pages import (
    HOSTILE,
    IDS,
    SETS,
    STUDENT,
    Tags,
    history,
    lists,
    report_of,
    section,
    strings,
    table,
)

from llmlabel.labelspace import load_labels


def page_with(tmp_path: Path, string: str) -> tuple[dict, str]:
    """The string in every place that a person or a model can fill."""
    labels = load_labels([string, "beta", "gamma"])
    tmp_path.mkdir()
    (tmp_path / "model_card.json").write_text(json.dumps({string: string}))
    base = table(
        STUDENT,
        labels,
        set_ids=lists(SETS),
        id=strings([string, *IDS[1:]]),
        text=strings([string, string * 1000, "x" * 80_000, "", "\u2028 $a$", string]),
        error=strings([string] * 6),
        engine=strings([string] * 6),
        prompt_sha=strings([string] * 6),
    )
    sources = {string: base, "student": base}
    return report_of(
        tmp_path,
        sources,
        baselines={"student": string},
        title=string,
        labels=labels,
        model=tmp_path,
    )


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    report, html = page_with(tmp_path / "hostile", HOSTILE)
    page, plain = Tags(html), Tags(page_with(tmp_path / "plain", "plain")[1])
    assert page.tags == plain.tags
    assert page.attributes == plain.attributes
    assert "script" not in page.tags
    assert all(place.startswith(("data:image/svg+xml;base64,", "#")) for place in page.addresses)
    assert "{{ 7 * 7 }}" in html
    assert not set(html) & {"\u202e", "\x00", "\u2028"}
    assert HOSTILE in report["review"]
    assert len(html) < 600_000


def test_hostile_labels_and_rounds_stay_text(tmp_path: Path) -> None:
    def tags(string: str, folder: Path) -> tuple[set[str], set[str], str]:
        entries = [string, {"id": "b", "name": string, "description": string, "parent": string}]
        labels = load_labels([*entries, {"id": "c", "parent": string}])
        rounds = [{**one, "parent": string, "labels": [string]} for one in history()]
        for one in rounds:
            one |= {"added": [string], "removed": [string], "suggestions": string}
            one |= {"problem": string, "explanation": string}
        calls = [1] * 6, Value("int32")
        sources = {string: table(STUDENT, labels, calls=calls, prompt_tokens=calls)}
        sources["student"] = sources[string]
        _, html = report_of(folder, sources, labels=labels, taxonomy=rounds)
        page = Tags(html)
        return page.tags, page.attributes, html

    hostile, plain = tags(HOSTILE, tmp_path / "a"), tags("plain", tmp_path / "b")
    assert hostile[:2] == plain[:2]
    assert "script" not in hostile[0]
    assert not set(hostile[2]) & {"\u202e", "\x00"}
    assert "{{ 7 * 7 }}" in section(hostile[2], "hierarchy")
    assert "{{ 7 * 7 }}" in section(hostile[2], "taxonomy")


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    _, html = report_of(tmp_path)
    style = re.search("<style>(.*)</style>", html, flags=re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in html
    assert "<link" not in html
    assert len(html) < 400_000
    for name in ("measured", "accuracy", "sets", "review", "provenance"):
        assert section(html, name)
    assert html.count("<img ") == html.count('alt="') == 14
