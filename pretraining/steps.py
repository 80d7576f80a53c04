"""Loss and gradient of a micro-batch: by compiled code of ours where the processor multiplies bf16, else by torch.

Legend: N = tokens of a micro-batch, D = width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretraining.kernels import CausalRows, HeadLoss, softmax_gradient
from pretraining.precision import products
from tunesmith.decoder.llama import Layer, Llama, LlamaConfig, rotation
from tunesmith.training import whole_step
from tunesmith.training.native import available
from tunesmith.training.whole import TrainableWeights
from tunesmith.training.whole_step import WholeStep

SCORED_ON_CPU = 256
"""Positions whose logits are in memory at once on a processor, where more of them would be in none of its caches."""


class Steps(Protocol):
    """What computes gradients."""

    parameters: list[Tensor]
    """The weights in fp32, in the order of `Llama.parameters`."""

    def begin(self) -> None:
        """Takes the parameters as they are now, with no gradient, for the micro-batches of a batch."""

    def learn(self, ids_N: Tensor, next_N: Tensor, row: int, share: float) -> Tensor:
        """The summed loss of rows of `row` tokens; adds `share` times its gradient to `.grad` of the parameters."""


def steps(start: Llama, *, device: str, compiled: bool, autograd: bool) -> Steps:
    """Steps that begin at the weights of `start`; with `autograd` those of torch in any case."""
    if device == "cpu" and not autograd and whole_step.covers(start):
        return CompiledSteps(start)
    return TorchSteps(start, device=device, compiled=compiled)


class CompiledSteps:
    """See `training.whole_step`."""

    def __init__(self, start: Llama) -> None:
        """`whole_step.covers(start)`, whose weights are copied."""
        self._weights = TrainableWeights(start)
        self._step = WholeStep(self._weights.model, self._weights.flat)
        self.parameters = self._weights.parts(self._weights.flat)

    def begin(self) -> None:
        """See `Steps`."""
        self._step.take()
        self._weights.flat_gradient.zero_()
        for parameter, gradient in zip(self.parameters, self._weights.parts(self._weights.flat_gradient), strict=True):
            parameter.grad = gradient

    def learn(self, ids_N: Tensor, next_N: Tensor, row: int, share: float) -> Tensor:
        """See `Steps`."""
        count = len(ids_N)
        scores = self._step.learn(
            ids_N,
            [row] * (count // row),
            predicting_M=torch.arange(count),
            target_M=next_N,
            weight_M=torch.full((count,), share),
            gradient=self._weights.flat_gradient,
        )
        return scores.nll_M.double().sum().float()


def gradient_on_cpu(logits_nV: Tensor, target_n: Tensor) -> Tensor:
    """`softmax_gradient` in fewer passes over memory."""
    nll_n, _ = available().loss(logits_nV, target_n, torch.ones(len(target_n)))
    return nll_n.sum()


class TorchSteps:
    """Forward by the decoder, backward by autograd, with hand-made gradients of the two costly pieces."""

    def __init__(self, start: Llama, *, device: str, compiled: bool) -> None:
        """With `compiled`, torch compiles the layers: needs a C++ compiler or CUDA."""
        self._start = start
        self._compiled_on_cpu = compiled and device == "cpu"
        self._dtype = products(device)
        self._most_scored = SCORED_ON_CPU if device == "cpu" else 1 << 30
        self._scratch_nV = torch.empty(0, start.config.vocabulary_size, dtype=self._dtype, device=device)
        self.parameters = [p.to(device).requires_grad_() for p in start.parameters()]
        compiling = torch.compile(fullgraph=True, dynamic=False, disable=not compiled)
        self._through = compiling(_through)  # of one layer: they are all alike, and the compiler takes long
        self._to_gradient = gradient_on_cpu if device == "cpu" else compiling(softmax_gradient)

    def begin(self) -> None:
        """See `Steps`."""
        for parameter in self.parameters:
            parameter.grad = None

    def learn(self, ids_N: Tensor, next_N: Tensor, row: int, share: float) -> Tensor:
        """See `Steps`."""
        scored = min(len(ids_N), self._most_scored)
        if len(self._scratch_nV) != scored:
            self._scratch_nV = self._scratch_nV.new_empty(scored, self._scratch_nV.shape[1])
        weights = [p.to(self._dtype) for p in self.parameters]
        hidden_ND = self._hidden(weights, ids_N, row)
        loss: Tensor = HeadLoss.apply(hidden_ND, weights[0], next_N, self._scratch_nV, self._to_gradient)
        (loss * share).backward()
        return loss.detach()

    def _hidden(self, weights: list[Tensor], ids_N: Tensor, row: int) -> Tensor:
        count = len(ids_N) // row
        model = self._start.over(weights)
        positions_N = torch.arange(row, device=ids_N.device).repeat(count)
        turn = rotation(positions_N, model.config, self._dtype)
        x_ND = F.embedding(ids_N, model.embedding_VD)
        for layer in model.layers:
            parts = (layer.attention_norm_D, layer.qkv, layer.o, layer.feed_norm_D, layer.gate_up, layer.down)
            x_ND = self._through(model.config, parts, x_ND, turn, count, self._compiled_on_cpu)
        return F.rms_norm(x_ND, model.norm_D.shape, model.norm_D, model.config.norm_epsilon)


def _through(
    config: LlamaConfig,
    parts: Sequence[Tensor],
    x_ND: Tensor,
    turn: tuple[Tensor, Tensor],
    count: int,
    compiled_on_cpu: bool,
) -> Tensor:
    """The states of `count` rows behind a layer of such weights."""
    attention_norm_D, qkv, o, feed_norm_D, gate_up, down = parts
    layer = Layer(attention_norm_D, [qkv], None, None, None, o, feed_norm_D, gate_up, down)
    one = Llama(
        config, attention_norm_D, [layer], attention_norm_D, attention_norm_D
    )  # embedding and head are not used
    return one.through(0, x_ND, turn, CausalRows(count, compiled_on_cpu))
