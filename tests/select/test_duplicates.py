import numpy as np
import pytest
from datasets import Dataset, Value
from reference import select as reference

from llmlabel.data import with_columns
from llmlabel.select.duplicates import drop_near_duplicates, grams, jaccard


def table(*texts, prefix="t"):
    return Dataset.from_dict(
        {"id": [f"{prefix}{i}" for i in range(len(texts))], "text": list(texts)}
    )


EVALUATION = table(
    "My card has not arrived, what should I do?", "ok", "Cancel the transfer", prefix="e"
)


def test_planted_repeats_are_found_and_the_rest_stays() -> None:
    rows = table(
        "my card has NOT arrived -- what should I do",
        "My card has not arrived, what should I do now?",
        "My card was stolen yesterday evening",
        "OK!",
        "okay",
        "",
        "Cancel the transfers",
    )
    found = drop_near_duplicates(rows, EVALUATION)
    assert found["selected"][:] == [False, False, True, False, True, True, False]
    assert found["weight"][:] == [0, 0, 1, 0, 1, 1, 0]
    assert found["select_reason"][0] == "repeats evaluation row 'e0' (1.00)"
    assert found["select_reason"][2] is None
    assert found["select_score"][1] == pytest.approx(36 / 40)
    assert found["select_score"][2] == 0
    # 15 grams against 14 of the evaluation row
    assert found["select_reason"][6] == f"repeats evaluation row 'e2' ({15 / 16:.2f})"


@pytest.mark.parametrize("seed", range(20))
def test_prefix_filtering_finds_what_all_pairs_find(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def text():
        return "".join(rng.choice(list("abc "), size=rng.integers(0, 14)))

    unseen = [text() for _ in range(25)]
    near = ["".join(c for c in t if rng.uniform() < 0.95) for t in unseen]
    rows, characters = [text() for _ in range(25)] + near, int(rng.integers(1, 4))
    threshold = float(rng.choice([0.3, 0.5, 0.75, 0.9, 1.0]))
    found = drop_near_duplicates(
        table(*rows), table(*unseen, prefix="e"), threshold=threshold, characters=characters
    )
    expected = [reference.most_similar(t, unseen, characters) for t in rows]
    expected = [value if value >= threshold else 0.0 for value in expected]
    assert found["select_score"][:] == pytest.approx(expected, abs=1e-6)


def test_grams_and_their_similarity() -> None:
    assert grams("A, b!", 2) == {"a ", " b"}
    assert grams("ab", 5) == {"ab"}
    assert grams(" ?", 5) == frozenset()
    assert jaccard(frozenset("abc"), frozenset("bcd")) == 0.5
    assert jaccard(frozenset(), frozenset()) == 0


def test_weights_stay_and_bad_arguments_are_refused() -> None:
    rows = with_columns(table("ok", "no"), {"weight": ([2.0, 3.0], Value("float32"))})
    assert drop_near_duplicates(rows, EVALUATION)["weight"][:] == [0, 3]
    for wrong in ({"threshold": 0.0}, {"threshold": 1.1}):
        with pytest.raises(ValueError, match="threshold must be above 0"):
            drop_near_duplicates(rows, EVALUATION, **wrong)
    with pytest.raises(ValueError, match="characters must be at least 1"):
        drop_near_duplicates(rows, EVALUATION, characters=0)
