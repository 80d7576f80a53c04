"""What a step by hand multiplies with: the frozen weights and the head, laid out for it, and the factors of jobs.

`PlainWeights` has torch's products; `training.panels` compiled ones of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.adapters.lora import Site as SiteName
from tunesmith.decoder.llama import Llama
from tunesmith.training.attention import RowAttention
from tunesmith.training.factors import TrainableLora
from tunesmith.training.kernels import Kernels
from tunesmith.training.loss import Head, PlainHead, Scores, Weighed, score, score_frozen
from tunesmith.training.sites import BaseWeight, SharedSite, SingleSite, Site

Sites = dict[SiteName, Site]
"""Of a layer."""
MOST_SHARED_WEIGHTS = 64_000_000
"""Larger models compute every job alone with torch's products: there one thread would be too slow for a pass, and with
several the last digits of a job would depend on the jobs beside it. So they would on a device."""


class FrozenWeights(Protocol):
    """Threads may share it."""

    dtype: torch.dtype
    """Of products, and of what is between two of them."""
    shares: bool
    """Whether a pass may hold pieces of several jobs."""
    grid: int | None
    """Tokens of a piece are rounded up to a multiple; None: as torch's products like it."""
    attention: RowAttention | None
    """For rows of any lengths; None: `training.attention`, for groups of similar ones."""
    head: Head
    """As products of steps have it."""

    def take(self, factors: TrainableLora, *, single: bool) -> None:
        """The factors of a job as they are now, for the passes of a step: with `single` passes of that job alone."""

    def layers(self, *, single: bool) -> Sequence[Sites]:
        """For a pass; with `single` all of it is of the job taken last."""

    def score(self, states_MD: Tensor, work: Weighed, grad_MD: Tensor, *, single: bool) -> Scores:
        """See `loss.score`: of the last states, whose gradient comes into `grad_MD`."""


class PlainWeights:
    """Implements `FrozenWeights` by those of torch."""

    grid: int | None = None

    def __init__(
        self,
        model: Llama,
        site_outputs: Sequence[list[int]],
        dtype: torch.dtype,
        kernels: Kernels,
        *,
        held: bool = True,
        attention: RowAttention | None = None,
    ) -> None:
        """`site_outputs` are the outputs of each linear layer of each site (`TrainableLora.site_outputs`).

        `held`: see `sites.BaseWeight`.
        """
        self.dtype, self.attention = dtype, attention
        on_processor = model.embedding_VD.device.type == "cpu"
        self.shares = on_processor and model.config.matrix_numbers <= MOST_SHARED_WEIGHTS
        self._model, self._kernels = model, kernels
        self._head_VD = model.head_VD.to(dtype)
        self.head: Head = PlainHead(self._head_VD)
        outputs = iter(site_outputs)
        self._shared: list[dict[SiteName, SharedSite]] = []
        for index, layout in enumerate(model.config.layout.layers):
            bare = model.bare(index)
            gains = {"qkv": bare.attention_norm_D, "gate_up": bare.feed_norm_D}
            sites: dict[SiteName, SharedSite] = {}
            for site in layout:
                weight = partial(model.matrix, index, site, torch.float32)
                sites[site] = SharedSite(BaseWeight(weight, gains.get(site), dtype, held=held), next(outputs))
            self._shared.append(sites)
        self._single: list[dict[SiteName, SingleSite]] = [
            {name: SingleSite(site) for name, site in layer.items()} for layer in self._shared
        ]

    def take(self, factors: TrainableLora, *, single: bool) -> None:
        """See `FrozenWeights`."""
        if not single:
            return
        pairs, _ = factors.pairs(factors.flat)
        sites = [site for layer in self._single for site in layer.values()]
        for site, pair in zip(sites, pairs, strict=True):
            site.take(pair, factors.lora.scale)

    def layers(self, *, single: bool) -> Sequence[Sites]:
        """See `FrozenWeights`."""
        return self._single if single else self._shared  # type: ignore[return-value]

    def score(self, states_MD: Tensor, work: Weighed, grad_MD: Tensor, *, single: bool) -> Scores:
        """See `FrozenWeights`."""
        if single:
            return score_frozen(self._kernels, self.head, states_MD, work, grad_MD)
        coarse_VD = None if self.dtype == torch.float32 else self._head_VD
        return score(self._model, states_MD, work, grad_MD, prompt_head_VD=coarse_VD)
