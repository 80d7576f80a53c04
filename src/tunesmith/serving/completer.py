"""From a request in text to choices in text: encode, load, generate, write. Plain and streamed have one generator.

Knows nothing of HTTP, keys or the database; the engine behind it knows nothing of text.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from tunesmith.chat_template import ChatTemplate, Conversation
from tunesmith.core.models import ModelRef
from tunesmith.engine.base import Engine, GenerateRequest, SamplingParams
from tunesmith.engine.chance import derive
from tunesmith.errors import InvalidRequest, NotFound, RateLimited, TunesmithError
from tunesmith.serving.choice import Choice, ChoiceDelta, ChoiceWriter, Logprobs
from tunesmith.serving.encoding import EncodedPrompt, encode
from tunesmith.serving.request import CompletionRequest
from tunesmith.serving.residency import Lease, Residency, State
from tunesmith.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 2
KEPT_FOR_OTHERS = 8
"""One part of so many of the room for completions is for keys that have none under way: one key cannot take it all."""
Read = TypeVar("Read")

__all__ = [
    "Choice",
    "ChoiceDelta",
    "Completer",
    "Completion",
    "CompletionRequest",
    "CompletionStream",
    "Logprobs",
    "Usage",
]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost. Prompts count once each; every generated token counts, shown or not."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Both."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Completion:
    """A plain answer."""

    choices: tuple[Choice, ...]
    """By index: sample s of prompt p has index p * n + s."""
    usage: Usage


class CompletionStream(AsyncIterator[ChoiceDelta | Usage]):
    """The pieces of all choices as they come, or as wholes, the Usage last. Close it if it is not read to the end."""

    def __init__(
        self, pieces: AsyncGenerator[ChoiceDelta | Usage, None], lease: Lease, leave: Callable[[], None]
    ) -> None:
        self._pieces = pieces
        # A stream that is dropped before it is read never runs the generator: what it holds must not hang on it.
        self._release = weakref.finalize(self, _give_back, lease, leave)

    async def __anext__(self) -> ChoiceDelta | Usage:
        try:
            return await anext(self._pieces)
        except BaseException:
            self._release()
            raise

    async def aclose(self) -> None:
        """Ends all sequences and frees their places. Idempotent."""
        await self._pieces.aclose()
        self._release()


class Completer:
    """Answers completion requests with one engine. For one event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_resident_adapters: int,
        max_resident_full_models: int = 4,
        max_sequences: int | None = None,
        new_seed: Callable[[], int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`max_sequences` bounds those under way; `new_seed` is asked once for each request without a seed.

        `clock` gives seconds since 1970: chat templates may ask for the date.
        """
        self._engine = engine
        self._most = max_sequences
        self._under_way: Counter[str] = Counter()
        """Sequences by payer."""
        self._residency = Residency(engine, max_adapters=max_resident_adapters, max_full=max_resident_full_models)
        self._new_seed = new_seed
        self._clock = clock
        self._tokenizers: dict[Path, Tokenizer] = {}
        self._templates: dict[Path, ChatTemplate] = {}

    async def open(self, request: CompletionRequest, *, whole: bool = False) -> CompletionStream:
        """Checks everything and loads the model; what is wrong with a request is known when this returns.

        `whole`: each choice is to come as one piece, when all have ended.
        Raises InvalidRequest naming the field, also where the model cannot be run here; NotFound if its adapter is
        gone; RateLimited where too many sequences are under way; EngineUnavailable. The stream raises EngineUnavailable
        if the engine dies meanwhile.
        """
        model = request.model
        template: ChatTemplate | None = None
        try:
            tokenizer = await _read_once(self._tokenizers, model.base_dir, Tokenizer.from_folder)
            if any(isinstance(prompt, Conversation) for prompt in request.prompts):
                template = await _read_once(self._templates, model.base_dir, ChatTemplate.from_folder)
        except (OSError, ValueError) as error:
            raise _cannot_run(model, error) from error
        request.check(self._engine.capabilities, tokenizer.vocabulary_size)
        n_sequences = len(request.prompts) * request.samples
        self._check_room(request.payer, n_sequences)
        self._under_way[request.payer] += n_sequences
        try:
            leave = partial(self._leave, request.payer, n_sequences)
            return await self._open(request, tokenizer, template, leave, whole=whole or request.ranked)
        except BaseException:
            self._leave(request.payer, n_sequences)
            raise

    async def warm(self, base_dir: Path, adapter_dir: Path) -> None:
        """Loads a model before anybody asks for it. Raises as `Residency.acquire`."""
        (await self._residency.acquire(base_dir, adapter_dir)).release()

    def state(self, model: ModelRef) -> State:
        """Whether a model can answer at once."""
        return self._residency.state(model.base_dir, model.adapter_dir)

    def _check_room(self, payer: str, n_sequences: int) -> None:
        if self._most is None:
            return
        if n_sequences > self._most:  # waiting would not help
            raise InvalidRequest(
                f"The request asks for {n_sequences} sequences (prompts times best_of); this server takes at most "
                f"{self._most} at a time. Send fewer prompts in each request.",
                param="prompt",
            )
        kept = self._most // KEPT_FOR_OTHERS if self._under_way[payer] else 0
        if self._under_way.total() + n_sequences > self._most - kept:
            raise RateLimited(
                "The server has as many completions under way as it takes. Try again in a moment.",
                retry_after_s=RETRY_AFTER_S,
            )

    def _leave(self, payer: str, n_sequences: int) -> None:
        self._under_way[payer] -= n_sequences
        if not self._under_way[payer]:
            del self._under_way[payer]

    async def _open(
        self,
        request: CompletionRequest,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        leave: Callable[[], None],
        *,
        whole: bool,
    ) -> CompletionStream:
        model = request.model
        now = datetime.fromtimestamp(self._clock())
        prompts = await asyncio.to_thread(encode, request, tokenizer, template, now)
        if request.max_tokens is None:
            request = replace(request, max_tokens=model.context_tokens - max(len(prompt.ids) for prompt in prompts))
        try:
            lease = await self._residency.acquire(model.base_dir, model.adapter_dir)
        except ValueError as error:
            raise _cannot_run(model, error) from error
        sequences = list(self._sequences(request, tokenizer, prompts, lease.handle, whole=whole))
        return CompletionStream(_run(self._engine, request, sequences, whole=whole), lease, leave)

    async def complete(self, request: CompletionRequest) -> Completion:
        """The same as `open`, collected."""
        choices: list[Choice] = []
        usage = Usage(0, 0)
        async with aclosing(await self.open(request, whole=True)) as stream:
            async for piece in stream:
                if isinstance(piece, Usage):
                    usage = piece
                else:
                    choices.append(Choice.join([piece]))
        return Completion(tuple(choices), usage)

    def _sequences(
        self,
        request: CompletionRequest,
        tokenizer: Tokenizer,
        prompts: list[EncodedPrompt],
        handle: str,
        *,
        whole: bool,
    ) -> Iterator[_Sequence]:
        assert request.max_tokens is not None
        seed = self._new_seed() if request.seed is None else request.seed
        with_table = request.logprobs is not None
        for p, prompt in enumerate(prompts):
            for s in range(request.samples):
                sampling = SamplingParams(
                    max_tokens=request.max_tokens,
                    temperature=request.temperature,
                    top_p=request.top_p,
                    presence_penalty=request.presence_penalty,
                    frequency_penalty=request.frequency_penalty,
                    logit_bias=request.logit_bias,
                    seed=derive(seed, p, s),
                    stop_token_ids=tokenizer.ending_ids,
                )
                top = request.logprobs if with_table or not request.ranked else 0  # ranking needs each token's own
                writer = ChoiceWriter(
                    tokenizer,
                    index=p * request.n + s,
                    prompt=prompt,
                    echo=request.echo,
                    with_table=with_table,
                    stop=request.stop,
                )
                score_prompt = request.echo and with_table
                together = whole and not (request.stop or prompt.stops)  # which may end it before the engine does
                generate = GenerateRequest(handle, prompt.ids, sampling, top, score_prompt, request.payer, together)
                yield _Sequence(generate, writer, [])


async def _read_once(known: dict[Path, Read], folder: Path, read: Callable[[Path], Read]) -> Read:
    if folder not in known:
        known[folder] = await asyncio.to_thread(read, folder)
    return known[folder]


def _give_back(lease: Lease, leave: Callable[[], None]) -> None:
    lease.release()
    leave()


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One sample of one prompt."""

    generate: GenerateRequest
    writer: ChoiceWriter
    pieces: list[ChoiceDelta]
    """What it has written, where that has to wait for the others."""


def _cannot_run(model: ModelRef, error: Exception) -> TunesmithError:
    """What to answer where a model that was looked up cannot be loaded. The operator is told in any case."""
    logger.warning("model cannot be loaded model=%s reason=%s", model.name, error)
    if model.adapter_dir is not None and not any(model.adapter_dir.glob("*.safetensors")):  # deleted meanwhile
        message = f"The model `{model.name}` does not exist. GET /v1/models lists those that do."
        return NotFound(message, code="model_not_found")
    # Where it lies is not for users.
    reason = str(error).replace(str(model.adapter_dir), "its adapter").replace(str(model.base_dir), model.base_dir.name)
    return InvalidRequest(f"The model `{model.name}` cannot be run on this server: {reason}.", param="model")


async def _run(
    engine: Engine, request: CompletionRequest, sequences: list[_Sequence], *, whole: bool
) -> AsyncGenerator[ChoiceDelta | Usage, None]:
    """All sequences at once; the pieces in the order in which they come, or as wholes when all have ended."""
    came: asyncio.Queue[ChoiceDelta | asyncio.Task[None]] = asyncio.Queue()
    show = None if whole else came.put_nowait
    tasks = [asyncio.create_task(_write(engine, sequence, show)) for sequence in sequences]
    for task in tasks:
        task.add_done_callback(came.put_nowait)
    running = len(tasks)
    try:
        while running:
            piece = await came.get()
            if isinstance(piece, ChoiceDelta):
                yield piece
            else:
                running -= 1
                piece.result()  # raises what ended it
        for choice in _whole_choices(request, sequences) if whole else ():
            yield choice
        prompt_tokens = sum(len(sequence.generate.prompt_ids) for sequence in sequences[:: request.samples])
        yield Usage(prompt_tokens, sum(sequence.writer.generated_tokens for sequence in sequences))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _write(engine: Engine, sequence: _Sequence, show: Callable[[ChoiceDelta], None] | None) -> None:
    """Writes one choice to its end, keeping the pieces in `sequence` unless they are shown at once."""
    show = show or sequence.pieces.append
    writer = sequence.writer
    if opening := writer.opening():
        show(opening)
    if sequence.generate.sampling.max_tokens or sequence.generate.score_prompt:
        async with aclosing(engine.generate(sequence.generate)) as outputs:
            try:
                async for output in outputs:
                    if piece := writer.push(output):
                        show(piece)
                        if piece.finish_reason:
                            return
            except ValueError as error:
                raise InvalidRequest(f"The engine cannot do this: {error}.") from error
    show(writer.end("length"))  # only where no tokens were asked for


def _whole_choices(request: CompletionRequest, sequences: list[_Sequence]) -> Iterator[ChoiceDelta]:
    """The samples of each prompt, each as one piece: where they are ranked the `n` likeliest, best first."""
    for p, start in enumerate(range(0, len(sequences), request.samples)):
        samples = sequences[start : start + request.samples]
        if request.ranked:
            samples.sort(key=lambda sequence: -sequence.writer.mean_logprob)  # stable: ties keep their order
        for rank, sequence in enumerate(samples[: request.n]):
            choice = Choice.join(sequence.pieces)
            yield ChoiceDelta(p * request.n + rank, choice.text, choice.logprobs, choice.finish_reason)
