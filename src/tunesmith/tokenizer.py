"""Text to token ids and back, without loss. Knows bytes and characters; nothing of models.

Every token stands for fixed bytes, and the bytes of a text's tokens are the text: a token may be a part of a character.
Two things stand before a prompt and are not shown: the token that begins a text, and the space that SentencePiece puts
before a first word. What follows a prompt, a completion, is encoded by itself, and neither stands there: so trainer and
engine see the same tokens.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tunesmith import vocabulary
from tunesmith.vocabulary import METASPACE, Vocabulary

TRIALS = (
    "Review: a  b\tc\n\nDon't! 1234 ->",
    " yes",
    "  \u00c9\u00a0\u3000\ufb01 \u2026 \u2460",
    "\u65e5\u672c \U0001f47d ",
)
"""Every tokenizer must give these back. What folds case, spaces or compatible characters does not."""
COMPOSED_BYTES = 3
"""So many bytes may become one where a tokenizer composes characters first: nine of a Korean syllable become three."""

_NONE = itertools.repeat(False)
"""No text holds its own marks."""
_MISREAD = re.compile(rf"({METASPACE})|(?<=<)(?=0x[0-9A-F]{{2}}>)")
"""In a text: what a metaspace vocabulary would take for a space, and where it could take four characters for a byte."""


class Tokenizer:
    """The tokenizer of one base model. Immutable, safe to share between threads."""

    def __init__(self, known: Vocabulary) -> None:
        """Raises ValueError if texts would not come back as they were."""
        self._known = known
        self._vocabulary_size = max(known.contents) + 1
        self._most_bytes = max(map(len, known.contents.values())) * (COMPOSED_BYTES if known.composes else 1)
        self._specials = tuple(known.contents[index].decode() for index in known.special_ids)
        ids_of_bytes = {content: index for index, content in known.contents.items() if len(content) == 1}
        self._spelt = (
            {METASPACE: [ids_of_bytes[bytes([byte])] for byte in METASPACE.encode()]} if known.metaspace else {}
        )
        for text in TRIALS:
            ids = self.prompt_ids(text)
            for back in (self.decode(self.encode(text)), self.prompt_text(ids)):
                if back != text:
                    raise ValueError(f"the tokenizer makes {back!r} of {text!r}; only those that lose nothing are read")

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder.

        Raises FileNotFoundError without `tokenizer.json` there, ValueError for one that cannot be used.
        """
        return cls(vocabulary.read(folder))

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token id."""
        return self._vocabulary_size

    @property
    def end_of_text_id(self) -> int:
        """The first of `ending_ids`."""
        return self._known.ending_ids[0]

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, such as `<|endoftext|>` or `</s>`: each of them ends a generation."""
        return self._known.ending_ids

    def fewest_tokens(self, text: str) -> int:
        """`text` has no fewer tokens; told without encoding it. Raises UnicodeEncodeError as `encode`."""
        return len(text.encode()) // self._most_bytes

    def encode(self, text: str) -> list[int]:
        """The ids of a text that follows another, nothing added; a special token written out in it is that one token.

        Raises UnicodeEncodeError for a lone surrogate, which no bytes stand for.
        """
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text; several times faster than one by one."""
        split = [self._split(text) for text in texts]
        encoded = self._encode(list(itertools.chain(*split)))
        ids_of = ([self._spelt.get(piece, next(encoded)) for piece in pieces] for pieces in split)
        return [list(itertools.chain(*ids)) for ids in ids_of]

    def prompt_ids(self, text: str, marked: bool = False) -> list[int]:
        """The ids of a prompt: what begins a text, then the text. An empty one that nothing begins: `end_of_text_id`.

        A text that is `marked` holds its own marks: what begins a text is in it, or is not wanted. Raises
        UnicodeEncodeError as `encode`.
        """
        return self.prompt_ids_many([text], [marked])[0]

    def prompt_ids_many(self, texts: Sequence[str], marked: Iterable[bool] = _NONE) -> list[list[int]]:
        """`prompt_ids` for each text; several times faster than one by one."""
        openings = (() if holds_it else self._known.opening_ids for holds_it in marked)
        encoded = self.encode_many([self._with_space(text) for text in texts])
        return [[*opening, *ids] or [self.end_of_text_id] for ids, opening in zip(encoded, openings, strict=False)]

    def prompt_pieces(self, token_ids: Sequence[int]) -> list[bytes | None]:
        """What each token of a prompt shows: None for one that the tokenizer itself puts before texts.

        Of the prompt_ids of a text, the pieces are the text.
        """
        known = self._known
        hidden = len(known.opening_ids) if tuple(token_ids[: len(known.opening_ids)]) == known.opening_ids else 0
        contents = known.contents
        shown = [contents.get(token_id, b"") for token_id in token_ids[hidden:]]
        if known.space_in_front and shown and token_ids[hidden] not in known.special_ids:
            shown[0] = shown[0].removeprefix(b" ")
        return [*[None] * hidden, *shown]

    def prompt_text(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt; bytes that are no character become U+FFFD."""
        return b"".join(piece or b"" for piece in self.prompt_pieces(token_ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; empty for ids without a token (rows that only pad an embedding matrix)."""
        return self._known.contents.get(token_id, b"")

    def token_text(self, token_id: int) -> str:
        r"""What tables of log-probabilities show: the text, or `bytes:\xf0\x9f` where it is not whole characters."""
        return bytes_text(self.token_bytes(token_id))

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of tokens that follow a prompt; bytes that are no character become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def _encode(self, pieces: list[str]) -> Iterator[list[int]]:
        library = self._known.library
        if len(pieces) == 1:  # waking the library's threads takes longer than the work
            return iter([library.encode(pieces[0], add_special_tokens=False).ids])
        return (encoding.ids for encoding in library.encode_batch(pieces, add_special_tokens=False))

    def _with_space(self, text: str) -> str:
        plain = self._known.space_in_front and text and not text.startswith(self._specials)
        return f" {text}" if plain else text

    def _split(self, text: str) -> list[str]:
        """The text in pieces that can be encoded one by one without loss."""
        text.encode()  # the library's own error would not say where
        if not self._known.metaspace:
            return [text]
        return [piece for piece in _MISREAD.split(text) if piece]


class IncrementalDecoder:
    """Text from the bytes of tokens as they come: a character is given out when its last byte is there.

    Over a whole stream, what `push` and `finish` return adds up to all bytes decoded at once.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, content: bytes) -> str:
        """The characters that these bytes complete; may be empty."""
        return self._decoder.decode(content)

    def finish(self) -> str:
        """U+FFFD if the stream ended within a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def bytes_text(content: bytes) -> str:
    r"""UTF-8 as text; anything else as `bytes:` and the bytes, printable ASCII plain and the rest as `\xNN`."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(b) if 0x20 <= b < 0x7F else f"\\x{b:02x}" for b in content)
