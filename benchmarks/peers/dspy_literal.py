"""DSPy's Predict with a Literal output.

Pins (a venv of its own, Python 3.11; may be distilabel's): dspy==3.4.1.

Its cache and its retries are off: neither is a property of the method.
"""

import logging
import os
from typing import Literal

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or the import asks the network

import dspy
from protocol import Rows, read_job, run


def main() -> None:
    job = read_job()
    logging.getLogger("dspy").setLevel(logging.CRITICAL)
    dspy.configure(
        lm=dspy.LM(
            f"openai/{job['served']}",
            api_base=f"{job['base_url']}/v1",
            api_key="EMPTY",
            model_type="chat",
            temperature=0.0,
            max_tokens=64,
            cache=False,
            num_retries=0,
        )
    )

    class Classify(dspy.Signature):
        """Classify the text."""

        text: str = dspy.InputField()
        label: Literal[tuple(job["labels"])] = dspy.OutputField()

    def label(rows: Rows) -> Rows:
        replies = dspy.Predict(Classify).batch(
            [dspy.Example(text=row["text"]).with_inputs("text") for row in rows],
            num_threads=job["in_flight"],
            max_errors=10**9,
            disable_progress_bar=True,
        )
        return [
            {"id": row["id"], "pred": getattr(reply, "label", None)}
            for row, reply in zip(rows, replies, strict=True)
        ]

    run(job, label, packages=("dspy", "litellm", "openai"))


if __name__ == "__main__":
    main()
