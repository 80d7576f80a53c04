"""What an engine promises: token ids in, token steps out. Knows nothing of text, stop strings, HTTP or rows.

Every engine (embedded, remote, scripted, vLLM) passes the same suite, `tests/contracts/test_engine.py`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]
Precision = Literal["float32", "bfloat16", "int8"]
"""Of the weights that an engine multiplies with: see `Settings.engine_precision`."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled. Values are within the ranges of the completions API."""

    max_tokens: int = 16
    """0 scores the prompt and generates nothing."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int = 0
    """The same request with the same seed gives the same tokens, whatever else is in the batch."""
    stop_token_ids: tuple[int, ...] = ()
    """Sampling one of these ends the sequence with `stop`; it is reported as the last token."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to go on with."""

    handle: str
    """From `Engine.load`."""
    prompt_ids: tuple[int, ...]
    """At least one token."""
    sampling: SamplingParams
    top_logprobs: int | None = None
    """None: no log-probabilities wanted; otherwise how many of the most likely tokens to report at each position."""
    score_prompt: bool = False
    """Report the prompt's own tokens first (for echo): needs `top_logprobs`."""
    payer: str = ""
    """Whose request it is: where there is not room for all, payers take turns."""
    together: bool = False
    """Nobody waits for outputs before the last: they may come many at once, which costs those who pass them on less."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token and its natural log-probability under the model's distribution (no temperature, top_p, bias or penalty).

    Computed in fp32 whatever the weights are held in.
    """

    token_id: int
    logprob: float | None
    """None for the first token of a prompt, and where no log-probabilities were asked."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token id, log-probability), best first; the token itself is here only if it is among them."""


@dataclass(frozen=True, slots=True)
class PromptScored:
    """The first item of a stream with `score_prompt`: one score for each prompt token."""

    scores: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One generated token."""

    score: TokenScore
    finish: FinishReason | None = None
    """Set on the last token of the sequence."""


EngineOutput = PromptScored | SampledToken
"""A stream is an optional `PromptScored`, then `max_tokens` or fewer `SampledToken`s, the last with `finish` set."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can honour; a request for more is refused by name before it gets here."""

    max_top_logprobs: int = 20
    prompt_logprobs: bool = True
    logit_bias: bool = True
    penalties: bool = True
    seed: bool = True


class Engine(Protocol):
    """Generates tokens for models it has loaded."""

    @property
    def capabilities(self) -> Capabilities:
        """Constant for the life of the engine."""

    async def load(self, base_dir: Path, adapter_dir: Path | None) -> str:
        """Make a model ready; return the handle to use in requests. Idempotent: the same folders, the same handle.

        `adapter_dir` holds an adapter, or a checkpoint of the shape of the base where all its weights were trained.
        Raises ValueError if the folders do not hold a model this engine can run.
        """

    async def unload(self, handle: str) -> None:
        """Give the memory of what was tuned back. Requests under way end as they would have; unknown handles pass."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineOutput, None]:
        """The tokens of one sequence as they come, or some at a time where the request has them `together`.

        Closing it (`aclose`) frees its place in the batch at once.

        Raises EngineUnavailable if the engine dies meanwhile, KeyError for a handle that is not loaded.
        """

    async def close(self) -> None:
        """End all work and give everything back. Idempotent."""
