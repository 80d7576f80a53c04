"""What is compared: each method answers a set's validation rows and is measured. Knows no files of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality import ask, baselines, measures
from benchmarks.quality.sets import (
    Classification,
    Generation,
    Row,
    attributes,
    choose,
    entities,
    read,
    references,
    shots,
)
from benchmarks.quality.tuning import tune
from tunesmith.client import Client
from tunesmith.tokenizer import Tokenizer

SAMPLES = 10


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is asked at most; None: everything."""

    base_rows: int | None
    """Rows that the untuned base classifies: its prompts are some ten times as long."""
    prompts: int | None
    """Prompts of a generation set."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What came out of one method on one set."""

    scores: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Task:
    """A set and the folder that it is in."""

    data: Classification | Generation
    folder: Path

    @property
    def train(self) -> list[Row]:
        """What may be learned from."""
        return read(self.folder / self.data.train)

    @property
    def valid(self) -> list[Row]:
        """What is asked."""
        return read(self.folder / self.data.valid)


def without_model(task: Task, method: str) -> Measured:
    """`majority` or `tfidf`."""
    started_s = time.monotonic()
    train, valid = task.train, task.valid
    facts: dict[str, Any] = {"rows": len(valid)}
    if method == "majority":
        given = baselines.majority(train, valid)
    else:
        given, facts["chosen"] = baselines.tfidf(train, valid)
    return Measured(_class_scores(valid, given), facts | {"seconds": round(time.monotonic() - started_s, 1)})


def few_shot(client: Client, task: Task, base: str, tokenizer: Tokenizer, limits: Limits) -> Measured:
    """The base as it is, with a few examples before each question."""
    before = shots(task.train, task.data.separator)
    if isinstance(task.data, Classification):
        rows = choose(task.valid, limits.base_rows)
        classes = class_ids(task.train, tokenizer)
        given = ask.first_tokens(client, base, [before + row.prompt for row in rows], classes)
        return Measured(_class_scores(rows, given), {"rows": len(rows)})
    return _written(client, base, task.data, task.valid, limits, before)


def tuned(client: Client, task: Task, base: str, limits: Limits) -> Measured:
    """Fine-tuned with the defaults; the answer is its likeliest token, whatever that is, or its likeliest text."""
    made = tune(client, base, task.train)
    facts = {
        "job_seconds": round(made.job_s, 1),
        "trained_tokens": made.trained_tokens,
        "hyperparameters": made.hyperparameters,
    }
    if isinstance(task.data, Classification):
        rows = task.valid
        given = ask.first_tokens(client, made.model, [row.prompt for row in rows])
        return Measured(_class_scores(rows, given), facts | {"rows": len(rows)})
    measured = _written(client, made.model, task.data, task.valid, limits, "")
    return Measured(measured.scores, facts | measured.facts, measured.samples)


def class_ids(train: Sequence[Row], tokenizer: Tokenizer) -> list[int]:
    """The token of each class. Raises ValueError for a class of more than one."""
    ids = []
    for completion in sorted({row.completion for row in train}):
        encoded = tokenizer.encode(completion)
        if len(encoded) != 1:
            raise ValueError(f"the class {completion!r} has {len(encoded)} tokens; a class is a single token here")
        ids += encoded
    return ids


def _class_scores(rows: Sequence[Row], given: Sequence[str]) -> dict[str, float]:
    truth = [row.completion for row in rows]
    return {"accuracy": measures.accuracy(truth, given), "weighted_f1": measures.weighted_f1(truth, given)}


def _written(
    client: Client, model: str, data: Generation, valid: Sequence[Row], limits: Limits, before: str
) -> Measured:
    wanted = references(valid, data.stop)
    prompts = choose([Row(prompt, "") for prompt in wanted], limits.prompts)
    wanted = {row.prompt: wanted[row.prompt] for row in prompts}
    given = ask.texts(client, model, [before + prompt for prompt in wanted], data.stop, data.max_tokens)
    rows = choose([row for row in valid if row.prompt in wanted], limits.prompts)
    scores = _SCORES[data.name](wanted, given) | {"loss": ask.loss(client, model, before, rows)}
    samples = [
        {"prompt": prompt, "reference": others[0], "given": text}
        for (prompt, others), text in zip(list(wanted.items())[:SAMPLES], given, strict=False)
    ]
    return Measured(scores, {"prompts": len(prompts), "loss_rows": len(rows)}, samples)


def _entities(wanted: dict[str, list[str]], given: Sequence[str]) -> dict[str, float]:
    truth = [entities(others[0]) for others in wanted.values()]
    return measures.entity_scores(truth, [entities(text) for text in given])


def _descriptions(wanted: dict[str, list[str]], given: Sequence[str]) -> dict[str, float]:
    others = list(wanted.values())
    return {
        "bleu": measures.bleu(given, others),
        "rouge_l": measures.rouge_l(given, others),
        "slot_coverage": measures.slot_coverage([attributes(prompt) for prompt in wanted], given),
    }


def _replies(wanted: dict[str, list[str]], given: Sequence[str]) -> dict[str, float]:
    return {"rouge_l": measures.rouge_l(given, list(wanted.values()))}


_SCORES: dict[str, Callable[[dict[str, list[str]], Sequence[str]], dict[str, float]]] = {
    "wnut17_entities": _entities,
    "e2e_descriptions": _descriptions,
    "support_chat": _replies,
}
