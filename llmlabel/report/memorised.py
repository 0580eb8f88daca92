"""What a report says of labels that a student learned by heart although its early epochs doubted them."""

from typing import Any

import numpy as np
from datasets import Dataset

from llmlabel.data import require_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.report.measure import MOST_LABELS, names_of


def memorised(suspects: Dataset | None, labels: LabelSpace) -> dict[str, Any] | None:
    """How many labels are suspect, of which labels, and how often that is right; None without rows."""
    if suspects is None:
        return None
    from llmlabel.train.memorisation import measure_memorised  # torch, which no other report needs

    found = measure_memorised(suspects, labels)
    several = len(found["labels"])
    found["labels"] = dict(list(found["labels"].items())[:MOST_LABELS])
    return found | {"labels_left_out": several - len(found["labels"])}


def most_suspicious(
    suspects: Dataset | None, labels: LabelSpace, *, rows: int
) -> list[dict[str, Any]]:
    """The suspect rows with the lowest early margin; of equal ones by id. Gold plays no part in it."""
    if suspects is None:
        return []
    require_columns(suspects, "id", "text", "suspect", "memorised", "early_id", "early_margin")
    names = names_of(labels)
    ids, margins = suspects["id"][:], suspects["early_margin"][:]
    order = sorted(
        (row for row, suspect in enumerate(suspects["suspect"][:]) if suspect),
        key=lambda row: (round(margins[row], 6), str(ids[row])),  # rounding must not break a tie
    )
    found = []
    for row in order[:rows]:
        entry = suspects[row]
        gold = entry.get("gold")
        found.append(
            {
                **{key: entry[key] for key in ("id", "memorised")},
                "text": entry["text"],
                "margin": entry["early_margin"],
                "given": names[entry["label_ids"][int(np.argmax(entry["label_probs"]))]],
                "early": names[entry["early_id"]],
                "gold": None if gold is None else [names[label] for label in gold],
            }
        )
    return found
