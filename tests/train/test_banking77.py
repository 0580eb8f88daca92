"""Students of a slice of banking77 beat a linear model of words on the same rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from llmlabel import models
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.train.classifier import predict, train_classifier

FILE = Path(__file__).parents[3] / "shared" / "data" / "banking77" / "banking77.jsonl"


@pytest.mark.model
@pytest.mark.skipif(not FILE.is_file(), reason="the data of banking77 is not there")
def test_1500_rows_of_77_intents(tmp_path: Path) -> None:
    given = [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]
    labels = load_labels(sorted({row["label"] for row in given}))
    draw = np.random.default_rng(0)
    train, test = (
        [given[i] for i in sorted(draw.permutation(own)[:count].tolist())]
        for own, count in (
            ([i for i, row in enumerate(given) if row["split"] == "train"], 1500),
            ([i for i, row in enumerate(given) if row["split"] == "test"], 1000),
        )
    )
    truth = np.array([labels.index(row["label"]) for row in test])
    gold = np.array([labels.index(row["label"]) for row in train])
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    words = LinearSVC(C=1).fit(vectors.fit_transform([row["text"] for row in train]), gold)
    by_words = words.predict(vectors.transform([row["text"] for row in test]))

    rows = Dataset.from_dict({"text": [row["text"] for row in train]})
    student = train_classifier(
        SoftLabels.from_dense(np.eye(len(labels))[gold], labels).add_to(rows),
        labels,
        model=models.MINILM,
        output=tmp_path / "student",
        pooling="mean",
        learning_rate=2e-3,
        num_train_epochs=4,
        max_length=64,
    )
    asked = {"id": [str(i) for i in range(len(test))], "text": [row["text"] for row in test]}
    said = predict(Dataset.from_dict(asked), model=student)
    by_student = SoftLabels.from_dataset(said, labels).dense().argmax(axis=1)
    # 0.727 and 0.880 where all 3,080 test rows are asked; 70 s on one core
    assert (by_student == truth).mean() > (by_words == truth).mean() + 0.1
