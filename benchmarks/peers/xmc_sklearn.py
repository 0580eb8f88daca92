"""What needs scikit-learn only: centroids, neighbours, and the label names alone.

python xmc_sklearn.py JOB.json      job: `method`, one of METHODS
"""

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from xmc_protocol import Answers, Task, best_of, read_job, run


def words(task: Task) -> tuple[csr_matrix, csr_matrix]:
    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=50_000)
    return vectorizer.fit_transform(task.texts).tocsr(), vectorizer.transform(task.new).tocsr()


def centroid(task: Task) -> Answers:
    known, new = words(task)
    return best_of((new @ normalize(task.gold.T @ known).T).toarray())


def neighbours(task: Task, *, k: int = 20) -> Answers:
    known, new = words(task)
    scores = np.zeros((len(task.new), task.gold.shape[1]), dtype=np.float32)
    for start in range(0, len(task.new), 500):
        near = (new[start : start + 500] @ known.T).toarray()
        order = np.argsort(-near, axis=1, kind="stable")[:, :k]
        for row, rows in enumerate(order):
            scores[start + row] = near[row, rows] @ task.gold[rows]
    return best_of(scores)


def names(task: Task) -> Answers:
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True)
    pairs = zip(task.names, task.descriptions, strict=True)
    labels = vectorizer.fit_transform([" ".join(pair).strip() for pair in pairs])
    return best_of((vectorizer.transform(task.new) @ labels.T).toarray())


METHODS = {"centroid": centroid, "neighbours": neighbours, "names": names}

if __name__ == "__main__":
    run(("scikit-learn", "numpy", "scipy"), METHODS[read_job()[0]["method"]], {"defaults": {}})
