from __future__ import annotations

import codecs
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import TOKENIZER
from tunesmith.tokenizer import END_OF_TEXT, IncrementalDecoder, Tokenizer, bytes_text

BOX = Tokenizer.from_folder(TOKENIZER.parent)
LIBRARY = tokenizers.Tokenizer.from_file(str(TOKENIZER))

texts = st.text(st.characters(exclude_categories=("Cs",)))
id_lists = st.lists(st.integers(0, BOX.vocabulary_size - 1), max_size=30)


@given(texts)
def test_any_text_makes_the_round_trip(text: str) -> None:
    ids = BOX.encode(text)
    assert BOX.decode(ids) == text
    assert b"".join(BOX.token_bytes(i) for i in ids) == text.encode()


@given(id_lists)
def test_any_ids_decode_as_the_library_does(ids: list[int]) -> None:
    assert BOX.decode(ids) == LIBRARY.decode(ids, skip_special_tokens=False)


@given(st.lists(texts, max_size=5))
def test_many_texts_are_encoded_like_one(several: list[str]) -> None:
    assert BOX.encode_many(several) == [BOX.encode(text) for text in several]


@given(id_lists)
def test_a_stream_adds_up_to_the_whole(ids: list[int]) -> None:
    decoder = IncrementalDecoder(BOX)
    pieces = [decoder.push(i) for i in ids] + [decoder.finish()]
    assert "".join(pieces) == BOX.decode(ids)


def test_a_character_is_given_out_when_it_is_whole() -> None:
    ids = BOX.encode("a\N{EXTRATERRESTRIAL ALIEN}b")
    decoder = IncrementalDecoder(BOX)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) == "a\N{EXTRATERRESTRIAL ALIEN}b"
    assert "" in pieces  # some token is only a part of the character
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_stream_cut_within_a_character_ends_in_a_replacement() -> None:
    ids = BOX.encode("\N{EXTRATERRESTRIAL ALIEN}")
    decoder = IncrementalDecoder(BOX)
    assert len(ids) > 1
    assert decoder.push(ids[0]) == ""
    assert decoder.finish() == "\ufffd"


def test_end_of_text_is_one_token_wherever_it_stands() -> None:
    assert BOX.encode(END_OF_TEXT) == [BOX.end_of_text_id]
    assert BOX.encode(f"a{END_OF_TEXT}b").count(BOX.end_of_text_id) == 1
    assert BOX.token_text(BOX.end_of_text_id) == END_OF_TEXT
    assert BOX.decode([BOX.end_of_text_id]) == END_OF_TEXT


def test_an_empty_prompt_is_the_start_of_a_document() -> None:
    assert BOX.prompt_ids("") == [BOX.end_of_text_id]
    assert BOX.prompt_ids(" yes") == BOX.encode(" yes")
    assert BOX.encode("") == []


def test_token_text_is_the_text_or_names_the_bytes() -> None:
    assert BOX.token_text(BOX.encode(" yes")[0]) == " yes"
    partial = BOX.encode("\N{EXTRATERRESTRIAL ALIEN}")[0]
    shown = BOX.token_text(partial)
    assert shown.startswith("bytes:\\xf0")
    assert codecs.escape_decode(shown.removeprefix("bytes:"))[0] == BOX.token_bytes(partial)
    assert bytes_text(b" \xe2\x80") == "bytes: \\xe2\\x80"


def test_vocabulary_covers_every_id() -> None:
    assert BOX.vocabulary_size == LIBRARY.get_vocab_size()
    assert all(BOX.token_bytes(i) for i in range(BOX.vocabulary_size))
    assert BOX.token_bytes(BOX.vocabulary_size) == b""


def test_a_lone_surrogate_is_refused_in_any_call() -> None:
    for call in (BOX.encode, BOX.prompt_ids, lambda text: BOX.encode_many(["fine", text])):
        with pytest.raises(UnicodeEncodeError):
            call("\ud83d")


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_tokenizers_that_cannot_be_read_say_why() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="byte-level"):
        Tokenizer(words)
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    bare.decoder = tokenizers.decoders.ByteLevel()
    with pytest.raises(ValueError, match=r"endoftext"):
        Tokenizer(bare)
