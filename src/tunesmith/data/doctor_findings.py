"""What the doctor says of rows that were looked at: findings, each with rows, reasons and a way out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from tunesmith.data.doctor import Codec, Examined
from tunesmith.data.doctor_labels import class_names, numbers, unknown_classes
from tunesmith.data.doctor_overlap import Overlap
from tunesmith.data.facts import Task
from tunesmith.data.findings import Finding, Fix, Severity, Subject, ending, find, separator, shown
from tunesmith.data.rows import SHOWN_ROWS, RowList

_OF_THE_FILE = frozenset(
    {"format", "sheets", "encoding", "prompt_column", "completion_column", "additional_column", "task"}
)
_SAME_TEXTS = frozenset({"prompt_suffix", "completion_suffix"})
"""Where they are fatal, all prompts or all completions are the same."""
_OF_STYLE = frozenset({"lower_case_prompt", "lower_case_completion", "prompt_prefix", "completion_prefix"})
"""What `prepare` asks about, and a person may have meant: no reason for a script to stop."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that is said of a file."""

    findings: tuple[Finding, ...]
    class_spellings: Mapping[str, str]
    """New names for classes, where old ones are not one token or begin alike."""


def diagnose(examined: Examined, codec: Codec | None) -> Diagnosis:
    """The findings about rows of training."""
    classes, spellings = class_names(examined, codec)
    rows = _of_rows(examined, examined.facts.task)
    return Diagnosis((*rows, *_no_marks(examined), *numbers(examined), *classes), spellings)


def about_file(subject: Subject) -> list[Finding]:
    """Findings of `prepare` that are not said here in more words: how the file is written, and matters of style."""
    found = find(subject)
    return [
        *(one for one in found if one.id in _OF_THE_FILE or (one.id in _SAME_TEXTS and one.severity is Severity.FATAL)),
        *(replace(one, severity=Severity.NOTE) for one in found if one.id in _OF_STYLE),
    ]


def about_validation(training: Examined, validation: Examined, overlap: Overlap) -> list[Finding]:
    """Findings about rows of a validation file, looked at with the marks of the training rows."""
    task = training.facts.task
    findings = [*_of_rows(validation, task), *_overlaps(overlap)]
    if task is Task.CLASSIFICATION:
        findings += unknown_classes(training, validation)
    return findings


def _found(
    id_: str, rows: RowList, explanation: str, action: str, severity: Severity = Severity.SUGGESTED, **change: object
) -> Iterator[Finding]:
    """A finding, if there are such rows."""
    if rows.count:
        yield Finding(id_, severity, explanation, rows, Fix(action, change))


def _of_rows(examined: Examined, task: Task) -> Iterator[Finding]:
    """What rows of training and of validation alike can have."""
    yield from _unreadable(examined)
    yield from _private(examined)
    yield from _marks(examined)
    yield from _repeats(examined, task)


def _unreadable(examined: Examined) -> Iterator[Finding]:
    facts, texts = examined.facts, examined.texts
    if not facts.kept:
        yield Finding("no_examples", Severity.FATAL, "There is no row with a completion.")
    yield from _found(
        "empty_completion",
        facts.empty,
        "These rows have no completion: there is nothing to learn from them, and training refuses them.",
        "Remove these rows",
        Severity.REQUIRED,
    )
    yield from _found(
        "half_characters",
        texts["half_characters"],
        "These rows hold half a character (one of two surrogates). No bytes stand for it, so no request could send it. "
        "Something has cut a text within an emoji or the like.",
        "Write these texts anew from where they come from",
        Severity.REQUIRED,
    )
    yield from _found(
        "long_examples",
        facts.too_long,
        f"These rows are longer than the base reads; the longest has {facts.longest_tokens:,} tokens. Training refuses "
        "them.",
        "Shorten or remove these rows",
        Severity.REQUIRED,
        drop_long=True,
    )
    yield from _found(
        "control_characters",
        texts["control_characters"],
        "These rows hold control characters, which nobody types: requests will not have them, and answers should not.",
        "Remove the control characters, or read the source in its right encoding",
    )
    yield from _found(
        "special_tokens",
        texts["special_tokens"],
        "These rows spell out a token that begins or ends texts. In a completion it ends the answer there.",
        "Take it out; the end of a completion is marked by itself",
    )
    yield from _found(
        "changed_tokens",
        texts["changed_tokens"],
        "The tokens of these rows give another text back: this tokenizer composes characters. Compared with the text, "
        "answers would differ.",
        "Write the texts in composed characters (Unicode NFC)",
    )


