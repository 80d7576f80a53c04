"""What the doctor says of numbers and classes: too few rows, uneven classes, names that a base reads badly. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from tunesmith.data.doctor import Codec, Examined
from tunesmith.data.doctor_classes import judge_classes
from tunesmith.data.facts import Task
from tunesmith.data.findings import Finding, Fix, Severity, shown
from tunesmith.data.rows import RowList

ROWS_PER_CLASS = 100
"""The guide's advice for classification."""
GENERATION_ROWS = 500
"""The guide's advice for conditional generation."""
UNBALANCED = 10
"""Times as many rows in one class as in another."""
MAX_CLASSES_JUDGED = 1_000
NAMED = 8
"""So many classes stand in a sentence."""


def numbers(examined: Examined) -> Iterator[Finding]:
    """Whether there are enough rows, of each class and in all."""
    facts = examined.facts
    classes = _classes(examined)
    if not classes:
        if 0 < facts.kept < GENERATION_ROWS and facts.task is not Task.CLASSIFICATION:
            text = (
                f"There are {facts.kept:,} rows. For generation, {GENERATION_ROWS} good ones are the least to aim for."
            )
            yield Finding("few_rows", Severity.NOTE, text, fix=Fix("Add rows"))
        return
    small = {name: count for name, count in classes.items() if count < ROWS_PER_CLASS}
    if small:
        text = (
            f"{len(small):,} of {len(classes):,} classes have fewer than {ROWS_PER_CLASS} rows: "
            f"{_listed([f'{name.strip()} ({count:,})' for name, count in reversed(small.items())])}."
        )
        yield Finding("few_rows", Severity.NOTE, text, RowList(sum(small.values())), Fix("Add rows of these classes"))
    (most, many), (least, few) = next(iter(classes.items())), list(classes.items())[-1]
    if many >= UNBALANCED * few:
        text = (
            f"`{most.strip()}` has {many:,} rows, `{least.strip()}` {few:,}. The model will rarely answer with what is "
            "rare; accuracy looks good all the same. If the class is a slip of spelling, mend that."
        )
        yield Finding(
            "class_imbalance", Severity.SUGGESTED, text, RowList(few), Fix("Add rows of rare classes, or weigh them")
        )


def class_names(examined: Examined, codec: Codec | None) -> tuple[list[Finding], Mapping[str, str]]:
    """Findings about the names of classes, and new names for those that should have one."""
    classes = _classes(examined)
    if codec is None or not classes or len(classes) > MAX_CLASSES_JUDGED:
        return [], {}
    judged = judge_classes(list(classes), codec.encode)
    renamed = _listed([f"`{shown(name.strip())}` -> `{shown(new.strip())}`" for name, new in judged.spellings.items()])
    fix = Fix(f"Rename classes: {renamed}" if renamed else "Choose names that are one token each")
    findings = [
        Finding(id_, Severity.SUGGESTED, text, RowList(sum(classes[name] for name in names)), fix)
        for id_, names, text in (
            (
                "class_tokens",
                judged.several_tokens,
                "are not one token for this base. Metrics judge by the first, and each answer takes longer",
            ),
            (
                "class_first_tokens",
                judged.alike,
                "begin with the same token as another: metrics that judge by the first cannot tell them apart",
            ),
        )
        if names
        for text in [f"{len(names):,} of {len(classes):,} classes {text}: {_listed([n.strip() for n in names])}."]
    ]
    return findings, judged.spellings


def unknown_classes(training: Examined, validation: Examined) -> Iterator[Finding]:
    """Whether validation asks for what training does not teach."""
    known = {name.strip() for name in _classes(training)}
    unknown = {name: count for name, count in _named(validation).items() if name.strip() not in known}
    if known and unknown:
        text = (
            f"Validation has classes that training has not: {_listed([name.strip() for name in unknown])}. The model "
            "cannot know them, and metrics count them as wrong."
        )
        fix = Fix("Mend their spelling, or add training rows of these classes")
        yield Finding("unknown_classes", Severity.SUGGESTED, text, RowList(sum(unknown.values())), fix)


def _classes(examined: Examined) -> dict[str, int]:
    """Classes with their rows, the most frequent first, as they are spelt most often; none if there are no classes."""
    return _named(examined) if examined.facts.task is Task.CLASSIFICATION else {}


def _named(examined: Examined) -> dict[str, int]:
    """Completions without stop sequence, with how often each comes; white space around them tells none apart."""
    spelt: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for text, count in examined.facts.classes:
        name = text.removesuffix(examined.marks.stop or "")
        if name.strip():
            counts[spelt.setdefault(name.strip(), name)] += count
    return dict(counts.most_common())


def _listed(names: Sequence[str]) -> str:
    """`a, b and 3 more`."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
