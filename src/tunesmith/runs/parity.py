"""The gate before `succeeded`: the served adapter reproduces the trainer's log-probabilities.

The trainer leaves rows and its own log-probabilities for them in `parity.json`. Here the engine scores the same rows
with the adapter as it will be served: from its files, over the engine's own path. What a user measures on a model is
then what its training reported.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.chat import Chat
from tunesmith.data.formats import read_examples
from tunesmith.engine.base import Engine, GenerateRequest, PromptScored, SamplingParams
from tunesmith.rundir import RunDir, RunSpec
from tunesmith.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Bound:
    """By how much a served log-probability may differ from the trainer's: nats, and a share of it."""

    nats: float
    share: float = 0.0

    def of(self, logprob: float) -> float:
        """In nats."""
        return self.nats + self.share * abs(logprob)


EXACT = Bound(1e-4)
"""Two fp32 computations of the same log-probability, with different batches and caches, differ by about 1e-5."""
ROUNDED = Bound(0.1, 0.01)
"""Of an engine that computes in bf16, the trainer's being fp32: of 5,000 tokens of a base of 5 M parameters they
differed by 0.007 on average and by 0.064 at most, unlikely ones more (docs/design/decisions/decode.md)."""
COARSE = Bound(0.4, 0.02)
"""Of one whose weights and states have 8 bits: of 6,000 tokens 0.028 on average and 0.21 at most."""
BOUNDS = {"float32": EXACT, "bfloat16": ROUNDED, "int8": COARSE}
"""By `Settings.engine_precision`, on a processor ..."""
ON_DEVICE = {"float32": EXACT, "bfloat16": COARSE}
"""... and on a GPU, where all between products is rounded to bf16 too: of 4,500 tokens of a base of 20 M parameters
0.022 on average and 0.22 at most."""
LEAST_EFFECT_NATS = 1e-5
"""Tuned and untuned differ by more than this somewhere: less may be rounding, with no adapter in the way."""
SATURATED_NATS = 1e-3
"""Where the base is as sure of every token as this, tuning has nothing to add, and any difference will do."""


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One row of training or validation data with the trainer's opinion of it."""

    token_ids: tuple[int, ...]
    completion_start: int
    logprobs: tuple[float, ...]
    """The trainer's log-probabilities of `token_ids[completion_start:]`."""


def read_rows(run_dir: RunDir) -> list[ParityRow]:
    """The rows the trainer left; at least one. Raises ValueError if there is none, FileNotFoundError without file."""
    rows = [
        ParityRow(tuple(row["token_ids"]), row["completion_start"], tuple(row["logprobs"]))
        for row in json.loads(run_dir.parity.read_text())["rows"]
    ]
    if not rows:
        raise ValueError(f"{run_dir.parity} has no rows")
    return rows


async def check_run(engine: Engine, run_dir: RunDir, spec: RunSpec, bound: Bound = EXACT) -> str | None:
    """Why the adapters of a run, kept epochs included, may not be served, in words for the user; None if all may.

    Raises EngineUnavailable if the engine dies meanwhile: then ask again.
    """
    reason = check_text(run_dir, spec)
    for folder in (run_dir, *(folder for _, folder in run_dir.snapshots())):
        reason = reason or await check(engine, folder, spec, folder.adapter, bound)
    return reason


def check_text(run_dir: RunDir, spec: RunSpec) -> str | None:
    """Why the tokens that were trained on are not those that a user's text becomes; None if they are.

    The trainer leaves the first rows of its file; here they are encoded as a request for a completion is.
    """
    base_dir = Path(spec.base_dir)
    tokenizer = Tokenizer.from_folder(base_dir)
    path = run_dir.validation_file if run_dir.validation_file.exists() else run_dir.training_file
    with path.open("rb") as lines:
        examples = read_examples(lines, Chat.of(base_dir))
        for index, (row, example) in enumerate(zip(read_rows(run_dir), examples, strict=False)):
            prompt_ids = tuple(tokenizer.prompt_ids(example.prompt, example.marked))
            asked = prompt_ids + tuple(tokenizer.encode(example.completion))
            if (asked, len(prompt_ids)) != (row.token_ids, row.completion_start):
                return (
                    f"The model was not trained on what users will ask of it: row {index + 1} is other tokens in a "
                    "request than in training."
                )
    return None


async def check(engine: Engine, run_dir: RunDir, spec: RunSpec, adapter_dir: Path, bound: Bound = EXACT) -> str | None:
    """Why the adapter may not be served, as one sentence for the user; None if it may.

    The adapter is unloaded again. Raises EngineUnavailable if the engine dies meanwhile: then ask again.
    """
    rows = read_rows(run_dir)
    base_dir = Path(spec.base_dir)
    try:
        handle = await engine.load(base_dir, adapter_dir)
    except ValueError as error:
        reason = str(error).replace(str(adapter_dir), adapter_dir.name)  # where it lies is not for users
        return f"The engine cannot load what was trained: {reason}"
    try:
        served = await score_rows(engine, handle, rows)
    finally:
        await engine.unload(handle)
    untuned = await score_rows(engine, await engine.load(base_dir, None), rows)
    return compare(rows, served, untuned, bound)


async def score_rows(engine: Engine, handle: str, rows: list[ParityRow]) -> list[tuple[float, ...]]:
    """The engine's log-probabilities of each row's completion tokens, all rows in flight at once."""
    return await asyncio.gather(*(_score(engine, handle, row) for row in rows))


def compare(
    rows: list[ParityRow], served: list[tuple[float, ...]], untuned: list[tuple[float, ...]], bound: Bound = EXACT
) -> str | None:
    """Why `served` does not stand for the trained model, or None. `untuned` are the base's own log-probabilities."""
    for index, (row, found) in enumerate(zip(rows, served, strict=True)):
        for offset, (trained, answered) in enumerate(zip(row.logprobs, found, strict=True)):
            difference = abs(trained - answered)
            if not difference <= bound.of(trained):  # written so that NaN does not pass
                return (
                    f"The served model does not give the numbers of its training: for token {offset + 1} of row "
                    f"{index + 1} the trainer's log-probability is {trained:.6f} and the served one {answered:.6f}, "
                    f"which may differ by at most {bound.of(trained):.4g}."
                )
    effect = max(abs(a - b) for s, u in zip(served, untuned, strict=True) for a, b in zip(s, u, strict=True))
    certain = all(logprob > -SATURATED_NATS for row in untuned for logprob in row)
    if effect <= (0.0 if certain else LEAST_EFFECT_NATS):
        return "The served model answers exactly as its base does: the trained adapter has no effect."
    return None


async def _score(engine: Engine, handle: str, row: ParityRow) -> tuple[float, ...]:
    request = GenerateRequest(
        handle=handle,
        prompt_ids=row.token_ids,
        sampling=SamplingParams(max_tokens=0, temperature=0.0),
        top_logprobs=0,
        score_prompt=True,
    )
    async for output in engine.generate(request):
        if isinstance(output, PromptScored):
            scores = [score.logprob for score in output.scores[row.completion_start :]]
            return tuple(float("nan") if score is None else score for score in scores)
    raise AssertionError("an engine asked to score the prompt yields PromptScored first")
