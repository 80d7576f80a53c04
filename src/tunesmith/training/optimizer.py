"""AdamW over one flat tensor. Knows numbers, not what they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_NORM_FLOOR = 1e-6
"""Added to a norm before it divides, as in `torch.nn.utils.clip_grad_norm_`."""


class FlatAdamW:
    """The steps of `torch.nn.utils.clip_grad_norm_` and `torch.optim.AdamW(fused=True)`, to the bit.

    By the function and not the class, of which making one imports the compiler of torch: over a second of every run.
    """

    def __init__(self, flat: Tensor, gradient: Tensor, *, weight_decay: float, largest_norm: float) -> None:
        """A gradient of a norm above `largest_norm` is made shorter, to that norm."""
        self._largest_norm = largest_norm
        self._flat, self._gradient, self._weight_decay = flat, gradient, weight_decay
        self.state = {
            "step": torch.zeros((), device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
        """What a checkpoint has to hold."""

    def step(self, learning_rate: float) -> None:
        """Changes the tensor by its gradient."""
        # Where nothing is to be clipped torch multiplies by one: that and its norm take two thirds of AdamW's time.
        share = self._largest_norm / (torch.linalg.vector_norm(self._gradient) + _NORM_FLOOR)
        if not share >= 1.0:  # written so that what is no number stays none
            self._gradient.mul_(share)
        adamw(
            [self._flat],
            [self._gradient],
            [self.state["exp_avg"]],
            [self.state["exp_avg_sq"]],
            [],
            [self.state["step"]],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )
