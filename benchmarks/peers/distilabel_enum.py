"""distilabel's TextClassification, held to the labels by a JSON schema with an enum.

Pins (a venv of its own, Python 3.11): "distilabel[openai]==1.5.3".

Without the enum the same task gives a small model's free text, which is hardly ever one of the
labels; distilabel's own schema is {"labels": str}, no enum. Its own retries stay on.
"""

from distilabel.models import OpenAILLM
from distilabel.steps.tasks import TextClassification
from protocol import Rows, read_job, run


def main() -> None:
    job = read_job()
    schema = {
        "type": "object",
        "properties": {"labels": {"enum": job["labels"]}},
        "required": ["labels"],
    }
    task = TextClassification(
        llm=OpenAILLM(
            model=job["served"],
            base_url=f"{job['base_url']}/v1",
            api_key="EMPTY",
            generation_kwargs={
                "max_new_tokens": 64,
                "temperature": 0.0,
                "extra_body": {"structured_outputs": {"json": schema}},
            },
            timeout=600,
        ),
        available_labels=job["labels"],
        use_default_structured_output=False,
        input_batch_size=job["in_flight"],
    )
    task.load()

    def label(rows: Rows) -> Rows:
        replies: Rows = []
        for first in range(0, len(rows), job["in_flight"]):
            some = rows[first : first + job["in_flight"]]
            replies += next(task.process([{"id": row["id"], "text": row["text"]} for row in some]))
        return [
            {"id": row["id"], "pred": reply.get("labels")}
            for row, reply in zip(rows, replies, strict=True)
        ]

    run(job, label, packages=("distilabel", "openai"))


if __name__ == "__main__":
    main()
