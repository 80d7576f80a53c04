"""The loss and its gradient at the model's last hidden state; what was predicted right, on the way.

Legend: M = weighed positions, C = those of completion tokens, D = model width, V = vocabulary, m = one chunk of M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.decoder.base import Decoder
from tunesmith.training.kernels import Kernels
from tunesmith.training.sites import product

T = TypeVar("T")

_CHUNK_LOGITS = 1 << 21
"""Logits held at once: 8 MiB of fp32, which the caches of a processor still serve ..."""
_CHUNK_LOGITS_ELSEWHERE = 1 << 27
"""... and half a GiB on a device, which is filled by large products alone."""
_ROUNDING = 16
"""Positions of a chunk are rounded up to a multiple: for fewer the libraries have other kernels, which add up in
another order, so that what is said of a position would depend on how many others there are."""


class Weighed(Protocol):
    """The positions whose prediction counts, as a `MicroBatch` has them."""

    @property
    def target_M(self) -> Tensor:
        """The ids of the tokens predicted."""

    @property
    def weight_M(self) -> Tensor:
        """How much each counts."""

    @property
    def completion_C(self) -> Tensor:
        """Which of M predict completion tokens."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a forward pass says of the weighed tokens of a micro-batch."""

    nll_M: Tensor
    """Negative log-probabilities, nats."""
    right_M: Tensor
    """Whether no token was held more likely."""

    @classmethod
    def of(cls, hidden_MD: Tensor) -> Scores:
        """To be filled, of so many states, where they are."""
        nll_M = torch.empty(len(hidden_MD), device=hidden_MD.device)
        return cls(nll_M, torch.empty_like(nll_M, dtype=torch.bool))


def score(
    model: Decoder,
    hidden_MD: Tensor,
    batch: Weighed,
    gradient_MD: Tensor,
    *,
    prompt_head_VD: Tensor | None = None,
    head_gradient_VD: Tensor | None = None,
) -> Scores:
    """Scores of the `batch` whose weighed positions have the states `hidden_MD`, and their gradient.

    `gradient_MD` receives that of sum(weight * nll) with respect to the states. It is made here, chunk by chunk beside
    the logits, since the head is frozen: all logits of a batch never exist at once. For weight w, probabilities p and
    target y it is w (p W - W_y), with W the head. Prompt tokens are many and weigh little: with `prompt_head_VD`, the
    head in another dtype, theirs are computed in that. To `head_gradient_VD`, where given, the gradient of the head is
    added, for each position w (p - one-hot(y)) times its state.
    """
    scores, size = Scores.of(hidden_MD), _rounded_chunk(model, hidden_MD.device)
    for positions, coarse_VD in _kinds(hidden_MD, batch, prompt_head_VD):
        for chunk_m in positions.split(size):
            states_mD = hidden_MD[chunk_m]
            rounded_mD = _rounded(states_mD)
            if coarse_VD is None:
                logits_mV = model.logits(rounded_mD)[: len(chunk_m)]
            else:
                logits_mV = (rounded_mD.to(coarse_VD.dtype) @ coarse_VD.T).float()[: len(chunk_m)]
            target_m, weight_m1 = batch.target_M[chunk_m], batch.weight_M[chunk_m, None]
            total_m1 = _score_chunk(logits_mV, target_m, chunk_m, scores)
            head_VD = model.head_VD if coarse_VD is None else coarse_VD
            expected_mD = product(_rounded(logits_mV).to(head_VD.dtype), head_VD)[: len(chunk_m)].div_(total_m1)
            gradient_MD[chunk_m] = expected_mD.sub_(head_VD[target_m]).mul_(weight_m1)
            if head_gradient_VD is not None:
                head_gradient_VD.addmm_(logits_mV.T, states_mD * (weight_m1 / total_m1))
                head_gradient_VD.index_add_(0, target_m, states_mD * weight_m1, alpha=-1.0)
    return scores


class Head(Protocol):
    """A frozen head, for products in the dtype that it has them in."""

    @property
    def vocabulary(self) -> int:
        """V."""

    def logits(self, states_MD: Tensor) -> Tensor:
        """[M, V]."""

    def back(self, grad_MV: Tensor) -> Tensor:
        """The gradient of the states [M, D], from that of the logits."""


