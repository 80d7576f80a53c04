from __future__ import annotations

import codecs
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.tiny import TOKENIZER
from tests.vocabularies import KINDS, gpt2, llama2, llama3, unigram
from tunesmith.tokenizer import IncrementalDecoder, Tokenizer, bytes_text
from tunesmith.vocabulary import END_OF_TEXT, METASPACE

BOX = Tokenizer.from_folder(TOKENIZER.parent)
LIBRARY = tokenizers.Tokenizer.from_file(str(TOKENIZER))

texts = st.text(st.characters(exclude_categories=["Cs"]))
composed = texts.map(lambda text: unicodedata.normalize("NFC", text))
"""As the tokenizers that compose characters leave them."""
awkward = st.lists(
    st.sampled_from(
        [METASPACE, " ", "a", "<0x41>", "<", "</s>", "<s>", "<eos>", "<image>", END_OF_TEXT, "\n", "\u00e9"]
    )
).map("".join)
plain = st.text("abcde fgh.,'\n\u00e9\U0001f47d", min_size=1).filter(lambda text: text[0] not in " ")
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
    decoder = IncrementalDecoder()
    pieces = [decoder.push(BOX.token_bytes(i)) for i in ids] + [decoder.finish()]
    assert "".join(pieces) == BOX.decode(ids)


def test_a_character_is_given_out_when_it_is_whole() -> None:
    ids = BOX.encode("a\N{EXTRATERRESTRIAL ALIEN}b")
    decoder = IncrementalDecoder()
    pieces = [decoder.push(BOX.token_bytes(i)) for i in ids]
    assert "".join(pieces) == "a\N{EXTRATERRESTRIAL ALIEN}b"
    assert "" in pieces  # some token is only a part of the character
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_stream_cut_within_a_character_ends_in_a_replacement() -> None:
    ids = BOX.encode("\N{EXTRATERRESTRIAL ALIEN}")
    decoder = IncrementalDecoder()
    assert len(ids) > 1
    assert decoder.push(BOX.token_bytes(ids[0])) == ""
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


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@settings(max_examples=20)
@given(composed | awkward)
@example("  two spaces")
def test_text_of_every_kind_makes_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert len(ids) >= tokenizer.fewest_tokens(text)


@settings(max_examples=20)
@given(composed.filter(bool) | awkward.filter(bool))
@example(" starts with a space")
def test_a_prompt_of_every_kind_shows_its_text_and_nothing_else(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.prompt_ids(text)
    assert b"".join(piece or b"" for piece in tokenizer.prompt_pieces(ids)) == text.encode()
    assert tokenizer.prompt_text(ids) == text
    assert len(ids) <= len(text.encode()) + 2


@settings(max_examples=20)
@given(composed, composed)
def test_prompt_and_completion_join_without_a_seam(tokenizer: Tokenizer, prompt: str, completion: str) -> None:
    ids = tokenizer.prompt_ids(prompt or "x") + tokenizer.encode(completion)
    assert tokenizer.prompt_text(ids) == (prompt or "x") + completion


@settings(max_examples=20)
@given(texts)
@example("e\u0301 \u1112\u1161\u11ab")
def test_the_bounds_hold_for_every_kind(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))


@pytest.mark.parametrize("completion", [" yes", " positive", "\n", " a triumph", "."])
def test_a_completion_is_tokenised_as_if_the_prompt_went_on(tokenizer: Tokenizer, completion: str) -> None:
    prompt = "Every scene was dull and far too long ->"
    assert tokenizer.prompt_ids(prompt) + tokenizer.encode(completion) == tokenizer.prompt_ids(prompt + completion)


