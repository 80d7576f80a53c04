"""Writes the model cards from what was recorded: `family.toml` for the making, the quality benchmark for the scores.

    python -m pretraining.card

A card says what a model is, what it has read, what it cost and how it does when fine-tuned; nothing is typed by hand
but `family.toml`, and the tests compare the pages with it.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import results
from benchmarks.quality.sets import CLASSIFICATION
from pretraining.shapes import SHAPES, parameters
from tunesmith.core import box

HERE = Path(__file__).parent
ROOT = HERE.parent
CARDS = ROOT / "docs" / "models"
SCORES = ROOT / "benchmarks" / "quality" / "results.jsonl"


@dataclass(frozen=True, slots=True)
class Making:
    """How one model of the family came to be: an entry of `family.toml`."""

    name: str
    tokens: int
    """Tokens this model was trained on, those of a model it was grown from not counted."""
    grown_from: str | None
    tokens_before: int | None
    """What that one had read when this was grown from it, where it has read on since."""
    bits_per_byte: float
    """Of the packed weights, over the whole validation shard."""
    cost: str
    command: str
    note: str


def family() -> dict[str, Making]:
    """The family, smallest first."""
    entries = tomllib.loads((HERE / "family.toml").read_text())
    return {
        name: Making(name=name, **{"grown_from": None, "tokens_before": None, **entry})
        for name, entry in entries.items()
    }


def tokens_read(making: Making, all_of_them: dict[str, Making]) -> int:
    """Tokens that went into the weights, those of the models it was grown from included."""
    return tokens_before(making, all_of_them) + making.tokens


def tokens_before(making: Making, all_of_them: dict[str, Making]) -> int:
    """Those that the model it was grown from had read by then."""
    if making.tokens_before is not None or not making.grown_from:
        return making.tokens_before or 0
    return tokens_read(all_of_them[making.grown_from], all_of_them)


def pages() -> dict[str, str]:
    """File name -> text of every card and of the page that lists them."""
    makings, lines = family(), results.read_lines(SCORES)
    cards = {f"{name}.md": _card(making, makings, lines) for name, making in makings.items()}
    return {"README.md": _overview(makings), **cards}


def _card(making: Making, makings: dict[str, Making], lines: list[dict[str, Any]]) -> str:
    config = SHAPES[making.name]
    packed = box.BOX / making.name / box.PACKED
    embedding = config.vocabulary_size * config.width
    read = f"{_millions(making.tokens)} of the [corpus](README.md#what-they-have-read)"
    if making.grown_from:
        before = _millions(tokens_before(making, makings))
        read += f", grown from [{making.grown_from}]({making.grown_from}.md), which had read {before}"
    facts = [
        (
            "shape",
            f"Llama type: width {config.width}, {config.layers} layers, {config.heads} heads of {config.head_width}"
            f" ({config.kv_heads} for keys and values), feed-forward {config.feed_forward_width}, tied embeddings",
        ),
        ("parameters", f"{parameters(config) / 1e6:.1f} M, of which {embedding / 1e6:.1f} M in the embedding"),
        ("context", f"{config.context_tokens:,} tokens"),
        ("trained on", read),
        ("cost", making.cost),
        (
            "held-out text",
            f"{making.bits_per_byte:.3f} bits per byte over 6.1 MB that share no source document with training",
        ),
        (
            "in the box",
            f"int8 rows with fp32 scales, {packed.stat().st_size / 1e6:.1f} MB; unpacked to fp32 on first use",
        ),
        ("licence", "Apache-2.0, like the rest of the package"),
    ]
    table = ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts)]
    parts = [f"# {making.name}", "\n".join(table), f"```\n{making.command.strip()}\n```", making.note.strip()]
    parts += [_scores(making.name, lines), _LIMITS]
    return "\n\n".join(part for part in parts if part) + "\n"


def _scores(name: str, lines: list[dict[str, Any]]) -> str:
    """Accuracy of the tuned model on each classification set, beside what needs no model."""
    found = {(line["set"], line["method"], line["base"]): line["scores"] for line in lines}
    rows = [
        (
            data.name,
            *(found.get((data.name, method, base)) for method, base in _COLUMNS),
            found.get((data.name, "tuned", name)),
        )
        for data in CLASSIFICATION
    ]
    shown = [row for row in rows if row[-1] is not None]
    if not shown:
        return ""
    body = [" | ".join(["| " + row[0], *(_accuracy(scores) for scores in row[1:])]) + " |" for row in shown]
    return _SCORES_HEAD + "\n".join(body)


def _accuracy(scores: dict[str, float] | None) -> str:
    return f"{scores['accuracy']:.3f}" if scores else ""


def _overview(makings: dict[str, Making]) -> str:
    header = "| model | parameters | tokens read | bits per byte | in the box |\n| --- | --- | --- | --- | --- |"
    rows = [
        f"| [{name}]({name}.md) | {parameters(SHAPES[name]) / 1e6:.1f} M | {_millions(tokens_read(making, makings))}"
        f" | {making.bits_per_byte:.3f} | {(box.BOX / name / box.PACKED).stat().st_size / 1e6:.1f} MB |"
        for name, making in makings.items()
    ]
    return (HERE / "cards.md").read_text().replace("{table}", "\n".join([header, *rows]))


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.1f} M tokens"


_SCORES_HEAD = """## Fine-tuned

Accuracy on held-out rows; sets, methods and all other scores:
[benchmarks/quality](../../benchmarks/quality/README.md).

| set | always the largest class | TF-IDF + logistic regression | tuned, default hyperparameters |
| --- | --- | --- | --- |
"""
_COLUMNS = (("majority", None), ("tfidf", None))
_LIMITS = "What the family is good for, what it is not, and what it has read: [README.md](README.md)."


def main() -> None:
    """Writes every page to `docs/models/`."""
    for name, text in pages().items():
        (CARDS / name).write_text(text)


if __name__ == "__main__":
    main()
