from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.serving.stops import StopScanner

# few letters, so that stops, parts of stops and overlaps are common; the last two are one character to a reader
letters = st.text(st.sampled_from("ab#\N{EXTRATERRESTRIAL ALIEN}e\N{COMBINING ACUTE ACCENT}"), max_size=12)
stop_lists = st.lists(letters.filter(bool), max_size=4)


def cut(text: str, stops: list[str]) -> str:
    """The definition, character by character: the first stop that is whole ends the text where it began."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(letters, stop_lists, st.lists(st.integers(0, 12), max_size=6))
def test_the_cut_does_not_depend_on_the_pieces(text: str, stops: list[str], borders: list[int]) -> None:
    edges = sorted({0, len(text), *(min(border, len(text)) for border in borders)})
    scanner, given_out = StopScanner(stops), ""
    for start, end in itertools.pairwise(edges):
        given_out += scanner.push(text[start:end])
        assert cut(text, stops).startswith(given_out)  # nothing given out has to be taken back
        if scanner.stopped:
            break
    given_out += scanner.finish()
    assert given_out == cut(text, stops)
    assert scanner.stopped == any(stop in text for stop in stops)


def test_only_a_possible_beginning_is_held_back() -> None:
    scanner = StopScanner(["###", "\n"])
    assert scanner.push("yes #") == "yes "
    assert scanner.push("#") == ""
    assert scanner.push("1#") == "##1"
    assert scanner.finish() == "#"


def test_text_that_cannot_be_a_stop_passes_at_once() -> None:
    assert StopScanner([]).push("anything") == "anything"
    assert StopScanner(["END"]).push("anything") == "anything"