@settings(max_examples=20)
@given(plain)
def test_prompts_are_those_of_the_checkpoints_own_tokenizer(folder: Path, tokenizer: Tokenizer, text: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.no_truncation()
    expected = library.encode(text).ids
    if folder.name.startswith("opt"):  # what begins its texts stands in tokenizer_config.json, for transformers to add
        expected = [1, *expected]
    assert tokenizer.prompt_ids(text) == expected


@settings(max_examples=20)
@given(plain, plain)
def test_many_prompts_are_encoded_like_one(tokenizer: Tokenizer, one: str, other: str) -> None:
    assert tokenizer.prompt_ids_many([one, "", other]) == [tokenizer.prompt_ids(text) for text in (one, "", other)]


@pytest.mark.parametrize(
    ("kind", "ends", "empty", "first"),
    [
        ("gpt2", ["<|endoftext|>"], ["<|endoftext|>"], []),
        ("neox", ["<|endoftext|>"], ["<|endoftext|>"], []),
        ("llama3", ["<|end_of_text|>", "<|eot_id|>"], ["<|begin_of_text|>"], ["<|begin_of_text|>"]),
        ("opt", ["</s>"], ["</s>"], ["</s>"]),
        ("llama2", ["</s>"], ["<s>"], ["<s>"]),
        ("mistral", ["</s>"], ["<s>"], ["<s>"]),
        ("gemma", ["<eos>"], ["<bos>"], ["<bos>"]),
        ("unigram", ["</s>"], ["</s>"], []),
        ("unigram_with_bos", ["</s>"], ["<s>"], ["<s>"]),
    ],
)
def test_what_ends_a_text_and_what_begins_it_is_the_checkpoints_own(
    tmp_path: Path, kind: str, ends: list[str], empty: list[str], first: list[str]
) -> None:
    tokenizer = Tokenizer.from_folder(KINDS[kind](tmp_path))
    assert [tokenizer.token_text(i) for i in tokenizer.ending_ids] == ends
    assert tokenizer.end_of_text_id == tokenizer.ending_ids[0]
    assert [tokenizer.token_text(i) for i in tokenizer.prompt_ids("")] == empty
    ids = tokenizer.prompt_ids("a film")
    assert [tokenizer.token_text(i) for i in ids[: len(first)]] == first
    assert tokenizer.prompt_pieces(ids)[: len(first)] == [None] * len(first)
    mark = ends[0]
    assert tokenizer.encode(f"a{mark}b").count(tokenizer.end_of_text_id) == 1  # written out, it is that one token


def test_the_first_word_of_a_prompt_is_spelt_like_any_other_and_shown_without_its_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(llama2(tmp_path))
    ids = tokenizer.prompt_ids("film")
    assert ids == [1, *tokenizer.encode(" film")]
    assert tokenizer.token_bytes(ids[1]).startswith(b" ")
    assert tokenizer.prompt_text(ids) == "film"
    assert tokenizer.prompt_text(ids[1:]) == "film"  # ids without what begins a text
    assert tokenizer.prompt_ids("<s>film") == [1, 1, *tokenizer.encode("film")]
    assert tokenizer.prompt_text([1, 1, *tokenizer.encode(" film")]) == "<s> film"


def test_a_mark_without_a_row_in_the_model_is_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(KINDS["gemma"](tmp_path))
    rows = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    assert tokenizer.vocabulary_size == rows
    assert max(tokenizer.encode("<image>")) < rows


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, ["<|endoftext|>"]),
        ({"config.json": {"eos_token_id": 300}}, ["<|endoftext|>"]),  # an ordinary token: of another tokenizer
        ({"config.json": {"eos_token_id": 99_999}}, ["<|endoftext|>"]),
        ({"config.json": {"eos_token_id": None}}, ["<|endoftext|>"]),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|endoftext|>"}}}, ["<|endoftext|>"]),
        ({"tokenizer_config.json": {"eos_token": "X"}}, ["X", "<|endoftext|>"]),
        ({"tokenizer_config.json": {"eos_token": "no such token"}}, ["<|endoftext|>"]),
    ],
)
def test_only_marks_that_the_tokenizer_has_end_a_text(tmp_path: Path, files: dict[str, Any], ends: list[str]) -> None:
    gpt2(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert [tokenizer.token_text(i) for i in tokenizer.ending_ids] == ends


def test_a_checkpoint_that_wants_no_beginning_gets_none(tmp_path: Path) -> None:
    llama3(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.prompt_ids("film") == tokenizer.encode("film")


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def _changed(folder: Path, change: dict[str, Any]) -> Path:
    definition = json.loads((folder / "tokenizer.json").read_text())
    for part, fields in change.items():
        both = isinstance(definition[part], dict) and isinstance(fields, dict)
        definition[part] = definition[part] | fields if both else fields
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


@pytest.mark.parametrize(
    ("make", "change", "reason"),
    [
        (gpt2, {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "WordPiece"),
        (llama3, {"added_tokens": []}, "no end of a text"),
        (gpt2, {"normalizer": {"type": "Lowercase"}}, "lose nothing"),
        (gpt2, {"normalizer": {"type": "NFKC"}}, "lose nothing"),
        (gpt2, {"pre_tokenizer": {"type": "WhitespaceSplit"}}, "lose nothing"),
        (gpt2, {"model": {"vocab": {"a": 0}, "merges": []}}, "no token for"),
        (gpt2, {"model": {"type": "Unknown"}}, "no tokenizer"),
        (gpt2, {"model": None}, "no token for"),
        (gpt2, {"decoder": "ByteLevel"}, "no tokenizer"),
        (llama2, {"model": {"byte_fallback": False}}, "byte fallback"),
        (unigram, {"model": {"byte_fallback": False}}, "byte fallback"),
    ],
)
def test_tokenizers_that_cannot_be_read_say_why(tmp_path: Path, make: Any, change: dict[str, Any], reason: str) -> None:
    folder = _changed(make(tmp_path), change)
    with pytest.raises(ValueError, match=reason):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_files_that_are_no_object_are_named(tmp_path: Path, name: str, content: str) -> None:
    gpt2(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_folder(tmp_path)
