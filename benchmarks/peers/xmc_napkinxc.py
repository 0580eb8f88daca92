"""napkinXC: a probabilistic label tree.

Pins (a venv of its own, Python 3.11; `python3 -m venv nap && nap/bin/pip install ...`):
napkinxc==0.7.2 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1

    python xmc_napkinxc.py JOB.json

Settings: its defaults; those of the final experiments of its paper (Jasinska-Kobus et al. 2020,
experiments/plt_jmlr of the repository): three unbalanced trees of 16, squared hinge.
"""

import tempfile

from napkinxc.models import PLT
from xmc_protocol import Answers, Task, best_of_pairs, run

PAPER = {
    "arity": 16,
    "kmeans_balanced": False,
    "ensemble": 3,
    "loss": "l2",
    "liblinear_c": 1,
}
SETTINGS = {
    "defaults": {"features": "words"},
    "paper": {"features": "words", **PAPER},
    "defaults, characters too": {"features": "characters"},
    "paper, characters too": {"features": "characters", **PAPER},
}


def fit(task: Task, *, features: str, **options: object) -> Answers:
    known, new = getattr(task, features)
    with tempfile.TemporaryDirectory() as folder:
        model = PLT(folder, threads=1, seed=0, **options)
        model.fit(known, task.gold)
        return best_of_pairs(model.predict_proba(new, top_k=100))


if __name__ == "__main__":
    run(("napkinxc", "numpy", "scipy"), fit, SETTINGS)
