import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, List, Value
from reference import compress as reference

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.refine import compress as module
from llmlabel.refine import projector
from llmlabel.refine.codecs import Dense, TopK, TwoDistances, partners
from llmlabel.refine.compress import compress, compress_blocks, restore, restore_blocks, store_size
from llmlabel.refine.projector import LowRank, project, reduced_rank
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b", "c", "d"])
PROBS = [[0.6, 0.3, 0.06, 0.04], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]


def table(probs, labels=LABELS) -> Dataset:
    ids = [f"r{i}" for i in range(len(probs))]
    rows = Dataset.from_dict({"id": ids})
    return SoftLabels.from_dense(np.array(probs, dtype=float), labels).add_to(rows)


def dense(rows, labels=LABELS):
    return SoftLabels.from_dataset(rows, labels).dense()


# ---------------------------------------------------------------------------------- top k


def test_top_2_with_smoothing(tmp_path: Path) -> None:
    store = compress(table(PROBS), LABELS, codec=TopK(2, bits=32), output=tmp_path)
    back = restore(store, LABELS)
    assert back["id"][:] == ["r0", "r1", "r2", "r3"]
    expected = [[0.6, 0.3, 0.05, 0.05], [0, 0, 1, 0], [0, 0, 0, 0], [0.15, 0.15, 0.3, 0.4]]
    assert dense(back) == pytest.approx(np.array(expected), abs=1e-7)
    assert dense(back)[0, :2].tolist() == np.float32([0.6, 0.3]).tolist()  # stored without an error
    assert back["label_ids"][2] == []
    assert sum(back["label_probs"][0]) == pytest.approx(1, abs=1e-6)


def test_what_the_stored_labels_leave(tmp_path: Path) -> None:
    store = compress(table(PROBS), LABELS, codec=TopK(2, bits=32), output=tmp_path)
    missing = dense(restore(store, LABELS, rest="missing"))
    assert missing[0] == pytest.approx([0.6, 0.3, 0, 0])
    assert missing[3] == pytest.approx([0, 0, 0.3, 0.4])
    scaled = dense(restore(store, LABELS, rest="renormalise"))
    assert scaled[0] == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert scaled[2].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("rest", ["smooth", "renormalise", "missing"])
@pytest.mark.parametrize("seed", range(20))
def test_restored_rows_equal_the_twin(tmp_path: Path, seed: int, rest) -> None:
    rng = np.random.default_rng(seed)
    count, k, bits = int(rng.integers(2, 9)), int(rng.integers(1, 10)), [8, 32][seed % 2]
    labels = load_labels([str(i) for i in range(count)])
    probs = rng.dirichlet(np.full(count, 0.4), size=12) * rng.choice([1, 1, 0.7, 0], size=(12, 1))
    rows = table(probs, labels)
    codec = TopK(k, bits) if seed % 3 else Dense(bits)
    store = compress(rows, labels, codec=codec, output=tmp_path, block_rows=5)
    kept = count if isinstance(codec, Dense) else k
    expected = [
        reference.restored(reference.stored(row, kept, bits), count, rest)
        for row in dense(rows, labels).tolist()
    ]
    found = dense(restore(store, labels, rest=rest), labels)
    assert found == pytest.approx(np.array(expected), abs=1e-6)
    blocks = list(restore_blocks(store, labels, rest=rest, block_rows=5))
    assert [len(block) for block in blocks] == [5, 5, 2]
    together = np.concatenate([dense(block, labels) for block in blocks])
    assert together.tolist() == found.tolist()


@pytest.mark.parametrize(
    ("codec", "labels", "payload"),
    [
        (TopK(1), 16, 3),
        (TopK(3), 16, 9),
        (TopK(5), 16, 15),
        (TopK(8, bits=8), 1000, 24),
        (TopK(8), 1000, 32),
        (TopK(1, bits=32), 66_000, 8),
        (TopK(20, bits=8), 4, 8),  # no more than there are labels
        (Dense(), 16, 16),
        (Dense(32), 16, 64),
        (TwoDistances(), 16, 6),
        (TwoDistances(32), 16, 10),
    ],
)
def test_bytes_of_a_row(tmp_path: Path, codec, labels, payload) -> None:
    space = load_labels([str(i) for i in range(labels)])
    probs = np.zeros((2, labels))
    probs[:, 1] = 1
    store = compress(table(probs, space), space, codec=codec, output=tmp_path)
    size = store_size(store)
    assert (size.payload_bytes, size.rows, size.codec) == (payload, 2, type(codec).__name__)
    assert size.file_bytes == (tmp_path / "labels.parquet").stat().st_size
    assert size.bytes_per_row == size.file_bytes / 2
    assert restore(store, space)["label_ids"][:] == [[1], [1]] or isinstance(codec, TwoDistances)


