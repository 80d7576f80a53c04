"""From logits to token ids and their log-probabilities. Each row depends on its own parameters, seed and step only.

Legend: B = rows, V = vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.engine.base import SamplingParams, TokenScore
from tunesmith.engine.chance import uniform

GREEDY_BELOW = 1e-5
"""Temperatures under this are taken for 0: dividing by them would overflow."""

NUCLEUS_TOKENS = 256
"""So many of the best mostly come to any `top_p` below 1."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What decides the next token of one row, besides its logits."""

    sampling: SamplingParams
    step: int
    """How many tokens the sequence has generated."""
    counts: Counter[int]
    """How often it has generated each."""


def choose(logits_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The next token of each row: bias and penalties, then temperature, then the nucleus, then chance."""
    edits = [(row, token_id, change) for row, draw in enumerate(draws) for token_id, change in _changes(draw)]
    if not edits:
        return _choose(logits_BV.float(), draws)
    # In place, and back: copying the logits of a step of a small model takes a tenth of it.
    rows, token_ids, changes = zip(*edits, strict=True)
    where = tuple(torch.tensor(each, device=logits_BV.device) for each in (rows, token_ids))
    shaped_BV = logits_BV.float().contiguous()
    before = shaped_BV[where]
    shaped_BV.index_put_(where, torch.tensor(changes, dtype=torch.float32, device=logits_BV.device), accumulate=True)
    try:
        return _choose(shaped_BV, draws)
    finally:
        shaped_BV.index_put_(where, before)


def _choose(shaped_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    chosen = _likeliest(shaped_BV)
    warm = [row for row, draw in enumerate(draws) if draw.sampling.temperature >= GREEDY_BELOW]
    whole = [row for row in warm if draws[row].sampling.top_p >= 1]
    nucleus = [row for row in warm if draws[row].sampling.top_p < 1]
    if whole:
        weights_BV = _weights(shaped_BV[whole], [draws[row] for row in whole])
        for row, token_id in zip(whole, _pick(weights_BV, [draws[row] for row in whole]), strict=True):
            chosen[row] = token_id
    if nucleus:
        weights_BV = _weights(shaped_BV[nucleus], [draws[row] for row in nucleus])
        for row, token_id in zip(nucleus, _pick_nucleus(weights_BV, [draws[row] for row in nucleus]), strict=True):
            chosen[row] = token_id
    return chosen


def score(logits_BV: Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[TokenScore]:
    """The log-probability of one token in each row, with the `tops` most likely: of the logits as they are."""
    logprobs_BV = logits_BV.float().log_softmax(-1)
    own_B = logprobs_BV.gather(1, torch.tensor(token_ids, device=logits_BV.device)[:, None])[:, 0].tolist()
    best = logprobs_BV.topk(max(tops), dim=-1)
    ids, values = best.indices.tolist(), best.values.tolist()
    return [
        TokenScore(token_id, own_B[row], tuple(zip(ids[row][:top], values[row][:top], strict=True)))
        for row, (token_id, top) in enumerate(zip(token_ids, tops, strict=True))
    ]


def _likeliest(logits_BV: Tensor) -> list[int]:
    if logits_BV.device.type == "cpu":  # where numpy's argmax has vectors, and torch's a loop
        found: list[int] = logits_BV.numpy().argmax(-1).tolist()
    else:
        found = logits_BV.argmax(-1).tolist()
    return found


def _changes(draw: Draw) -> list[tuple[int, float]]:
    sampling = draw.sampling
    changes = list(sampling.logit_bias.items())
    if sampling.presence_penalty or sampling.frequency_penalty:
        changes += [
            (token_id, -(count * sampling.frequency_penalty + sampling.presence_penalty))
            for token_id, count in draw.counts.items()
        ]
    return changes


def _weights(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Probabilities in double precision, so that their running sums are exact to the last token."""
    temperatures = [[draw.sampling.temperature] for draw in draws]
    return (logits_BV.double() / torch.tensor(temperatures, dtype=torch.float64, device=logits_BV.device)).softmax(-1)


def _pick_nucleus(weights_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """As `_pick`, among the fewest of the best that come to `top_p`."""
    shares = [[draw.sampling.top_p] for draw in draws]
    top_p_B1 = torch.tensor(shares, dtype=torch.float64, device=weights_BV.device)
    # Sorting a whole vocabulary takes longer than a step of a small model, and is needed for flat distributions only.
    best = weights_BV.topk(min(NUCLEUS_TOKENS, weights_BV.shape[1]), dim=-1)
    picked = _pick_among(best.values, best.indices, top_p_B1, draws)
    flat = (best.values.sum(-1) < top_p_B1[:, 0]).nonzero()[:, 0].tolist()
    if flat:
        values_BV, order_BV = weights_BV[flat].sort(dim=-1, descending=True, stable=True)
        among_all = _pick_among(values_BV, order_BV, top_p_B1[flat], [draws[row] for row in flat])
        for row, token_id in zip(flat, among_all, strict=True):
            picked[row] = token_id
    return picked


def _pick_among(values_BK: Tensor, token_ids_BK: Tensor, top_p_B1: Tensor, draws: Sequence[Draw]) -> list[int]:
    """As `_pick_nucleus`, where the K best come to `top_p`."""
    above_BK = values_BK.cumsum(-1) - values_BK
    outside_BK = above_BK >= top_p_B1
    outside_BK[:, 0] = False
    # Chance goes by token id, not by rank: which of two equally likely tokens comes first is a matter of rounding.
    token_ids_BK, place_BK = token_ids_BK.sort(-1)
    places = _pick(values_BK.masked_fill(outside_BK, 0).gather(1, place_BK), draws)
    return [int(token_ids_BK[row, place]) for row, place in enumerate(places)]


def _pick(weights_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """An index of each row, as likely as its weight: where the running sum passes a uniform share of the total."""
    sums_BV = weights_BV.cumsum(-1)
    shares = [[uniform(draw.sampling.seed, draw.step)] for draw in draws]
    marks_B1 = torch.tensor(shares, dtype=torch.float64, device=weights_BV.device) * sums_BV[:, -1:]
    picked: list[int] = torch.searchsorted(sums_BV, marks_B1, right=True)[:, 0].tolist()
    return picked
