"""What every engine is asked to do. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Seconds = Callable[["Case", int, int], float]
"""(case, requests, new tokens of each) -> processor time, with as many requests at once as the case has clients."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of work."""

    name: str
    clients: int
    prompt_tokens: int
    new_tokens: int
    requests: int
    logprobs: bool = False
    adapters: int = 0
    """Tuned models that take turns; 0: the base itself."""
    beyond_first: bool = False
    """What the first token took does not count."""

    def rate(self, seconds: Seconds) -> float:
        """Requests (of one token), or tokens, a second of processor time."""
        seconds(self, min(2, self.requests), 2)  # warm
        spent = seconds(self, self.requests, self.new_tokens)
        if self.beyond_first:
            return self.requests * (self.new_tokens - 1) / (spent - seconds(self, self.requests, 1))
        return self.requests * self.new_tokens / spent


CASES = (
    Case("decode", 1, 300, 65, 3, beyond_first=True),
    Case("first token", 1, 300, 1, 8),
    Case("classify x1", 1, 300, 1, 8, logprobs=True),
    Case("classify x8", 8, 300, 1, 24, logprobs=True),
    Case("classify x32", 32, 300, 1, 64, logprobs=True),
    Case("generate x1", 1, 64, 64, 3),
    Case("generate x8", 8, 64, 64, 16),
    Case("generate x32", 32, 64, 64, 32),
)
"""Prompts are all different, so that no cache of beginnings helps."""
INTERLEAVED = tuple(
    case
    for adapters in (1, 50)
    for case in (
        Case(f"classify x32, {adapters} tuned", 32, 300, 1, 100, logprobs=True, adapters=adapters),
        Case(f"generate x32, {adapters} tuned", 32, 64, 64, 50, adapters=adapters),
    )
)
"""Only for engines that serve adapters: one tuned model, and many that take turns."""
