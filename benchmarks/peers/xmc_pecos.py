"""PECOS XR-Linear.

Pins (a venv of its own, Python 3.11; `python3 -m venv pecos && pecos/bin/pip install ...`):
libpecos==1.2.8 torch==2.13.0 scikit-learn==1.9.1. It brings numpy 1.26.4 and scipy 1.13.1; without
the torch pin 6 GB.

    python xmc_pecos.py JOB.json

Settings: its defaults; those of its paper (Yu et al. 2022, examples/pecos-xrlinear-jmlr22 of the
repository, EXP-2): 32 splits, negatives of both kinds, beam 50, the mean of three seeds.
"""

from pecos.xmc import Indexer, LabelEmbeddingFactory
from pecos.xmc.xlinear.model import XLinearModel
from xmc_protocol import Answers, Task, best_of, run

PAPER = {"splits": 32, "negatives": "tfn+man", "beam": 50, "seeds": 3}
SETTINGS = {
    "defaults": {"features": "words"},
    "paper": {"features": "words", **PAPER},
    "defaults, characters too": {"features": "characters"},
    "paper, characters too": {"features": "characters", **PAPER},
}


def fit(
    task: Task,
    *,
    features: str,
    splits: int = 16,
    negatives: str = "tfn",
    beam: int = 10,
    seeds: int = 1,
) -> Answers:
    known, new = getattr(task, features)
    labels = LabelEmbeddingFactory.create(task.gold, known, method="pifa", threads=1)
    total = None
    for seed in range(seeds):
        clusters = Indexer.gen(
            labels, indexer_type="hierarchicalkmeans", nr_splits=splits, seed=seed, threads=1
        )
        model = XLinearModel.train(
            known, task.gold, C=clusters, negative_sampling_scheme=negatives, threads=1
        )
        scores = model.predict(new, beam_size=beam, only_topk=100, threads=1).tocsr()
        total = scores if total is None else total + scores
    return best_of(total)


if __name__ == "__main__":
    run(("libpecos", "numpy", "scipy"), fit, SETTINGS)
