"""How likely a model finds each of a few answers, asked over HTTP: the prompt and each answer echoed, not generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tunesmith.client import Client

PROMPTS_PER_REQUEST = 40


def answer_logprobs(
    client: Client,
    model: str,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    advance: Callable[[int], None] = lambda prompts: None,
) -> list[dict[str, float]]:
    """For each prompt, answer -> natural log-probability of the whole answer after it. `advance` hears of prompts done.

    Answers begin with a space, so that no token spans prompt and answer.
    """
    scores: list[dict[str, float]] = []
    prompts_at_once = max(1, PROMPTS_PER_REQUEST // len(answers))
    for start in range(0, len(prompts), prompts_at_once):
        asked = prompts[start : start + prompts_at_once]
        texts = [prompt + answer for prompt in asked for answer in answers]
        body = {"model": model, "prompt": texts, "max_tokens": 0, "echo": True, "logprobs": 0}
        choices = iter(sorted(client.post("completions", body=body)["choices"], key=lambda choice: choice["index"]))
        for prompt in asked:
            scores.append({answer: _logprob_after(prompt, next(choices)["logprobs"]) for answer in answers})
        advance(len(asked))
    return scores


def best(logprobs: dict[str, float]) -> str:
    """The answer found most likely."""
    return max(logprobs, key=logprobs.__getitem__)


def probabilities(logprobs: dict[str, float]) -> dict[str, float]:
    """The log-probabilities as probabilities."""
    return {answer: math.exp(logprob) for answer, logprob in logprobs.items()}


def _logprob_after(prompt: str, block: dict[str, list[float]]) -> float:
    """Sum over the tokens that begin where the prompt ends or later; offsets count characters."""
    return sum(
        logprob
        for logprob, offset in zip(block["token_logprobs"], block["text_offset"], strict=True)
        if offset >= len(prompt)
    )
