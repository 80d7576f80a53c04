"""All weights of a model as what is trained, for `method: full`.

Products are computed in bf16 where that is asked, over weights kept in fp32. A pass is one call of compiled code where
there is some for it (`training.whole_step`); else it goes forward and backward by autograd through the decoder, and
the head's own gradient is made beside its logits, as in `training.loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.decoder.llama import Llama
from tunesmith.decoder.saving import save_checkpoint
from tunesmith.training import whole_step
from tunesmith.training.batches import Row
from tunesmith.training.loss import Scores, score
from tunesmith.training.metrics import Tally
from tunesmith.training.packing import MicroBatch, micro_batches
from tunesmith.training.whole_step import WholeStep
from tunesmith.training.workers import Workers, deal


class TrainableWeights:
    """The weights of a model as one tensor. `flat` holds them in the order of `Llama.parameters`."""

    def __init__(self, start: Llama) -> None:
        """Copies the weights of `start`."""
        parameters = list(start.parameters())
        self._shapes = [parameter.shape for parameter in parameters]
        self.flat = torch.cat([parameter.flatten() for parameter in parameters]).float()
        self.flat_gradient = torch.zeros_like(self.flat)
        self._views: list[WeightsView] = []
        self.model = start.over(self.parts(self.flat))
        """The model as it is now: its weights are views of `flat`."""

    def parts(self, flat: Tensor) -> list[Tensor]:
        """A tensor laid out as `flat`, by weight."""
        sizes = [shape.numel() for shape in self._shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self._shapes, strict=True)]

    @cached_property
    def compiled(self) -> WholeStep | None:
        """Passes with products in bf16 by compiled code, where there is some for this machine and model."""
        return WholeStep(self.model, self.flat) if whole_step.covers(self.model) else None

    @property
    def adapters(self) -> None:
        """The forward pass adds nothing to the weights."""
        return None

    def save(self, folder: Path, base_dir: Path) -> None:
        """See `decoder.saving.save_checkpoint`."""
        save_checkpoint(self.model, folder, base_dir)

    def views(self, count: int) -> list[WeightsView]:
        """The same weights with gradients of their own, one for each of `count` threads; the first is `flat_gradient`.

        They are made once.
        """
        while len(self._views) < count:
            gradient = torch.zeros_like(self.flat) if self._views else self.flat_gradient
            leaves = [part.detach().requires_grad_() for part in self.parts(self.flat)]
            for leaf, of_leaf in zip(leaves, self.parts(gradient), strict=True):
                leaf.grad = of_leaf
            self._views.append(WeightsView(leaves, gradient))
        return self._views[:count]

    def learn(self, batch: MicroBatch, view: WeightsView, share: float, dtype: torch.dtype) -> Scores:
        """Scores of `batch`; adds `share` times the gradient of its summed loss to `view.flat_gradient`.

        By autograd, whatever there is.
        """
        with torch.enable_grad():
            network = self.model.over([leaf.to(dtype) for leaf in view.leaves])
            hidden_ND = network.hidden(batch.token_ids_N, batch.positions_N, batch.attend)
        hidden_MD = hidden_ND.detach()[batch.predicting_M].float()
        gradient_MD = torch.empty_like(hidden_MD)
        of_head_VD = view.leaves[0 if self.model.config.tied else -1].grad
        weighed = replace(batch, weight_M=batch.weight_M * share)
        scores = score(self.model, hidden_MD, weighed, gradient_MD, head_gradient_VD=of_head_VD)
        of_hidden_ND = torch.zeros_like(hidden_ND).index_copy_(0, batch.predicting_M, gradient_MD.to(dtype))
        hidden_ND.backward(of_hidden_ND)
        return scores


@dataclass(frozen=True, slots=True)
class WeightsView:
    """Leaves of an autograd graph, each adding to its part of `flat_gradient`."""

    leaves: Sequence[Tensor]
    flat_gradient: Tensor


class WholeLearner:
    """Runs rows forward and backward, on all workers. `beat` is called before each forward pass."""

    def __init__(
        self, weights: TrainableWeights, workers: Workers, *, beat: Callable[[], None], dtype: torch.dtype
    ) -> None:
        """`dtype` is that of the products, fp32 in the place of int16; weights, and their gradients, are in fp32."""
        self._weights = weights
        self._workers = workers
        self._beat = beat
        self._dtype = torch.float32 if dtype == torch.int16 else dtype
        self._compiled = weights.compiled if dtype == torch.bfloat16 else None

    @torch.no_grad()
    def learn(self, rows: Sequence[Row], *, prompt_loss_weight: float, max_tokens: int) -> Tally:
        """Leaves the gradient of the weighted mean loss over `rows` in `flat_gradient` of the weights."""
        device = self._weights.flat.device
        dealt = deal([len(row.token_ids) for row in rows], min(self._workers.at_once(device), len(rows)))
        cut = [
            micro_batches(
                [rows[index] for index in part],
                prompt_loss_weight=prompt_loss_weight,
                max_tokens=max_tokens,
                device=device,
            )
            for part in dealt
        ]
        weight = sum(float(batch.weight_M.double().sum()) for batches in cut for batch in batches)
        views = self._weights.views(len(cut))
        if self._compiled is not None:
            self._compiled.take()

        def share(load: tuple[WeightsView, list[MicroBatch]]) -> Tally:
            view, batches = load
            tally = Tally()
            view.flat_gradient.zero_()
            for batch in batches:
                self._beat()
                tally.add(batch, self._pass(batch, view, 1 / weight))
            return tally

        total = Tally()
        for tally in self._workers.each(torch.no_grad()(share), list(zip(views, cut, strict=True))):
            total.merge(tally)
        for view in views[1:]:
            self._weights.flat_gradient.add_(view.flat_gradient)
        return total

    def _pass(self, batch: MicroBatch, view: WeightsView, share: float) -> Scores:
        if self._compiled is None:
            return self._weights.learn(batch, view, share, self._dtype)
        return self._compiled.learn(
            batch.token_ids_N,
            batch.row_lengths,
            predicting_M=batch.predicting_M,
            target_M=batch.target_M,
            weight_M=batch.weight_M * share,
            gradient=view.flat_gradient,
        )
