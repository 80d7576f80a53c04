"""The data sets: where their rows are, how the base model is shown examples, how an answer is read. Knows no model."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHOTS = 4
SEED = 1
"""Of every random choice: which examples are shown, which prompts are asked."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Classification:
    """One of a few completions, each a single token, is right."""

    name: str
    train: str
    """Path below the folder of data sets; so is `valid`."""
    valid: str
    n_classes: int
    separator: str
    """Between the examples in the base's prompt."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Text is to be written. Several rows may share a prompt; each is then one reference of it."""

    name: str
    train: str
    valid: str
    stop: str
    max_tokens: int
    separator: str


CLASSIFICATION = (
    Classification("tweet_sentiment", "tweet_sentiment/train.jsonl", "tweet_sentiment/valid.jsonl", 2, "\n"),
    Classification("tweet_sentiment3", "tweet_sentiment/train3.jsonl", "tweet_sentiment/valid3.jsonl", 3, "\n"),
    Classification("banking77", "banking77/train.jsonl", "banking77/valid.jsonl", 77, "\n\n"),
    Classification("clinc150", "clinc150/train.jsonl", "clinc150/valid.jsonl", 150, "\n\n"),
)
GENERATION = (
    Generation("wnut17_entities", "wnut17_entities/train.jsonl", "wnut17_entities/valid.jsonl", " END", 64, " END\n\n"),
    Generation(
        "e2e_descriptions", "e2e_descriptions/train.jsonl", "e2e_descriptions/valid.jsonl", " END", 96, " END\n"
    ),
    Generation("support_chat", "support_chat/train.jsonl", "support_chat/valid.jsonl", "\n", 64, "\n\n"),
)
SETS: dict[str, Classification | Generation] = {each.name: each for each in (*CLASSIFICATION, *GENERATION)}


def read(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def choose(rows: Sequence[Row], most: int | None) -> list[Row]:
    """At most that many rows, drawn once and for all; None: all of them."""
    if most is None or most >= len(rows):
        return list(rows)
    return random.Random(SEED).sample(rows, most)


def shots(train: Sequence[Row], separator: str) -> str:
    """The text before the base's prompt: SHOTS examples of different completions, as far as there are so many.

    Drawn among the shorter half of the prompts, so that they leave room for the question.
    """
    drawn = random.Random(SEED).sample(train, len(train))
    half = sorted(len(row.prompt) for row in train)[len(train) // 2]
    rows = [row for row in drawn if len(row.prompt) <= half]
    seen: dict[str, int] = defaultdict(int)
    order = []
    for index, row in enumerate(rows):
        order.append((seen[row.completion], index))  # the first of each completion, then the second of each
        seen[row.completion] += 1
    chosen = [rows[index] for _, index in sorted(order)[:SHOTS]]
    # The completion's own end (" END", a line break) is part of the separator.
    return "".join(row.prompt + row.completion.rstrip("\n").removesuffix(" END") + separator for row in chosen)


def references(rows: Sequence[Row], stop: str) -> dict[str, list[str]]:
    """Prompt -> what may be written after it, without the stop sequence and the spaces around."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        found[row.prompt].append(row.completion.removesuffix(stop).strip())
    return dict(found)


def entities(text: str) -> list[str]:
    r"""The names that an answer lists, one a line; "none" is the empty list.

    >>> entities(" Empire State Building\n ESB"), entities(" none")
    (['Empire State Building', 'ESB'], [])
    """
    lines = [line.strip() for line in text.splitlines()]
    return [] if lines == ["none"] else [line for line in lines if line]


def attributes(prompt: str) -> list[str]:
    """The values of `name=..., food=... ->` that a description is to state word for word.

    `familyFriendly` is yes or no, which a sentence says in other words.

    >>> attributes("name=The Mill, priceRange=less than £20, familyFriendly=yes ->")
    ['The Mill', 'less than £20']
    """
    pairs = (pair.partition("=") for pair in prompt.removesuffix(" ->").split(", "))
    return [value for name, _, value in pairs if name != "familyFriendly"]
