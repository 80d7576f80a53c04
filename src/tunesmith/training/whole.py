"""All weights of a model as what is trained, for `method: full`: forward and backward by autograd through the decoder.

Products are computed in bf16 where that is asked, over weights kept in fp32; the head's own gradient is made beside its
logits, as in `training.loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.decoder.llama import Llama
from tunesmith.decoder.saving import save_checkpoint
from tunesmith.training.loss import Scores, score
from tunesmith.training.packing import MicroBatch


class TrainableWeights:
    """The weights of a model as one tensor. `flat` holds them in the order of `Llama.parameters`."""

    def __init__(self, start: Llama) -> None:
        """Copies the weights of `start`."""
        parameters = list(start.parameters())
        self._shapes = [parameter.shape for parameter in parameters]
        self.flat = torch.cat([parameter.flatten() for parameter in parameters]).float()
        self.flat_gradient = torch.zeros_like(self.flat)
        self.model = start.over(self.parts(self.flat))
        """The model as it is now: its weights are views of `flat`."""

    def parts(self, flat: Tensor) -> list[Tensor]:
        """A tensor laid out as `flat`, by weight."""
        sizes = [shape.numel() for shape in self._shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self._shapes, strict=True)]

    def view(self) -> WeightsView:
        """The same weights with gradients of their own, for one thread."""
        gradient = torch.zeros_like(self.flat)
        leaves = [part.detach().requires_grad_() for part in self.parts(self.flat)]
        for leaf, of_leaf in zip(leaves, self.parts(gradient), strict=True):
            leaf.grad = of_leaf
        return WeightsView(leaves, gradient)

    def learn(self, batch: MicroBatch, view: WeightsView, dtype: torch.dtype) -> Scores:
        """Scores of `batch`; adds the gradient of its loss to `view.flat_gradient`."""
        with torch.enable_grad():
            network = self.model.over([leaf.to(dtype) for leaf in view.leaves])
            hidden_ND = network.hidden(batch.token_ids_N, batch.positions_N, batch.attend)
        hidden_MD = hidden_ND.detach()[batch.predicting_M].float()
        gradient_MD = torch.empty_like(hidden_MD)
        of_head_VD = view.leaves[0 if self.model.config.tied else -1].grad
        scores = score(self.model, hidden_MD, batch, gradient_MD, head_gradient_VD=of_head_VD)
        of_hidden_ND = torch.zeros_like(hidden_ND).index_copy_(0, batch.predicting_M, gradient_MD.to(dtype))
        hidden_ND.backward(of_hidden_ND)
        return scores

    def save(self, folder: Path, base_dir: Path) -> None:
        """See `decoder.saving.save_checkpoint`."""
        save_checkpoint(self.model, folder, base_dir)


@dataclass(frozen=True, slots=True)
class WeightsView:
    """Leaves of an autograd graph, each adding to its part of `flat_gradient`."""

    leaves: Sequence[Tensor]
    flat_gradient: Tensor
