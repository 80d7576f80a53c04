"""A tokenizer as a GGUF file describes it: which of llama.cpp's own it is, its tokens, merges and marks. Needs `gguf`.

llama.cpp splits texts by code, chosen by a name in the file: a tokenizer that splits in any other way cannot be
described, and is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from tunesmith import vocabulary
from tunesmith.chat_template import template_source
from tunesmith.vocabulary import Vocabulary

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES_ALONE = ("ByteLevel", False)
SPLITS: dict[tuple[tuple[str, object], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_REST}"), _BYTES_ALONE): "llama-bpe",
    (("Split", rf"{_CONTRACTIONS}|\p{{N}}|{_REST}"), _BYTES_ALONE): "qwen2",
}
"""The parts of a pre-tokenizer, each with what matters of it -> llama.cpp's name. Source: its src/llama-vocab.cpp."""
WHOLE_WORDS_FIRST = frozenset({"llama-bpe"})
"""Of those, where llama.cpp takes a word that is a token as that token, whatever its merges."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Words:
    """What `tokenizer.ggml.*` of a file says."""

    split: str
    spellings: tuple[str, ...]
    """By token id; byte-level ones spell each byte as one character."""
    kinds: tuple[gguf.TokenType, ...]
    """By token id."""
    merges: tuple[str, ...]
    beginning_id: int
    begins_texts: bool
    """Whether `beginning_id` stands before every text."""
    ending_id: int
    chat_template: str | None

    def add_to(self, out: gguf.GGUFWriter) -> None:
        """Writes it."""
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre(self.split)
        out.add_token_list(self.spellings)
        out.add_token_types(self.kinds)
        out.add_token_merges(self.merges)
        out.add_bos_token_id(self.beginning_id)
        out.add_add_bos_token(self.begins_texts)
        out.add_eos_token_id(self.ending_id)
        if self.chat_template is not None:
            out.add_chat_template(self.chat_template)


def words_of(folder: Path, rows: int) -> Words:
    """The tokenizer of a checkpoint folder whose model has `rows` rows of embedding.

    Raises ValueError with a reason for one that no name of llama.cpp's stands for, and as `vocabulary.read`.
    """
    known = vocabulary.read(folder)
    definition: Json = json.loads(known.library.to_str())
    split = _split(known, definition)
    if len(known.opening_ids) > 1:
        raise ValueError(f"its tokenizer puts {len(known.opening_ids)} tokens before a text, and llama.cpp at most one")
    words = {index: spelling for spelling, index in known.library.get_vocab(with_added_tokens=False).items()}
    marks = known.library.get_added_tokens_decoder()
    spellings, kinds = [], []
    for index in range(rows):
        if index in marks:
            kind = gguf.TokenType.CONTROL if marks[index].special else gguf.TokenType.USER_DEFINED
            spelling = marks[index].content
        elif index in words:
            kind, spelling = gguf.TokenType.NORMAL, words[index]
        else:
            kind, spelling = gguf.TokenType.UNUSED, f"[PAD{index}]"  # a row that only pads the matrix
        kinds.append(kind)
        spellings.append(spelling)
    return Words(
        split=split,
        spellings=tuple(spellings),
        kinds=tuple(kinds),
        merges=tuple(" ".join(pair) for pair in definition["model"]["merges"]),
        # llama.cpp has the ids of GPT-2 for what a file does not name.
        beginning_id=(known.opening_ids or known.ending_ids)[0],
        begins_texts=bool(known.opening_ids),
        ending_id=known.ending_ids[0],
        chat_template=template_source(folder),
    )


def _split(known: Vocabulary, definition: Json) -> str:
    """llama.cpp's name for how texts become words."""
    if known.metaspace or definition["model"]["type"] != "BPE":
        raise ValueError("its tokenizer is of SentencePiece's kind; only byte-level ones are written as GGUF")
    if known.space_in_front:
        raise ValueError("its tokenizer puts a space before a text, which llama.cpp does only for SentencePiece's kind")
    for part in vocabulary.parts_of(definition["normalizer"]):
        if part["type"] != "NFC":  # which llama.cpp leaves out of tokenizers that have it, such as Qwen's
            raise ValueError(f"its tokenizer changes texts first ({part['type']}), which llama.cpp does not")
    parts = vocabulary.parts_of(definition["pre_tokenizer"])
    name = SPLITS.get(tuple((part["type"], _what_matters(part)) for part in parts))
    if name is None or (name in WHOLE_WORDS_FIRST) != bool(definition["model"].get("ignore_merges")):
        raise ValueError(
            f"its tokenizer splits texts in a way that is none of llama.cpp's {', '.join(sorted(SPLITS.values()))}"
        )
    return name


def _what_matters(part: Json) -> object:
    options = {
        "ByteLevel": part.get("use_regex", True),
        "Digits": part.get("individual_digits"),
        "Split": part.get("pattern", {}).get("Regex") if _keeps_all(part) else None,
    }
    return options.get(part["type"])


def _keeps_all(part: Json) -> bool:
    return part.get("behavior") == "Isolated" and not part.get("invert")
