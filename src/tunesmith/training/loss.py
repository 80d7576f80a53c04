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


def score(model: Decoder, hidden_MD: Tensor, batch: MicroBatch, gradient_MD: Tensor | None = None) -> Scores:
    """Scores of the `batch` whose weighed positions have the states `hidden_MD`.

    `gradient_MD`, where given, receives that of sum(weight * nll) with respect to the states. It is made here, chunk by
    chunk beside the logits, since the head is frozen: all logits of a batch never exist at once. For weight w,
    probabilities p and target y it is w (p W - W_y), with W the head.
    """
    nll_M = torch.empty(len(hidden_MD))
    right_M = torch.empty(len(hidden_MD), dtype=torch.bool)
    size = max(1, _CHUNK_LOGITS // model.config.vocabulary_size)
    for start in range(0, len(hidden_MD), size):
        chunk = slice(start, start + size)
        target_m1 = batch.target_M[chunk, None]
        logits_mV = model.logits(hidden_MD[chunk]).float()
        target_logits_m1 = logits_mV.gather(1, target_m1)
        largest_m1 = logits_mV.amax(1, keepdim=True)
        unnormalised_mV = logits_mV.sub_(largest_m1).exp_()
        total_m1 = unnormalised_mV.sum(1, keepdim=True)
        nll_M[chunk] = (total_m1.log() + largest_m1 - target_logits_m1).squeeze(1)
        right_M[chunk] = (target_logits_m1 == largest_m1).squeeze(1)
        if gradient_MD is not None:
            expected_mD = (unnormalised_mV @ model.head_VD).div_(total_m1)
            gradient_MD[chunk] = (expected_mD - model.head_VD[target_m1.squeeze(1)]) * batch.weight_M[chunk, None]
    return Scores(nll_M, right_M)
