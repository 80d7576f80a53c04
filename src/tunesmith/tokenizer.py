"""Text to token ids and back, over a checkpoint's `tokenizer.json`. Knows bytes and characters; nothing of models.

Byte-level tokenizers only (GPT-2, Llama 3, Qwen, the box): every token stands for fixed bytes, so any text makes the
round trip, and a token may be part of a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

END_OF_TEXT = "<|endoftext|>"
"""Ends a document, stands before the next, and is what an empty prompt means."""


class Tokenizer:
    """The tokenizer of one base model. Immutable, safe to share between threads."""

    def __init__(self, definition: tokenizers.Tokenizer) -> None:
        """Raises ValueError if `definition` is not byte-level or has no end-of-text token."""
        if not isinstance(definition.decoder, tokenizers.decoders.ByteLevel):
            raise ValueError(f"the tokenizer's decoder is {definition.decoder!r}; only byte-level tokenizers are read")
        end_of_text_id = definition.token_to_id(END_OF_TEXT)
        if end_of_text_id is None:
            raise ValueError(f"the tokenizer has no token {END_OF_TEXT}")
        self._definition = definition
        self._end_of_text_id = end_of_text_id
        byte_of = {character: byte for byte, character in _byte_characters().items()}
        added = {index: token.content.encode() for index, token in definition.get_added_tokens_decoder().items()}
        try:
            self._bytes = {
                index: bytes(byte_of[c] for c in spelling)
                for spelling, index in definition.get_vocab(with_added_tokens=False).items()
                if index not in added
            } | added
        except KeyError as error:
            raise ValueError(f"the tokenizer spells tokens with {error.args[0]!r}, which stands for no byte") from error
        self._vocabulary_size = max(self._bytes) + 1
        self._longest_token_bytes = max(map(len, self._bytes.values()))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder.

        Raises FileNotFoundError without `tokenizer.json` there, ValueError for one that cannot be used.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}")
        try:
            definition = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower for what it cannot read
            raise ValueError(f"it is no tokenizer: {error}") from error
        return cls(definition)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token id."""
        return self._vocabulary_size

    @property
    def longest_token_bytes(self) -> int:
        """No token stands for more bytes: a text has at least its bytes divided by this many tokens."""
        return self._longest_token_bytes

    @property
    def end_of_text_id(self) -> int:
        """The id of `<|endoftext|>`."""
        return self._end_of_text_id

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, nothing added; `<|endoftext|>` in the text is that one token.

        Raises UnicodeEncodeError for a lone surrogate, which no bytes stand for.
        """
        text.encode()  # the library's own error would not say where
        return list(self._definition.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text; several times faster than one by one."""
        for text in texts:
            text.encode()
        return [list(e.ids) for e in self._definition.encode_batch(list(texts), add_special_tokens=False)]

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a prompt: as `encode`, but an empty prompt is the start of a document, `[end_of_text_id]`."""
        return self.encode(text) or [self._end_of_text_id]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; empty for ids without a token (rows that only pad an embedding matrix)."""
        return self._bytes.get(token_id, b"")

    def token_text(self, token_id: int) -> str:
        r"""What tables of log-probabilities show: the text, or `bytes:\xf0\x9f` where it is not whole characters."""
        return bytes_text(self.token_bytes(token_id))

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of tokens; bytes that are no character become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")


class IncrementalDecoder:
    """Text from tokens as they come: a character is given out when its last byte is there.

    Over a whole stream, what `push` and `finish` return adds up to `Tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """U+FFFD if the stream ended within a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def bytes_text(content: bytes) -> str:
    r"""UTF-8 as text; anything else as `bytes:` and the bytes, printable ASCII plain and the rest as `\xNN`."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(b) if 0x20 <= b < 0x7F else f"\\x{b:02x}" for b in content)


def _byte_characters() -> dict[int, str]:
    """How byte-level vocabularies spell each byte: printable Latin-1 as itself, the rest from U+0100 on.

    Source: `bytes_to_unicode` of GPT-2's encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