def test_half_precision_and_bytes_come_back_within_their_rounding(tmp_path: Path) -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(4), size=50)
    for bits, step in ((16, 2**-11), (8, 1 / 510)):
        store = compress(table(probs), LABELS, codec=Dense(bits), output=tmp_path / str(bits))
        found = dense(restore(store, LABELS, rest="missing"))
        assert np.abs(found - probs).max() < 4 * step  # with what a sum above 1 takes away
        assert found.sum(axis=1).max() <= 1 + 1e-6


def test_a_flat_row_of_many_labels_is_not_rounded_away(tmp_path: Path) -> None:
    labels = load_labels([str(i) for i in range(1000)])
    probs = np.full((1, 1000), 0.00099)
    probs[0, 700] = 1 - probs.sum() + 0.00099
    for codec in (TopK(3, bits=8), Dense(8)):
        store = compress(
            table(probs, labels), labels, codec=codec, output=tmp_path / codec.__class__.__name__
        )
        found = dense(restore(store, labels), labels)[0]
        assert found.argmax() == 700
        assert found.sum() == pytest.approx(1, abs=1e-6)


def test_many_labels_of_a_row_are_events_of_their_own(tmp_path: Path) -> None:
    labels = load_labels(["a", "b", "c"], multilabel=True)
    rows = table([[0.9, 0.8, 0.1], [0.0, 0.0, 0.3]], labels)
    back = restore(compress(rows, labels, codec=TopK(2, bits=32), output=tmp_path), labels)
    assert dense(back, labels) == pytest.approx(np.array([[0.9, 0.8, 0], [0, 0, 0.3]]))


# ---------------------------------------------------------------------------- two distances