@dataclass(frozen=True, slots=True)
class PlainHead:
    """Products of torch. What they give a position may depend in its last digits on how many others there are."""

    head_VD: Tensor

    @property
    def vocabulary(self) -> int:
        """See `Head`."""
        return len(self.head_VD)

    def logits(self, states_MD: Tensor) -> Tensor:
        """See `Head`."""
        return states_MD.to(self.head_VD.dtype) @ self.head_VD.T

    def back(self, grad_MV: Tensor) -> Tensor:
        """See `Head`."""
        return grad_MV @ self.head_VD


def score_frozen(kernels: Kernels, head: Head, hidden_MD: Tensor, batch: Weighed, gradient_MD: Tensor) -> Scores:
    """As `score` with a gradient, faster, all by the products of `head`."""
    scores = Scores.of(hidden_MD)
    size = max(1, _chunk_logits(hidden_MD.device) // head.vocabulary)
    for start in range(0, len(hidden_MD), size):
        chunk = slice(start, start + size)
        logits_mV = head.logits(hidden_MD[chunk])
        scores.nll_M[chunk], scores.right_M[chunk] = kernels.loss(
            logits_mV, batch.target_M[chunk], batch.weight_M[chunk]
        )
        gradient_MD[chunk] = head.back(logits_mV)  # no longer logits: their gradient
    return scores


def measure(model: Decoder, hidden_MD: Tensor, batch: Weighed, prompt_head: Head | None = None) -> Scores:
    """Scores alone, in fp32. Those of prompt tokens, which are many and weigh little, by `prompt_head` where given."""
    scores, size = Scores.of(hidden_MD), _rounded_chunk(model, hidden_MD.device)
    for positions, coarse in _kinds(hidden_MD, batch, prompt_head):
        for chunk_m in positions.split(size):
            rounded_mD = _rounded(hidden_MD[chunk_m])
            logits_mV = model.logits(rounded_mD) if coarse is None else coarse.logits(rounded_mD).float()
            _score_chunk(logits_mV[: len(chunk_m)], batch.target_M[chunk_m], chunk_m, scores)
    return scores


def _kinds(hidden_MD: Tensor, batch: Weighed, coarse: T | None) -> list[tuple[Tensor, T | None]]:
    """Which of M have the head that is the model's, and which the other."""
    if coarse is None:
        return [(torch.arange(len(hidden_MD), device=hidden_MD.device), None)]
    is_prompt_M = torch.ones(len(hidden_MD), dtype=torch.bool, device=hidden_MD.device)
    is_prompt_M.index_fill_(0, batch.completion_C, False)
    return [(batch.completion_C, None), (is_prompt_M.nonzero().squeeze(1), coarse)]


def _rounded_chunk(model: Decoder, device: torch.device) -> int:
    return max(1, _chunk_logits(device) // model.config.vocabulary_size // _ROUNDING) * _ROUNDING


def _chunk_logits(device: torch.device) -> int:
    return _CHUNK_LOGITS if device.type == "cpu" else _CHUNK_LOGITS_ELSEWHERE


def _score_chunk(logits_mV: Tensor, target_m: Tensor, chunk_m: Tensor, scores: Scores) -> Tensor:
    """Fills the scores of a chunk and puts in the place of its logits probabilities times a total, returned [m, 1]."""
    target_m1 = target_m[:, None]
    target_logits_m1 = logits_mV.gather(1, target_m1)
    largest_m1 = logits_mV.amax(1, keepdim=True)
    total_m1 = logits_mV.sub_(largest_m1).exp_().sum(1, keepdim=True)
    scores.nll_M[chunk_m] = (total_m1.log() + largest_m1 - target_logits_m1).squeeze(1)
    scores.right_M[chunk_m] = (target_logits_m1 == largest_m1).squeeze(1)
    return total_m1


def _rounded(x_mD: Tensor) -> Tensor:
    missing = -len(x_mD) % _ROUNDING
    return F.pad(x_mD, (0, 0, 0, missing)) if missing else x_mD
