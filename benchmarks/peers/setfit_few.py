"""SetFit: a sentence encoder tuned on pairs of texts, then logistic regression.

Pins (a venv of its own, Python 3.11): setfit==1.2.0 "torch<2.14". Its defaults (one epoch, batches of
16 pairs for the encoder), but for the number of pairs: 2 x `iterations` of each row, as in its paper,
where the default takes all pairs of all rows once.

    python setfit_few.py JOB.json      job: `texts`, `gold`, `test`, `model`, `iterations`; prints what it
                                       says of `test`
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    model = SetFitModel.from_pretrained(job["model"])
    rows = Dataset.from_dict({"text": job["texts"], "label": job["gold"]})
    arguments = TrainingArguments(
        report_to="none", save_strategy="no", num_iterations=job["iterations"]
    )
    Trainer(model, arguments, train_dataset=rows).train()
    print(json.dumps([int(label) for label in model.predict(job["test"])]))


if __name__ == "__main__":
    main()
