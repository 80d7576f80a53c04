from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.formats import (
    MAX_LINE_BYTES,
    Example,
    LineSplitter,
    read_examples,
    split_lines,
    write_jsonl,
)
from tunesmith.errors import InvalidRequest

GOOD = b'{"prompt":"a ->","completion":" b"}\n'

texts = st.text(st.characters(exclude_categories=["Cs"]))
examples = st.builds(Example, prompt=texts, completion=texts.filter(bool))


def read(content: bytes) -> list[Example]:
    return list(read_examples(split_lines([content])))


def fault(content: bytes) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read(content)
    assert caught.value.param == "file"
    return caught.value.message


@given(st.lists(examples, min_size=1))
def test_what_is_written_reads_back(written: list[Example]) -> None:
    assert read(b"".join(write_jsonl(written))) == written


@given(st.lists(examples, min_size=1), st.integers(1, 7))
def test_chunks_of_any_size_give_the_same_lines(written: list[Example], size: int) -> None:
    content = b"".join(write_jsonl(written))
    chunks = [content[start : start + size] for start in range(0, len(content), size)]
    assert list(read_examples(split_lines(chunks))) == written


@given(st.binary())
def test_any_bytes_are_examples_or_refused_in_words(content: bytes) -> None:
    try:
        read(content)
    except InvalidRequest as error:
        assert error.message


def test_lines_are_written_plainly() -> None:
    assert list(write_jsonl([Example("ä/", ' "b"')])) == ['{"prompt":"ä/","completion":" \\"b\\""}\n'.encode()]


@pytest.mark.parametrize(
    "content",
    [
        GOOD.rstrip(b"\n"),
        GOOD.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + GOOD,
        GOOD + b"\n  \n\r\n",
        b' {"completion":" b", "prompt":"a ->"} \n',
    ],
    ids=["no last newline", "CRLF", "byte order mark", "blank lines at the end", "spaces and other order"],
)
def test_harmless_variations_read_the_same(content: bytes) -> None:
    assert read(content) == [Example("a ->", " b")]


def test_an_empty_prompt_is_allowed() -> None:
    assert read(b'{"prompt":"","completion":"b"}') == [Example("", "b")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "Line 2 of the file is blank"),
        (b"{", "Line 2 of the file is not JSON: "),
        (b"prompt,completion", "is not JSON"),
        (b"\xff\xfe{\x00}", "is not UTF-8 at byte 1"),
        (b'{"prompt":"a\x00","completion":"b"}', "NUL byte"),
        (b'["a","b"]', "is an array, not an object"),
        (b'"a"', "is a string, not an object"),
        (b"1", "is a number, not an object"),
        (b"null", "is null, not an object"),
        (b'{"completion":"b"}', "has no field `prompt`"),
        (b'{"prompt":"a"}', "has no field `completion`"),
        (b'{"prompt":"a","completion":""}', "empty `completion`"),
        (b'{"prompt":1,"completion":"b"}', "`prompt` that is a number, not a string"),
        (b'{"prompt":"a","completion":null}', "`completion` that is null, not a string"),
        (b'{"prompt":"a","completion":["b"]}', "`completion` that is an array"),
        (b'{"prompt":"a","completion":{}}', "`completion` that is an object"),
        (b'{"prompt":true,"completion":"b"}', "`prompt` that is a boolean"),
        (b'{"prompt":"a","completion":"b","label":1}', "field 'label', which is not read"),
        (b'{"prompt":"a","completion":"b","\\u001b[31m":1}', "field '\\x1b[31m'"),
        (b'{"prompt":"a","prompt":"b","completion":"c"}', "field 'prompt' twice"),
        (b'{"prompt":"\\ud800","completion":"b"}', "half a character, \\ud800, in `prompt`"),
        (b'{"prompt":' + b"[" * 100_000, "is not JSON that can be read"),
        (b'{"prompt":' + b"1" * 10_000 + b"}", "is not JSON that can be read"),
        (b"{" + b'"":1,' * 50_000 + b'"":1}', "twice"),
    ],
)
def test_a_fault_is_named_with_its_line(line: bytes, words: str) -> None:
    message = fault(GOOD + line + b"\n" + GOOD)
    assert words in message
    assert message.startswith("Line 2 of the file")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_examples_is_refused(content: bytes) -> None:
    assert "empty" in fault(content)


def test_a_line_too_long_is_refused_without_being_held() -> None:
    given = 0

    def garbage() -> Iterator[bytes]:
        nonlocal given
        yield GOOD
        for _ in range(100):
            given += 1_000_000
            yield b"x" * 1_000_000

    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="Line 2 of the file is longer than 1048576 bytes"):
        list(split_lines(garbage()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert given == 2_000_000  # the rest was not even asked for
    assert peak < 5_000_000


def test_the_longest_line_is_read() -> None:
    frame = len(json.dumps({"prompt": "", "completion": "b"}))
    line = json.dumps({"prompt": "a" * (MAX_LINE_BYTES - frame), "completion": "b"}).encode()
    assert len(line) == MAX_LINE_BYTES
    assert len(read(line + b"\n")) == 1
    assert "longer" in fault(b" " + line)


@given(st.lists(st.binary()))
def test_splitting_is_what_bytes_split_does(chunks: list[bytes]) -> None:
    splitter = LineSplitter()
    lines = [line for chunk in chunks for line in splitter.feed(chunk)] + list(splitter.end())
    expected = b"".join(chunks).split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert lines == [line.removesuffix(b"\r") for line in expected]
