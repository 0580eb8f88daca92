import pytest

from llmlabel.strictyaml import read_yaml


def test_scalars_are_what_they_look_like() -> None:
    text = (
        "a: no\nb: 1e-4\nc: 1E5\nd: on\ne: 012\nf: 1.0\ng: ~\nh: true\ni: .inf\nj: 2026-11-26\nk: 7"
    )
    assert read_yaml(text) == {
        "a": "no", "b": 1e-4, "c": 1e5, "d": "on", "e": "012", "f": 1.0, "g": None, "h": True,
        "i": float("inf"), "j": "2026-11-26", "k": 7,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "x:\n  - {a: 1, b: 2, a: 3}", "a: 1\n'a': 2"])
def test_a_key_twice(text: str) -> None:
    with pytest.raises(ValueError, match=r"line \d: 'a' is defined twice, first in line \d"):
        read_yaml(text)


@pytest.mark.parametrize(
    "text", ["a: [1", "a: !!python/object/apply:os.system [ls]", "- a\n- \x00", "[" * 5000]
)
def test_broken_documents_are_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is looked at below)
        read_yaml(text)
    assert len(str(caught.value).splitlines()) == 1
