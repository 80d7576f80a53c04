"""Questions to a server: which class, what text, how likely. Speaks /v1 alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.quality.sets import Row
from tunesmith.client import Client

PROMPTS_PER_REQUEST = 64
SURE = 100
"""The largest `logit_bias`: the token is above every one without it, and among those with it nothing changes."""


def first_tokens(client: Client, model: str, prompts: Sequence[str], among: Sequence[int] = ()) -> list[str]:
    """The likeliest next token of each prompt as text; with `among`, the likeliest of those token ids."""
    return [text for text, _ in _completions(client, model, prompts, max_tokens=1, logit_bias=_bias(among))]


def texts(client: Client, model: str, prompts: Sequence[str], stop: str, max_tokens: int) -> list[str]:
    """What the model writes after each prompt, taking the likeliest token each time, without the spaces around it."""
    answers = _completions(client, model, prompts, max_tokens=max_tokens, stop=[stop])
    return [text.strip() for text, _ in answers]


def loss(client: Client, model: str, before: str, rows: Sequence[Row]) -> float:
    """Mean negative log-probability of the completions' tokens after `before` and the prompt, nats a token."""
    whole = [before + row.prompt + row.completion for row in rows]
    answers = _completions(client, model, whole, max_tokens=0, echo=True, logprobs=0)
    logprobs: list[float] = [
        logprob
        for row, (_, block) in zip(rows, answers, strict=True)
        for logprob, offset in zip(block["token_logprobs"], block["text_offset"], strict=True)
        if offset >= len(before) + len(row.prompt)
    ]
    return -sum(logprobs) / len(logprobs)


def _bias(among: Sequence[int]) -> dict[str, int]:
    return {str(token_id): SURE for token_id in among}


def _completions(client: Client, model: str, prompts: Sequence[str], **asked: Any) -> list[tuple[str, Any]]:
    """(text, log-probabilities) for each prompt."""
    found = []
    for some in batched_prompts(prompts):
        body = {"model": model, "prompt": some, "temperature": 0, **asked}
        choices = client.post("completions", body=body)["choices"]
        found += [
            (choice["text"], choice["logprobs"]) for choice in sorted(choices, key=lambda choice: choice["index"])
        ]
    return found


def batched_prompts(prompts: Sequence[str]) -> list[list[str]]:
    """The prompts in their order, PROMPTS_PER_REQUEST at a time."""
    return [list(prompts[start : start + PROMPTS_PER_REQUEST]) for start in range(0, len(prompts), PROMPTS_PER_REQUEST)]
