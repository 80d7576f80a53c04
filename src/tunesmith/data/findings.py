"""CHECKS: what is good or bad about training data, in order; each gives a Finding, or nothing. Pure; no rows, no files.

The order and the meaning are those of `openai tools fine_tunes.prepare_data` 0.28.1; where and why they differ:
docs/design/decisions/prepare.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from tunesmith.data.facts import ENDINGS, NEW_LINE, SEPARATORS, ColumnFacts, Facts, Lengths, Task
from tunesmith.data.json_rows import Shape
from tunesmith.data.plan import Plan
from tunesmith.data.rows import COMPLETION, PROMPT, RowList
from tunesmith.data.source import Format, Source

FEW_EXAMPLES = 100
LONG_MARK_CHARACTERS = 10
LONG_PROMPT_PREFIX_CHARACTERS = 12
LONG_COMPLETION_PREFIX_CHARACTERS = 5
LAST_SEPARATOR = "\n\n### =>\n\n"
LAST_ENDING = " [END]"
"""Where some text holds each of the usual ones."""


NO_ROWS = RowList()


class Severity(Enum):
    """What follows from a finding."""

    NOTE = "note"
    """Good to know."""
    SUGGESTED = "suggested"
    """A fix is offered."""
    REQUIRED = "required"
    """A fix is made: without it the file cannot be trained on."""
    FATAL = "fatal"
    """Only a person can mend it."""


@dataclass(frozen=True, slots=True)
class Fix:
    """What can be done about a finding."""

    action: str
    """As an order, without a full stop: `Remove 3 duplicate rows`."""
    change: Mapping[str, Any] = field(default_factory=dict)
    """Fields of Plan; empty for what is done in any case."""

    def accept(self, plan: Plan) -> Plan:
        """The plan with this fix in it."""
        return replace(plan, **self.change)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about a file."""

    id: str
    severity: Severity
    explanation: str
    """Sentences."""
    rows: RowList = NO_ROWS
    """The rows that it is about; none if it is about all."""
    fix: Fix | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What the checks look at."""

    source: Source
    facts: Facts
    lengths: Lengths | None
    """None where no base was given; then lengths are not judged."""


Check = Callable[[Subject], Finding | None]


def find(subject: Subject) -> list[Finding]:
    """All findings, in the order of CHECKS, up to the first that is fatal."""
    found: list[Finding] = []
    for check in CHECKS:
        finding = check(subject)
        if finding is not None:
            found.append(finding)
            if finding.severity is Severity.FATAL:
                break
    return found


def _format(subject: Subject) -> Finding | None:
    source = subject.source
    if source.format is Format.JSONL and source.shape is Shape.LINES:
        return None
    name = source.format.name
    if source.shape is not None:
        written = {Shape.LINES: "JSONL", Shape.LIST: "JSON", Shape.COLUMNS: "JSON"}[source.shape]
        text = f"Your file ends with `.{source.format.value}` and holds {source.shape.value}."
        return Finding("format", Severity.REQUIRED, text, fix=Fix(f"Convert your format `{written}` to `JSONL`"))
    text = f"By its ending your file is {'an Excel workbook' if name == 'XLSX' else f'a {name} file'}."
    return Finding("format", Severity.REQUIRED, text, fix=Fix(f"Convert your format `{name}` to `JSONL`"))


def _sheets(subject: Subject) -> Finding | None:
    source = subject.source
    if len(source.sheets) < 2:
        return None
    others = ", ".join(f"`{name}`" for name in source.sheets if name != source.sheet)
    text = (
        f"The workbook has {len(source.sheets)} sheets. Only `{source.sheet}` is read; --sheet names another: {others}."
    )
    return Finding("sheets", Severity.NOTE, text)


def _encoding(subject: Subject) -> Finding | None:
    encoding = subject.source.encoding
    if encoding in (None, "utf-8", "utf-8-sig"):
        return None
    guess = " That is a guess: look at accents and quotation marks." if encoding in ("cp1252", "latin-1") else ""
    text = f"The file is not UTF-8; it is read as {str(encoding).upper()}.{guess}"
    return Finding("encoding", Severity.REQUIRED, text, fix=Fix("Write UTF-8"))


def _number(subject: Subject) -> Finding:
    count = subject.facts.rows
    text = f"Your file contains {count:,} prompt-completion pairs."
    if count < FEW_EXAMPLES:
        text += (
            " A few hundred are the least to begin with: quality tends to rise by an even step with each doubling of "
            "their number."
        )
    return Finding("num_examples", Severity.NOTE, text)


def _column(name: str) -> Check:
    def check(subject: Subject) -> Finding | None:
        columns = subject.source.columns
        read = columns.prompt if name == PROMPT else columns.completion
        if read == name:
            return None
        text = f"The column/key `{read}` is read as `{name}`."
        return Finding(f"{name}_column", Severity.REQUIRED, text, fix=Fix(f"Rename column/key `{read}` to `{name}`"))

    return check


def _extra_columns(subject: Subject) -> Finding | None:
    extra = subject.source.columns.extra
    if not extra:
        return None
    named = ", ".join(f"`{name}`" for name in extra)
    text = f"There should be two columns/keys a row, `prompt` and `completion`. There are also: {named}."
    return Finding("additional_column", Severity.REQUIRED, text, fix=Fix(f"Remove additional columns/keys: {named}"))


def _empty(subject: Subject) -> Finding | None:
    rows = subject.facts.empty
    if not rows.count:
        return None
    text = f"Completions should not be empty. These rows are: {rows}."
    return Finding(
        "empty_completion", Severity.REQUIRED, text, rows, Fix(f"Remove {rows.count:,} rows with empty completions")
    )


def _nothing_left(subject: Subject) -> Finding | None:
    if subject.facts.kept:
        return None
    return Finding(
        "no_examples", Severity.FATAL, "There is no row with a completion. Add examples, and run this again."
    )


def _task(subject: Subject) -> Finding | None:
    if subject.facts.task is not Task.CLASSIFICATION:
        return None
    text = (
        f"By its {subject.facts.distinct_completions:,} different completions this looks like classification. One of "
        "the smaller, faster models such as `ada` does well at it; keep a part of the rows for validation, "
        "to know how well."
    )
    return Finding("task", Severity.NOTE, text)


def _duplicates(subject: Subject) -> Finding | None:
    rows = subject.facts.duplicates
    if not rows.count:
        return None
    text = f"{rows.count:,} rows repeat an earlier one, prompt and completion. They are: {rows}."
    fix = Fix(f"Remove {rows.count:,} duplicate rows", {"drop_duplicates": True})
    return Finding("duplicated_rows", Severity.SUGGESTED, text, rows, fix)


def _too_long(subject: Subject) -> Finding | None:
    rows, lengths = subject.facts.too_long, subject.lengths
    if lengths is None or not rows.count:
        return None
    text = (
        f"{rows.count:,} rows are longer than the {lengths.limit_tokens:,} tokens that `{lengths.base}` reads; the "
        f"longest has {subject.facts.longest_tokens:,}. They are: {rows}."
    )
    return Finding(
        "long_examples", Severity.SUGGESTED, text, rows, Fix(f"Remove {rows.count:,} long rows", {"drop_long": True})
    )


def _case(name: str, field_name: str) -> Check:
    def check(subject: Subject) -> Finding | None:
        column = subject.facts.prompts if name == PROMPT else subject.facts.completions
        if not column.mostly_upper:
            return None
        text = (
            f"More than a third of the letters in your {name}s are upper case. Models have seen mostly lower case and "
            "do worse on capitals; lower-case the data if that makes sense in your domain."
        )
        return Finding(
            f"lower_case_{name}", Severity.SUGGESTED, text, fix=Fix(f"Lower-case all {name}s", {field_name: True})
        )

    return check


def _prompt_suffix(subject: Subject) -> Finding | None:
    facts = subject.facts
    if facts.task is Task.OPEN_ENDED:
        return None
    prompts = facts.prompts
    if prompts.identical:
        text = (
            f"All prompts are the same: `{shown(prompts.common_suffix)}`. For open-ended generation leave the prompts "
            "empty; otherwise they have to differ."
        )
        return Finding("prompt_suffix", Severity.FATAL, text)
    suggested = separator(prompts)
    if prompts.common_suffix:
        return Finding("prompt_suffix", Severity.NOTE, _about_suffix(prompts, "prompts", suggested))
    text = (
        "Your prompts have no common ending. A separator at the end of each tells the model where its answer begins. "
        "For open-ended generation leave the prompts empty."
    )
    fix = Fix(f"Add the separator `{shown(suggested)}` to the end of all prompts", {"prompt_suffix": suggested})
    return Finding("prompt_suffix", Severity.SUGGESTED, text, fix=fix)


def _prompt_prefix(subject: Subject) -> Finding | None:
    prompts = subject.facts.prompts
    prefix = prompts.common_prefix
    if not prefix or prompts.identical:
        return None
    text = f"All prompts begin with `{shown(prefix)}`."
    if len(prefix) <= LONG_PROMPT_PREFIX_CHARACTERS:
        return Finding("prompt_prefix", Severity.NOTE, text)
    text += " A tuned model needs no instructions and no examples in its prompt: the rows themselves say what to do."
    fix = Fix(f"Remove the prefix `{shown(prefix)}` from all prompts", {"prompt_prefix": prefix})
    return Finding("prompt_prefix", Severity.SUGGESTED, text, fix=fix)


def _completion_prefix(subject: Subject) -> Finding | None:
    completions = subject.facts.completions
    prefix = completions.common_prefix
    if len(prefix) < LONG_COMPLETION_PREFIX_CHARACTERS or completions.identical:
        return None
    text = f"All completions begin with `{shown(prefix)}`. What is always the same need not be generated."
    fix = Fix(f"Remove the prefix `{shown(prefix)}` from all completions", {"completion_prefix": prefix})
    return Finding("completion_prefix", Severity.SUGGESTED, text, fix=fix)


def _completion_suffix(subject: Subject) -> Finding | None:
    facts = subject.facts
    if facts.task is not Task.CONDITIONAL:
        return None
    completions = facts.completions
    if completions.identical:
        text = f"All completions are the same: `{shown(completions.common_suffix)}`. A model would only repeat that."
        return Finding("completion_suffix", Severity.FATAL, text)
    suggested = ending(completions)
    if completions.common_suffix:
        return Finding("completion_suffix", Severity.NOTE, _about_suffix(completions, "completions", suggested))
    text = "Your completions have no common ending. One at the end of each tells the model where to stop."
    fix = Fix(f"Add the ending `{shown(suggested)}` to all completions", {"completion_suffix": suggested})
    return Finding("completion_suffix", Severity.SUGGESTED, text, fix=fix)


def _completion_space(subject: Subject) -> Finding | None:
    if subject.facts.completions.starts_with_space:
        return None
    text = (
        "Completions should begin with a space: most words are one token with the space before them, and more without."
    )
    fix = Fix("Add a space to the beginning of completions that have none", {"completion_space": True})
    return Finding("completion_space", Severity.SUGGESTED, text, fix=fix)


CHECKS: tuple[Check, ...] = (
    _format,
    _sheets,
    _encoding,
    _number,
    _column(PROMPT),
    _column(COMPLETION),
    _extra_columns,
    _empty,
    _nothing_left,
    _task,
    _duplicates,
    _too_long,
    _case(PROMPT, "lower_prompts"),
    _case(COMPLETION, "lower_completions"),
    _prompt_suffix,
    _prompt_prefix,
    _completion_prefix,
    _completion_suffix,
    _completion_space,
)


def separator(prompts: ColumnFacts) -> str:
    """The first of SEPARATORS that no prompt holds; ` ->` only where prompts are single lines."""
    options = SEPARATORS[1:] if NEW_LINE in prompts.holds else SEPARATORS
    return next((option for option in options if option not in prompts.holds), LAST_SEPARATOR)


def ending(completions: ColumnFacts) -> str:
    """The first of ENDINGS that no completion holds."""
    return next((option for option in ENDINGS if option not in completions.holds), LAST_ENDING)


def shown(text: str) -> str:
    r"""A piece of text within a sentence: line ends as `\n`."""
    return text.replace("\n", "\\n")


def _about_suffix(column: ColumnFacts, name: str, suggested: str) -> str:
    suffix = column.common_suffix
    text = f"All {name} end with `{shown(suffix)}`."
    if len(suffix) > LONG_MARK_CHARACTERS:
        text += f" That is long; a shorter one such as `{shown(suggested)}` does the same."
    if column.suffix_inside:
        text += f" WARNING: some {name} hold it before their end too. It should be unique; look through your {name}."
    return text