def _private(examined: Examined) -> Iterator[Finding]:
    texts = examined.texts
    yield from _found(
        "secrets",
        texts["secrets"],
        "These rows hold what looks like a secret: an API key, a private key, a password in an address. A model "
        "repeats what it was trained on, to anybody who may ask it.",
        "Take the secrets out, and revoke those that are real",
        Severity.REQUIRED,
    )
    yield from _found(
        "card_numbers",
        texts["card_numbers"],
        "These rows hold numbers of payment cards (their check digit is right). A model repeats what it was trained "
        "on.",
        "Put a placeholder in their place",
        Severity.REQUIRED,
    )
    for id_, what in ("email_addresses", "e-mail addresses"), ("phone_numbers", "phone numbers"):
        yield from _found(
            id_,
            texts[id_],
            f"These rows hold {what}. A model may repeat them in an answer to somebody else.",
            "Put a placeholder in their place, unless they are meant to be told",
        )


def _marks(examined: Examined) -> Iterator[Finding]:
    marks, faults = examined.marks, examined.faults
    if marks.separator is not None:
        mark = shown(marks.separator)
        yield from _found(
            "separator_missing",
            faults.separator_missing,
            f"Most prompts end with `{mark}`, these do not. Without it the model does not know where its answer "
            "begins, and may go on with the prompt.",
            f"Add `{mark}` to the end of these prompts",
        )
        yield from _found(
            "separator_space",
            faults.separator_space,
            f"These prompts end with `{mark}` but for white space. A request that ends with the separator has other "
            "tokens than they have.",
            f"End these prompts with exactly `{mark}`",
        )
        yield from _found(
            "separator_inside",
            faults.separator_inside,
            f"These prompts hold `{mark}` before their end too: the model sees the question end early.",
            "Take it out of the text, or choose a separator that no prompt holds",
        )
        if marks.dialogue:
            text = (
                f"Prompts end with `{mark}` and hold it earlier too, as turns of a talk do. Serving has to build them "
                "the same way."
            )
            yield Finding("dialogue", Severity.NOTE, text)
    yield from _found(
        "completion_space",
        faults.no_space,
        "These completions do not begin with a space: most words are one token with the space before them, and more "
        "without.",
        "Add a space to the beginning of these completions",
        completion_space=True,
    )
    if marks.stop is not None:
        mark = shown(marks.stop)
        yield from _found(
            "stop_missing",
            faults.stop_missing,
            f"Most completions end with `{mark}`, these do not: the model learns to go on now and then.",
            f"Add `{mark}` to the end of these completions",
        )
        yield from _found(
            "stop_inside",
            faults.stop_inside,
            f'These completions hold `{mark}` before their end too: asked with `stop=["{mark}"]`, answers are '
            "cut there.",
            "Take it out of the text, or choose an ending that no completion holds",
        )


def _no_marks(examined: Examined) -> Iterator[Finding]:
    marks, facts = examined.marks, examined.facts
    every = RowList(facts.kept, tuple(range(1, min(facts.kept, SHOWN_ROWS) + 1)) if not facts.empty.count else ())
    if marks.separator is None and facts.task is not Task.OPEN_ENDED and not facts.prompts.identical:
        suggested = separator(facts.prompts)
        yield from _found(
            "separator_missing",
            every,
            "Prompts have no common ending. A separator at the end of each tells the model where its answer begins.",
            f"Add the separator `{shown(suggested)}` to the end of all prompts",
            prompt_suffix=suggested,
        )
    if marks.stop is None and facts.task is Task.CONDITIONAL and not facts.completions.identical:
        suggested = ending(facts.completions)
        yield from _found(
            "stop_missing",
            every,
            "Completions have no common ending. One at the end of each tells the model where to stop.",
            f"Add the ending `{shown(suggested)}` to all completions",
            completion_suffix=suggested,
        )


def _repeats(examined: Examined, task: Task) -> Iterator[Finding]:
    yield from _found(
        "duplicated_rows",
        examined.facts.duplicates,
        "These rows repeat an earlier row, prompt and completion. They weigh twice, and nothing new is learnt.",
        "Remove these rows",
        drop_duplicates=True,
    )
    classes = task is Task.CLASSIFICATION
    text = "The prompts of these rows come more than once, with different completions. "
    yield from _found(
        "contradicting_rows",
        examined.contradictions,
        text + ("A classifier cannot learn both." if classes else "That is fine if several answers are right."),
        "Decide which completion is right" if classes else "Look through them",
        Severity.SUGGESTED if classes else Severity.NOTE,
    )


def _overlaps(overlap: Overlap) -> Iterator[Finding]:
    action = "Remove them from one of the two files"
    for id_, rows, text in (
        ("overlap_exact", overlap.exact, "have a prompt that stands in the training file too"),
        (
            "overlap_spelling",
            overlap.spelling,
            "have a prompt that stands in the training file but for case, punctuation or white space",
        ),
        ("overlap_near", overlap.near, "are nearly the same as a row of the training file"),
    ):
        yield from _found(
            id_, rows, f"These validation rows {text}: what is known by heart is measured, not what was learnt.", action
        )
    if overlap.unlooked:
        text = f"The last {overlap.unlooked:,} validation rows were compared whole only: more than that were too many."
        yield Finding("overlap_unlooked", Severity.NOTE, text)
