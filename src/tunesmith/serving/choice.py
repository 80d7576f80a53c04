"""From the tokens of one sequence to the text, table and end of one choice, piece by piece.

Pieces of text and rows of the table are given out as soon as nothing that follows can change them; a plain answer is
the same pieces joined. A row of the table belongs to the text if its token gave at least a part of a character of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunesmith.engine.base import EngineOutput, FinishReason, PromptScored, TokenScore
from tunesmith.serving.encoding import EncodedPrompt
from tunesmith.serving.stops import StopScanner
from tunesmith.tokenizer import IncrementalDecoder, Tokenizer, bytes_text


@dataclass(frozen=True, slots=True)
class Row:
    """A token of a text, and what the model says of it."""

    content: bytes
    logprob: float | None
    """Natural logarithm; None for the first token of an echoed prompt."""
    top: tuple[tuple[bytes, float], ...]
    """The most likely tokens, best first; the token itself is here only if it is among them."""
    offset: int
    """Where it begins, in characters from the start of the prompt."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The table of a text, or the four parallel lists that completions show it as."""

    rows: tuple[Row, ...]

    @classmethod
    def join(cls, parts: Iterable[Logprobs]) -> Logprobs:
        """One table after another."""
        return cls(tuple(row for part in parts for row in part.rows))

    @property
    def tokens(self) -> tuple[str, ...]:
        """As text, or spelt out where they are no whole characters."""
        return tuple(bytes_text(row.content) for row in self.rows)

    @property
    def token_logprobs(self) -> tuple[float | None, ...]:
        """See `Row.logprob`."""
        return tuple(row.logprob for row in self.rows)

    @property
    def top_logprobs(self) -> tuple[dict[str, float] | None, ...]:
        """The most likely tokens, and the token itself if it is not among them; None where `token_logprobs` is."""
        return tuple(None if row.logprob is None else _by_text(row, row.logprob) for row in self.rows)

    @property
    def text_offset(self) -> tuple[int, ...]:
        """See `Row.offset`."""
        return tuple(row.offset for row in self.rows)


def _by_text(row: Row, logprob: float) -> dict[str, float]:
    likely: dict[str, float] = {}
    for content, value in row.top:
        likely.setdefault(bytes_text(content), value)
    likely[bytes_text(row.content)] = logprob  # also where a likelier token reads the same
    return likely


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one step adds to a choice."""

    index: int
    text: str
    logprobs: Logprobs | None
    """None if no table was asked for."""
    finish_reason: FinishReason | None
    """Set on the last piece of a choice."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole completion."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason

    @classmethod
    def join(cls, deltas: Iterable[ChoiceDelta]) -> Choice:
        """The pieces of one choice, the last with its finish reason."""
        listed = list(deltas)
        finish_reason = listed[-1].finish_reason
        assert finish_reason is not None
        tables = [delta.logprobs for delta in listed if delta.logprobs is not None]
        text = "".join(delta.text for delta in listed)
        return cls(listed[0].index, text, Logprobs.join(tables) if tables else None, finish_reason)


class ChoiceWriter:
    """Writes one choice from the outputs of one sequence."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        index: int,
        prompt: EncodedPrompt,
        echo: bool,
        with_table: bool,
        stop: tuple[str, ...],
    ) -> None:
        self.index = index
        self.generated_tokens = 0
        self._total_logprob = 0.0
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder()
        self._scanner = StopScanner((*stop, *prompt.stops))
        self._unshown = prompt.unshown
        self._prompt_ids = prompt.ids
        self._echo = echo
        self._with_table = with_table
        self._waiting: list[Row] = []
        self._decoded = self._released = 0
        if with_table and not echo:
            text = tokenizer.prompt_text(prompt.ids) if prompt.text is None else prompt.text
            self._decoded = self._released = len(text)

    @property
    def mean_logprob(self) -> float:
        """Of all tokens generated so far; 0 before the first."""
        return self._total_logprob / self.generated_tokens if self.generated_tokens else 0.0

    def opening(self) -> ChoiceDelta | None:
        """The echoed prompt; None without echo, and where its table has to wait for the engine's scores."""
        if not self._echo or self._with_table:
            return None
        return self._prompt([TokenScore(token_id, None) for token_id in self._prompt_ids])

    def push(self, output: EngineOutput) -> ChoiceDelta | None:
        """What a step of the engine adds; None if it all has to be held back."""
        if isinstance(output, PromptScored):
            return self._prompt(output.scores)
        self.generated_tokens += 1
        self._total_logprob += output.score.logprob or 0.0
        if output.finish == "stop":
            return self.end("stop")  # the token of the end of the text is no text
        text = self._scanner.push(self._decode(output.score, self._tokenizer.token_bytes(output.score.token_id)))
        if self._scanner.stopped:
            return self._cut(text)
        return self.end("length", text) if output.finish else self._delta(text, None)

    def end(self, reason: FinishReason, text: str = "") -> ChoiceDelta:
        """The last piece: `text` and whatever is still held back."""
        text += self._scanner.push(self._decoder.finish())
        if self._scanner.stopped:
            return self._cut(text)
        text += self._scanner.finish()
        self._released += len(text)
        rows, self._waiting = self._waiting, []
        return ChoiceDelta(self.index, self._shown(text), self._table(rows), reason)

    def _prompt(self, scores: Sequence[TokenScore]) -> ChoiceDelta | None:
        pieces = self._tokenizer.prompt_pieces([score.token_id for score in scores])
        shown = [(score, piece) for score, piece in zip(scores, pieces, strict=True) if piece is not None]
        # What is not shown is no row: the first that is has no log-probability, as the first of any echoed prompt.
        first = [(TokenScore(score.token_id, None), piece) for score, piece in shown[:1]]
        return self._delta("".join(self._decode(*row) for row in [*first, *shown[1:]]), None)

    def _cut(self, text: str) -> ChoiceDelta:
        delta = self._delta(text, "stop")
        assert delta is not None
        return delta

    def _decode(self, score: TokenScore, content: bytes) -> str:
        """The characters that a token completes; its row of the table waits until they are given out."""
        if self._with_table:
            top = tuple((self._tokenizer.token_bytes(token_id), logprob) for token_id, logprob in score.top)
            self._waiting.append(Row(content, score.logprob, top, self._decoded))
        text = self._decoder.push(content)
        self._decoded += len(text)
        return text

    def _delta(self, text: str, finish_reason: FinishReason | None) -> ChoiceDelta | None:
        self._released += len(text)
        count = sum(row.offset < self._released for row in self._waiting)
        rows, self._waiting = self._waiting[:count], self._waiting[count:]
        if not text and not rows and finish_reason is None:
            return None
        return ChoiceDelta(self.index, self._shown(text), self._table(rows), finish_reason)

    def _shown(self, text: str) -> str:
        """`text`, without what is not shown of the first of it."""
        if text and self._unshown:
            text, self._unshown = text.removeprefix(self._unshown), ""
        return text

    def _table(self, rows: list[Row]) -> Logprobs | None:
        return Logprobs(tuple(rows)) if self._with_table else None
