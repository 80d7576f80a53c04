"""What decides the weights of a run besides data and shape."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

_CHOSEN = (
    "batch_tokens",
    "micro_batch_tokens",
    "muon_learning_rate",
    "adam_learning_rate",
    "row_tokens",
    "long_share",
    "warmup_steps",
    "decay_share",
)
"""Fields that have an option on the command line."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights besides the data and the shape."""

    tokens: int
    batch_tokens: int = 16_384
    micro_batch_tokens: int = 4_096
    row_tokens: int = 512
    long_row_tokens: int = 2_048
    long_share: float = 0.15
    """Share of the tokens, at the end, that is trained in long rows."""
    muon_learning_rate: float = 0.01
    adam_learning_rate: float = 0.003
    warmup_steps: int = 100
    decay_share: float = 0.45
    seed: int = 0

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, **defaults: float) -> None:
        """One for each field that users choose; `defaults` where they are others than the fields'."""
        for name in _CHOSEN:
            default = defaults.get(name, cls.__dataclass_fields__[name].default)
            parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)

    @classmethod
    def of(cls, arguments: argparse.Namespace, *, tokens: int) -> Recipe:
        """As these options say. Raises ValueError as `Recipe`."""
        return cls(tokens, **{name: getattr(arguments, name) for name in _CHOSEN})

    def __post_init__(self) -> None:
        """Raises ValueError where batches are no whole micro-batches, or those no whole rows."""
        rows = [self.row_tokens, *([self.long_row_tokens] if self.long_share > 0 else [])]
        for whole, parts in ((self.batch_tokens, [self.micro_batch_tokens]), (self.micro_batch_tokens, rows)):
            for part in parts:
                if whole % part:
                    raise ValueError(f"{whole} tokens of a batch or micro-batch are not made of whole parts of {part}")

    @property
    def steps(self) -> int:
        """Number of optimizer updates."""
        return self.tokens // self.batch_tokens

    @property
    def decay_begins(self) -> int:
        """The step from which on the rate falls."""
        return math.ceil(self.steps * (1 - self.decay_share))

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at `step`."""
        warmup = (step + 1) / self.warmup_steps
        decay = (self.steps - step) / max(1.0, self.steps * self.decay_share)
        return min(1.0, warmup, decay)

    def row_length(self, step: int) -> int:
        """Tokens of a row at `step`."""
        return self.long_row_tokens if step >= self.steps * (1 - self.long_share) else self.row_tokens
