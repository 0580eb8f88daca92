import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from llmlabel.labelspace import LabelSpace, load_labels, show
from llmlabel.labelspace.show import tree_html, tree_text

LABELS = load_labels(
    [
        {"id": "animal"},
        {"id": "a1", "name": "cat", "description": "purrs", "parent": "animal"},
        {"id": "siamese", "parent": "a1"},
        {"id": "pet"},
        {"id": "dog", "parents": ["pet", "animal"]},
        {"id": "puppy", "parent": "dog"},
        {"id": "hamster", "parent": "pet"},
    ]
)


def chain(depth: int) -> LabelSpace:
    ids = tuple(f"n{i}" for i in range(depth))
    return LabelSpace(ids, ids, ("",) * depth, ((), *((id,) for id in ids[:-1])))


def star(children: int) -> LabelSpace:
    ids = ("top", *(f"c{i}" for i in range(children)))
    return LabelSpace(ids, ids, ("",) * len(ids), ((), *[("top",)] * children))


# --------------------------------------------------------------------------------------- as text


def test_a_tree_is_drawn_and_a_second_parent_shows_what_is_below_once() -> None:
    assert tree_text(LABELS).splitlines() == [
        "animal",
        "├── cat  [a1]  purrs",
        "│   └── siamese",
        "└── dog",
        "    └── puppy",
        "pet",
        "├── dog (see above)",
        "└── hamster",
    ]


def test_counts_depth_and_width() -> None:
    counts = [1234, 3, 1, 0, 5, 2, 7]
    assert tree_text(LABELS, depth=2, counts=counts, width=21).splitlines() == [
        "animal  1,234",
        "├── cat  3 ... 1 mor…",
        "└── dog  5 ... 1 more",
        "pet  0",
        "├── dog  5 ... 1 more",
        "└── hamster  7",
    ]
    assert tree_text(LABELS, depth=1, counts=[0.5] * 7).splitlines() == [
        "animal  0.5 ... 2 more",
        "pet  0.5 ... 2 more",
    ]
    assert tree_text(load_labels(["x", "y"]), counts=np.array([1, 2]).tolist()) == "x  1\ny  2"


def test_many_children_are_counted() -> None:
    lines = tree_text(star(20_000), most_children=2).splitlines()
    assert lines == ["top", "├── c0", "├── c1", "└── ... 19,998 more"]
    flat = load_labels([f"l{i}" for i in range(1205)])
    assert tree_text(flat, most_children=2) == "l0\nl1\n... 1,203 more"


def test_a_label_that_was_cut_at_one_place_is_unfolded_at_the_next() -> None:
    labels = load_labels(
        [
            {"id": "a"},
            {"id": "a1", "parent": "a"},
            {"id": "b", "parent": "a1"},
            {"id": "x", "parents": ["b", "c"]},
            {"id": "y", "parent": "x"},
            {"id": "c"},
        ]
    )
    assert tree_text(labels, depth=3).splitlines() == [
        "a",
        "└── a1",
        "    └── b ... 1 more",
        "c",
        "└── x",
        "    └── y",
    ]
    assert tree_text(labels, depth=4).splitlines()[3:] == [
        "        └── x ... 1 more",
        "c",
        "└── x",
        "    └── y",
    ]


