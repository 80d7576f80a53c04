"""Whatever rows go in, what is mended trains, and what it was mended of is gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.doctor import Codec
from tunesmith.data.doctor_private import PLACEHOLDERS, redacted, scan, without_controls
from tunesmith.data.facts import Lengths
from tunesmith.data.formats import Example, read_examples, split_lines
from tunesmith.data.json_rows import Shape
from tunesmith.data.outputs import prepared_lines
from tunesmith.data.repair import SHOWN_CHANGES, Changes, mend, plan_repair
from tunesmith.data.rows import Batch, Columns, Wanted
from tunesmith.data.source import Format, Source
from tunesmith.data.verdict import TRAINING, VALIDATION, Part, Verdict, judge

LIMIT = 60
SECRET = "sk-proj-a8Fj3kLm29dKwq77ZpRt"
END = "<end>"
Pairs = list[tuple[str, str]]


def count(pairs: Sequence[tuple[str, str]]) -> list[int]:
    return [len((prompt + completion).encode()) + 1 for prompt, completion in pairs]


LENGTHS = Lengths("bytes", LIMIT, count)
CODEC = Codec(lambda texts: [list(text.encode()) for text in texts], lambda ids: bytes(ids).decode(), (END,))


def part(pairs: Pairs, size: int = 7) -> Part:
    columns = Columns(("prompt", "completion"), "prompt", "completion")
    source = Source(Path("x.jsonl"), Format.JSONL, "utf-8", columns, Wanted(), shape=Shape.LINES)

    def batches() -> Iterator[Batch]:
        for start in range(0, len(pairs), size):
            some = pairs[start : start + size]
            yield Batch(start + 1, [prompt for prompt, _ in some], [text for _, text in some], 0)

    return Part(source, batches)


def mended(
    training: Pairs, validation: Pairs | None = None, only: Sequence[str] = (), codec: Codec = CODEC
) -> tuple[Verdict, list[Changes]]:
    """As the command does it; what changed in each file."""
    parts = [part(training)] + ([] if validation is None else [part(validation)])
    verdict = judge(parts[0], parts[1] if len(parts) == 2 else None, LENGTHS, codec)
    repair, _ = plan_repair(verdict, CODEC.special, only)
    told = []
    for which, one in zip((TRAINING, VALIDATION), parts, strict=False):
        examined = verdict.training if which == TRAINING else verdict.validation
        assert examined is not None
        gone = None
        if which == VALIDATION and verdict.overlap is not None and repair.drop_overlap:
            gone = np.any([verdict.overlap.masks[kind] for kind in repair.drop_overlap], axis=0)
        changes = Changes()
        written = b"".join(
            prepared_lines(batch) for batch in mend(one.batches(), repair, examined.facts, LENGTHS, gone, changes)
        )
        rows = list(read_examples(split_lines([written]))) if written else []
        assert len(rows) == changes.kept
        assert all(tokens <= LIMIT for tokens in count([(row.prompt, row.completion) for row in rows]))
        told.append(changes)
        outputs.append(rows)
    return verdict, told


outputs: list[list[Example]] = []
"""What `mended` has written, file by file."""

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "",
        " ",
        " ->",
        "a ->",
        "a -> ",
        " yes",
        "yes\n",
        "\0",
        "\x07",
        SECRET,
        "jane.doe@mailbox.org",
        END,
        "<e<end>nd>",
        "e\u0301",
        "4012888888881881",
        "x" * (LIMIT - 4),
        "x" * (LIMIT - 9),
        "+44 20 7946 0958",
        "same",
    ]
)
pairs = st.lists(st.tuples(words, words), min_size=1, max_size=40)


@given(pairs, st.none() | pairs)
def test_what_is_mended_trains(training: Pairs, validation: Pairs | None) -> None:
    outputs.clear()
    verdict, told = mended(training, validation)
    assert verdict.training is not None
    for changes, before, rows in zip(told, (training, validation or []), outputs, strict=False):
        assert changes.kept + changes.removed == len(before)
        assert len(changes.shown) == min(SHOWN_CHANGES, changes.changed + changes.removed)
        for kind in ("secrets", "card_numbers"):
            assert not scan([text for row in rows for text in (row.prompt, row.completion)]).places[kind]
    if len(outputs[0]) == len(training) and not told[0].changed:
        ours = [finding.id for which, finding in verdict.findings if which == TRAINING]
        assert "secrets" not in ours


ROWS = [(f"{n} came ->", " yes" if n % 2 else " no") for n in range(40)]


def test_rows_that_are_good_stay_as_they_are() -> None:
    outputs.clear()
    _, (changes,) = mended(ROWS)
    assert (changes.changed, changes.removed, changes.kept) == (0, 0, 40)
    assert outputs == [[Example(*pair) for pair in ROWS]]


def test_each_defect_is_mended_where_it_is() -> None:
    odd: list[tuple[tuple[str, str], Example | None]] = [
        (("it came", " yes"), Example("it came ->", " yes")),
        (("it came -> \n", " yes"), Example("it came ->", " yes")),
        (("bell \x07\0 ->", " no"), Example("bell  ->", " no")),
        (("so <e<end>nd>x ->", " no"), Example("so x ->", " no")),
        ((f"with {SECRET}. ->", " no"), Example("with [secret]. ->", " no")),
        (("card 4012 8888 8888 1881 ->", " no"), Example("card [card number] ->", " no")),
        (("no space ->", "yes"), Example("no space ->", " yes")),
        (ROWS[3], None),
        (("empty ->", ""), None),
        (("x" * LIMIT, " no"), None),
        (("x" * (LIMIT - 5), " no"), None),  # too long once it has its separator
        (("bare ->", "\x07"), None),
    ]
    outputs.clear()
    _, (changes,) = mended(ROWS + [before for before, _ in odd])
    assert outputs[0][40:] == [after for _, after in odd if after is not None]
    assert (changes.changed, changes.removed) == (7, 5)
    assert [change.row for change in changes.shown] == list(range(41, 51))
    assert changes.shown[7].after is None
    assert changes.shown[7].written == 47


def test_what_may_be_meant_is_mended_if_it_is_named() -> None:
    rows = [*ROWS, ("ask jane.doe@mailbox.org or +44 20 7946 0958 ->", " no"), (f"{SECRET} ->", " no"), ROWS[0]]
    outputs.clear()
    mended(rows)
    assert outputs[0][40].prompt == rows[40][0]
    mended(rows, only=["email_addresses", "phone_numbers"])
    assert [row.prompt for row in outputs[1][40:]] == [
        "ask [email address] or [phone number] ->",
        rows[41][0],
        ROWS[0][0],
    ]


def test_classes_are_renamed_only_if_that_is_asked_for() -> None:
    """With a tokenizer of which names of up to four letters are one token."""
    short = Codec(lambda texts: [[ord(text[1])] * -(-len(text) // 5) for text in texts], CODEC.decode, (END,))
    rows = [(prompt, {" yes": " agreed\n", " no": " no\n"}[text]) for prompt, text in ROWS]
    outputs.clear()
    verdict, (changes,) = mended(rows, codec=short)
    assert (verdict.class_spellings, changes.changed) == ({" agreed": " agre"}, 0)
    _, (changes,) = mended(rows, only=["class_tokens"], codec=short)
    assert changes.changed == 20
    assert {row.completion for row in outputs[1]} == {" agre\n", " no\n"}


def test_both_files_are_mended_alike_and_validation_gives_up_what_training_holds() -> None:
    bare = [(prompt.removesuffix(" ->"), text.strip()) for prompt, text in ROWS]
    outputs.clear()
    _, (_, changes) = mended(bare, [("new one", "no"), ("7 came", "yes"), ("7 Came!", "yes")])
    assert {row.prompt[-3:] for row in outputs[0]} == {" ->"}
    assert outputs[1] == [Example("new one ->", " no")]
    assert changes.removed == 2


@pytest.mark.parametrize("kind", PLACEHOLDERS)
@given(text=st.text(max_size=30), secret=st.sampled_from([SECRET, "4012888888881881", "a@b.org", "(212) 456-7890"]))
def test_nothing_is_found_where_it_was_taken_out(kind: str, text: str, secret: str) -> None:
    whole = text.encode("utf-8", "ignore").decode()
    assert not scan([redacted(f"{whole} {secret} {whole}", [kind])]).places[kind]


def test_the_whole_of_a_find_is_taken_out() -> None:
    key = "a -----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY----- b"
    assert redacted(key, ["secrets"]) == "a [secret] b"
    assert redacted("to jane.doe+x@mailbox.org, now", ["email_addresses"]) == "to [email address], now"
    assert redacted(f"{SECRET}", ["secrets"], lambda found: found[:2]) == "sk"
    assert without_controls("a\0b\x07c\n") == "abc\n"
