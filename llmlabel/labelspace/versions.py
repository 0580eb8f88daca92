"""Two versions of a label space: what changed between them, and the new one with stable ids.

What an old label became is a mapping `same`: old id -> the new ids that say the same together. It is
given by a person, or found by `llmlabel.refine.carry.mapping_from_rows`; a label that it leaves out
is the one with its id, so an id must never be used again for another meaning: `merge_labels` sees to
that. `llmlabel.refine.carry.carry_over` moves labelled rows to the new version.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmlabel.labelspace import LabelSpace, closest


@dataclass(frozen=True)
class LabelDiff:
    """What became of the labels of an old version; every label is named by its id.

    Attributes:
        old_space: Fingerprint of the old version.
        new_space: Of the new one.
        successors: Every old id -> the new ids that say the same together; none when it is removed.
        kept: Old ids of labels that are as they were.
        renamed: Old ids of labels with another id, name or description now.
        moved: Old ids of labels with other parents now; one can be renamed as well.
        split: Old id -> the new ids that share its meaning.
        merged: New id -> the old ids that are one label now.
        added: New ids that no old label became.
        removed: Old ids that nothing says any more.
    """

    old_space: str
    new_space: str
    successors: dict[str, tuple[str, ...]]
    kept: tuple[str, ...]
    renamed: tuple[str, ...]
    moved: tuple[str, ...]
    split: dict[str, tuple[str, ...]]
    merged: dict[str, tuple[str, ...]]
    added: tuple[str, ...]
    removed: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether each label has the id, texts and parents that it had.

        The order, `multilabel` and `parent_probs` may differ (see `describe`), so that rows still
        have to be carried over where the fingerprints differ.
        """
        return len(self.kept) == len(self.successors) and not self.added


def diff_labels(
    old: LabelSpace, new: LabelSpace, *, same: Mapping[str, Sequence[str]] | None = None
) -> LabelDiff:
    """What was kept, renamed, moved, split, merged, added and removed.

    Args:
        old: The version that rows were labelled with.
        new: The version to come.
        same: Old id -> new ids; an old id that is left out becomes the new label with this id, or
            nothing where there is none.

    Raises:
        ValueError: `same` names an id that is not in its version.
    """
    after = _successors(old, new, same or {})
    before: dict[str, list[str]] = {id: [] for id in new.ids}
    for id, successors in after.items():
        for successor in successors:
            before[successor].append(id)
    single = {
        id: some[0] for id, some in after.items() if len(some) == 1 and len(before[some[0]]) == 1
    }
    renamed = [id for id, other in single.items() if _texts(old, id) != _texts(new, other)]
    moved = [id for id, other in single.items() if _has_moved(old, new, after, (id, other))]
    changed = {*renamed, *moved}
    return LabelDiff(
        old_space=old.fingerprint,
        new_space=new.fingerprint,
        successors=after,
        kept=tuple(id for id in single if id not in changed),
        renamed=tuple(renamed),
        moved=tuple(moved),
        split={id: some for id, some in after.items() if len(some) > 1},
        merged={id: tuple(some) for id, some in before.items() if len(some) > 1},
        added=tuple(id for id, some in before.items() if not some),
        removed=tuple(id for id, some in after.items() if not some),
    )


