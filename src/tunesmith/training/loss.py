"""The loss and its gradient at the model's last hidden state; what was predicted right, on the way.

Legend: M = weighed positions, C = those of completion tokens, D = model width, V = vocabulary, m = one chunk of M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.decoder.base import Decoder
from tunesmith.training.packing import MicroBatch

_CHUNK_LOGITS = 1 << 21
"""Logits held at once: 8 MiB of fp32, which the caches of a processor still serve."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a forward pass says of the weighed tokens of a micro-batch."""

    nll_M: Tensor
    """Negative log-probabilities, nats."""
    right_M: Tensor
    """Whether no token was held more likely."""


def score(
    model: Decoder,
    hidden_MD: Tensor,
    batch: MicroBatch,
    gradient_MD: Tensor | None = None,
    *,
    prompt_head_VD: Tensor | None = None,
) -> Scores:
    """Scores of the `batch` whose weighed positions have the states `hidden_MD`.

    `gradient_MD`, where given, receives that of sum(weight * nll) with respect to the states. It is made here, chunk by
    chunk beside the logits, since the head is frozen: all logits of a batch never exist at once. For weight w,
    probabilities p and target y it is w (p W - W_y), with W the head. Prompt tokens are many and weigh little: with
    `prompt_head_VD`, the head in another dtype, theirs are computed in that.
    """
    scores = Scores(torch.empty(len(hidden_MD)), torch.empty(len(hidden_MD), dtype=torch.bool))
    size = max(1, _CHUNK_LOGITS // model.config.vocabulary_size)
    if prompt_head_VD is None:
        kinds = [(torch.arange(len(hidden_MD)), model.head_VD)]
    else:
        is_prompt_M = torch.ones(len(hidden_MD), dtype=torch.bool).index_fill_(0, batch.completion_C, False)
        kinds = [(batch.completion_C, model.head_VD), (is_prompt_M.nonzero().squeeze(1), prompt_head_VD)]
    for positions, head_VD in kinds:
        for chunk_m in positions.split(size):
            coarse = head_VD is prompt_head_VD
            states_mD = hidden_MD[chunk_m]
            logits_mV = (states_mD.to(head_VD.dtype) @ head_VD.T).float() if coarse else model.logits(states_mD).float()
            gradient_mD = _score_chunk(
                logits_mV, head_VD, batch.target_M[chunk_m], chunk_m, scores, gradient_MD is None
            )
            if gradient_MD is not None and gradient_mD is not None:
                gradient_MD[chunk_m] = gradient_mD.mul_(batch.weight_M[chunk_m, None])
    return scores


def _score_chunk(
    logits_mV: Tensor, head_VD: Tensor, target_m: Tensor, chunk_m: Tensor, scores: Scores, no_gradient: bool
) -> Tensor | None:
    """Fills the scores of a chunk; returns p W - W_y. Overwrites the logits."""
    target_m1 = target_m[:, None]
    target_logits_m1 = logits_mV.gather(1, target_m1)
    largest_m1 = logits_mV.amax(1, keepdim=True)
    unnormalised_mV = logits_mV.sub_(largest_m1).exp_()
    total_m1 = unnormalised_mV.sum(1, keepdim=True)
    scores.nll_M[chunk_m] = (total_m1.log() + largest_m1 - target_logits_m1).squeeze(1)
    scores.right_M[chunk_m] = (target_logits_m1 == largest_m1).squeeze(1)
    if no_gradient:
        return None
    expected_mD = (unnormalised_mV.to(head_VD.dtype) @ head_VD).float().div_(total_m1)
    return expected_mD.sub_(head_VD[target_m])
