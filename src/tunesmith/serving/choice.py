"""From the tokens of one sequence to the text, table and end of one choice, piece by piece.

Pieces of text and rows of the table are given out as soon as nothing that follows can change them; a plain answer is
the same pieces joined. A row of the table belongs to the text if its token gave at least a part of a character of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunesmith.engine.base import EngineOutput, FinishReason, PromptScored, TokenScore
from tunesmith.serving.request import Prompt
from tunesmith.serving.stops import StopScanner
from tunesmith.tokenizer import IncrementalDecoder, Tokenizer, bytes_text


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Four parallel lists, one row a token. `text_offset` counts characters from the start of the prompt."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    """Natural logarithms; None for the first token of an echoed prompt."""
    top_logprobs: tuple[dict[str, float] | None, ...]
    """The most likely tokens, and the token itself if it is not among them; None where `token_logprobs` is."""
    text_offset: tuple[int, ...]

    @classmethod
    def join(cls, parts: Iterable[Logprobs]) -> Logprobs:
        """One table after another."""
        listed = list(parts)
        return cls(
            tokens=tuple(row for part in listed for row in part.tokens),
            token_logprobs=tuple(row for part in listed for row in part.token_logprobs),
            top_logprobs=tuple(row for part in listed for row in part.top_logprobs),
            text_offset=tuple(row for part in listed for row in part.text_offset),
        )


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


@dataclass(frozen=True, slots=True)
class _Row:
    token: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int


class ChoiceWriter:
    """Writes one choice from the outputs of one sequence."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        index: int,
        prompt: Prompt,
        prompt_ids: tuple[int, ...],
        echo: bool,
        with_table: bool,
        stop: tuple[str, ...],
    ) -> None:
        self.index = index
        self.generated_tokens = 0
        self._total_logprob = 0.0
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder()
        self._scanner = StopScanner(stop)
        self._prompt_ids = prompt_ids
        self._echo = echo
        self._with_table = with_table
        self._waiting: list[_Row] = []
        if echo:
            self._decoded = self._released = 0
        else:
            text = prompt if isinstance(prompt, str) else tokenizer.prompt_text(prompt)
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
        return ChoiceDelta(self.index, text, self._table(rows), reason)

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
            token = bytes_text(content)
            top: dict[str, float] | None = None
            if score.logprob is not None:
                top = {}
                for token_id, logprob in score.top:
                    top.setdefault(self._tokenizer.token_text(token_id), logprob)
                top[token] = score.logprob  # also where a likelier token reads the same
            self._waiting.append(_Row(token, score.logprob, top, self._decoded))
        text = self._decoder.push(content)
        self._decoded += len(text)
        return text

    def _delta(self, text: str, finish_reason: FinishReason | None) -> ChoiceDelta | None:
        self._released += len(text)
        count = sum(row.offset < self._released for row in self._waiting)
        rows, self._waiting = self._waiting[:count], self._waiting[count:]
        if not text and not rows and finish_reason is None:
            return None
        return ChoiceDelta(self.index, text, self._table(rows), finish_reason)

    def _table(self, rows: list[_Row]) -> Logprobs | None:
        if not self._with_table:
            return None
        return Logprobs(
            tokens=tuple(row.token for row in rows),
            token_logprobs=tuple(row.logprob for row in rows),
            top_logprobs=tuple(row.top for row in rows),
            text_offset=tuple(row.offset for row in rows),
        )
