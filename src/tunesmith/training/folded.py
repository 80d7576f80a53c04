"""A step of a Llama by hand: forward and backward, with the adapters folded into its weights.

What autograd would do with `decoder.llama`, in fewer operations and, where the processor multiplies bf16, several times
faster: the adapters are added to the weights once a step, the gain of a norm is part of the product that follows it, no
gradient is computed for anything frozen, and buffers are written in place. Only for training: what is measured and
served goes through `decoder.llama` in fp32.

Legend: N = tokens (rounded up), D = model width, F = feed-forward width, I, O = inputs and outputs of a site, R = rank,
P = linear layers stacked in a site, H, K = query and key/value heads, d = head width, B, T = rows and cells of the
padded shape, M = weighed positions, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.adapters.lora import Site
from tunesmith.decoder.base import Decoder
from tunesmith.decoder.llama import Llama, rotation
from tunesmith.training.attention import Attended, attend
from tunesmith.training.factors import FactorView, TrainableLora
from tunesmith.training.loss import Scores
from tunesmith.training.packing import MicroBatch

ROUNDING = {torch.float32: 1, torch.bfloat16: 64}
"""Tokens are rounded up to a multiple. bf16 products are compiled for each shape they meet, about 1.5 ms a shape."""
CELL_ROUNDING = {torch.float32: 1, torch.bfloat16: 16}

Score = Callable[[Tensor, Tensor], Scores]
"""(normed states of the weighed positions [M, D], where to put the gradient of the loss there) -> scores."""


def product_dtype(precision: str) -> torch.dtype:
    """That of `RunSpec.precision`; auto: bf16 where the processor multiplies it, for elsewhere it would be emulated."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else torch.float32


def covers(model: Decoder) -> TypeGuard[Llama]:
    """Whether a step of `model` can be done here: a Llama without norms on queries and keys, on a CPU."""
    return isinstance(model, Llama) and not model.config.qk_norm and model.embedding_VD.device.type == "cpu"


