"""Muon for the matrices inside the layers, Adam for embedding and norms, and the processes that share the work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pretraining.precision import products
from pretraining.recipe import Recipe


@dataclass(slots=True)
class Optimizer:
    """Muon for matrices inside the layers, Adam for the rest; momentum and moments are the state."""

    parameters: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]

    @classmethod
    def over(cls, parameters: list[Tensor]) -> Optimizer:
        """An optimizer at rest."""
        return cls(parameters, [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters])

    @torch.no_grad()
    def step(self, step: int, recipe: Recipe, workers: Workers) -> None:
        """One update from the `.grad` of every parameter."""
        rate = recipe.rate(step)
        matrices = [i for i, p in enumerate(self.parameters) if p.ndim == 2 and i > 0]  # 0 is the embedding
        parameters, first, gradients = self._of(matrices)
        torch._foreach_mul_(first, 0.95)
        torch._foreach_add_(first, gradients)
        directions = self._directions(matrices, workers)
        torch._foreach_mul_(parameters, 1 - 0.01 * rate * recipe.muon_learning_rate)
        for index in matrices:
            parameter = self.parameters[index]
            scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            parameter.sub_(directions[index].float(), alpha=rate * recipe.muon_learning_rate * scale)
        others = sorted(set(range(len(self.parameters))) - set(matrices))
        parameters, first, gradients = self._of(others)
        second = [self.second[index] for index in others]
        torch._foreach_lerp_(first, gradients, 0.1)
        torch._foreach_mul_(second, 0.95)
        torch._foreach_addcmul_(second, gradients, gradients, value=0.05)
        bias_1, bias_2 = 1 - 0.9 ** (step + 1), 1 - 0.95 ** (step + 1)
        divisors = torch._foreach_div(second, bias_2)
        torch._foreach_sqrt_(divisors)
        torch._foreach_add_(divisors, 1e-8)
        torch._foreach_addcdiv_(parameters, first, divisors, value=-rate * recipe.adam_learning_rate / bias_1)

    def _of(self, indices: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters, their first moments, and their gradients: what is done to all of them is one call on a GPU."""
        parameters = [self.parameters[index] for index in indices]
        return parameters, [self.first[index] for index in indices], [gradient(parameter) for parameter in parameters]

    def _directions(self, matrices: list[int], workers: Workers) -> dict[int, Tensor]:
        """The orthogonal update of each matrix: equal shapes in one batch, the work shared by the processes."""
        dtype = products(self.parameters[0].device)
        directions = {i: torch.zeros_like(self.parameters[i], dtype=dtype) for i in matrices}
        for shape in dict.fromkeys(self.parameters[i].shape for i in matrices):
            mine = [i for i in matrices if self.parameters[i].shape == shape][workers.rank :: workers.count]
            if mine:
                batch = torch.stack([gradient(self.parameters[i]) + 0.95 * self.first[i] for i in mine])
                for index, direction in zip(mine, orthogonal(batch), strict=True):
                    directions[index].copy_(direction)
        workers.sum(list(directions.values()))
        return directions


def gradient(parameter: Tensor) -> Tensor:
    """The gradient that the backward passes have summed up."""
    assert parameter.grad is not None
    return parameter.grad


def orthogonal(matrices_LRC: Tensor) -> Tensor:
    """For each matrix, one with its singular vectors and singular values near 1, by five Newton-Schulz steps.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    x = matrices_LRC.to(products(matrices_LRC.device))
    tall = x.shape[1] > x.shape[2]
    x = x.mT.contiguous() if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


@dataclass(frozen=True, slots=True)
class Workers:
    """The processes that share a run: each computes part of every batch, all end each step with the same weights."""

    rank: int
    count: int

    @classmethod
    def join(cls, device: str) -> Workers:
        """Meets the others if `torchrun` started this process, else works alone."""
        if not dist.is_torchelastic_launched():
            return cls(rank=0, count=1)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def sum(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
