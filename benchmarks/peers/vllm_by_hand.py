"""What one writes by hand for a vLLM server: a choice, or a one-token read of option codes.

Pins (any venv): openai>=2; the server is vLLM 0.32 (`structured_outputs`, `logprob_token_ids`,
`/tokenize`). Further key of the job: `mode`.

`choice` gives a string. `codes` gives a distribution: up to 26 labels are the letters A to Z, more
are pairs of capitals that are one token each; a read takes at most 128 ids, so more labels need a
second request, whose prompt is in the cache by then.
"""

import asyncio
import itertools
import math
import string
from collections.abc import Awaitable, Callable, Iterator

from openai import APIError, AsyncOpenAI
from protocol import Job, Rows, read_job, run

MOST_IDS = 128

Ask = Callable[[AsyncOpenAI, str], Awaitable[dict]]


def choice(job: Job) -> Ask:
    question = f"Classify the text as one of: {', '.join(job['labels'])}.\nText: "

    async def ask(client: AsyncOpenAI, text: str) -> dict:
        completion = await client.chat.completions.create(
            model=job["served"],
            temperature=0.0,
            max_tokens=32,
            messages=[{"role": "user", "content": question + text}],
            extra_body={"structured_outputs": {"choice": job["labels"]}},
        )
        return {"pred": completion.choices[0].message.content}

    return ask


def read(job: Job) -> Ask:
    labels: list[str] = job["labels"]
    known = asyncio.run(one_token_codes(job))
    ids, kind = list(known), "letter" if len(labels) <= len(string.ascii_uppercase) else "code"
    options = "\n".join(f"{c}: {label}" for c, label in zip(known.values(), labels, strict=True))
    question = f"Classify the text. Answer with the {kind} of one option only.\n{options}\nText: "

    async def ask(client: AsyncOpenAI, text: str) -> dict:
        found: dict[int, float] = {}
        for first in range(0, len(ids), MOST_IDS):
            body = {
                "return_tokens_as_token_ids": True,
                "logprob_token_ids": ids[first : first + MOST_IDS],
            }
            completion = await client.chat.completions.create(
                model=job["served"],
                temperature=0.0,
                max_tokens=1,
                logprobs=True,
                messages=[{"role": "user", "content": question + text}],
                extra_body=body,
            )
            for entry in completion.choices[0].logprobs.content[0].top_logprobs:
                found[int(entry.token.removeprefix("token_id:"))] = math.exp(entry.logprob)
        joint = [found.get(i, 0.0) for i in ids]
        mass = sum(joint)
        probs = [p / mass if mass else 0.0 for p in joint]
        best = labels[probs.index(max(probs))] if mass else None
        return {"pred": best, "probs": probs, "label_mass": mass}

    return ask


async def one_token_codes(job: Job) -> dict[int, str]:
    """A code for every label that is one token of its own where a reply starts."""
    found: dict[int, str] = {}
    async with client_of(job) as client:

        async def tokens(messages: list[dict], *, ended: bool) -> list[int]:
            turn = {"add_generation_prompt": ended, "continue_final_message": not ended}
            body = {"model": job["served"], "messages": messages, **turn}
            url = f"{job['base_url']}/tokenize"
            return (await client.post(url, cast_to=object, body=body))["tokens"]

        user = {"role": "user", "content": "x"}
        prompt = await tokens([user], ended=True)
        for code in codes(len(job["labels"])):
            reply = await tokens([user, {"role": "assistant", "content": code}], ended=False)
            if reply[:-1] == prompt:
                found.setdefault(reply[-1], code)
            if len(found) == len(job["labels"]):
                return found
    raise SystemExit(f"only {len(found)} one-token codes for {len(job['labels'])} labels")


def codes(labels: int) -> Iterator[str]:
    letters = string.ascii_uppercase
    if labels <= len(letters):
        return iter(letters)
    return (first + second for first, second in itertools.product(letters, letters))


def client_of(job: Job) -> AsyncOpenAI:
    url = f"{job['base_url']}/v1"
    return AsyncOpenAI(base_url=url, api_key="EMPTY", timeout=600, max_retries=0)


def main() -> None:
    job = read_job()
    ask = choice(job) if job["mode"] == "choice" else read(job)

    async def label_all(rows: Rows) -> Rows:
        slots = asyncio.Semaphore(job["in_flight"])
        async with client_of(job) as client:

            async def one(row: dict) -> dict:
                async with slots:
                    try:
                        return {"id": row["id"], **await ask(client, row["text"])}
                    except APIError as error:
                        return {"id": row["id"], "pred": None, "error": str(error)}

            return list(await asyncio.gather(*map(one, rows)))

    run(job, lambda rows: asyncio.run(label_all(rows)), packages=("openai",))


if __name__ == "__main__":
    main()
