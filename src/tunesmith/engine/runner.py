"""The batch: loaded models, sequences under way, one step of all of them at a time. Synchronous, for one thread.

Sequences of one base go through one forward pass together, whatever their adapters; each base has its own pass.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor

from tunesmith.adapters import checkpoint
from tunesmith.adapters.lora import Lora
from tunesmith.adapters.stack import AdapterStacks, Mixture, PackedAdapter
from tunesmith.decoder import loading, replays
from tunesmith.decoder.base import Decoder
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.panels import Bits
from tunesmith.engine import native, prompts, sampling, scheduler, tiled
from tunesmith.engine.base import FinishReason, GenerateRequest, Precision, PromptScored, SampledToken, TokenScore
from tunesmith.engine.blocks import BLOCK_TOKENS, BlockPool
from tunesmith.engine.deltas import PanelAdapter
from tunesmith.engine.handles import handle_of
from tunesmith.engine.kvcache import KVCache
from tunesmith.engine.messages import Ended, Event, Produced
from tunesmith.engine.native import MOST_ROWS, NativeStep
from tunesmith.engine.paneled import PaneledLlama
from tunesmith.engine.prompts import PromptStep
from tunesmith.engine.recorded import RecordedStep
from tunesmith.engine.scheduler import Chunk, Scheduler
from tunesmith.engine.tiled import TiledAdapter, TiledStep
from tunesmith.rundir import holds_all_weights

SCORED_ROWS = 128
"""Prompt positions whose logits are held at a time: the vocabulary is wide."""


BITS: dict[Precision, Bits] = {"float32": 32, "bfloat16": 16, "int8": 8}
"""Of weights that `tiled` does not cover: 16 and 8 bits are fixed point, and 16 closer to the weights than bf16 is."""
WITHOUT_EIGHT = (
    "int8 needs a C++ compiler and a model of the Llama family on a processor; float32 and bfloat16 run everywhere"
)


Adapter = PackedAdapter | PanelAdapter | TiledAdapter
A = TypeVar("A", bound=Adapter)


class StepFailed(Exception):
    """A step went wrong; `events` had come of it before, and are told nowhere else."""

    def __init__(self, events: list[Event]) -> None:
        super().__init__("a step of the engine went wrong")
        self.events = events


class LoadedBase:
    """The weights of a base, the cache of its sequences, and the stacks of its adapters."""

    def __init__(self, weights: Decoder, cache: KVCache, precision: Precision = "float32") -> None:
        """`precision`: see `Runner`. Raises ValueError for weights that it cannot hold."""
        self._precision = precision
        self.weights = weights
        self.cache = cache
        self.stacks = AdapterStacks()
        self.tiled: TiledStep | None = None
        self.panels: PaneledLlama | None = None
        self.native: NativeStep | None = None
        self.prompts: PromptStep | None = None
        self.recorded: RecordedStep | None = None
        if cache.dtype == torch.bfloat16 and isinstance(weights, Llama) and tiled.covers(weights):
            self.tiled = TiledStep(weights, cache, eight=precision == "int8")
        elif (
            isinstance(weights, Llama)
            and native.covers(weights)
            and (library := prompts.library()) is not None
            and (decode := native.library()) is not None
        ):
            self.panels = PaneledLlama(library, weights, BITS[precision])
            self.prompts = PromptStep(library, weights, self.panels, cache)
            self.native = NativeStep(decode, weights, self.panels, cache)
        elif precision == "int8":
            raise ValueError(WITHOUT_EIGHT)
        elif isinstance(weights, Llama) and cache.device.type != "cpu":
            self.recorded = RecordedStep(weights, cache, replays.recorder_of(cache.device))

    @classmethod
    def load(cls, folder: Path, precision: Precision, device: str, cache_bytes: int) -> LoadedBase:
        """A base with a cache of its own. Raises what `decoder.loading.load` raises, ValueError for int8 in vain."""
        weights, dtype = _read(folder, precision, device)
        config = weights.config
        layers = len(config.layout.layers)
        token_bytes = 2 * layers * config.kv_heads * config.head_width * dtype.itemsize
        # At least one sequence of full length, plus the position after the last (see `ModelRef.context_tokens`).
        tokens = max(cache_bytes // token_bytes, config.context_tokens + 1)
        cache = KVCache(
            BlockPool(-(-tokens // BLOCK_TOKENS)),
            layers=layers,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            dtype=dtype,
            device=torch.device(device),
        )
        return cls(weights, cache, precision)

    def retrained(self, folder: Path, device: str) -> LoadedBase:
        """The same model with all its weights tuned; it shares the cache. Raises ValueError for another shape."""
        weights, _ = _read(folder, self._precision, device)
        if _shape(weights) != _shape(self.weights):
            raise ValueError(f"{folder.name} has another shape than its base")
        return LoadedBase(weights, self.cache, self._precision)

    def adapter(self, lora: Lora) -> Adapter:
        """As steps of this base read it. Raises ValueError."""
        if (compiled := self.tiled or self.panels) is not None:
            return compiled.adapter(lora)
        return PackedAdapter.from_lora(lora, self.cache.dtype, self.cache.device)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """[B, V] of states after the last norm."""
        return (self.tiled or self.panels or self.weights).logits(hidden_BD)


def _read(folder: Path, precision: Precision, device: str) -> tuple[Decoder, torch.dtype]:
    """The weights, and the dtype of their cache. Raises what `decoder.loading.load` raises.

    On a processor the weights come in fp32: compiled steps round them themselves, and what those do not cover stays so.
    """
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    if device != "cpu":
        return loading.load(folder, dtype, device), dtype
    weights = loading.load(folder, torch.float32, device)
    return weights, dtype if tiled.covers(weights) else torch.float32


def _shape(weights: Decoder) -> tuple[object, ...]:
    """What the cache goes by, and the tokens."""
    config = weights.config
    return config.layout, config.kv_heads, config.head_width, config.vocabulary_size


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A base, or what was tuned from it. A base is kept as long as a model or a sequence refers to it."""

    base: LoadedBase
    adapter: Adapter | None
    identity: str
    """Its handle."""

    @property
    def pool(self) -> BlockPool:
        """See `Placed`."""
        return self.base.cache.pool


