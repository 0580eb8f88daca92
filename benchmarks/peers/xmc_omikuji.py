"""omikuji: Parabel and Bonsai.

Pins (a venv of its own, Python 3.11; `python3 -m venv omi && omi/bin/pip install ...`):
omikuji==0.5.2 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1

    python xmc_omikuji.py JOB.json

Settings: its defaults, which are Parabel; Bonsai as its README and Annif's models of the same
vocabulary have it (100 clusters, not balanced, depth 3). It dies on a row without features, so that
such a row is given one constant feature that no other has.
"""

import tempfile
from pathlib import Path

import numpy as np
import omikuji
from scipy.sparse import csr_matrix, hstack
from sklearn.datasets import dump_svmlight_file
from xmc_protocol import Answers, Task, best_of_pairs, run

BONSAI = {"cluster_k": 100, "cluster_balanced": False, "max_depth": 3}
SETTINGS = {
    "defaults (Parabel)": {"features": "words"},
    "Bonsai": {"features": "words", **BONSAI},
    "Parabel, characters too": {"features": "characters"},
    "Bonsai, characters too": {"features": "characters", **BONSAI},
}


def fit(task: Task, *, features: str, **options: int) -> Answers:
    known, new = (with_constant(matrix) for matrix in getattr(task, features))
    settings = omikuji.Model.default_hyper_param()
    for name, value in options.items():
        setattr(settings, name, value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.txt")
        with path.open("wb") as file:
            file.write(f"{known.shape[0]} {known.shape[1]} {task.gold.shape[1]}\n".encode())
            dump_svmlight_file(known, task.gold.astype(np.int8), file, multilabel=True)
        model = omikuji.Model.train_on_data(str(path), settings, 1)
    model.init_prediction_thread_pool(1)
    rows = zip(new.indptr[:-1], new.indptr[1:], strict=True)
    pairs = [
        list(zip(new.indices[i:j].tolist(), new.data[i:j].tolist(), strict=True)) for i, j in rows
    ]
    return best_of_pairs([model.predict(some, top_k=100) for some in pairs])


def with_constant(matrix: csr_matrix) -> csr_matrix:
    empty = (np.diff(matrix.indptr) == 0).astype(np.float32)
    return hstack([matrix, csr_matrix(empty[:, None])]).tocsr()


if __name__ == "__main__":
    run(("omikuji", "numpy", "scipy"), fit, SETTINGS)