def test_two_distances_hold_two_log_probabilities(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    probs = rng.dirichlet(np.ones(4), size=20)
    rows = table(probs)
    back = dense(restore(compress(rows, LABELS, codec=TwoDistances(32), output=tmp_path), LABELS))
    given = dense(rows)
    other = given.argmax(axis=1)[partners(rows["id"][:], seed=0)]
    for i, (before, after) in enumerate(zip(given.tolist(), back.tolist(), strict=True)):
        pair = {int(given[i].argmax()), int(other[i])}
        for label in pair:
            gap = reference.distances(after, label) - reference.distances(before, label)
            assert gap == pytest.approx(0, abs=1e-5)
        rest = [p for label, p in enumerate(after) if label not in pair]
        assert rest == pytest.approx([rest[0]] * len(rest), abs=1e-7)
        assert sum(after) == pytest.approx(1, abs=1e-6)


def test_distances_are_cut_off_and_unread_rows_are_nobodys_partner(tmp_path: Path) -> None:
    rows = table([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    store = compress(rows, LABELS, codec=TwoDistances(32), output=tmp_path)
    raw = pq.read_table(store / "labels.parquet")["payload"].to_pylist()
    assert raw[1] is None
    kind = np.dtype([("ids", "<u1", (2,)), ("log_probs", "<f4", (2,))])
    first, third = (np.frombuffer(raw[i], kind)[0] for i in (0, 2))
    assert (first["ids"].tolist(), third["ids"].tolist()) == ([0, 2], [2, 0])
    assert first["log_probs"].tolist() == [0, -16]
    back = dense(restore(store, LABELS))
    assert back[1].tolist() == [0, 0, 0, 0]
    assert back[0] == pytest.approx([1, 0, np.exp(-16), 0], abs=1e-6)


def test_partners_depend_on_seed_and_ids_and_never_are_the_row_itself() -> None:
    ids = [f"r{i}" for i in range(50)]
    found = partners(ids, seed=0)
    assert sorted(found) == list(range(50))
    assert not (found == np.arange(50)).any()
    back = partners(ids[::-1], seed=0)
    assert [ids[::-1][i] for i in back][::-1] == [ids[i] for i in found]
    assert partners(ids, seed=1).tolist() != found.tolist()
    assert partners(["only"], seed=0).tolist() == [0]


def test_two_distances_need_labels_that_exclude_each_other(tmp_path: Path) -> None:
    labels = load_labels(["a", "b"], multilabel=True)
    with pytest.raises(ValueError, match="TwoDistances needs a single-label space"):
        compress(table([[1, 1]], labels), labels, codec=TwoDistances(), output=tmp_path)
    with pytest.raises(ValueError, match="and the label of each partner"):
        compress_blocks([table(PROBS)], LABELS, codec=TwoDistances(), output=tmp_path)


# -------------------------------------------------------------------------------- projector


def vectors(rows, values) -> Dataset:
    return with_columns(rows, {"vector": (np.asarray(values).tolist(), List(Value("float32")))})


def bed(seed=0, rows=60, width=6):
    rng = np.random.default_rng(seed)
    anchors = vectors(Dataset.from_dict({"id": list(LABELS.ids)}), rng.normal(size=(4, width)))
    values = rng.normal(size=(rows, width))
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    teacher = np.exp(6 * unit @ rng.normal(size=(width, 4)) / width)
    teacher /= teacher.sum(axis=1, keepdims=True)
    return vectors(table(teacher), values), anchors, teacher


def test_rank_0_is_the_zero_shot_classifier(tmp_path: Path) -> None:
    rows, anchors, _ = bed()
    store = compress(rows, LABELS, codec=LowRank(0, anchors), output=tmp_path)
    found = dense(restore(store, LABELS, texts=rows, anchors=anchors))
    v, a = np.array(rows["vector"][:]), np.array(anchors["vector"][:])
    for i in range(5):
        cosines = [v[i] @ b / np.linalg.norm(v[i]) / np.linalg.norm(b) for b in a]
        powers = np.exp(20 * np.array(cosines))
        assert found[i] == pytest.approx(powers / powers.sum(), abs=1e-6)


def test_a_projector_gives_its_labels_slice_by_slice(tmp_path: Path, monkeypatch) -> None:
    rows, anchors, _ = bed()
    store = compress(rows, LABELS, codec=LowRank(2, anchors), output=tmp_path)
    whole = restore(store, LABELS, texts=rows, anchors=anchors)
    sizes = []

    def spy(vectors, *rest, **more):
        sizes.append(len(vectors))
        return project(vectors, *rest, **more)

    monkeypatch.setattr(projector, "project", spy)
    monkeypatch.setattr(module, "_BLOCK_VALUES", 7 * len(LABELS))
    sliced = restore(store, LABELS, texts=rows, anchors=anchors)
    assert sizes == [7] * 8 + [4]
    assert dense(sliced) == pytest.approx(dense(whole), abs=1e-7)
    assert sliced.column_names == whole.column_names


def test_anchors_with_a_label_twice_are_refused(tmp_path: Path) -> None:
    rows, anchors, _ = bed()
    twice = anchors.select([0, 1, 2, 3, 3])
    with pytest.raises(ValueError, match="the id 'd' is more than once in anchors; remove one"):
        compress(rows, LABELS, codec=LowRank(2, twice), output=tmp_path)


def test_full_rank_gives_a_linear_teacher_back_and_each_rank_brings_it_nearer(
    tmp_path: Path,
) -> None:
    rows, anchors, teacher = bed()
    errors = []
    for rank in (0, 1, 2, 4):
        codec = LowRank(rank, anchors, ridge=1e-9)
        store = compress(rows, LABELS, codec=codec, output=tmp_path / str(rank), block_rows=7)
        found = restore(store, LABELS, texts=rows, anchors=anchors)
        errors.append(((centred(dense(found)) - centred(teacher)) ** 2).sum())
        whole = sum(array.nbytes for array in load(store).values())
        assert whole == rank * (4 + 6) * 4
        assert store_size(store).payload_bytes == 0
    assert errors[3] < 1e-8
    assert errors[0] > errors[1] > errors[2] > errors[3]


def centred(probs):
    logs = np.log(probs)
    return logs - logs.mean(axis=1, keepdims=True)


def load(store):
    from safetensors.numpy import load_file

    return load_file(store / "projector.safetensors")


@pytest.mark.parametrize("seed", range(20))
def test_reduced_rank_regression_is_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    v, d = rng.normal(size=(30, 5)), rng.normal(size=(30, 4))
    rank = int(rng.integers(1, 4))
    left, right = reduced_rank(v.T @ v, v.T @ d, rank=rank, ridge=1e-12)
    assert np.linalg.matrix_rank(left @ right) == rank
    best = reference.squared_error(v.tolist(), d.tolist(), (left @ right).tolist())
    for _ in range(10):  # another matrix of that rank, optimal for its own left side
        near = left + rng.normal(scale=0.05, size=left.shape)
        fitted = v @ near
        other = near @ np.linalg.lstsq(fitted, d, rcond=None)[0]
        error = reference.squared_error(v.tolist(), d.tolist(), other.tolist())
        assert best <= error + 1e-9


def test_project_adds_the_update() -> None:
    out = project(
        np.array([[3.0, 4.0]]),
        np.array([[1.0, 0.0], [0.0, 2.0]]),
        np.array([[1.0], [0.0]]),
        np.array([[2.0, 0.0]]),
        scale=10.0,
    )
    logits = np.array([10 * 0.6 + 0.6 * 2, 10 * 0.8])
    assert out[0] == pytest.approx(logits - np.log(np.exp(logits).sum()))


def test_a_projector_is_refused_with_what_does_not_fit(tmp_path: Path) -> None:
    rows, anchors, _ = bed()
    store = compress(rows, LABELS, codec=LowRank(2, anchors), output=tmp_path)
    with pytest.raises(ValueError, match="needs texts= and anchors="):
        restore(store, LABELS)
    other = bed(seed=1)[1]
    with pytest.raises(ValueError, match="label vectors are not those"):
        restore(store, LABELS, texts=rows, anchors=other)
    wide = vectors(rows, np.ones((60, 7)))
    with pytest.raises(ValueError, match="width 7 do not fit label vectors of width 6"):
        restore(store, LABELS, texts=wide, anchors=anchors)
    with pytest.raises(ValueError, match="no row with the id of label 'd'"):
        restore(store, LABELS, texts=rows, anchors=anchors.select([0, 1, 2]))
    with pytest.raises(ValueError, match="of label space"):
        restore(store, load_labels(["a", "b", "c", "x"]), texts=rows, anchors=anchors)
    many = load_labels(["a", "b"], multilabel=True)
    with pytest.raises(ValueError, match="LowRank needs a single-label space"):
        compress(table([[1, 1]], many), many, codec=LowRank(2, anchors), output=tmp_path)
    (store / "projector.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="not a whole file"):
        restore(store, LABELS, texts=rows, anchors=anchors)


# ----------------------------------------------------------------------------- what is refused


def test_the_wrong_space_and_another_version_are_refused(tmp_path: Path, monkeypatch) -> None:
    store = compress(table(PROBS), LABELS, codec=TopK(2), output=tmp_path)
    with pytest.raises(ValueError, match=f"of label space {LABELS.fingerprint}, but the"):
        restore(store, load_labels(["a", "b", "c", "x"]))
    monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    with pytest.raises(ValueError, match="has format version 1, this llmlabel reads 2"):
        restore(store, LABELS)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no compressed labels are there"):
        restore(tmp_path, LABELS)
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "labels.parquet")
    with pytest.raises(ValueError, match="these are no compressed labels"):
        restore(tmp_path, LABELS)
    store = compress(table(PROBS), LABELS, codec=TopK(2), output=tmp_path)
    whole = (store / "labels.parquet").read_bytes()
    (store / "labels.parquet").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        restore(store, LABELS)


def test_a_payload_that_does_not_fit_its_header_is_refused(tmp_path: Path) -> None:
    header = {
        "version": 1,
        "codec": {"name": "TopK", "k": 1, "bits": 16},
        "label_space": LABELS.fingerprint,
    }
    for payload, message in ((b"\x09\x00\x3c", "names label 9 of 4"), (b"\x01\x00", "has 2 bytes")):
        kind = pa.binary(len(payload))
        schema = pa.schema(
            [("id", pa.string()), ("payload", kind)], metadata={"llmlabel": json.dumps(header)}
        )
        column = pa.array([payload], kind)
        pq.write_table(
            pa.Table.from_arrays([pa.array(["r"]), column], schema=schema),
            tmp_path / "labels.parquet",
        )
        with pytest.raises(ValueError, match=message):
            restore(tmp_path, LABELS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "k must be at least 1"),
        (lambda: LowRank(-1, Dataset.from_dict({})), "rank must be at least 0"),
        (lambda: LowRank(1, Dataset.from_dict({}), scale=0.0), "scale and ridge must be above 0"),
    ],
)
def test_bad_codecs_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_no_rows_are_a_store_too(tmp_path: Path) -> None:
    store = compress(table(PROBS).select([]), LABELS, codec=TopK(2), output=tmp_path)
    back = restore(store, LABELS)
    assert (len(back), back.column_names) == (
        0,
        ["id", "label_ids", "label_probs", "label_space"],
    )


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    labels = load_labels([str(i) for i in range(100)])
    rng = np.random.default_rng(0)
    block = rng.dirichlet(np.full(100, 0.05), size=500)

    def blocks(count):
        for number in range(count):
            ids = [f"{number}-{i}" for i in range(500)]
            soft = SoftLabels.from_dense(block, labels).top(8)
            yield soft.add_to(Dataset.from_dict({"id": ids}))

    def peak(count):
        tracemalloc.start()
        folder = tmp_path / str(count)
        compress_blocks(blocks(count), labels, codec=TopK(8), output=folder)
        rows, of_arrow, before = 0, 0, pa.total_allocated_bytes()
        for part in restore_blocks(folder, labels, rest="missing", block_rows=500):
            rows += len(part)
            of_arrow = max(of_arrow, pa.total_allocated_bytes() - before)
        assert rows == 500 * count
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest, of_arrow

    peak(2)
    few, many = peak(6), peak(24)
    assert many[0] < 1.5 * few[0]
    assert many[1] < 1.5 * few[1]
