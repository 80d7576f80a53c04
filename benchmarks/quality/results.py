"""The file of results, a line for each (set, method, base's digest), and the page made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.sets import CLASSIFICATION, GENERATION, SHOTS

BASES = ("ada", "babbage", "curie", "davinci")
MEASURES = {
    "wnut17_entities": ("f1", "exact_match", "precision", "recall", "loss"),
    "e2e_descriptions": ("bleu", "rouge_l", "slot_coverage", "loss"),
    "support_chat": ("rouge_l", "loss"),
}
LONGEST_SHOWN = 240
"""Characters of a sample's prompt, counted from its end."""


@dataclass(frozen=True, slots=True)
class Key:
    """What is measured only once."""

    set_name: str
    method: str
    base_digest: str | None
    """None: the method uses no base."""


def key_of(line: dict[str, Any]) -> Key:
    """The key of a line."""
    return Key(line["set"], line["method"], line["base_digest"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines, in their order; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: dict[str, Any]) -> None:
    """One line, whole: several processes may write to the same file."""
    with path.open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def page(lines: Sequence[dict[str, Any]], before: str) -> str:
    """The Markdown page: `before`, the tables, the samples. Of several lines for a base's name the last counts."""
    found = {(line["set"], line["method"], line["base"]): line for line in lines}
    parts = [before.strip(), _classification(found), _cost(found), *_generation(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


Found = dict[tuple[str, str, str | None], dict[str, Any]]


def _classification(found: Found) -> str:
    columns = [("majority", None), ("tfidf", None), *(("few-shot", base) for base in BASES)]
    columns += [("tuned", base) for base in BASES]
    shown = [column for column in columns if any(key[1:] == column and _is_class(key[0]) for key in found)]
    names = {"majority": "always the largest class", "tfidf": "TF-IDF + logistic regression"}
    names |= {"few-shot": f"{{}}, {SHOTS} examples in the prompt", "tuned": "**{} tuned**"}
    header = ["set", "rows", "measure", *(names[method].format(base) for method, base in shown)]
    rows = []
    for data in CLASSIFICATION:
        lines = [found.get((data.name, *column)) for column in shown]
        if any(lines):
            n_rows = max(line["rows"] for line in lines if line)
            for measure in ("accuracy", "weighted_f1"):
                cells = [f"{line['scores'][measure]:.3f}" if line else "" for line in lines]
                rows.append([data.name, f"{n_rows:,}", measure.replace("_", " "), *cells])
    return "## Classification\n\n" + _table(header, rows) if rows else ""


def _cost(found: Found) -> str:
    header = ["set", "base", "weights", "tokens trained", "job, s", "batch", "learning rate multiplier"]
    rows = []
    for (name, method, base), line in sorted(found.items(), key=_order):
        if method == "tuned":
            asked = line["hyperparameters"]
            tokens, seconds = f"{line['trained_tokens']:,}", f"{line['job_seconds']:,.0f}"
            cells = [name, base, line["base_digest"], tokens, seconds]
            rows.append([*cells, asked["batch_size"], asked["learning_rate_multiplier"]])
    return "## What tuning took\n\n" + _table(header, rows) if rows else ""


def _generation(found: Found) -> Iterable[str]:
    for data in GENERATION:
        measures = MEASURES[data.name]
        lines = [
            (base, method, found[data.name, method, base])
            for base in BASES
            for method in ("few-shot", "tuned")
            if (data.name, method, base) in found
        ]
        if not lines:
            continue
        rows = [
            [f"**{base} tuned**" if method == "tuned" else f"{base}, {SHOTS} examples in the prompt", line["prompts"]]
            + [f"{line['scores'][measure]:.3f}" for measure in measures]
            for base, method, line in lines
        ]
        names = ["loss, nats a token" if measure == "loss" else measure.replace("_", " ") for measure in measures]
        yield f"## {data.name}\n\n" + _table(["model", "prompts", *names], rows)
        yield _samples(data.name, found)


def _samples(set_name: str, found: Found) -> str:
    """Side by side, of the largest base that has both."""
    for base in reversed(BASES):
        pair = [found.get((set_name, method, base)) for method in ("few-shot", "tuned")]
        if pair[0] and pair[1]:
            rows = [
                [
                    _cell(one["prompt"][-LONGEST_SHOWN:]),
                    _cell(one["reference"]),
                    _cell(one["given"]),
                    _cell(two["given"]),
                ]
                for one, two in zip(pair[0]["samples"], pair[1]["samples"], strict=True)
            ]
            header = ["end of the prompt", "reference", f"{base}, {SHOTS} examples", f"{base} tuned"]
            return f"The first {len(rows)} prompts:\n\n" + _table(header, rows)
    return ""


def _order(entry: tuple[tuple[str, str, str | None], object]) -> tuple[int, int]:
    (name, _, base), _ = entry
    names = [data.name for data in (*CLASSIFICATION, *GENERATION)]
    return names.index(name), BASES.index(base or BASES[0])


def _is_class(set_name: str) -> bool:
    return any(data.name == set_name for data in CLASSIFICATION)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("#", "\\#").replace("\n", " ⏎ ")


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
