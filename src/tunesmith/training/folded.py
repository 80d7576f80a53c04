"""A step of a Llama by hand: forward and backward, for the rows of one job or of many at once.

What autograd would do with `decoder.llama`, in fewer operations and, where the processor multiplies bf16, several times
faster: the gain of a norm is part of the product that follows it, no gradient is computed for anything frozen, little
is kept for the way back, and what stands between two products is one pass over the data (`training.kernels`). Only for
training: what is measured and served goes through `decoder.llama` in fp32.

Legend: N = tokens (rounded up), D = model width, F = feed-forward width, R = rank, H, K = query and key/value heads,
d = head width, M = weighed positions, V = vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.adapters.lora import Site as SiteName
from tunesmith.decoder.base import Decoder
from tunesmith.decoder.llama import Llama, rotation
from tunesmith.decoder.replays import Replays
from tunesmith.training.attention import Attended, attend
from tunesmith.training.factors import TrainableLora
from tunesmith.training.frozen import FrozenWeights, Sites
from tunesmith.training.kernels import HeadNorms, Heads, Kernels, RowGroup, Turn
from tunesmith.training.loss import Head, Scores
from tunesmith.training.passes import MOST_FRAMED_TOKENS, Pass, Piece
from tunesmith.training.sites import Part


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """That of `RunSpec.precision`; auto: bf16 on a device, and on a processor that multiplies it.

    On others it would be emulated: there it is int16, fixed point (decoder/fixed.h), nearer to fp32 than bf16 is, and
    faster than fp32.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    return torch.bfloat16 if device.type != "cpu" or multiplies_bf16() else torch.int16


