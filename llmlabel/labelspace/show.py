"""A label space for a person to look at: as a tree of lines, and as HTML that folds.

A label with several parents stands below each of them, but what is below it is shown once only.
"""

import re
from collections.abc import Sequence
from html import escape

import numpy as np

from llmlabel.labelspace import LabelSpace

_MOST_NESTED = 60
"""Levels of HTML; browsers flatten what is nested some hundred elements deep."""

_OPEN_AT_FIRST = 40
"""So many labels are unfolded when the page opens, as whole levels."""

# Control characters, what reorders the text around it, halves of characters, non-characters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)

_Count = int | float | np.integer | np.floating


def printable(text: str) -> str:
    """The text without characters that a terminal or a page would obey."""
    return _UNSAFE.sub("\ufffd", text)


def tree_text(
    labels: LabelSpace,
    *,
    depth: int | None = None,
    counts: Sequence[_Count] | None = None,
    width: int = 100,
    most_children: int = 50,
) -> str:
    """The labels as lines: name, count, id where it is not the name, description.

    Args:
        labels: A flat space has one line a label.
        depth: How many levels are shown; all of them when left out.
        counts: A number for each label, such as its rows.
        width: Characters of a line; longer ones are cut.
        most_children: So many labels below one are shown, the others are counted.

    Raises:
        ValueError: A number below 1, or counts of other labels.

    >>> from llmlabel.labelspace import load_labels
    >>> labels = load_labels(["pet", {"id": "cat", "parent": "pet"}, {"id": "dog", "parent": "pet"}])
    >>> print(tree_text(labels, counts=[5, 2, 3]))
    pet  5
    ├── cat  2
    └── dog  3
    """
    _check(labels, counts)
    for name, value in (("depth", depth), ("width", width), ("most_children", most_children)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    lines: list[str] = []
    reached: dict[int, int] = {}  # how many levels below each label are shown above
    heights = _heights(labels)
    # What is below a label is pushed last to first, so that it comes off the stack in order.
    waiting: list[tuple[int | str, str, str, int]] = []
    _push(waiting, labels.roots, "", 1, most_children)
    while waiting:
        label, edge, margin, level = waiting.pop()
        if isinstance(label, str):
            lines.append(_cut(f"{margin}{edge}{label}", width))
            continue
        children = labels.children[label]
        note = ""
        reach = heights[label] if depth is None else min(heights[label], depth - level)
        if children and reached.get(label, -1) >= reach:
            note, children = " (see above)", ()
        elif depth is not None and level >= depth:
            note, children = f" ... {len(children):,} more" if children else "", ()
        lines.append(_cut(f"{margin}{edge}{_line(labels, label, counts, note)}", width))
        if children:
            reached[label] = reach
            below = margin + {"": "", "├── ": "│   ", "└── ": "    "}[edge]
            _push(waiting, children, _narrow(below, level, width), level + 1, most_children)
    return "\n".join(lines)


def _heights(labels: LabelSpace) -> list[int]:
    """The longest way down from each label, in edges."""
    found = [0] * len(labels)
    for label in reversed(labels.topological):
        for parent in labels.parent_positions[label]:
            found[parent] = max(found[parent], found[label] + 1)
    return found


def _push(
    waiting: list[tuple[int | str, str, str, int]],
    some: Sequence[int],
    margin: str,
    level: int,
    most: int,
) -> None:
    """Puts siblings on the stack, the first on top."""
    entries: list[int | str] = list(some[:most])
    if len(some) > most:
        entries.append(f"... {len(some) - most:,} more")
    edges = ["├── "] * (len(entries) - 1) + ["└── "] if level > 1 else [""] * len(entries)
    waiting.extend(
        (entry, edge, margin, level)
        for entry, edge in zip(reversed(entries), reversed(edges), strict=True)
    )


def _narrow(margin: str, level: int, width: int) -> str:
    """The margin, or where it takes half of the line its last part after the level's number."""
    if len(margin) <= width // 2:
        return margin
    number = re.match(r"\d+: ", margin)
    return f"{level}: {margin[number.end() if number else 4 :][: width // 2]}"


def _line(labels: LabelSpace, label: int, counts: Sequence[_Count] | None, note: str) -> str:
    name, id = _one_line(labels.names[label]), _one_line(labels.ids[label])
    description = _one_line(labels.descriptions[label])
    parts = [name]
    if counts is not None:
        parts.append(f"  {_number(counts[label])}")
    parts.append(note)
    if id != name:
        parts.append(f"  [{id}]")
    if description:
        parts.append(f"  {description}")
    return "".join(parts)


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1].rstrip()}…"


