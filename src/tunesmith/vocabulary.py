"""What a checkpoint's files say of its tokenizer: its tokens' bytes, what ends a text, what stands before a prompt.

Read are `tokenizer.json` and the small JSON files beside it, of the two kinds that lose nothing: byte-level ones
(GPT-2, Llama 3, Qwen, SmolLM, the box) and those of SentencePiece that spell a space as U+2581 and fall back on bytes
(Llama 2, Mistral, Gemma).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

END_OF_TEXT = "<|endoftext|>"
"""Ends a document wherever a vocabulary has it, whatever else the checkpoint names."""
METASPACE = "\u2581"
"""What SentencePiece writes for a space."""
MAX_OPENING_TOKENS = 3
"""More before a prompt than any known tokenizer puts there (GLM puts two)."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_TEXT_BYTES = frozenset({*range(0xC0), *range(0xC2, 0xF5)})
"""What UTF-8 is made of."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of one checkpoint."""

    library: tokenizers.Tokenizer
    """Encodes text as it is: adds nothing in front, cuts nothing off, takes no space away."""
    contents: dict[int, bytes]
    """Token id -> what it stands for within a text."""
    special_ids: frozenset[int]
    """Marks, not words: `</s>` and the like."""
    ending_ids: tuple[int, ...]
    """At least one. Each ends a text; the first is the one that the checkpoint names first."""
    opening_ids: tuple[int, ...]
    """What the checkpoint's own tokenizer puts before every text, such as `<s>`; mostly none."""
    metaspace: bool
    """Whether spaces and U+2581 are spelt alike."""
    space_in_front: bool
    """Whether a text is read as if a space stood before it, so that its first word is spelt like any other."""
    composes: bool
    """Whether a text is brought into Unicode's form NFC before it is encoded."""


def read(folder: Path) -> Vocabulary:
    """The vocabulary of a checkpoint folder.

    Raises FileNotFoundError without `tokenizer.json`, ValueError with a reason for one that cannot be used.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {folder}")
    definition = _object(path)
    config, generation = _object(folder / "config.json"), _object(folder / "generation_config.json")
    options = _object(folder / "special_tokens_map.json") | _object(folder / "tokenizer_config.json")
    text_config = config.get("text_config")
    models = [generation, config, text_config if isinstance(text_config, dict) else {}]

    rows = next((model["vocab_size"] for model in models if isinstance(model.get("vocab_size"), int)), None)
    try:
        kind = _kind(definition)
        space_in_front = _leave_text_alone(definition, rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no tokenizer: {type(error).__name__} {error}") from error
    library = _library(definition)
    contents = _contents(library, metaspace=kind == "metaspace")
    return Vocabulary(
        library=library,
        contents=contents,
        special_ids=frozenset(i for i, token in library.get_added_tokens_decoder().items() if token.special),
        ending_ids=_ending_ids(library, models, options),
        opening_ids=_opening_ids(library, models, options),
        metaspace=kind == "metaspace",
        space_in_front=space_in_front,
        composes=any(part["type"] == "NFC" for part in parts_of(definition["normalizer"])),
    )


def _kind(definition: Json) -> str:
    """`bytes` or `metaspace`: how tokens are spelt. Raises ValueError for any other spelling, or one with gaps."""
    parts = list(parts_of(definition.get("decoder")))
    model = definition.get("model") or {}
    vocabulary = model.get("vocab") or {}
    spellings = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    if any(part["type"] == "ByteLevel" for part in parts):
        missing = [byte for byte, character in _byte_characters().items() if character not in spellings]
        kind = "bytes"
    elif any(part["type"] == "Metaspace" or part.get("pattern") == {"String": METASPACE} for part in parts):
        if not model.get("byte_fallback"):
            raise ValueError("the tokenizer has no byte fallback: characters that it does not know would be lost")
        missing = [byte for byte in range(0x100) if f"<0x{byte:02X}>" not in spellings]
        kind = "metaspace"
    else:
        shown = ", ".join(part["type"] for part in parts) or "none"
        raise ValueError(
            f"the tokenizer's decoder is {shown}; read are byte-level ones, and those that spell a space {METASPACE!r}"
        )
    if lost := _TEXT_BYTES.intersection(missing):
        raise ValueError(f"the tokenizer has no token for {len(lost)} bytes, 0x{min(lost):02X} the first: text is lost")
    return kind


def _leave_text_alone(definition: Json, rows: int | None) -> bool:
    """Takes out of a definition what adds to a text or takes from it; whether it put a space in front of texts."""
    puts_space = False
    for part in parts_of(definition.get("pre_tokenizer")):
        if part["type"] == "Metaspace":
            legacy = "always" if part.pop("add_prefix_space", True) else "never"
            puts_space |= part.get("prepend_scheme", legacy) != "never"
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            puts_space |= part.get("add_prefix_space", True)
            part["add_prefix_space"] = False
    kept = [part for part in parts_of(definition.get("normalizer")) if part["type"] != "Prepend"]
    puts_space |= len(kept) < len(list(parts_of(definition.get("normalizer"))))
    definition["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for token in definition.get("added_tokens", []):
        token["lstrip"] = token["rstrip"] = False
    if rows is not None:  # some tokenizers know marks, of images say, that the model has no row for
        definition["added_tokens"] = [token for token in definition.get("added_tokens", []) if token["id"] < rows]
    definition["truncation"] = definition["padding"] = None
    if "dropout" in definition["model"]:
        definition["model"]["dropout"] = None  # chance, for pretraining
    return puts_space


def _library(definition: Json) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises nothing narrower for what it cannot read
        raise ValueError(f"it is no tokenizer: {error}") from error


def _contents(library: tokenizers.Tokenizer, *, metaspace: bool) -> dict[int, bytes]:
    byte_of = {character: byte for byte, character in _byte_characters().items()}

    def content(spelling: str) -> bytes:
        if not metaspace:
            known = all(character in byte_of for character in spelling)
            return bytes(byte_of[c] for c in spelling) if known else spelling.encode()
        if byte := _BYTE_TOKEN.fullmatch(spelling):
            return bytes.fromhex(byte[1])
        return spelling.replace(METASPACE, " ").encode()

    contents = {index: content(spelling) for spelling, index in library.get_vocab(with_added_tokens=False).items()}
    for index, token in library.get_added_tokens_decoder().items():
        contents[index] = content(token.content) if metaspace else token.content.encode()
    return contents


def _ending_ids(library: tokenizers.Tokenizer, models: Iterable[Json], options: Json) -> tuple[int, ...]:
    """Every token that the checkpoint's files call an end, in the order of those files, each once."""
    found: list[int | None] = []
    marks = library.get_added_tokens_decoder()
    for model in models:
        named = model.get("eos_token_id")
        # A config may be of another tokenizer, or made of defaults: an ordinary word ends nothing.
        found += [index for index in (named if isinstance(named, list) else [named]) if index in marks]
    found += [_named(library, options, "eos_token"), library.token_to_id(END_OF_TEXT)]
    ending = tuple(dict.fromkeys(index for index in found if index is not None))
    if not ending:
        raise ValueError(
            "no end of a text is known: config.json, generation_config.json and tokenizer_config.json name no "
            f"eos_token that the tokenizer has, and it has no {END_OF_TEXT}"
        )
    return ending


