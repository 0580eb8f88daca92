import re

import numpy as np
import pytest
from report.pages import svg

from llmlabel.report import matrices


def texts(uri: str) -> list[str]:
    return re.findall("<!-- (.*?) -->", svg(uri))


def test_confusion_writes_every_count_but_zero() -> None:
    said = texts(
        matrices.confusion(
            np.array([[3, 0], [12, 5]]),
            true_names=["a", "政治"],
            said_names=["$a$", "b"],
            axes_names=("consensus", "voted"),
        )
    )
    assert sorted(said) == sorted(
        ["3", "12", "5", "a", "label 2", "$a$", "b", "consensus", "voted"]
    )


def test_agreement_shows_each_pair_once_and_puts_the_alike_side_by_side() -> None:
    shares = np.eye(4)
    for one, other, share in [(0, 1, 0.2), (0, 2, 0.9), (0, 3, 0.3), (1, 2, 0.1), (1, 3, 0.8)]:
        shares[one, other] = shares[other, one] = share
    shares[2, 3] = shares[3, 2] = np.nan
    said = texts(matrices.agreement(shares, names=["a", "b", "c", "d"]))
    assert sorted(one for one in said if one.isdigit()) == ["10", "20", "30", "80", "90"]
    names = [one for one in said if one.isalpha()]
    order = [*names[:3], names[-1]]  # columns are all but the last, rows all but the first
    assert len(names) == 6
    assert abs(order.index("a") - order.index("c")) == 1
    assert abs(order.index("b") - order.index("d")) == 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_voters_who_all_agree_alike_can_be_drawn(share: float) -> None:
    shares = np.full((3, 3), share)
    assert texts(matrices.agreement(shares, names=["a", "b", "c"])).count(f"{100 * share:.0f}") == 3
