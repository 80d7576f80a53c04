from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import TOKENIZER
from tunesmith.data.checks import OPENING_TOKENS, SHOWN_OVER_LONG, OverLong, most_tokens, survey
from tunesmith.data.formats import Example
from tunesmith.tokenizer import Tokenizer

TOKENS = Tokenizer.from_folder(TOKENIZER.parent)


def words(example: Example) -> int:
    return len(f"{example.prompt} {example.completion}".split())


def test_counts_rows_and_remembers_completions_in_order() -> None:
    rows = [Example("p", completion) for completion in (" b", " a", " b", " c")]
    found = survey(rows, count_tokens=words, limit_tokens=2048, max_completions=10)
    assert found.examples == 4
    assert found.over_long == ()
    assert list(found.completions.items()) == [(" b", 1), (" a", 2), (" c", 4)]


def test_remembers_no_more_completions_than_asked() -> None:
    rows = [Example("", str(number)) for number in range(1000)]
    assert len(survey(rows, count_tokens=words, limit_tokens=9, max_completions=3).completions) == 3
    assert not survey(rows, count_tokens=words, limit_tokens=9, max_completions=0).completions


def test_only_rows_that_could_be_too_long_are_tokenised() -> None:
    counted: list[Example] = []

    def count(example: Example) -> int:
        counted.append(example)
        return words(example)

    rows = [Example("a b", "c"), Example("a" * 9, "c"), Example("a b c d e f g h", "i j")]
    found = survey(rows, count_tokens=count, limit_tokens=5 + OPENING_TOKENS, max_completions=0)
    assert counted == rows[1:]
    assert found.over_long == (OverLong(row=3, tokens=10),)


def test_stops_when_enough_rows_are_too_long() -> None:
    rows = (Example("a b c", "d") for _ in range(1000))
    found = survey(rows, count_tokens=words, limit_tokens=3, max_completions=0)
    assert found.over_long == tuple(OverLong(row, 4) for row in range(1, SHOWN_OVER_LONG + 1))
    assert len(list(rows)) == 1000 - SHOWN_OVER_LONG


@given(st.builds(Example, *[st.text(st.characters(exclude_categories=["Cs"]))] * 2))
def test_the_bound_holds_for_the_tokenizer_of_the_box(example: Example) -> None:
    tokens = len(TOKENS.prompt_ids(example.prompt)) + len(TOKENS.encode(example.completion))
    assert tokens <= most_tokens(example)
