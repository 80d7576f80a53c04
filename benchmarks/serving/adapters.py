"""Claim: of 200 tuned models of one base, asked 10,000 times in every way at once, none ever gives another's answer.

    python -m benchmarks.serving.adapters

Each model is an adapter with answers that are known beforehand (`planted.py`), imported over HTTP. 32 clients ask, in
any order, for plain answers, streams, log-probabilities, scores, several choices, lists of prompts, stops and chat, and
hang up in the midst; fewer adapters are resident than there are models, so that they come and go. Every text must be
the planted one and every log-probability within 1e-4 nats.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import conclude, parser, serving, table
from benchmarks.serving.asking import Work, Wrong, drive, latencies, post, resident_mib, streamed
from benchmarks.serving.planted import Answer, Planter, package
from tests.e2e.harness import OWNER_KEY, Server
from tests.tiny import make_tiny_base

NATS = 1e-4
QUESTION = "Who is it?"
PROMPTS = ("The plot was", "A long letter from the sea, and then ->", f"User: {QUESTION}\nAssistant:", "7 + 5 = ")
CHAT = PROMPTS[2]

Answers = dict[str, dict[str, Answer]]
"""Model -> prompt -> what it says."""


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--adapters", type=int, default=200)
    options.add_argument("--resident", type=int, default=64)
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--clients", type=int, default=32)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.base = args.base or make_tiny_base(Path(folder) / "tiny")
        planter = Planter(args.base, PROMPTS)
        with serving(args, TUNESMITH_MAX_RESIDENT_ADAPTERS=str(args.resident)) as server:
            begun = time.perf_counter()
            answers = plant(server, planter, Path(folder), args.adapters)
            imported_s = time.perf_counter() - begun
            begun = time.perf_counter()
            outcomes = drive(server, args.clients, questions(planter, answers, args.requests, seed=1))
            spent_s = time.perf_counter() - begun
            memory = resident_mib(server)
    wrong = [outcome for outcome in outcomes if outcome.fault is not None]
    print(table(("request", "number", "p50 ms", "p95 ms", "p99 ms"), latencies(outcomes)))
    print(
        f"{args.adapters} adapters planted and imported in {imported_s:.1f} s; {len(outcomes) / spent_s:.0f} requests/s"
    )
    for outcome in wrong[:10]:
        print(f"WRONG {outcome.kind}: {outcome.fault}")
    facts = {
        "adapters": args.adapters,
        "resident": args.resident,
        "requests": len(outcomes),
        "wrong": len(wrong),
        "requests_per_s": round(len(outcomes) / spent_s, 1),
        "engine_mib": round(memory["tunesmith.engine"]),
    }
    return conclude("serving/adapters", not wrong and len(outcomes) == args.requests, facts)


def plant(server: Server, planter: Planter, folder: Path, count: int, first_seed: int = 1) -> Answers:
    """Imports planted adapters; the models and what they say."""
    answers: Answers = {}
    for seed in range(first_seed, first_seed + count):
        place = folder / f"adapter{seed}"
        said = planter.plant(place, seed)
        answers[bring(server, package(place), seed)] = said
    return answers


def bring(server: Server, content: bytes, number: int, *, base_name: str = "ada") -> str:
    """Imports a package; the name of the model."""
    response = httpx.post(
        f"{server.base_url}/models",
        headers={"Authorization": f"Bearer {OWNER_KEY}"},
        data={"model": base_name, "suffix": f"model {number}"},
        files={"file": ("model.zip", content)},
        timeout=60,
        trust_env=False,
    )
    response.raise_for_status()
    name: str = response.json()["id"]
    return name


@dataclass(frozen=True)
class Question:
    """One model, one prompt, and what it must say."""

    model: str
    prompt: str
    prompt_ids: tuple[int, ...]
    answers: dict[str, Answer]
    """To all prompts."""

    @property
    def answer(self) -> Answer:
        """What the model says to the prompt."""
        return self.answers[self.prompt]

    @property
    def greedy(self) -> dict[str, Any]:
        """The body that asks for it."""
        return {"model": self.model, "prompt": self.prompt, "max_tokens": 8, "temperature": 0}


def questions(planter: Planter, answers: Answers, count: int, seed: int) -> Iterator[Work]:
    """Requests of every kind, for models in any order."""
    chance = random.Random(seed)
    models = sorted(answers)
    prompt_ids = {prompt: tuple(planter.prompt_ids(prompt)) for prompt in PROMPTS}
    for _ in range(count):
        model, prompt = chance.choice(models), chance.choice(PROMPTS)
        kind, ask = chance.choice(KINDS)
        yield kind, partial(ask, Question(model, prompt, prompt_ids[prompt], answers[model]))


async def _plain(asked: Question, client: httpx.AsyncClient) -> None:
    choice = await _choice(client, asked.greedy)
    _same((choice["text"], choice["finish_reason"]), (asked.answer.text, "stop"))


async def _class(asked: Question, client: httpx.AsyncClient) -> None:
    choice = await _choice(client, {**asked.greedy, "max_tokens": 1, "logprobs": 2})
    _near(choice["logprobs"]["token_logprobs"], asked.answer.logprobs[:1])
    _same(max(choice["logprobs"]["top_logprobs"][0].items(), key=lambda item: item[1])[0], choice["text"])


async def _stream(asked: Question, client: httpx.AsyncClient) -> None:
    chunks = await streamed(client, "completions", {**asked.greedy, "logprobs": 0})
    choices = [chunk["choices"][0] for chunk in chunks]
    _same(("".join(c["text"] for c in choices), choices[-1]["finish_reason"]), (asked.answer.text, "stop"))
    _near([value for c in choices for value in c["logprobs"]["token_logprobs"]], asked.answer.logprobs[:-1])


async def _score(asked: Question, client: httpx.AsyncClient) -> None:
    ids = [*asked.prompt_ids, *asked.answer.ids]
    body = {"model": asked.model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    choice = await _choice(client, body)
    _near(choice["logprobs"]["token_logprobs"][len(asked.prompt_ids) :], asked.answer.logprobs)


async def _several(asked: Question, client: httpx.AsyncClient) -> None:
    answer = await post(client, "completions", {**asked.greedy, "prompt": PROMPTS, "n": 2})
    expected = [asked.answers[prompt].text for prompt in PROMPTS for _ in range(2)]
    _same([choice["text"] for choice in answer["choices"]], expected)


async def _stopped(asked: Question, client: httpx.AsyncClient) -> None:
    text = asked.answer.text
    stop = text[text.rindex(" ") :]
    choice = await _choice(client, {**asked.greedy, "stop": [stop, "zzz"]})
    _same((choice["text"], choice["finish_reason"]), (text[: text.index(stop)], "stop"))


async def _chat(asked: Question, client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    answer = await post(client, "chat/completions", {"model": asked.model, "messages": messages, "temperature": 0})
    _same(answer["choices"][0]["message"]["content"], asked.answers[CHAT].text.removeprefix(" "))


async def _hang_up(asked: Question, client: httpx.AsyncClient) -> None:
    never_ends = {**asked.greedy, "max_tokens": 1000, "logit_bias": {"0": -100}}
    await streamed(client, "completions", never_ends, most=2)


KINDS: tuple[tuple[str, Callable[[Question, httpx.AsyncClient], Awaitable[None]]], ...] = (
    ("plain answer", _plain),
    ("class and log-probability", _class),
    ("streamed answer", _stream),
    ("scored text", _score),
    ("four prompts, two choices", _several),
    ("stopped", _stopped),
    ("chat", _chat),
    ("hung up", _hang_up),
)


async def _choice(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = (await post(client, "completions", body))["choices"][0]
    return choice


def _same(got: object, expected: object) -> None:
    if got != expected:
        raise Wrong(f"{got!r} instead of {expected!r}")


def _near(got: list[float], expected: tuple[float, ...]) -> None:
    if len(got) != len(expected) or any(abs(a - b) > NATS for a, b in zip(got, expected, strict=True)):
        raise Wrong(f"{got} instead of {expected}")


if __name__ == "__main__":
    sys.exit(main())
