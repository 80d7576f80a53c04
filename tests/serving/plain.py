"""What a completion is, computed plainly: transformers and PEFT, whole forwards, one list of ids after another.

Written from the page on completions, not from the code that it is held against; only chance is taken from there.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.engine.chance import derive, uniform
from tunesmith.serving.request import CompletionRequest
from tunesmith.tokenizer import Tokenizer

Floats = NDArray[np.float64]


@dataclass
class Sample:
    """One sequence as it grows."""

    ids: list[int]
    prompt_tokens: int
    logprobs: list[Floats]
    """Of each generated token: the whole distribution it was drawn from."""
    text: str = ""
    """What was generated, cut at its stop."""
    finish_reason: str | None = None

    @property
    def generated(self) -> list[int]:
        return self.ids[self.prompt_tokens :]

    @property
    def mean_logprob(self) -> float:
        own = [row[token_id] for row, token_id in zip(self.logprobs, self.generated, strict=True)]
        return float(np.mean(own)) if own else 0.0


@dataclass(frozen=True)
class PlainRow:
    token: str
    logprob: float | None
    best: list[float]
    offset: int


@dataclass(frozen=True)
class PlainChoice:
    text: str
    finish_reason: str
    rows: list[PlainRow] | None


@torch.inference_mode()
def distributions(model: Any, rows: list[list[int]], *, after_each: bool = False) -> Floats:
    """Log-probabilities [rows, vocabulary] after rows of equal length, or [rows, tokens, vocabulary] within them."""
    logits: torch.Tensor = model(torch.tensor(rows), use_cache=False).logits
    found: Floats = (logits if after_each else logits[:, -1]).double().log_softmax(-1).numpy()
    return found


def answer(model: Any, tokenizer: Tokenizer, request: CompletionRequest) -> tuple[list[PlainChoice], int, int]:
    """The choices, and the tokens of prompts and of completions."""
    choices, prompt_tokens, completion_tokens = [], 0, 0
    for p, prompt in enumerate(request.prompts):
        ids = tokenizer.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)
        samples = [Sample(list(ids), len(ids), []) for _ in range(request.best_of or request.n)]
        generate(model, tokenizer, request, p, samples)
        prompt_tokens += len(ids)
        completion_tokens += sum(len(sample.generated) for sample in samples)
        if len(samples) > request.n:
            samples = sorted(samples, key=lambda sample: -sample.mean_logprob)[: request.n]
        choices += [show(model, tokenizer, request, prompt, sample) for sample in samples]
    return choices, prompt_tokens, completion_tokens


def generate(model: Any, tokenizer: Tokenizer, request: CompletionRequest, p: int, samples: list[Sample]) -> None:
    assert request.seed is not None
    assert request.max_tokens is not None
    for step in range(request.max_tokens):
        running = [sample for sample in samples if sample.finish_reason is None]
        if not running:
            break
        for sample, row in zip(running, distributions(model, [sample.ids for sample in running]), strict=True):
            share = uniform(derive(request.seed, p, samples.index(sample)), step)
            sample.logprobs.append(row)
            sample.ids.append(draw(row, request, sample.generated, share))
            finish(tokenizer, request, sample)
    for sample in samples:
        sample.finish_reason = sample.finish_reason or "length"


def shaped(logprobs: Floats, request: CompletionRequest, generated: list[int]) -> Floats:
    """The probabilities of the next token, once bias, penalties, temperature and nucleus have had their say."""
    scores = logprobs.copy()
    for token_id, bias in request.logit_bias.items():
        scores[token_id] += bias
    for token_id in set(generated):
        scores[token_id] -= request.presence_penalty + request.frequency_penalty * generated.count(token_id)
    if request.temperature == 0:
        return (np.arange(len(scores)) == scores.argmax()).astype(float)
    weights = np.exp((scores - scores.max()) / request.temperature)
    weights /= weights.sum()
    if request.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        kept = max(1, int(np.searchsorted(np.cumsum(weights[order]), request.top_p)) + 1)
        weights[order[kept:]] = 0
        weights /= weights.sum()
    return weights


def draw(logprobs: Floats, request: CompletionRequest, generated: list[int], share: float) -> int:
    """The token where the running sum of probabilities, by token id, passes `share`."""
    return int(np.searchsorted(np.cumsum(shaped(logprobs, request, generated)), share, side="right"))


def finish(tokenizer: Tokenizer, request: CompletionRequest, sample: Sample) -> None:
    """Looks for an end after a new token."""
    if sample.generated[-1] in tokenizer.ending_ids:
        sample.finish_reason = "stop"
        return
    sample.text = tokenizer.decode(sample.generated)
    found = [
        (sample.text.index(stop) + len(stop), sample.text.index(stop)) for stop in request.stop if stop in sample.text
    ]
    if found:
        sample.text = sample.text[: min(found)[1]]
        sample.finish_reason = "stop"


def show(model: Any, tokenizer: Tokenizer, request: CompletionRequest, prompt: object, sample: Sample) -> PlainChoice:
    ended = sample.generated[-1:] and sample.generated[-1] in tokenizer.ending_ids
    generated = sample.generated[:-1] if ended else sample.generated
    prompt_ids = sample.ids[: sample.prompt_tokens]
    prompt_text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt_ids)
    if isinstance(prompt, str) and not prompt:
        prompt_text = tokenizer.decode(prompt_ids) if request.echo else ""
    text = sample.text
    if request.echo:
        whole = tokenizer.decode([*prompt_ids, *generated])
        cut = len(tokenizer.decode(generated)) - len(sample.text)
        text = whole[: len(whole) - cut]
    reason = str(sample.finish_reason)
    if request.logprobs is None:
        return PlainChoice(text, reason, None)
    rows: list[PlainRow] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offset = 0 if request.echo else len(prompt_text)
    end = offset + len(text)
    scored: list[tuple[int, Floats | None]] = []
    if request.echo:
        scored.append((prompt_ids[0], None))
        scored += zip(prompt_ids[1:], distributions(model, [prompt_ids], after_each=True)[0], strict=False)
    scored += zip(generated, sample.logprobs, strict=False)
    for token_id, logprobs in scored:
        if offset >= end:
            break
        best = [] if logprobs is None else np.sort(np.partition(logprobs, -5)[-5:])[::-1][: request.logprobs].tolist()
        own = None if logprobs is None else float(logprobs[token_id])
        rows.append(PlainRow(tokenizer.token_text(token_id), own, best, offset))
        offset += len(decoder.decode(tokenizer.token_bytes(token_id)))
    return PlainChoice(text, reason, rows)
