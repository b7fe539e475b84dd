"""Revises answers with a peer: generate_peers.py asyncio|curator|distilabel ENDPOINT INPUT OUT IN_FLIGHT.

Writes one JSON line a row that came back: {"id", "text"}. Each peer is used as its documentation shows.
"""

import asyncio
import json
import os
import sys

peer, endpoint, source, out, in_flight = sys.argv[1:]
in_flight = int(in_flight)
rows = [json.loads(line) for line in open(source)]
os.environ.setdefault("OPENAI_API_KEY", "none")
PROMPT = "Improve the answer.\n\n<task>\n{prompt}\n</task>\n\n<answer>\n{response}\n</answer>"


def messages(row):
    return [{"role": "user", "content": PROMPT.format(**row)}]


def revision(text):
    return text.split("<revision>\n")[1].split("\n</revision>")[0]


def with_asyncio():
    """The openai package as its users run it: a semaphore, its own retries, a file that is appended to."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=endpoint, max_retries=8, timeout=10)
    gate = asyncio.Semaphore(in_flight)
    done = set()
    if os.path.exists(out):
        done = {json.loads(line)["id"] for line in open(out)}
    sink = open(out, "a")

    async def one(row):
        async with gate:
            try:
                reply = await client.chat.completions.create(model="teacher", messages=messages(row))
                text = revision(reply.choices[0].message.content)
            except Exception:
                return
        sink.write(json.dumps({"id": row["id"], "text": text}) + "\n")

    async def all_rows():
        await asyncio.gather(*(one(row) for row in rows if row["id"] not in done))

    asyncio.run(all_rows())
    sink.close()


def with_curator():
    os.environ.setdefault("TELEMETRY_ENABLED", "False")
    os.environ["CURATOR_DISABLE_RICH_DISPLAY"] = "1"
    import tiktoken
    from bespokelabs import curator

    class Lengths:
        """tiktoken's tables come from the network; their place is taken by lengths, which cost nothing."""

        def encode(self, text, **_):
            return range(len(text) // 4)

    tiktoken.get_encoding = tiktoken.encoding_for_model = lambda *_: Lengths()

    class Reviser(curator.LLM):
        def prompt(self, row):
            return PROMPT.format(**row)

        def parse(self, row, response):
            return {"id": row["id"], "text": revision(response)}

    reviser = Reviser(
        model_name="teacher",
        backend="openai",
        backend_params={
            "base_url": endpoint,
            "max_requests_per_minute": 10_000_000,
            "max_tokens_per_minute": 10_000_000_000,
            "max_concurrent_requests": in_flight,
            "request_timeout": 10,
            "require_all_responses": False,
        },
    )
    result = reviser(rows)
    result = getattr(result, "dataset", result)
    with open(out, "w") as sink:
        for row in result:
            sink.write(json.dumps({"id": row["id"], "text": row["text"]}) + "\n")


def with_distilabel():
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    llm = OpenAILLM(model="teacher", base_url=endpoint, api_key="none", max_retries=8, timeout=10)
    with Pipeline(name="revise") as pipeline:
        data = [{"id": row["id"], "instruction": PROMPT.format(**row)} for row in rows]
        load = LoadDataFromDicts(data=data, batch_size=in_flight)
        task = TextGeneration(llm=llm, input_batch_size=in_flight)
        load >> task
    result = pipeline.run(use_cache=True)
    with open(out, "w") as sink:
        for row in result["default"]["train"]:
            if row["generation"]:
                sink.write(json.dumps({"id": row["id"], "text": row["generation"]}) + "\n")


if __name__ == "__main__":
    {"asyncio": with_asyncio, "curator": with_curator, "distilabel": with_distilabel}[peer]()