def _number(count: _Count) -> str:
    return f"{count:,}" if isinstance(count, int | np.integer) else f"{count:,.1f}"


def _check(labels: LabelSpace, *some: Sequence[object] | None) -> None:
    for values in some:
        if values is not None and len(values) != len(labels):
            raise ValueError(
                f"{len(values)} values do not fit a space of {len(labels)} labels; give one a label"
            )


def tree_html(
    labels: LabelSpace,
    *,
    counts: Sequence[_Count] | None = None,
    details: Sequence[str] | None = None,
    most_nodes: int = 5000,
    most_children: int = 200,
) -> str:
    """The labels as nested lists that fold without a script; every text is escaped.

    Where the space is too large, the upper levels are shown and the rest is counted.

    Args:
        labels: A flat space is a plain list.
        counts: A number for each label, with a bar for its part of the largest.
        details: A short text for each label, shown after it.
        most_nodes: So many lines are shown, level by level.
        most_children: So many of them below one label.
    """
    _check(labels, counts, details)
    shown, opened = _that_fit(labels, most_nodes, most_children)
    largest = max(map(float, counts), default=0.0) if counts is not None else 0.0
    parts = ['<ul class="tree">']
    done: set[int] = set()
    waiting = _stacked(labels.roots, shown[-1])
    while waiting:
        label = waiting.pop()
        if isinstance(label, str):
            parts.append(label)
            continue
        line = _html_line(labels, label, counts, details, largest)
        children = labels.children[label]
        if not children:
            parts.append(f"<li>{line}</li>")
        elif label in done:
            parts.append(f"<li>{line} <small>(see above)</small></li>")
        elif not shown.get(label):
            parts.append(f"<li>{line} <small>… {len(children):,} more</small></li>")
        else:
            done.add(label)
            is_open = " open" if label in opened else ""
            parts.append(f"<li><details{is_open}><summary>{line}</summary><ul>")
            waiting += ["</ul></details></li>", *_stacked(children, shown[label])]
    parts.append("</ul>")
    return "\n".join(parts)


def _stacked(some: Sequence[int], shown: int) -> list[int | str]:
    """The first labels, last to first, below a line that counts the others."""
    hidden = len(some) - shown
    more = [f'<li class="more">… {hidden:,} more</li>'] if hidden else []
    return [*more, *reversed(some[:shown])]


def _that_fit(
    labels: LabelSpace, most_nodes: int, most_children: int
) -> tuple[dict[int, int], set[int]]:
    """How many of each label's children are shown (of -1: roots), and which labels are unfolded."""
    shown = {-1: min(len(labels.roots), most_children, most_nodes)}
    used = unfolded = shown[-1]
    opened: set[int] = set()
    level: list[int] = list(labels.roots[: shown[-1]])
    for _ in range(_MOST_NESTED):
        below: list[int] = []
        parents = [label for label in dict.fromkeys(level) if label not in shown]
        for label in parents:
            shown[label] = min(len(labels.children[label]), most_children, most_nodes - used)
            used += shown[label]
            below += labels.children[label][: shown[label]]
        if not below:
            break
        unfolded += len(below)
        if unfolded <= _OPEN_AT_FIRST:
            opened.update(parents)
        level = below
    return shown, opened


def _html_line(
    labels: LabelSpace,
    label: int,
    counts: Sequence[_Count] | None,
    details: Sequence[str] | None,
    largest: float,
) -> str:
    description = labels.descriptions[label]
    title = f' title="{_escaped(description)}"' if description else ""
    line = f"<bdi{title}>{_escaped(labels.names[label])}</bdi>"
    if counts is not None:
        share = 100 * float(counts[label]) / largest if largest > 0 else 0.0
        line += f' <span class="count" style="--p: {share:.0f}">{_number(counts[label])}</span>'
    if details is not None and details[label]:
        line += f" <small>{_escaped(details[label])}</small>"
    return line


def _escaped(text: str) -> str:
    return escape(_one_line(text))