def _successors(
    old: LabelSpace, new: LabelSpace, same: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    known = {"old": dict.fromkeys(old.ids), "new": dict.fromkeys(new.ids)}
    for id, successors in same.items():
        for version, ids in (("old", [id]), ("new", successors)):
            for one in ids:
                if one not in known[version]:
                    raise ValueError(
                        f"same: {one!r} is no id of the {version} labels; {closest(one, known[version])}"
                    )
    return {
        id: tuple(dict.fromkeys(same[id])) if id in same else (id,) if id in known["new"] else ()
        for id in old.ids
    }


def _texts(labels: LabelSpace, id: str) -> tuple[str, str, str]:
    at = labels.index(id)
    return id, labels.names[at], labels.descriptions[at]


def _has_moved(
    old: LabelSpace, new: LabelSpace, after: dict[str, tuple[str, ...]], pair: tuple[str, str]
) -> bool:
    """Whether the parents of the second are other labels than those of the first became."""
    expected = [set(after[parent]) for parent in old.parents[old.index(pair[0])]]
    parents = set(new.parents[new.index(pair[1])])
    return not parents <= set().union(*expected) or any(not some & parents for some in expected)


def describe(diff: LabelDiff, old: LabelSpace, new: LabelSpace) -> list[str]:
    """One line for each change, for a person: what happened, then the labels.

    What differs besides the labels (their order, `multilabel`, `parent_probs`) is the last line.
    """

    def parents(space: LabelSpace, id: str) -> str:
        return _listed(space.parents[space.index(id)]) or "the top"

    lines = []
    for id in diff.renamed:
        _, was, said = _texts(old, id)
        other, name, description = _texts(new, diff.successors[id][0])
        news = [
            f"{what} {first!r} -> {second!r}"
            for what, first, second in (
                ("id", id, other),
                ("name", was, name),
                ("description", said, description),
            )
            if first != second
        ]
        lines.append(f"renamed {id!r}: {', '.join(news)}")
    for id in diff.moved:
        to = parents(new, diff.successors[id][0])
        lines.append(f"moved {id!r}: from {parents(old, id)} to {to}")
    lines += [f"split {id!r} into {_listed(some)}" for id, some in diff.split.items()]
    lines += [f"merged {_listed(some)} into {id!r}" for id, some in diff.merged.items()]
    lines += [f"added {id!r} below {parents(new, id)}" for id in diff.added]
    lines += [f"removed {id!r} from {parents(old, id)}" for id in diff.removed]
    if others := _other_differences(diff, old, new):
        refused = ", which refuses a change of multilabel" * ("multilabel" in others)
        lines.append(f"also changed: {', '.join(others)}; move old rows with carry_over{refused}")
    return lines


def _other_differences(diff: LabelDiff, old: LabelSpace, new: LabelSpace) -> list[str]:
    """What changes the fingerprint though each label is as it was."""
    single = sorted(map(old.index, (*diff.kept, *{*diff.renamed, *diff.moved})))
    after = {old.ids[at]: diff.successors[old.ids[at]][0] for at in single}
    places = [new.index(id) for id in after.values()]
    orders, probs = False, bool(old.parent_probs) != bool(new.parent_probs)
    edges_before = [edges for *_, edges in _entries(old)]
    edges_now = [edges for *_, edges in _entries(new)]
    for at, place in zip(single, places, strict=True):
        before = {after.get(parent): prob for parent, prob in edges_before[at]}
        now = dict(edges_now[place])
        if before.keys() == now.keys():  # else it was moved, or a parent was split or merged
            orders |= [*before] != [*now]
            probs |= before != now
    found = {
        "order of labels": places != sorted(places),
        "order of parents": orders,
        "multilabel": old.multilabel != new.multilabel,
        "parent_probs": probs,
    }
    return [what for what, differs in found.items() if differs]


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids))


def merge_labels(
    old: LabelSpace,
    new: LabelSpace,
    *,
    same: Mapping[str, Sequence[str]] | None = None,
    keep_removed: bool = False,
    retired: Sequence[str] = (),
) -> LabelSpace:
    """The new version with stable ids: a label that is the same has the id that it had.

    A part of a label that was split, the union of several, and a label that was added mean something
    that no id meant before: such a label keeps the id that the new version gives it only where that
    is in neither `old` nor `retired`; else it gets one that was never used, the old one with a number.

    Args:
        old: The version whose ids are kept.
        new: The version whose labels, names, descriptions and parents are taken.
        same: Old id -> new ids, as in `diff_labels`.
        keep_removed: Labels that only the old version has follow, below those of their parents that
            are one label now.
        retired: Ids of still older versions.
    """
    diff = diff_labels(old, new, same=same)
    ids = {diff.successors[id][0]: id for id in (*diff.kept, *diff.renamed, *diff.moved)}
    used = {*old.ids, *retired}
    taken = {*used, *new.ids}
    for id in new.ids:
        if id not in ids:
            ids[id] = id if id not in used else _fresh(id, taken)
            taken.add(ids[id])
    content = [
        (ids[id], name, description, {ids[parent]: prob for parent, prob in edges})
        for id, name, description, edges in _entries(new)
    ]
    if keep_removed:
        gone = set(diff.removed)
        here = {old_id: ids[some[0]] for old_id, some in diff.successors.items() if len(some) == 1}
        here |= {id: id for id in gone}
        content += [
            (
                id,
                name,
                description,
                {here[parent]: prob for parent, prob in edges if parent in here},
            )
            for id, name, description, edges in _entries(old)
            if id in gone
        ]
    has_probs = bool(new.parent_probs or (keep_removed and old.parent_probs))
    return LabelSpace(
        ids=tuple(id for id, *_ in content),
        names=tuple(name for _, name, *_ in content),
        descriptions=tuple(description for *_, description, _ in content),
        parents=tuple(tuple(edges) for *_, edges in content),
        multilabel=new.multilabel,
        parent_probs=tuple(tuple(edges.values()) for *_, edges in content) if has_probs else (),
    )


def _entries(labels: LabelSpace) -> Iterator[tuple[str, str, str, list[tuple[str, float]]]]:
    """Id, name, description, and each parent with its probability, 1 where nobody says."""
    probs = labels.parent_probs or tuple((1.0,) * len(some) for some in labels.parents)
    edges = [list(zip(*pair, strict=True)) for pair in zip(labels.parents, probs, strict=True)]
    return zip(labels.ids, labels.names, labels.descriptions, edges, strict=True)


def _fresh(id: str, taken: set[str]) -> str:
    number = 2
    while f"{id}-{number}" in taken:
        number += 1
    return f"{id}-{number}"
