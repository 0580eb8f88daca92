import numpy as np
import pytest

from llmlabel.engine.labeltrie import LabelTrie

SEQUENCES = [[5, 9], [5, 6, 9], [5, 6, 7, 9], [8, 9], [5, 7, 9]]


def test_shared_prefixes_are_one_node() -> None:
    trie = LabelTrie.of(SEQUENCES)
    assert trie.tokens.tolist() == [-1, 5, 6, 7, 8, 7]
    assert trie.parents.tolist() == [0, 0, 1, 2, 0, 1]
    assert trie.depths.tolist() == [0, 1, 2, 3, 1, 2]
    assert trie.last_node.tolist() == [1, 2, 3, 4, 5]
    assert trie.children == [[5, 8], [6, 7, 9], [7, 9], [9], [9], [9]]
    assert trie.path(3) == [5, 6, 7]
    root = trie.edges(0)
    assert (root.nodes, root.node_at, root.labels) == ([1, 4], [0, 1], [])
    inner = trie.edges(1)
    assert (inner.nodes, inner.node_at, inner.labels, inner.label_at) == ([2, 5], [0, 1], [0], [2])


def test_joint_is_the_sum_down_the_path() -> None:
    trie = LabelTrie.of(SEQUENCES)
    steps = np.array([[0.0, -1.0, -2.0, -4.0, -8.0, -16.0]])
    ends = np.array([[-0.1, -0.2, -0.3, -0.4, -0.5]])
    np.testing.assert_allclose(
        trie.joint(steps, ends), [[-1.1, -3.2, -7.3, -8.4, -17.5]], rtol=1e-12
    )
    assert steps[0, 2] == -2.0  # the argument is not written to


@pytest.mark.parametrize("seed", range(20))
def test_a_subset_holds_the_same_paths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    unique = {tuple(rng.integers(3, 6, rng.integers(1, 5)).tolist()) for _ in range(60)}
    sequences = [[*s, 9] for s in sorted(unique)]
    some = rng.permutation(len(sequences))[:7].tolist()
    part = LabelTrie.of(sequences).subset(some)
    for label, node, token in zip(some, part.last_node, part.last_token, strict=True):
        assert [*part.path(int(node)), int(token)] == sequences[label]
    assert len(part) == 1 + len(
        {tuple(sequences[i][: n + 1]) for i in some for n in range(len(sequences[i]) - 1)}
    )


def test_ten_thousand_labels() -> None:
    rng = np.random.default_rng(0)
    unique = {tuple(rng.integers(0, 30, 4).tolist()) for _ in range(10_500)}
    sequences = [[*s, 99] for s in sorted(unique)][:10_000]
    trie = LabelTrie.of(sequences)
    assert max(len(c) for c in trie.children) <= 31
    assert len(trie.last_node) == 10_000


def test_same_tokens_and_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="labels number 0 and 2 have the same tokens"):
        LabelTrie.of([[1, 9], [2, 9], [1, 9]])
    with pytest.raises(ValueError, match="label number 1 has no tokens"):
        LabelTrie.of([[1, 9], [9]])
