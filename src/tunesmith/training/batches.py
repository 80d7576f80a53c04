"""Examples -> token rows -> what each step eats. Knows no model.

A row is one example; a batch is the rows of one step. Chance is keyed by its purpose, never drawn from a running
generator, so the batches of any step can be told without those before it: that is all a resumed run needs.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from tunesmith.data.formats import Example
from tunesmith.errors import InvalidRequest
from tunesmith.rundir import steps_of
from tunesmith.tokenizer import Tokenizer

_BLOCK = 1_000
"""Examples encoded at once."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example as tokens; the prompt has at least one, and so has the completion."""

    token_ids: array[int]
    completion_start: int
    """Index of the first completion token."""

    @property
    def n_completion(self) -> int:
        """Tokens to learn."""
        return len(self.token_ids) - self.completion_start


def encode_rows(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    context_tokens: int,
    param: str,
    beat: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Rows of `examples`, prompt and completion encoded apart, as in serving; see `Tokenizer.prompt_ids`.

    Raises InvalidRequest(`param`) naming the line of an example over `context_tokens`, or of one without completion.
    `beat` is called now and then.
    """
    rows: list[Row] = []
    left = iter(examples)
    while block := list(itertools.islice(left, _BLOCK)):
        prompts = tokenizer.prompt_ids_many([one.prompt for one in block], [one.marked for one in block])
        completions = tokenizer.encode_many([example.completion for example in block])
        for prompt_ids, completion in zip(prompts, completions, strict=True):
            _check(len(rows) + 1, len(prompt_ids), len(completion), context_tokens, param)
            rows.append(Row(array("i", prompt_ids + completion), len(prompt_ids)))
        beat()
    return rows


def _check(line: int, n_prompt: int, n_completion: int, context_tokens: int, param: str) -> None:
    if n_completion == 0:
        raise InvalidRequest(f"Line {line} of the {param} has an empty completion. Fill or remove it.", param=param)
    if n_prompt + n_completion > context_tokens:
        raise InvalidRequest(
            f"Line {line} of the {param} has {n_prompt + n_completion} tokens (prompt {n_prompt}, completion "
            f"{n_completion}); the model takes at most {context_tokens}. Shorten or remove it.",
            param=param,
        )


def generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """Chance for one purpose: equal arguments give equal draws."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which rows each step takes: the epochs, each in an order of its own, one after another, cut into batches.

    A batch may reach over the end of an epoch, so every step but the last takes `batch_size` rows.
    """

    n_rows: int
    n_epochs: int
    batch_size: int
    seed: int

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return steps_of(self.n_rows, self.n_epochs, self.batch_size)

    def batches(self, after_step: int) -> Iterator[list[int]]:
        """Indices of the rows of step `after_step + 1` and of each that follows."""
        start = after_step * self.batch_size
        first_epoch, skipped = divmod(start, self.n_rows)
        orders = (self._order(epoch) for epoch in range(first_epoch, self.n_epochs))
        indices = itertools.islice(itertools.chain.from_iterable(orders), skipped, None)
        while batch := list(itertools.islice(indices, self.batch_size)):
            yield batch

    def epochs_completed(self, step: int) -> int:
        """How many whole epochs the first `step` steps make."""
        return min(step * self.batch_size // self.n_rows, self.n_epochs)

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(self.n_rows, generator=generator(self.seed, "epoch", epoch)).tolist()
        return order


def validation_batch(n_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the validation rows that are measured at `step`; all of them where they are no more than a batch."""
    order: list[int] = torch.randperm(n_rows, generator=generator(seed, "validation", step)).tolist()
    return order[:batch_size]