Running = scheduler.Sequence[Model]


class Runner:
    """Loads models and steps through the requests for them."""

    def __init__(
        self,
        *,
        precision: Precision = "float32",
        device: str = "cpu",
        max_running: int = 64,
        step_tokens: int = 512,
        cache_bytes: int = 512 << 20,
    ) -> None:
        """`precision` of products with the weights of bases; `int8` is refused where it cannot be had.

        `step_tokens` trades the pause that a long prompt makes for throughput; `cache_bytes` is for each base.
        """
        self._precision = precision
        self._device = device
        self._cache_bytes = cache_bytes
        self._models: dict[str, Model] = {}
        self._bases: WeakValueDictionary[str, LoadedBase] = WeakValueDictionary()
        self._scheduler: Scheduler[Model] = Scheduler(max_running=max_running, step_tokens=step_tokens)
        self.tokens_computed = 0
        """Tokens that went through a model since the start; those found in the cache did not."""

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return self._scheduler.busy

    def load(self, handle: str, base_dir: str, adapter_dir: str | None) -> None:
        """`read` and `keep`."""
        self.keep(handle, self.read(handle, base_dir, adapter_dir))

    def read(self, handle: str, base_dir: str, adapter_dir: str | None) -> Model:
        """A model from its folders, or the one that is loaded. Raises ValueError if there is none that can run here.

        May be called while another thread steps, by one thread at a time.
        """
        if (known := self._models.get(handle)) is not None:
            return known
        try:
            return self._load(handle, Path(base_dir), Path(adapter_dir) if adapter_dir else None)
        except KeyError as error:
            raise ValueError(f"the adapter in {adapter_dir} lacks {error.args[0]}") from error
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{adapter_dir or base_dir} cannot be read: {error}") from error

    def keep(self, handle: str, model: Model) -> None:
        """Requests may ask for it from now on."""
        self._models[handle] = model

    def unload(self, handle: str) -> None:
        """Sequences under way keep their model until they end. Unknown handles pass."""
        self._models.pop(handle, None)

    def submit(self, number: int, request: GenerateRequest) -> list[Event]:
        """Takes a request; the events tell if it has ended at once."""
        model = self._models.get(request.handle)
        if model is None:
            return [Ended(number, "unknown handle", request.handle)]
        sequence = scheduler.Sequence.begin(number, request, model)
        if (reason := _fault(sequence)) is not None:
            return [Ended(number, "refused", reason)]
        if request.sampling.max_tokens == 0 and not request.score_prompt:
            return [Ended(number)]
        self._scheduler.add(sequence)
        return []

    def cancel(self, number: int) -> None:
        """Frees the place of a sequence. Unknown numbers pass."""
        self._scheduler.remove(number)

    def fail_running(self, reason: str) -> list[Event]:
        """Gives up what takes part in steps, after one went wrong; what waits is tried."""
        numbers = [sequence.number for sequence in self._scheduler.running]
        for number in numbers:
            self._scheduler.remove(number)
        return [Ended(number, "failed", reason) for number in numbers]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward pass for each base with work to do, and what came of it. Raises StepFailed."""
        events: list[Event] = []
        try:
            by_base: defaultdict[LoadedBase, list[Chunk[Model]]] = defaultdict(list)
            for chunk in self._scheduler.next_step():
                by_base[chunk.sequence.model.base].append(chunk)
            for base, chunks in by_base.items():
                events.extend(self._step(base, chunks))  # keeps those before an exception
        except Exception as error:
            raise StepFailed(events) from error
        return events

    def _load(self, handle: str, base_dir: Path, adapter_dir: Path | None) -> Model:
        key = handle_of(base_dir, None)
        base = self._bases.get(key)
        if base is None:
            base = LoadedBase.load(base_dir, self._precision, self._device, self._cache_bytes)
            self._bases[key] = base
        if adapter_dir is None:
            return Model(base, None, handle)
        if holds_all_weights(adapter_dir):
            return Model(base.retrained(adapter_dir, self._device), None, handle)
        lora, _ = checkpoint.load(adapter_dir, base.weights.config.layout)
        return Model(base, base.adapter(lora), handle)

    def _step(self, base: LoadedBase, chunks: list[Chunk[Model]]) -> Iterator[Event]:
        self.tokens_computed += sum(chunk.length for chunk in chunks)
        logits_WV: Tensor | None = None
        mixture: Mixture | None = None
        one_each = all(chunk.length == 1 for chunk in chunks)
        tokens = [chunk.sequence.token_ids[chunk.start : chunk.end] for chunk in chunks]
        recorded: tuple[Tensor, Tensor] | None = None
        if base.recorded is not None and one_each:
            recorded = base.recorded([ids[0] for ids in tokens], chunks, _adapters(PackedAdapter, chunks))
        if base.tiled is None and base.panels is None and recorded is None:
            chunks, mixture = _arrange(base.stacks, chunks)
            tokens = [chunk.sequence.token_ids[chunk.start : chunk.end] for chunk in chunks]
        wanted = [_wanted(chunk) for chunk in chunks]
        if base.tiled is not None:
            hidden_WD = base.tiled.hidden(tokens, chunks, _adapters(TiledAdapter, chunks), wanted)
        elif recorded is not None:
            hidden_WD, logits_WV = (_select(each, chunks, wanted) for each in recorded)
        elif base.native is not None and len(chunks) <= MOST_ROWS and one_each:
            step = base.native([ids[0] for ids in tokens], chunks, _adapters(PanelAdapter, chunks))
            hidden_WD, logits_WV = (_select(each, chunks, wanted) for each in step)
        elif base.prompts is not None:
            ids = list(itertools.chain.from_iterable(tokens))
            hidden_WD = base.prompts.hidden(ids, chunks, _adapters(PanelAdapter, chunks), wanted)
        else:
            token_ids_N = torch.tensor(list(itertools.chain.from_iterable(tokens)), device=self._device)
            attention = base.cache.attend(chunks)
            hidden_ND = base.weights.hidden(token_ids_N, attention.positions_N, attention, mixture)
            hidden_WD = _select(hidden_ND, chunks, wanted)

        ends = list(itertools.accumulate(wanted))
        for chunk, end in zip(chunks, ends, strict=True):
            if _is_scored(chunk):
                _score_prompt(base, chunk, hidden_WD[end - chunk.length : end])
            self._scheduler.computed(chunk)

        complete = [
            (chunk.sequence, end) for chunk, end in zip(chunks, ends, strict=True) if chunk.sequence.pending == 0
        ]
        for sequence, _ in complete:
            if sequence.request.score_prompt and sequence.generated == 0:
                yield Produced(sequence.number, PromptScored(tuple(sequence.prompt_scores)))
                if sequence.request.sampling.max_tokens == 0:
                    self._scheduler.remove(sequence.number)
                    yield Ended(sequence.number)
        sampling_now = [(sequence, end) for sequence, end in complete if sequence.request.sampling.max_tokens]
        if sampling_now:
            rows = [end - 1 for _, end in sampling_now]
            logits_BV = base.logits(_rows(hidden_WD, rows)) if logits_WV is None else _rows(logits_WV, rows)
            for sequence, token in _sample([sequence for sequence, _ in sampling_now], logits_BV):
                if token.finish:
                    self._scheduler.remove(sequence.number)
                yield Produced(sequence.number, token)


def _fault(sequence: Running) -> str | None:
    """What would make a request fail in the midst of others: it is refused before it joins them."""
    request, pool = sequence.request, sequence.model.pool
    config = sequence.model.base.weights.config
    vocabulary = config.vocabulary_size
    positions = len(request.prompt_ids) + max(request.sampling.max_tokens - 1, 0)  # the last is never fed back
    ids = [*request.prompt_ids, *request.sampling.logit_bias]
    if not request.prompt_ids:
        return "the prompt has no tokens"
    if not all(0 <= token_id < vocabulary for token_id in ids):
        return f"token ids must be between 0 and {vocabulary - 1}"
    if positions > config.context_tokens:
        return f"prompt and completion need {positions} positions, and the model has {config.context_tokens}"
    if sequence.blocks_needed > pool.blocks:
        return f"prompt and completion need more than the {pool.blocks * BLOCK_TOKENS} tokens this engine has room for"
    return None


def _adapters(kind: type[A], chunks: Sequence[Chunk[Model]]) -> list[A | None]:
    """Those of the sequences, all of which are of the kind that their base reads."""
    adapters = [chunk.sequence.model.adapter for chunk in chunks]
    assert all(adapter is None or isinstance(adapter, kind) for adapter in adapters)
    return cast(list[A | None], adapters)


def _arrange(stacks: AdapterStacks, chunks: list[Chunk[Model]]) -> tuple[list[Chunk[Model]], Mixture | None]:
    """The chunks in an order that suits the adapters: none first, one adapter together, equal lengths side by side."""
    lengths: Counter[PackedAdapter | None] = Counter()
    of_chunks = _adapters(PackedAdapter, chunks)
    for chunk, adapter in zip(chunks, of_chunks, strict=True):
        lengths[adapter] += chunk.length
    plain_tokens = lengths.pop(None, 0)
    # Among equal lengths the order is by identity: the same adapters in the next step make the same stack.
    adapters = sorted((adapter for adapter in lengths if adapter), key=lambda adapter: (lengths[adapter], id(adapter)))
    place: dict[PackedAdapter | None, int] = {adapter: index for index, adapter in enumerate(adapters)}
    by_place = sorted(zip(of_chunks, chunks, strict=True), key=lambda pair: place.get(pair[0], -1))
    arranged = [chunk for _, chunk in by_place]
    return arranged, stacks.mix(plain_tokens, [(adapter, lengths[adapter]) for adapter in adapters])


def _is_scored(chunk: Chunk[Model]) -> bool:
    return chunk.sequence.request.score_prompt and chunk.sequence.generated == 0


def _wanted(chunk: Chunk[Model]) -> int:
    """Of how many of its last tokens the states are asked for."""
    return chunk.length if _is_scored(chunk) else int(chunk.completes)


def _select(x_N: Tensor, chunks: Sequence[Chunk[Model]], wanted: Sequence[int]) -> Tensor:
    """Rows of the tokens wanted, [W, ..], out of those of all."""
    if sum(wanted) == len(x_N):
        return x_N
    return x_N[prompts.last_places(wanted, [chunk.length for chunk in chunks])]


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """Some rows, in the order they have: all of them as they are."""
    return x if len(rows) == len(x) else x[rows]


def _score_prompt(base: LoadedBase, chunk: Chunk[Model], hidden_TD: Tensor) -> None:
    """Adds the scores of the prompt tokens that the tokens of this chunk predict."""
    sequence = chunk.sequence
    top = sequence.request.top_logprobs or 0
    if not sequence.prompt_scores:
        sequence.prompt_scores.append(TokenScore(sequence.token_ids[0], None))
    targets = sequence.token_ids[chunk.start + 1 : chunk.end + 1]
    for first in range(0, len(targets), SCORED_ROWS):
        some = targets[first : first + SCORED_ROWS]
        logits_BV = base.logits(hidden_TD[first : first + len(some)])
        sequence.prompt_scores += sampling.score(logits_BV, some, [top] * len(some))


def _sample(sequences: list[Running], logits_BV: Tensor) -> Iterator[tuple[Running, SampledToken]]:
    """The next token of each sequence, which is added to it."""
    draws = [sampling.Draw(s.request.sampling, s.generated, s.counts) for s in sequences]
    chosen = sampling.choose(logits_BV, draws)
    scores = [TokenScore(token_id, None) for token_id in chosen]
    scored = [row for row, sequence in enumerate(sequences) if sequence.request.top_logprobs is not None]
    if scored:
        tops = [sequences[row].request.top_logprobs or 0 for row in scored]
        for row, score in zip(
            scored, sampling.score(logits_BV[scored], [chosen[r] for r in scored], tops), strict=True
        ):
            scores[row] = score
    for sequence, token_score in zip(sequences, scores, strict=True):
        sequence.token_ids.append(token_score.token_id)
        sequence.counts[token_score.token_id] += 1
        yield sequence, SampledToken(token_score, _finish(sequence))


def _finish(sequence: Running) -> FinishReason | None:
    wanted = sequence.request.sampling
    if sequence.token_ids[-1] in wanted.stop_token_ids:
        return "stop"
    return "length" if sequence.generated == wanted.max_tokens else None