def test_what_the_depth_cut_below_a_label_is_shown_at_a_higher_place() -> None:
    labels = load_labels(
        [
            {"id": "a"},
            {"id": "b", "parent": "a"},
            {"id": "x", "parents": ["b", "c"]},
            {"id": "y", "parent": "x"},
            {"id": "z", "parent": "y"},
            {"id": "c"},
        ]
    )
    assert tree_text(labels, depth=4).splitlines() == [
        "a",
        "└── b",
        "    └── x",
        "        └── y ... 1 more",
        "c",
        "└── x",
        "    └── y",
        "        └── z",
    ]
    assert tree_text(labels, depth=5).splitlines()[-2:] == ["c", "└── x (see above)"]


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_equals_the_recursion(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parents = [
        sorted({int(p) for p in rng.integers(n, size=rng.integers(3))}) if n else []
        for n in range(12)
    ]
    labels = load_labels(
        [{"id": f"n{n}", "parents": [f"n{p}" for p in some]} for n, some in enumerate(parents)]
    )
    depth, most = int(rng.integers(2, 6)), int(rng.integers(1, 5))
    done: dict[int, int] = {}  # label -> levels shown below it

    def height(label: int) -> int:
        return max((1 + height(n) for n in range(12) if label in parents[n]), default=0)

    def below(some: list[int], level: int) -> list[str]:
        lines = []
        for at, label in enumerate(some[:most]):
            children = [n for n in range(12) if label in parents[n]]
            lines.append(f"n{label}")
            rest: list[str] = []
            reach = min(height(label), depth - level)
            if children and done.get(label, -1) >= reach:
                lines[-1] += " (see above)"
            elif children and level == depth:
                lines[-1] += f" ... {len(children)} more"
            elif children:
                done[label] = reach
                rest = below(children, level + 1)
            is_last = at == len(some) - 1
            edge, margin = ("└── ", "    ") if is_last else ("├── ", "│   ")
            if level > 1:
                lines[-1] = edge + lines[-1]
                rest = [margin + line for line in rest]
            lines += rest
        if len(some) > most:
            lines.append(("└── " if level > 1 else "") + f"... {len(some) - most} more")
        return lines

    roots = [n for n in range(12) if not parents[n]]
    drawn = tree_text(labels, depth=depth, most_children=most, width=200)
    assert drawn.splitlines() == below(roots, 1)


def test_a_chain_of_10000_is_drawn_in_time_and_width() -> None:
    labels = chain(10_000)
    start = time.process_time()
    lines = tree_text(labels, width=60).splitlines()
    assert time.process_time() - start < 2
    assert len(lines) == 10_000
    assert max(map(len, lines)) <= 60
    assert lines[3] == "        └── n3"
    assert lines[-1].startswith("9999: ")
    assert lines[-1].endswith("└── n9999")


HOSTILE = "</summary><script>alert(1)</script>\"'&\x1b[31m\u202eevil\x00 {{ 7*7 }}"


def hostile() -> LabelSpace:
    names = (HOSTILE, "two\nlines", "שלום عالم")
    return LabelSpace(names, names, (HOSTILE, "", ""), ((), (HOSTILE,), (HOSTILE,)))


def test_a_terminal_obeys_no_name() -> None:
    text = tree_text(hostile(), width=500)
    assert not set(text) & {"\x1b", "\x00", "\u202e"}
    assert text.splitlines()[1:] == ["├── two lines", "└── שלום عالم"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"width": 0}, "width must be at least 1"),
        ({"most_children": 0}, "most_children must be at least 1"),
        ({"counts": [1]}, "1 values do not fit a space of 7 labels"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree_text(LABELS, **arguments)


def test_the_docstring_is_right() -> None:
    import doctest

    assert doctest.testmod(show).attempted == 3
    assert doctest.testmod(show).failed == 0


# --------------------------------------------------------------------------------------- as HTML


class Tags(HTMLParser):
    """The tags, checked to be nested well, and how deep they go."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.deepest = 0
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.open.append(tag)
        self.seen.append(tag)
        self.deepest = max(self.deepest, len(self.open))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def words(html: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", html).split())


def test_html_folds_without_a_script() -> None:
    html = tree_html(LABELS, counts=[12, 3, 1, 4, 6, 2, 0], details=["", "3 true"] + [""] * 5)
    tags = Tags(html)
    assert words(html) == (
        "animal 12 cat 3 3 true siamese 1 dog 6 puppy 2 pet 4 dog 6 (see above) hamster 0"
    )
    assert tags.seen.count("details") == 4
    assert tags.seen.count("summary") == 4
    assert set(tags.seen) == {"ul", "li", "details", "summary", "bdi", "span", "small"}
    assert '<bdi title="purrs">cat</bdi> <span class="count" style="--p: 25">3</span>' in html
    assert html.count("<details open>") == 4  # so few that all of them are seen at once


def test_only_the_first_levels_are_unfolded() -> None:
    entries = [{"id": f"{i}"} for i in range(4)]
    entries += [{"id": f"{i}.{j}", "parent": f"{i}"} for i in range(4) for j in range(8)]
    entries += [{"id": f"{i}.{j}.0", "parent": f"{i}.{j}"} for i in range(4) for j in range(8)]
    html = tree_html(load_labels(entries))
    assert html.count("<details open>") == 4  # 4 + 32 labels to see; 68 would be too many
    assert html.count("<details>") == 32


def test_what_does_not_fit_is_counted() -> None:
    html = tree_html(star(20_000))
    assert html.count("<li>") == 201
    assert words(html).endswith("c199 … 19,800 more")
    entries = [{"id": f"{i}"} for i in range(3)]
    entries += [{"id": f"{i}.{j}", "parent": f"{i}"} for i in range(3) for j in range(3)]
    html = tree_html(load_labels(entries), most_nodes=7)
    Tags(html)
    assert words(html) == "0 0.0 0.1 0.2 1 1.0 … 2 more 2 … 3 more"
    flat = tree_html(load_labels([f"l{i}" for i in range(1205)]), most_children=2)
    assert words(flat) == "l0 l1 … 1,203 more"


def test_a_chain_of_10000_is_not_nested_deeper_than_browsers_go() -> None:
    html = tree_html(chain(10_000))
    tags = Tags(html)
    assert tags.deepest < 256
    assert words(html).endswith("n60 … 1 more")


def test_large_trees_are_quick_and_small() -> None:
    entries = [{"id": f"{i}"} for i in range(20)]
    entries += [{"id": f"{i}.{j}", "parent": f"{i}"} for i in range(20) for j in range(100)]
    entries += [
        {"id": f"{i}.{j}.{k}", "parent": f"{i}.{j}"}
        for i in range(20)
        for j in range(100)
        for k in range(20)
    ]
    labels = load_labels(entries)
    labels.children  # noqa: B018 - cached, and not what is measured
    start = time.process_time()
    html = tree_html(labels, counts=list(range(len(labels))))
    assert time.process_time() - start < 3  # 0.05 s without the checks of types
    assert html.count("<li>") == 5000
    assert len(html) < 1_000_000


def test_hostile_names_stay_text() -> None:
    html = tree_html(hostile(), details=[HOSTILE, "", ""])
    tags = Tags(html)
    assert set(tags.seen) == {"ul", "li", "details", "summary", "bdi", "small"}
    assert not set(html) & {"\x1b", "\x00", "\u202e"}
    assert "&lt;/summary&gt;&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;" in html
    assert "<bdi>שלום عالم</bdi>" in html
    with pytest.raises(ValueError, match="2 values do not fit a space of 3 labels"):
        tree_html(hostile(), details=["", ""])