def _opening_ids(library: tokenizers.Tokenizer, models: Iterable[Json], options: Json) -> tuple[int, ...]:
    """What `add_bos_token` asks for, or, where nothing is said of it, what the post-processor puts in front."""
    asked = options.get("add_bos_token")
    if asked is False:
        return ()
    if asked is True:
        by_id = next((model["bos_token_id"] for model in models if isinstance(model.get("bos_token_id"), int)), None)
        named = _named(library, options, "bos_token")
        beginning = by_id if named is None else named
        if beginning in library.get_added_tokens_decoder():
            return (beginning,)
    plain, whole = (library.encode("a", add_special_tokens=add).ids for add in (False, True))
    starts = range(len(whole) - len(plain) + 1)
    front = next((start for start in starts if whole[start : start + len(plain)] == plain), 0)
    if front > MAX_OPENING_TOKENS:
        raise ValueError(f"the tokenizer puts {front} tokens before a text; at most {MAX_OPENING_TOKENS} are read")
    return tuple(whole[:front])


def _named(library: tokenizers.Tokenizer, options: Json, role: str) -> int | None:
    name = options.get(role)
    content = name.get("content") if isinstance(name, dict) else name
    index: int | None = library.token_to_id(content) if isinstance(content, str) else None
    return index


def parts_of(component: Json | None) -> Iterator[Json]:
    """A component of a definition, or those that a sequence is made of."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for name in ("normalizers", "pretokenizers", "decoders"):
        for part in component.get(name, ()):
            yield from parts_of(part)


def _object(path: Path) -> Json:
    """The object in a JSON file; empty where there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object but a {type(value).__name__}")
    return value


def _byte_characters() -> dict[int, str]:
    """How byte-level vocabularies spell each byte: printable Latin-1 as itself, the rest from U+0100 on.

    Source: `bytes_to_unicode` of GPT-2's encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
