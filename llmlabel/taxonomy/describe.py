"""Labels that are described by texts of their own."""

from pathlib import Path

import numpy as np
from datasets import Dataset

from llmlabel import models
from llmlabel.data import require_columns
from llmlabel.label.embedding import Encoder, unit_vectors
from llmlabel.labelspace import LabelSpace
from llmlabel.taxonomy.guardrails import first_words


def with_examples(
    dataset: Dataset,
    encoder: str | Path | Encoder,
    labels: LabelSpace,
    *,
    texts: int = 3,
    words: int = 15,
) -> LabelSpace:
    """The labels with the most central texts of each in its description.

    Every text belongs to the label whose "name: description" is nearest. The `texts` nearest to the
    mean of these, cut to `words` words, stand behind the description, and none twice. Names that a
    weak model has found say little; what it has found them for says more. A label without a text
    stays as it is.

    Args:
        dataset: rows with `id` and `text`, without true labels.
        encoder: path, hub name, `package:` source, or anything with `encode`.
        labels: what to describe.
        texts: how many are shown.
        words: of each.

    Raises:
        ValueError: `texts` or `words` is below 1.
    """
    require_columns(dataset, "id", "text")
    if min(texts, words) < 1:
        raise ValueError(f"texts and words must be at least 1; got {texts} and {words}")
    rows = sorted(zip(map(str, dataset["id"][:]), dataset["text"][:], strict=True))
    shown = [text for _, text in rows if text.strip()]
    if not shown:
        return labels
    ready = models.load_encoder(encoder)
    vectors = unit_vectors(ready, shown)
    nearest = (vectors @ unit_vectors(ready, labels.texts()).T).argmax(axis=1)
    descriptions = []
    for label, description in enumerate(labels.descriptions):
        mine = np.flatnonzero(nearest == label)
        close = np.argsort(-(vectors[mine] @ vectors[mine].sum(axis=0)), kind="stable")
        different = dict.fromkeys(first_words(shown[mine[i]], words) for i in close)
        some = " / ".join(list(different)[:texts])
        parts = [description, f"such as: {some}" if some else ""]
        descriptions.append("; ".join(part for part in parts if part))
    return LabelSpace(
        ids=labels.ids,
        names=labels.names,
        descriptions=tuple(descriptions),
        parents=labels.parents,
        multilabel=labels.multilabel,
        parent_probs=labels.parent_probs,
    )
