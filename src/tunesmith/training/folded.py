"""A step of a Llama by hand: forward and backward, for the rows of one job or of many at once.

What autograd would do with `decoder.llama`, in fewer operations and, where the processor multiplies bf16, several times
faster: the gain of a norm is part of the product that follows it, no gradient is computed for anything frozen, and
buffers are written in place. Where a job brings many tokens, its adapters are added to the weights first. Only for
training: what is measured and served goes through `decoder.llama` in fp32.

Legend: N = tokens (rounded up), D = model width, F = feed-forward width, R = rank, H, K = query and key/value heads,
d = head width, M = weighed positions, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.adapters.lora import Site as SiteName
from tunesmith.decoder.base import Decoder
from tunesmith.decoder.llama import Llama, rotation
from tunesmith.training.attention import Attended, attend
from tunesmith.training.factors import TrainableLora
from tunesmith.training.loss import Scores
from tunesmith.training.passes import Pass
from tunesmith.training.sites import FoldedSite, Part, SharedSite, Site

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


@dataclass(frozen=True, slots=True)
class _Saved:
    """What the backward pass of a layer needs."""

    normed_ND: Tensor
    norm_N1: Tensor
    attended: list[Attended]
    """By cells of the pass."""
    attention_N: Tensor
    """[N, H d]"""
    feed_normed_ND: Tensor
    feed_norm_N1: Tensor
    gate_up: Tensor
    active_NF: Tensor
    """silu(gate)"""
    product_NF: Tensor
    sites: dict[SiteName, list[Tensor]]
    """What each site keeps for itself."""


_Sites = dict[SiteName, Site]


class FoldedLlama:
    """A model's weights, laid out for training steps. Threads may share it."""

    def __init__(self, model: Llama, site_outputs: Sequence[list[int]], dtype: torch.dtype) -> None:
        """`covers(model)`; products are computed in `dtype`, everything between them that adds up in fp32.

        `site_outputs` are the outputs of each linear layer of each site (`TrainableLora.site_outputs`).
        """
        self._model, self._dtype = model, dtype
        outputs = iter(site_outputs)
        self._shared: list[dict[SiteName, SharedSite]] = []
        for layer in model.layers:
            gains = {"qkv": layer.attention_norm_D, "gate_up": layer.feed_norm_D}
            weights = {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.gate_up, "down": layer.down}
            self._shared.append(
                {
                    site: SharedSite.over(weight, gains.get(site), next(outputs), dtype)
                    for site, weight in weights.items()
                }
            )
        self._folded: list[dict[SiteName, FoldedSite]] = [
            {name: FoldedSite(site) for name, site in layer.items()} for layer in self._shared
        ]

    def fold(self, factors: TrainableLora) -> None:
        """Takes the factors of a job as they are now, for passes of that job alone."""
        pairs, _ = factors.pairs(factors.flat)
        sites = [site for layer in self._folded for site in layer.values()]
        for site, pair in zip(sites, pairs, strict=True):
            site.fold(pair, factors.lora.scale)

    def learn(self, work: Pass, score: Score, *, folded: bool) -> Scores:
        """Scores of a pass; adds the gradient of its loss to the views of its pieces.

        With `folded` all its pieces are of the job that was folded last.
        """
        layers: Sequence[_Sites] = self._folded if folded else self._shared  # type: ignore[assignment]
        turn = rotation(work.positions_N, self._model.config, self._dtype)
        cos, sin = (x[..., : x.shape[-1] // 2] for x in turn)
        x_ND, low = self._embed(work)
        saved = [self._forward(layers[index], index, x_ND, work, cos, sin) for index in range(len(layers))]
        hidden_ND, norm_N1 = self._norm(x_ND, torch.float32)

        states_MD = hidden_ND[work.predicting_M] * self._model.norm_D
        grad_MD = torch.empty_like(states_MD)
        scores = score(states_MD, grad_MD)

        grad_ND = torch.zeros_like(x_ND).index_copy_(0, work.predicting_M, grad_MD.mul_(self._model.norm_D))
        grad_ND = _norm_backward(grad_ND, hidden_ND, norm_N1, torch.zeros_like(x_ND))
        for index in reversed(range(len(layers))):
            self._backward(layers[index], index, saved[index], grad_ND, work, cos, sin)
        self._embed_backward(work, low, grad_ND)
        return scores

    def _embed(self, work: Pass) -> tuple[Tensor, list[Tensor | None]]:
        """And the low-rank inputs of each piece."""
        x_ND = F.embedding(work.token_ids_N, self._model.embedding_VD)
        kept: list[Tensor | None] = []
        for piece, span in zip(work.pieces, work.spans, strict=True):
            embedding = piece.view.embedding
            if embedding is None:
                kept.append(None)
                continue
            low_NR = F.embedding(work.token_ids_N[span], embedding[0]).mul_(piece.view.scale)
            x_ND[span].addmm_(low_NR, embedding[1].T)
            kept.append(low_NR)
        return x_ND, kept

    def _embed_backward(self, work: Pass, low: list[Tensor | None], grad_ND: Tensor) -> None:
        for piece, span, low_NR in zip(work.pieces, work.spans, low, strict=True):
            view = piece.view
            if low_NR is None or view.embedding is None or view.embedding_gradient is None:
                continue
            of_a, of_b = view.embedding_gradient
            of_b.addmm_(grad_ND[span].T, low_NR)
            grad_NR = (grad_ND[span] @ view.embedding[1]).mul_(view.scale)
            of_a.index_add_(0, work.token_ids_N[span], grad_NR)

    def _norm(self, x_ND: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each row over the root of its mean square, without gain; and one over that root."""
        square_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_()
        norm_N1 = square_N1.div_(x_ND.shape[1]).add_(self._model.config.norm_epsilon).rsqrt_()
        return torch.mul(x_ND, norm_N1, out=torch.empty_like(x_ND, dtype=dtype)), norm_N1

    def _forward(self, layer: _Sites, index: int, x_ND: Tensor, work: Pass, cos: Tensor, sin: Tensor) -> _Saved:
        """Adds the layer's output to `x_ND`."""
        config, kept = self._model.config, {}
        parts = _parts(work, index)
        normed_ND, norm_N1 = self._norm(x_ND, self._dtype)
        qkv, kept["qkv"] = layer["qkv"].forward(normed_ND, parts["qkv"])
        bias = self._model.layers[index].qkv_bias
        if bias is not None:
            qkv.add_(bias)
        q, k, v = qkv.unflatten(1, (-1, config.head_width)).split([config.heads, config.kv_heads, config.kv_heads], 1)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        attended = [attend(cells.pad(q), cells.pad(k), cells.pad(v)) for cells in work.cells]
        outs = [cells.unpad(each.out_BTHd) for cells, each in zip(work.cells, attended, strict=True)]
        attention_N = _filled_up(outs, len(x_ND))
        out_ND, kept["o"] = layer["o"].forward(attention_N, parts["o"])
        x_ND.add_(out_ND)

        feed_normed_ND, feed_norm_N1 = self._norm(x_ND, self._dtype)
        gate_up, kept["gate_up"] = layer["gate_up"].forward(feed_normed_ND, parts["gate_up"])
        gate_NF, up_NF = gate_up.chunk(2, 1)
        active_NF = F.silu(gate_NF)
        product_NF = active_NF * up_NF
        out_ND, kept["down"] = layer["down"].forward(product_NF, parts["down"])
        x_ND.add_(out_ND)
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
            kept,
        )

    def _backward(
        self, layer: _Sites, index: int, saved: _Saved, grad_ND: Tensor, work: Pass, cos: Tensor, sin: Tensor
    ) -> None:
        """Turns `grad_ND` from the gradient of the layer's output into that of its input."""
        config, kept, parts = self._model.config, saved.sites, _parts(work, index)

        grad_NF = layer["down"].backward(grad_ND, saved.product_NF, kept["down"], parts["down"])
        gate_NF, up_NF = saved.gate_up.chunk(2, 1)
        grad_gate_up = torch.empty_like(saved.gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, 1)
        torch.mul(grad_NF, saved.active_NF, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_NF.mul_(up_NF), gate_NF, grad_input=grad_gate)
        grad_normed = layer["gate_up"].backward(grad_gate_up, saved.feed_normed_ND, kept["gate_up"], parts["gate_up"])
        _norm_backward(grad_normed, saved.feed_normed_ND, saved.feed_norm_N1, grad_ND)

        grad_N = layer["o"].backward(grad_ND, saved.attention_N, kept["o"], parts["o"])
        grad_NHd = grad_N.unflatten(1, (config.heads, -1))
        grads = []
        for cells, attended in zip(work.cells, saved.attended, strict=True):
            q, k, v = (cells.unpad_gradient(grad) for grad in attended.gradients(cells.pad_gradient(grad_NHd)))
            turned = _rotated(q, cos[cells.span], -sin[cells.span]), _rotated(k, cos[cells.span], -sin[cells.span])
            grads.append(torch.cat([*turned, v], 1).flatten(1))
        grad_qkv = _filled_up(grads, len(grad_ND))
        grad_normed = layer["qkv"].backward(grad_qkv, saved.normed_ND, kept["qkv"], parts["qkv"])
        _norm_backward(grad_normed, saved.normed_ND, saved.norm_N1, grad_ND)


def _parts(work: Pass, layer: int) -> dict[SiteName, list[Part]]:
    pieces = list(zip(work.pieces, work.spans, strict=True))
    return {
        name: [Part(span, piece.view, 4 * layer + site) for piece, span in pieces]
        for site, name in enumerate(("qkv", "o", "gate_up", "down"))
    }


def _filled_up(parts: list[Tensor], n_tokens: int) -> Tensor:
    """One after another, zeros behind them."""
    missing = n_tokens - sum(len(part) for part in parts)
    if missing:
        parts = [*parts, parts[0].new_zeros(missing, parts[0].shape[1])]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