@dataclass(slots=True)
class _Site:
    """The weights of one site in the dtype of the products; `gain_I` is that of the norm before it."""

    base_OI: Tensor
    gain_I: Tensor | None
    outputs: list[int]
    weight_OI: Tensor
    a: Tensor
    """[P R, I], times the gain."""
    b_OR: Tensor
    """Times the scale."""

    @classmethod
    def over(cls, weight_OI: Tensor, gain_I: Tensor | None, outputs: list[int], rank: int, dtype: torch.dtype) -> _Site:
        base_OI = (weight_OI if gain_I is None else weight_OI * gain_I).to(dtype)
        a, b_OR = base_OI.new_empty(len(outputs) * rank, base_OI.shape[1]), base_OI.new_empty(len(base_OI), rank)
        return cls(base_OI, gain_I, outputs, torch.empty_like(base_OI), a, b_OR)

    def fold(self, a: Tensor, b_OR: Tensor, scale: float) -> None:
        self.a.copy_(a if self.gain_I is None else a * self.gain_I)
        torch.mul(b_OR, scale, out=self.b_OR)
        self.weight_OI.copy_(self.base_OI)
        parts = (self.weight_OI.split(self.outputs), self.b_OR.split(self.outputs), self.a.split(b_OR.shape[1]))
        for weight, b, a_RI in zip(*parts, strict=True):
            weight.addmm_(b, a_RI)

    def backward(self, grad_NO: Tensor, x_NI: Tensor, into: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """Adds to the gradients of A and B; returns that of x."""
        into_a, into_b = into
        h = x_NI @ self.a.T
        grad_h, rank = torch.empty_like(h), self.b_OR.shape[1]
        parts = (grad_NO.split(self.outputs, 1), self.b_OR.split(self.outputs), into_b.split(self.outputs))
        for grad, b, of_b, h_NR, of_h in zip(*parts, h.split(rank, 1), grad_h.split(rank, 1), strict=True):
            of_b.add_(grad.T @ h_NR, alpha=scale)
            torch.mm(grad, b, out=of_h)
        grad_a = grad_h.T @ x_NI
        into_a.add_(grad_a if self.gain_I is None else grad_a * self.gain_I)
        return grad_NO @ self.weight_OI


@dataclass(frozen=True, slots=True)
class _Saved:
    """What the backward pass of a layer needs."""

    normed_ND: Tensor
    norm_N1: Tensor
    attended: Attended
    attention_N: Tensor
    """[N, H d]"""
    feed_normed_ND: Tensor
    feed_norm_N1: Tensor
    gate_up: Tensor
    active_NF: Tensor
    """silu(gate)"""
    product_NF: Tensor


class FoldedLlama:
    """The weights of one step. `fold` before each; threads may then share it."""

    def __init__(self, model: Llama, factors: TrainableLora, dtype: torch.dtype) -> None:
        """`covers(model)`; products are computed in `dtype`, everything between them that adds up in fp32."""
        self._model, self._factors, self._dtype = model, factors, dtype
        rank = factors.lora.rank
        sites = iter(factors.site_outputs)
        self._layers: list[dict[Site, _Site]] = []
        for layer in model.layers:
            gains = {"qkv": layer.attention_norm_D, "gate_up": layer.feed_norm_D}
            weights = {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.gate_up, "down": layer.down}
            self._layers.append(
                {
                    site: _Site.over(weight, gains.get(site), next(sites), rank, dtype)
                    for site, weight in weights.items()
                }
            )

    def fold(self) -> None:
        """Takes the factors as they are now."""
        pairs, _ = self._factors.pairs(self._factors.flat)
        for site, (a, b_OR) in zip(self._sites(), pairs, strict=True):
            site.fold(a, b_OR, self._factors.lora.scale)

    def learn(self, batch: MicroBatch, view: FactorView, score: Score) -> Scores:
        """Scores of `batch`; adds the gradient of its loss to `view.flat_gradient`."""
        cells = _Cells.of(batch, self._dtype)
        cos, sin = (x[..., : x.shape[-1] // 2] for x in rotation(cells.positions_N, self._model.config, self._dtype))
        x_ND, low_NR = self._embed(cells.token_ids_N)
        saved = [self._forward(layer, index, x_ND, cells, cos, sin) for index, layer in enumerate(self._layers)]
        hidden_ND, norm_N1 = self._norm(x_ND, torch.float32)

        states_MD = hidden_ND[batch.predicting_M] * self._model.norm_D
        grad_MD = torch.empty_like(states_MD)
        scores = score(states_MD, grad_MD)

        grad_ND = torch.zeros_like(x_ND).index_copy_(0, batch.predicting_M, grad_MD.mul_(self._model.norm_D))
        grad_ND = _norm_backward(grad_ND, hidden_ND, norm_N1, torch.zeros_like(x_ND))
        pairs, embedding = self._factors.pairs(view.flat_gradient)
        for index in reversed(range(len(self._layers))):
            self._backward(
                self._layers[index], saved[index], grad_ND, pairs[4 * index : 4 * index + 4], cells, cos, sin
            )
        if embedding is not None and low_NR is not None:
            self._embed_backward(cells.token_ids_N, low_NR, grad_ND, embedding)
        return scores

    def _sites(self) -> list[_Site]:
        return [site for layer in self._layers for site in layer.values()]

    def _embed(self, token_ids_N: Tensor) -> tuple[Tensor, Tensor | None]:
        x_ND = F.embedding(token_ids_N, self._model.embedding_VD)
        _, embedding = self._factors.pairs(self._factors.flat)
        if embedding is None:
            return x_ND, None
        a_VR, b_DR = embedding
        low_NR = F.embedding(token_ids_N, a_VR).mul_(self._factors.lora.scale)
        return x_ND.addmm_(low_NR, b_DR.T), low_NR

    def _embed_backward(
        self, token_ids_N: Tensor, low_NR: Tensor, grad_ND: Tensor, into: tuple[Tensor, Tensor]
    ) -> None:
        _, embedding = self._factors.pairs(self._factors.flat)
        assert embedding is not None
        into[1].addmm_(grad_ND.T, low_NR)
        grad_NR = (grad_ND @ embedding[1]).mul_(self._factors.lora.scale)
        into[0].index_add_(0, token_ids_N, grad_NR)

    def _norm(self, x_ND: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each row over the root of its mean square, without gain; and one over that root."""
        square_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_()
        norm_N1 = square_N1.div_(x_ND.shape[1]).add_(self._model.config.norm_epsilon).rsqrt_()
        return torch.mul(x_ND, norm_N1, out=torch.empty_like(x_ND, dtype=dtype)), norm_N1

    def _forward(
        self, layer: dict[Site, _Site], index: int, x_ND: Tensor, cells: _Cells, cos: Tensor, sin: Tensor
    ) -> _Saved:
        """Adds the layer's output to `x_ND`."""
        config = self._model.config
        normed_ND, norm_N1 = self._norm(x_ND, self._dtype)
        qkv = normed_ND @ layer["qkv"].weight_OI.T
        bias = self._model.layers[index].qkv_bias
        if bias is not None:
            qkv.add_(bias)
        q, k, v = qkv.unflatten(1, (-1, config.head_width)).split([config.heads, config.kv_heads, config.kv_heads], 1)
        attended = attend(cells.pad(_rotated(q, cos, sin)), cells.pad(_rotated(k, cos, sin)), cells.pad(v))
        attention_N = cells.unpad(attended.out_BTHd)
        x_ND.add_(attention_N @ layer["o"].weight_OI.T)

        feed_normed_ND, feed_norm_N1 = self._norm(x_ND, self._dtype)
        gate_up = feed_normed_ND @ layer["gate_up"].weight_OI.T
        gate_NF, up_NF = gate_up.chunk(2, 1)
        active_NF = F.silu(gate_NF)
        product_NF = active_NF * up_NF
        x_ND.add_(product_NF @ layer["down"].weight_OI.T)
        return _Saved(
            normed_ND,
            norm_N1,
            attended,
            attention_N,
            feed_normed_ND,
            feed_norm_N1,
            gate_up,
            active_NF,
            product_NF,
        )

    def _backward(
        self,
        layer: dict[Site, _Site],
        saved: _Saved,
        grad_ND: Tensor,
        into: list[tuple[Tensor, Tensor]],
        cells: _Cells,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """Turns `grad_ND` from the gradient of the layer's output into that of its input."""
        scale, config = self._factors.lora.scale, self._model.config
        into_qkv, into_o, into_gate_up, into_down = into

        grad_NF = layer["down"].backward(grad_ND.to(self._dtype), saved.product_NF, into_down, scale)
        gate_NF, up_NF = saved.gate_up.chunk(2, 1)
        grad_gate_up = torch.empty_like(saved.gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, 1)
        torch.mul(grad_NF, saved.active_NF, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_NF.mul_(up_NF), gate_NF, grad_input=grad_gate)
        grad_normed = layer["gate_up"].backward(grad_gate_up, saved.feed_normed_ND, into_gate_up, scale)
        _norm_backward(grad_normed, saved.feed_normed_ND, saved.feed_norm_N1, grad_ND)

        grad_N = layer["o"].backward(grad_ND.to(self._dtype), saved.attention_N, into_o, scale)
        grads = saved.attended.gradients(cells.pad_gradient(grad_N.unflatten(1, (config.heads, -1))))
        grad_q, grad_k, grad_v = (cells.unpad_gradient(grad) for grad in grads)
        grad_qkv = torch.cat([_rotated(grad_q, cos, -sin), _rotated(grad_k, cos, -sin), grad_v], 1).flatten(1)
        grad_normed = layer["qkv"].backward(grad_qkv, saved.normed_ND, into_qkv, scale)
        _norm_backward(grad_normed, saved.normed_ND, saved.norm_N1, grad_ND)


@dataclass(frozen=True, slots=True)
class _Cells:
    """Between tokens one after another, rounded up, and the padded shape that attention works on."""

    n_tokens: int
    token_ids_N: Tensor
    positions_N: Tensor
    shape: tuple[int, int]
    """B, T"""
    token_of_cell: Tensor
    cell_of_token: Tensor
    """Tokens that were added stand at cell 0 and bring nothing."""

    @classmethod
    def of(cls, batch: MicroBatch, dtype: torch.dtype) -> _Cells:
        n_tokens, (rows, length) = len(batch.token_ids_N), batch.token_of_cell_BT.shape
        more_tokens = -n_tokens % ROUNDING[dtype]
        more_cells = -length % CELL_ROUNDING[dtype]
        row, column = batch.cell_of_token_N // length, batch.cell_of_token_N % length
        return cls(
            n_tokens,
            F.pad(batch.token_ids_N, (0, more_tokens)),
            F.pad(batch.positions_N, (0, more_tokens)),
            (rows, length + more_cells),
            F.pad(batch.token_of_cell_BT, (0, more_cells)).flatten(),
            F.pad(row * (length + more_cells) + column, (0, more_tokens)),
        )

    def pad(self, x_NHd: Tensor) -> Tensor:
        """[B, T, H, d]; no real token attends to what stands in a cell that was added."""
        x_BTHd: Tensor = x_NHd.index_select(0, self.token_of_cell).unflatten(0, self.shape)
        return x_BTHd

    def unpad(self, x_BTHd: Tensor) -> Tensor:
        """[N, H d]"""
        return x_BTHd.flatten(0, 1).index_select(0, self.cell_of_token).flatten(1)

    def pad_gradient(self, x_NHd: Tensor) -> Tensor:
        """[B, T, H, d] with zeros in cells that were added."""
        cells = x_NHd.new_zeros(self.shape[0] * self.shape[1], *x_NHd.shape[1:])
        cells.index_copy_(0, self.cell_of_token[: self.n_tokens], x_NHd[: self.n_tokens])
        x_BTHd: Tensor = cells.unflatten(0, self.shape)
        return x_BTHd

    def unpad_gradient(self, x_BTHd: Tensor) -> Tensor:
        """[N, H, d] with zeros for tokens that were added."""
        tokens = x_BTHd.flatten(0, 1).index_select(0, self.cell_of_token)
        tokens[self.n_tokens :] = 0.0
        return tokens


def _rotated(x_NHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (first, second) of the halves turned by the angle of its position."""
    out = torch.empty(x_NHd.shape, dtype=x_NHd.dtype)
    (first, second), (out_first, out_second) = x_NHd.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def _norm_backward(grad_normed: Tensor, normed_ND: Tensor, norm_N1: Tensor, grad_ND: Tensor) -> Tensor:
    """Adds to `grad_ND` what comes through y = x * norm: (dy - y mean(dy y)) * norm."""
    mean_N1 = (grad_normed * normed_ND).sum(-1, keepdim=True, dtype=torch.float32).div_(-normed_ND.shape[1])
    return grad_ND.addcmul_(torch.addcmul(grad_normed, normed_ND, mean_N1.to(normed_ND.dtype)), norm_N1)