def multiplies_bf16() -> bool:
    """Whether this processor does."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def covers(model: Decoder) -> TypeGuard[Llama]:
    """Whether a step of `model` can be done here: a Llama.

    One with norms on queries and keys by attention that has them: on a device, and with `PanelWeights`.
    """
    return isinstance(model, Llama)


SITES: tuple[SiteName, ...] = ("qkv", "o", "gate_up", "down")
"""Of a layer, in the order of factors."""
AFTER_ATTENTION = SITES[1:]
KEPT_SHARE = 0.5
"""Of free memory, what the layers of a pass may keep for the way back: the rest is for the pass itself."""


STAGES_KEPT = 8


@dataclass(frozen=True, slots=True)
class _AttentionSaved:
    """What the backward pass of a layer needs of what comes before its site `o`."""

    parts: list[Part]
    """Of `qkv`."""
    normed_ND: Tensor
    inverse_N: Tensor
    attended: list[Attended]
    """By groups of the pass."""
    qkv: list[Tensor]
    """What the site keeps for itself."""


@dataclass(frozen=True, slots=True)
class _FeedSaved:
    """And of the rest, from `o` on: of the tokens whose states go on from there."""

    parts: dict[SiteName, list[Part]]
    attention_N: Tensor
    """[N, H d]"""
    normed_ND: Tensor
    inverse_N: Tensor
    gate_up: Tensor
    sites: dict[SiteName, list[Tensor]]
    """What each site keeps for itself."""


_Saved = tuple[_AttentionSaved, _FeedSaved]


@dataclass(frozen=True, slots=True)
class _Start:
    """What a layer was given, for one that is computed again on the way back."""

    x_ND: Tensor
    added_ND: Tensor | None


@dataclass(frozen=True, slots=True)
class _Walk:
    """What the layers of a pass have in common."""

    work: Pass
    groups: list[RowGroup]
    turn: Turn


class FoldedLlama:
    """A model's weights, laid out for training steps. Without `replays` threads may share it."""

    def __init__(
        self,
        model: Llama,
        weights: FrozenWeights,
        kernels: Kernels,
        free_bytes: Callable[[], int] | None = None,
        replays: Replays | None = None,
    ) -> None:
        """`covers(model)`, whose weights `weights` has; everything between products that adds up does so in fp32.

        `free_bytes`, where given, is asked before each pass: where that is too little for what the way back needs of
        every layer, it computes them again, one after another. `replays` is for weights that jobs do not share and that
        have an attention for rows of any lengths: small passes are recorded.
        """
        self._model, self._weights, self._kernels, self._free_bytes = model, weights, kernels, free_bytes
        self._replays = replays
        self._stages: OrderedDict[Hashable, TrainableLora] = OrderedDict()
        self._recomputing: dict[int, bool] = {}
        """Of small passes, by their tokens: to ask how much memory is free takes as long as to ask for one."""
        # Behind its attention the last layer is of use to tokens that predict alone. Products of torch, where they are
        # shared by jobs, take whole pieces: what they say of a token may depend on how many there are.
        self._of_predicting = weights.grid == 1 or not weights.shares
        self._heads = Heads(model.config.heads, model.config.kv_heads, model.config.head_width)

    @property
    def shares(self) -> bool:
        """Whether a pass may hold pieces of several jobs."""
        return self._weights.shares

    @property
    def head(self) -> Head:
        """As products of steps have it."""
        return self._weights.head

    def take(self, factors: TrainableLora, *, single: bool) -> None:
        """See `FrozenWeights`."""
        if self._replays is None:  # else each pass takes its own: that is part of what is recorded
            self._weights.take(factors, single=single)

    @torch.no_grad()
    def learn(self, pieces: Sequence[Piece], *, single: bool) -> tuple[Pass, Scores]:
        """A pass over `pieces`: adds its gradient to their views.

        With `single` all are of the job taken last, or with `replays` of any one.
        """
        if self._replays is not None:
            (piece,) = pieces
            if len(piece.batch.token_ids_N) <= MOST_FRAMED_TOKENS:
                return self._learn_framed(piece, self._replays)
            self._weights.take(piece.view.owner, single=single)
        work = Pass.of(pieces, grid=self._weights.grid)
        groups = work.groups() if self._weights.attention is None else [work.rows()]
        return work, self._learn(work, groups, single=single, again=self._computes_again(len(work.token_ids_N)))

    def _learn_framed(self, piece: Piece, replays: Replays) -> tuple[Pass, Scores]:
        """A pass that depends on nothing but shapes and the tensors that it is given."""
        work, rows = Pass.framed(piece)
        stage = self._stage(piece.view.owner)
        (view,) = stage.views(1)
        n_tokens = len(work.token_ids_N)
        if n_tokens not in self._recomputing:
            self._recomputing[n_tokens] = self._computes_again(n_tokens)
        again = self._recomputing[n_tokens]

        def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            token_ids_N, predicting_M, target_M, weight_M, start_B, length_B = inputs
            batch = replace(piece.batch, predicting_M=predicting_M)
            tensors = token_ids_N, predicting_M, target_M, weight_M, work.completion_C
            staged = Pass([replace(piece, batch=batch, view=view)], work.spans, *tensors)
            view.begin()
            self._weights.take(stage, single=True)
            group = RowGroup(start_B, length_B, rows.cells, rows.end)
            scores = self._learn(staged, [group], single=True, again=again)
            return scores.nll_M, scores.right_M

        stage.flat.copy_(piece.view.owner.flat)
        given = (work.token_ids_N, work.predicting_M, work.target_M, work.weight_M, rows.start_B, rows.length_B)
        nll_M, right_M = replays.run((stage, rows.cells, again), given, run, changed=[view.flat_gradient])
        piece.view.flat_gradient.add_(view.flat_gradient)
        known = slice(len(piece.batch.predicting_M))
        return work, Scores(nll_M[known], right_M[known])

    def _stage(self, factors: TrainableLora) -> TrainableLora:
        """Factors of the same shapes and scale, which are written over in each pass: jobs that are alike share one."""
        if factors.likeness not in self._stages:
            self._stages[factors.likeness] = TrainableLora(factors.lora)
            if len(self._stages) > STAGES_KEPT:
                self._stages.popitem(last=False)
        self._stages.move_to_end(factors.likeness)
        return self._stages[factors.likeness]

    def _learn(self, work: Pass, groups: list[RowGroup], *, single: bool, again: bool) -> Scores:
        layers = self._weights.layers(single=single)
        kernels, of_predicting = self._kernels, self._of_predicting
        walk = _Walk(work, groups, self._turn(max(group.cells for group in groups)))
        x_ND, low = self._embed(work)
        added_ND: Tensor | None = None
        saved: list[_Start | _Saved] = []
        for index, layer in enumerate(layers):
            start = _Start(x_ND.clone(), added_ND) if again else None
            x_ND, added_ND, kept = self._forward(layer, index, x_ND, added_ND, walk)
            saved.append(start or kept)
        if added_ND is not None:
            x_ND.add_(added_ND)
        x_MD = x_ND if of_predicting else x_ND[work.predicting_M]
        hidden_MD, inverse_M = kernels.norm(x_MD, None, self._model.config.norm_epsilon, torch.float32)

        states_MD = hidden_MD * self._model.norm_D
        grad_MD = torch.empty_like(states_MD)
        scores = self._weights.score(states_MD, work, grad_MD, single=single)

        of_hidden_MD, grad_ND = grad_MD.mul_(self._model.norm_D), torch.zeros_like(x_MD)
        rounded_ND = kernels.norm_backward(of_hidden_MD, hidden_MD, inverse_M, grad_ND).to(self._weights.dtype)
        if not of_predicting:
            grad_ND, rounded_ND = _spread(grad_ND, work), _spread(rounded_ND, work)
        for index in reversed(range(len(layers))):
            layer, known = layers[index], saved.pop()
            if isinstance(known, _Start):
                _, _, known = self._forward(layer, index, known.x_ND, known.added_ND, walk)
            before, after = known
            grad_N = self._feed_backward(layer, after, grad_ND, rounded_ND)
            if self._narrows(index):
                grad_ND, grad_N = _spread(grad_ND, work), _spread(grad_N, work)
            rounded_ND = self._attend_backward(layer, before, grad_ND, grad_N)
        self._embed_backward(work, low, grad_ND)
        return scores

    def _computes_again(self, n_tokens: int) -> bool:
        if self._free_bytes is None:
            return False
        config = self._model.config
        inner, stacked = 2 * config.feed_forward_width, config.query_width + 2 * config.key_width
        size = self._weights.dtype.itemsize
        # For a token of a layer: norms, what attention keeps (`attention._Differentiated`), gate and up.
        numbers = 2 * config.width + stacked + 5 * config.query_width + inner
        if config.qk_norm and size < torch.float32.itemsize:
            numbers += 2 * (config.query_width + config.key_width)  # in fp32
        return n_tokens * config.layers * numbers * size > KEPT_SHARE * self._free_bytes()

    def _forward(
        self, layer: Sites, index: int, x_ND: Tensor, added_ND: Tensor | None, walk: _Walk
    ) -> tuple[Tensor, Tensor, _Saved]:
        """The states behind a layer, what is still to be added to them, and what its way back needs."""
        work, spans = walk.work, walk.work.spans
        attention_N, before = self._attend(layer, index, x_ND, added_ND, walk)
        if self._narrows(index):
            x_ND, attention_N = x_ND[work.predicting_M], attention_N[work.predicting_M]
            spans = list(work.weighed())
        added_ND, after = self._feed(layer, index, x_ND, attention_N, work, spans)
        return x_ND, added_ND, (before, after)

    def _narrows(self, index: int) -> bool:
        """Whether tokens that do not predict are of no use behind the attention of this layer."""
        return self._of_predicting and index == len(self._model.layers) - 1

    def _embed(self, work: Pass) -> tuple[Tensor, list[Tensor | None]]:
        """And the low-rank inputs of each piece."""
        x_ND = F.embedding(work.token_ids_N, self._model.embedding_VD).float()
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

    def _turn(self, cells: int) -> Turn:
        positions = torch.arange(cells, device=self._model.embedding_VD.device)
        cos, sin = rotation(positions, self._model.config, torch.float32)
        half = self._heads.width // 2  # both halves are the same
        return Turn(cos[:, 0, :half].contiguous(), sin[:, 0, :half].contiguous())

    def _attend(
        self, layer: Sites, index: int, x_ND: Tensor, added_ND: Tensor | None, walk: _Walk
    ) -> tuple[Tensor, _AttentionSaved]:
        """Adds `added_ND` to `x_ND`; returns what its tokens attend to, [N, H d]."""
        kernels, heads, parts = self._kernels, self._heads, _parts(walk.work, walk.work.spans, index, "qkv")
        normed_ND, inverse_N = kernels.norm(x_ND, added_ND, self._model.config.norm_epsilon, self._weights.dtype)
        qkv, kept = layer["qkv"].forward(normed_ND, parts)
        weights = self._model.bare(index)
        if weights.qkv_bias is not None:
            qkv.add_(weights.qkv_bias)
        attention_N = qkv.new_zeros(len(qkv), heads.queries * heads.width)
        norms = None
        if weights.q_norm_d is not None and weights.k_norm_d is not None:
            norms = HeadNorms(weights.q_norm_d, weights.k_norm_d, self._model.config.norm_epsilon)
        call = (walk.turn, heads, attention_N, norms)
        way = self._weights.attention
        if way is None:
            attended: list[Attended] = [attend(kernels, qkv, group, *call) for group in walk.groups]
        else:
            (rows,) = walk.groups
            asking_B = walk.work.asking(rows) if way.asks and self._narrows(index) else None
            attended = [way.attend(qkv, rows, *call, asking_B)]
        return attention_N, _AttentionSaved(parts, normed_ND, inverse_N, attended, kept)

    def _feed(
        self, layer: Sites, index: int, x_ND: Tensor, attention_N: Tensor, work: Pass, spans: Sequence[slice]
    ) -> tuple[Tensor, _FeedSaved]:
        """The rest of a layer, for tokens of which `spans` are those of the pieces; what is to be added to `x_ND`."""
        kernels, epsilon = self._kernels, self._model.config.norm_epsilon
        parts = {site: _parts(work, spans, index, site) for site in AFTER_ATTENTION}
        kept: dict[SiteName, list[Tensor]] = {}
        out_ND, kept["o"] = layer["o"].forward(attention_N, parts["o"])
        normed_ND, inverse_N = kernels.norm(x_ND, out_ND, epsilon, self._weights.dtype)
        gate_up, kept["gate_up"] = layer["gate_up"].forward(normed_ND, parts["gate_up"])
        out_ND, kept["down"] = layer["down"].forward(kernels.swiglu(gate_up), parts["down"])
        return out_ND, _FeedSaved(parts, attention_N, normed_ND, inverse_N, gate_up, kept)

    def _feed_backward(self, layer: Sites, saved: _FeedSaved, grad_ND: Tensor, rounded_ND: Tensor) -> Tensor:
        """Turns `grad_ND` from the gradient of the layer's output into that of what `_feed` was given as `x_ND`.

        `rounded_ND` is the same in the dtype of the products, before; what is returned is the gradient of attention.
        """
        kernels, kept, parts = self._kernels, saved.sites, saved.parts
        product_NF = kernels.swiglu(saved.gate_up)  # computed again: faster than to bring it from memory
        grad_NF = layer["down"].backward(rounded_ND, product_NF, kept["down"], parts["down"])
        grad_gate_up = kernels.swiglu_backward(saved.gate_up, grad_NF)
        grad_normed = layer["gate_up"].backward(grad_gate_up, saved.normed_ND, kept["gate_up"], parts["gate_up"])
        rounded_ND = kernels.norm_backward(grad_normed, saved.normed_ND, saved.inverse_N, grad_ND)
        return layer["o"].backward(rounded_ND, saved.attention_N, kept["o"], parts["o"])

    def _attend_backward(self, layer: Sites, saved: _AttentionSaved, grad_ND: Tensor, grad_N: Tensor) -> Tensor:
        """The same for the rest, from the gradient of attention on; that of the input in the dtype of products."""
        kernels, heads = self._kernels, self._heads
        grad_qkv = grad_N.new_zeros(len(grad_N), (heads.queries + 2 * heads.keys) * heads.width)
        for attended in saved.attended:
            attended.backward(grad_N, grad_qkv)
        grad_normed = layer["qkv"].backward(grad_qkv, saved.normed_ND, saved.qkv, saved.parts)
        return kernels.norm_backward(grad_normed, saved.normed_ND, saved.inverse_N, grad_ND)


def _parts(work: Pass, spans: Sequence[slice], layer: int, site: SiteName) -> list[Part]:
    """What is done piece by piece, where `spans` are the tokens of the pieces."""
    index = len(SITES) * layer + SITES.index(site)
    return [Part(span, piece.view, index) for piece, span in zip(work.pieces, spans, strict=True)]


def _spread(grad_M: Tensor, work: Pass) -> Tensor:
    """The gradient of all tokens, where those that predict nothing have none."""
    return grad_M.new_zeros(len(work.token_ids_N), grad_M.shape[1]).index_copy_(0, work.predicting_M, grad_M)
