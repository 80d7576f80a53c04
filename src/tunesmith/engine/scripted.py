"""A deterministic engine without weights, for tests and demos: a hash stands in for the model.

The next token depends on the model and the last two tokens, through logits that are reproducible on every machine;
prompts named in `answers` are followed by their answer instead. Everything else (sampling, scores, errors) keeps the
engine's contract, so the wire cannot tell it from a real one.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunesmith.engine.base import (
    Capabilities,
    EngineOutput,
    FinishReason,
    GenerateRequest,
    PromptScored,
    SampledToken,
    SamplingParams,
    TokenScore,
)
from tunesmith.engine.chance import uniform
from tunesmith.engine.handles import handle_of
from tunesmith.errors import EngineUnavailable

ANSWER_LOGIT = 30.0
"""Above all others, so that an answer has a probability of all but 1."""

Floats = NDArray[np.float64]


class ScriptedEngine:
    """See the module. `answers` maps the ids of a whole prompt to the ids that follow it, then end of text.

    After `close`, generating raises EngineUnavailable.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        answers: Mapping[tuple[int, ...], tuple[int, ...]] | None = None,
        end_of_text_id: int = 0,
        capabilities: Capabilities | None = None,
    ) -> None:
        self._vocabulary_size = vocabulary_size
        self._answers = {prompt: (*answer, end_of_text_id) for prompt, answer in (answers or {}).items()}
        self._capabilities = capabilities or Capabilities()
        self._models: dict[str, bytes] = {}
        self._closed = False
        self.running = 0
        """Sequences being generated now."""

    @property
    def capabilities(self) -> Capabilities:
        """Those given, by default all."""
        return self._capabilities

    async def load(self, base_dir: Path, adapter_dir: Path | None) -> str:
        """See `Engine.load`. Reads tuned weights only to answer differently for each."""
        handle = handle_of(base_dir, adapter_dir)
        weights = sorted(adapter_dir.glob("*.safetensors")) if adapter_dir else []
        content = b"".join(path.read_bytes() for path in weights)
        self._models[handle] = hashlib.blake2b(content).digest()
        return handle

    async def unload(self, handle: str) -> None:
        """See `Engine.unload`."""
        self._models.pop(handle, None)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineOutput, None]:
        """See `Engine.generate`. Gives way to other tasks before each token."""
        if self._closed:
            raise EngineUnavailable("The engine is closed.")
        model = self._models[request.handle]
        ids = list(request.prompt_ids)
        self.running += 1
        try:
            if request.score_prompt:
                yield PromptScored(tuple(self._score_prompt(model, ids, request.top_logprobs or 0)))
            for step in itertools.count():
                if step == request.sampling.max_tokens:
                    return
                await asyncio.sleep(0)
                logits_V = self._logits(model, ids)
                token_id = _sample(logits_V, request.sampling, ids[len(request.prompt_ids) :])
                ids.append(token_id)
                finish: FinishReason | None = None
                if token_id in request.sampling.stop_token_ids:
                    finish = "stop"
                elif step + 1 == request.sampling.max_tokens:
                    finish = "length"
                yield SampledToken(_score(logits_V, token_id, request.top_logprobs), finish)
                if finish:
                    return
        finally:
            self.running -= 1

    async def close(self) -> None:
        """See `Engine.close`."""
        self._closed = True

    def _logits(self, model: bytes, ids: Sequence[int]) -> Floats:
        seen = ",".join(map(str, ids[-2:])).encode()
        key = int.from_bytes(hashlib.blake2b(model + seen, digest_size=8).digest(), "big")
        logits_V = np.random.Generator(np.random.Philox(key)).standard_normal(self._vocabulary_size)
        for prompt, answer in self._answers.items():
            given = ids[len(prompt) :]
            if tuple(ids[: len(prompt)]) == prompt and len(given) < len(answer) and given == list(answer[: len(given)]):
                logits_V[answer[len(given)]] = ANSWER_LOGIT
        return logits_V

    def _score_prompt(self, model: bytes, ids: list[int], top: int) -> list[TokenScore]:
        first = TokenScore(ids[0], None)
        return [first, *(_score(self._logits(model, ids[:i]), ids[i], top) for i in range(1, len(ids)))]


def _score(logits_V: Floats, token_id: int, top: int | None) -> TokenScore:
    if top is None:
        return TokenScore(token_id, None)
    largest = logits_V.max()
    logprobs_V = logits_V - largest - np.log(np.exp(logits_V - largest).sum())
    best = np.argsort(-logprobs_V, kind="stable")[:top]
    return TokenScore(token_id, float(logprobs_V[token_id]), tuple((int(i), float(logprobs_V[i])) for i in best))


def _sample(logits_V: Floats, sampling: SamplingParams, generated: Sequence[int]) -> int:
    shaped_V = logits_V.copy()
    for token_id, bias in sampling.logit_bias.items():
        shaped_V[token_id] += bias
    for token_id, count in Counter(generated).items():
        shaped_V[token_id] -= count * sampling.frequency_penalty + sampling.presence_penalty
    if sampling.temperature == 0:
        return int(shaped_V.argmax())
    weights_V = np.exp((shaped_V - shaped_V.max()) / sampling.temperature)
    order = np.argsort(-weights_V, kind="stable")
    mass_V = np.cumsum(weights_V[order] / weights_V.sum())
    kept = int(np.searchsorted(mass_V, sampling.top_p)) + 1  # the fewest tokens that reach top_p
    kept = min(kept, len(mass_V))
    draw = uniform(sampling.seed, len(generated)) * mass_V[kept - 1]
    return int(order[min(int(np.searchsorted(mass_V, draw, side="right")), kept - 1)])
