"""Clusters of an encoder that a language model names: what an induced taxonomy is compared with."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from jaxtyping import Float, Int

from llmlabel import models, progress
from llmlabel.data import require_columns, with_columns
from llmlabel.engine import Engine
from llmlabel.files import lock
from llmlabel.label.embedding import Encoder, unit_vectors
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import render
from llmlabel.softlabels import SoftLabels
from llmlabel.taxonomy.calls import Answer, Asker
from llmlabel.taxonomy.guardrails import Limits, Proposal, ReplyError, first_words, scripts_of
from llmlabel.taxonomy.induce import Taxonomy, new_ids
from llmlabel.taxonomy.replies import label_schema, read_label

_COMPONENTS = 10  # distances in hundreds of dimensions tell little of density
_STARTS = 10
_ROUNDS = 3
_EXAMPLE = {
    "text": "- how often should I water a young apple tree in summer\n"
    "- is once a week enough water for grass\n"
    "- do tomatoes need water every day when it is hot",
    "name": "Watering",
    "description": "how much and how often to water plants",
}
"""Shown as a turn before every group: a model of 135 million parameters names nothing without it."""


def cluster_texts(
    dataset: Dataset,
    encoder: str | Path | Encoder,
    *,
    method: Literal["kmeans", "hdbscan"] = "kmeans",
    n_labels: int | None = None,
    min_texts: int = 10,
    seed: int = 0,
) -> Dataset:
    """Adds `cluster` (from 0, the largest first; -1 is none) and `centrality`.

    `centrality` is the cosine of a text with the mean of its cluster. A text without a character to
    read is in no cluster; `hdbscan` leaves out what lies between clusters too.

    Args:
        dataset: rows with `id` and `text`.
        encoder: path, hub name, `package:` source, or anything with `encode`.
        method: `kmeans` makes `n_labels` clusters; `hdbscan` finds their number, after a principal
            component analysis to 10 dimensions.
        n_labels: number of clusters of `kmeans`.
        min_texts: size of the smallest cluster of `hdbscan`.
        seed: of the starts.

    Raises:
        ValueError: `n_labels` is missing or given in vain, there are fewer texts than clusters, or
            no two clusters were found.
    """
    require_columns(dataset, "id", "text")
    if (n_labels is None) == (method == "kmeans"):
        raise ValueError(
            f"method={method!r} with n_labels={n_labels}: kmeans needs a number, and hdbscan finds it"
        )
    ids, texts = [str(id) for id in dataset["id"][:]], dataset["text"][:]
    order = sorted(range(len(ids)), key=ids.__getitem__)  # nothing depends on the order of rows
    rows = [row for row in order if texts[row].strip()]
    if len(rows) < (needed := n_labels or 2 * min_texts):
        raise ValueError(
            f"cluster_texts: {len(rows)} rows have a text, and {method} needs {needed}; give more "
            f"rows, or lower {'n_labels' if n_labels else 'min_texts'}"
        )
    ready = models.load_encoder(encoder)
    vectors = unit_vectors(ready, [texts[row] for row in rows])
    found = _clusters(vectors, method, n_labels, min_texts, seed)
    clusters, centrality = np.full(len(ids), -1), np.full(len(ids), np.nan)
    clusters[rows] = found
    centrality[rows] = _centrality(vectors, found)
    near = pa.array(centrality, pa.float32(), from_pandas=True)  # NaN is null
    return with_columns(
        dataset,
        {"cluster": (clusters, Value("int32")), "centrality": (near, Value("float32"))},
    )


def cluster_taxonomy(  # noqa: PLR0913  # each is one plain choice about how it is named
    dataset: Dataset,
    engine: Engine,
    *,
    use_case: str,
    nearest: int = 10,
    words: int = 20,
    name_words: int = 10,
    description_words: int = 30,
    seed: int = 0,
    output: Path | None = None,
) -> Taxonomy:
    """Names every cluster of `cluster_texts`: label k is cluster k.

    The model reads the texts nearest to the centre. A name that is taken is asked for again with the
    names of the others in view; where that does not help, or nothing can be read, words that are
    frequent in the cluster and rare outside make the name (class-based TF-IDF, Grootendorst, arXiv
    2203.05794, equation 1), and the history says so.

    Args:
        dataset: rows with `id`, `text`, `cluster` and `centrality`.
        engine: who names.
        use_case: what the labels are for, in a few words.
        nearest: texts shown of each cluster; those that read alike once.
        words: of each text.
        name_words: length of a name, as 8 characters a word.
        description_words: length of a description.
        seed: of the sampling.
        output: folder that keeps every call as soon as it is answered; the same call continues there.

    Raises:
        ValueError: a column is missing, or there are fewer than two clusters.
    """
    require_columns(dataset, "id", "text", "cluster", "centrality")
    members = _members(dataset)
    if len(members) < 2:
        raise ValueError(f"cluster_taxonomy: {len(members)} clusters, and a choice needs two")
    different = [dict.fromkeys(first_words(text, words) for text in some) for some in members]
    shown = [list(some)[:nearest] for some in different]
    limits = Limits(
        len(members),
        name_words,
        description_words,
        scripts_of(t for some in members for t in some),
        example=(_EXAMPLE["name"], _EXAMPLE["description"]),
    )
    asker = Asker(engine, seed, output)
    with (
        nullcontext() if output is None else lock(output),
        progress.task("cluster_taxonomy", total=len(members), unit="clusters") as advance,
    ):
        labels, answers = _named(asker, shown, limits, use_case)
        advance(len(members))
    entries, names, descriptions = [], list[str](), list[str]()
    weights = _class_tfidf(members)
    for cluster, answer in answers.items():
        label, problem = labels.get(cluster), answer.problem
        known = [*names, *(one.names[0] for one in labels.values())]
        name = label.names[0] if label else _made_name(answer.value, weights[cluster], known)
        if label is None:
            problem = f"{problem or 'the name is taken'}: words of the texts make the name"
        names.append(name)
        said = label or answer.value
        descriptions.append(said.descriptions[0] if said else "")
        entries.append(_entry(cluster, name, answer, problem, len(members[cluster])))
    space = LabelSpace(
        tuple(new_ids(names, None)), tuple(names), tuple(descriptions), ((),) * len(names)
    )
    return Taxonomy(space, entries)


def cluster_labels(dataset: Dataset, labels: LabelSpace) -> Dataset:
    """Adds the cluster of each row as its soft label, with probability 1.

    A row in no cluster has no label and an `error`.

    Args:
        dataset: rows with `cluster`.
        labels: those of `cluster_taxonomy`, in the order of the clusters.

    Raises:
        ValueError: there are more clusters than labels.
    """
    require_columns(dataset, "cluster")
    clusters = np.array(dataset["cluster"][:])
    if len(clusters) and clusters.max() >= len(labels):
        raise ValueError(f"cluster {clusters.max()} has no label; there are {len(labels)}")
    probs = np.zeros((len(clusters), len(labels)))
    rows = np.flatnonzero(clusters >= 0)
    probs[rows, clusters[rows]] = 1.0
    nulls = [None] * len(clusters)
    return with_columns(
        SoftLabels.from_dense(probs, labels).add_to(dataset),
        {
            "label_mass": (nulls, Value("float32")),
            "engine": (["clusters"] * len(clusters), Value("string")),
            "prompt_sha": (nulls, Value("string")),
            "error": ([None if c >= 0 else "in no cluster" for c in clusters], Value("string")),
        },
    )


# ------------------------------------------------------------------------------------ clusters


def _clusters(
    vectors: Float[np.ndarray, "rows width"],
    method: Literal["kmeans", "hdbscan"],
    n_labels: int | None,
    min_texts: int,
    seed: int,
) -> Int[np.ndarray, " rows"]:
    """The cluster of each row, numbered by falling size; of equal ones, by their first row."""
    from sklearn.cluster import HDBSCAN, KMeans
    from sklearn.decomposition import PCA

    if method == "kmeans":
        found = KMeans(n_labels, n_init=_STARTS, random_state=seed).fit_predict(vectors)
    else:
        few = min(_COMPONENTS, *vectors.shape)
        points = PCA(few, random_state=seed).fit_transform(vectors)
        found = HDBSCAN(min_cluster_size=min_texts, copy=True).fit_predict(points)
    numbers, first, sizes = np.unique(found[found >= 0], return_index=True, return_counts=True)
    if len(numbers) < 2:
        raise ValueError(
            f"cluster_texts: {method} found {len(numbers)} clusters; lower min_texts, or take kmeans"
        )
    place = np.full(int(numbers.max()) + 1, -1)
    place[numbers[np.lexsort((first, -sizes))]] = np.arange(len(numbers))
    return np.where(found >= 0, place[found], -1)


def _centrality(
    vectors: Float[np.ndarray, "rows width"], clusters: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    near = np.full(len(vectors), np.nan)
    for cluster in range(int(clusters.max()) + 1):
        mine = np.flatnonzero(clusters == cluster)
        centre = vectors[mine].mean(axis=0)
        near[mine] = vectors[mine] @ (centre / max(float(np.linalg.norm(centre)), 1e-12))
    return near


def _members(dataset: Dataset) -> list[list[str]]:
    """The texts of each cluster, the most central first; of equal ones, by id."""
    columns = (dataset[name][:] for name in ("cluster", "centrality", "id", "text"))
    rows = sorted(
        (cluster, -near, str(id), text)
        for cluster, near, id, text in zip(*columns, strict=True)
        if cluster >= 0
    )
    members: list[list[str]] = [[] for _ in range(rows[-1][0] + 1)] if rows else []
    for cluster, _, _, text in rows:
        members[cluster].append(text)
    return members


# --------------------------------------------------------------------------------------- names


def _named(
    asker: Asker, shown: Sequence[Sequence[str]], limits: Limits, use_case: str
) -> tuple[dict[int, Proposal], dict[int, Answer[Proposal]]]:
    """The label of each cluster that got a name of its own, and the last answer about every one."""
    labels: dict[int, Proposal] = {}
    answers: dict[int, Answer[Proposal]] = {}
    said = {key: _EXAMPLE[key] for key in ("name", "description")}
    example = {"text": _EXAMPLE["text"], "label": json.dumps(said)}
    waiting = list(range(len(shown)))
    for number in range(_ROUNDS):
        taken = ", ".join(sorted(label.names[0] for label in labels.values()))
        chats = [
            render(
                "taxonomy/name",
                text="\n".join(f"- {text}" for text in shown[cluster]),
                labels=(),
                demonstrations=[example],
                use_case=use_case,
                taken=taken,
                name_words=str(limits.name_words),
                description_words=str(limits.description_words),
            )
            for cluster in waiting
        ]
        found = asker.ask(
            "name",
            chats,
            partial(_read, [shown[cluster] for cluster in waiting], limits),
            schema=label_schema(limits),
            name=f"name-{number}",
        )
        for cluster, answer in zip(waiting, found, strict=True):
            answers[cluster] = answer
            known = {label.names[0].casefold() for label in labels.values()}
            if answer.value and answer.value.names[0].casefold() not in known:
                labels[cluster] = answer.value
        waiting = [c for c in waiting if c not in labels and answers[c].value]
        if not waiting:
            break
    return labels, dict(sorted(answers.items()))


def _read(shown: Sequence[Sequence[str]], limits: Limits, number: int, reply: str) -> Proposal:
    """The label of a group; the name of the example only where a text of the group says it."""
    label = read_label(reply, limits)
    name = label.names[0].casefold()
    if name == _EXAMPLE["name"].casefold() and not any(name in t.casefold() for t in shown[number]):
        raise ReplyError(f"the name {label.names[0]!r} is that of the example, and in no text")
    return label


def _class_tfidf(members: Sequence[Sequence[str]]) -> list[Mapping[str, float]]:
    """Weight of each word in each cluster: its count there x log(1 + mean words / count overall).

    Words that stand mostly in other clusters are left out, unless a cluster has no others: where
    clusters are few, the formula alone puts "the" and "for" first.
    """
    counts = [Counter(w for text in some for w in _words(text)) for some in members]
    overall = sum(counts, Counter[str]())
    mean = overall.total() / max(len(counts), 1)
    weights = [{w: n * math.log1p(mean / overall[w]) for w, n in one.items()} for one in counts]
    own = [
        {w: weight for w, weight in one.items() if 2 * counts[i][w] > overall[w]}
        for i, one in enumerate(weights)
    ]
    return [some or one for some, one in zip(own, weights, strict=True)]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]{3,}", text.casefold())


def _made_name(said: Proposal | None, weights: Mapping[str, float], taken: Sequence[str]) -> str:
    """A name from words of the texts, behind what the model said where that can be read."""
    known = {name.casefold() for name in taken}
    words = sorted(weights, key=lambda word: (-weights[word], word))
    if said is None and words:
        options = [", ".join(words[:count]) for count in range(min(3, len(words)), len(words) + 1)]
    else:
        options = [f"{said.names[0]} ({word})" for word in words] if said else []
    options += [f"cluster {number}" for number in range(1, len(taken) + 2)]
    return next(one for one in options if one.casefold() not in known)


def _entry(
    cluster: int, name: str, answer: Answer[Proposal], problem: str | None, texts: int
) -> dict[str, Any]:
    return {
        "run": 0,
        "level": 1,
        "parent": None,
        "step": "name",
        "batch": cluster,
        "score": None,
        "suggestions": None,
        "explanation": None,
        "labels": [name],
        "added": [name],
        "removed": [],
        "attempts": answer.attempts,
        "problem": problem,
        "notes": [f"{texts} texts", *([answer.cut] if answer.cut else [])],
    }
