"""The forward pass of any other architecture: that of transformers, with our attention and our adapters in it.

What transformers computes between attention and attention stays as it is. Its attention is replaced by the `attend`
that the caller passes in, through the registry that transformers keeps for that; every linear layer of a decoder layer,
and the embedding, gets the delta of the adapters added. What cannot be computed that way is refused at load
(`decoder.probe`).

Legend: as in `decoder.base`; I, O = inputs and outputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from tunesmith.adapters.lora import Adapters, Layout, Linear, Site
from tunesmith.decoder import probe
from tunesmith.decoder.base import Attend
from tunesmith.decoder.probe import Trace

ATTENTION = "tunesmith"
"""What our attention is called in the registry of transformers. No mask is registered under it: none is made."""


@dataclass(frozen=True, slots=True)
class ForeignShape:
    """See `decoder.base.Shape`."""

    vocabulary_size: int
    context_tokens: int
    kv_heads: int
    head_width: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class _Call:
    """What the parts of a model need to know of the forward pass under way."""

    attend: Attend
    adapters: Adapters | None
    windows: tuple[int | None, ...]


_CALL: ContextVar[_Call | None] = ContextVar("_CALL", default=None)
"""Transformers calls us back with arguments of its own: this is how ours get past it, in each thread by itself."""


class Foreign:
    """A model of transformers as a `Decoder`."""

    def __init__(self, network: transformers.PreTrainedModel, trace: Trace) -> None:
        embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
        rows = [len(module.get_parameter("weight")) for module in (embedding, head)]
        self.config = ForeignShape(
            vocabulary_size=min(rows),
            context_tokens=trace.context_tokens,
            kv_heads=trace.kv_heads,
            head_width=trace.head_width,
            layout=_layout(network, trace),
        )
        self.head_VD: Tensor = head.weight
        self._head_bias_V: Tensor | None = getattr(head, "bias", None)
        self._decoder = network.base_model
        self._windows = trace.windows
        for index, name in ((index, name) for index, names in enumerate(trace.linears) for name in names):
            linear = network.get_submodule(f"{trace.path}.{index}.{name}")
            linear.register_forward_hook(partial(_add_delta, index, name))
        if self.config.layout.embedding is not None:
            embedding.register_forward_hook(_add_embedding_delta)

    def hidden(
        self, token_ids_N: Tensor, positions_N: Tensor, attend: Attend, adapters: Adapters | None = None
    ) -> Tensor:
        """See `Decoder`."""
        before = _CALL.set(_Call(attend, adapters, self._windows))
        try:
            outputs = self._decoder(input_ids=token_ids_N[None], position_ids=positions_N[None], use_cache=False)
        finally:
            _CALL.reset(before)
        hidden_ND: Tensor = outputs.last_hidden_state[0]
        return hidden_ND

    def logits(self, hidden_ND: Tensor, token_ids: Sequence[int] | None = None) -> Tensor:
        """See `Decoder`."""
        head_VD, bias_V = self.head_VD, self._head_bias_V
        if token_ids is not None:
            head_VD = head_VD[list(token_ids)]
            bias_V = None if bias_V is None else bias_V[list(token_ids)]
        return F.linear(hidden_ND, head_VD, bias_V)


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Foreign:
    """A model from a checkpoint folder of any architecture that transformers has and that fits.

    Only safetensors are read, code in the folder is never run, the network is never touched. Raises ValueError with the
    reason for a model that is not run right here, FileNotFoundError without safetensors.
    """
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"no *.safetensors in {folder}; pickled weights are never read")
    transformers_logging.disable_progress_bar()  # the logs that this goes to are read, not watched
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except KeyError as error:
        if error.args != (ATTENTION,):
            raise
        raise ValueError(f"{folder}: the attention of this type of model cannot be replaced") from error
    except (
        ValueError,
        AttributeError,
        ImportError,
    ) as error:  # unknown to this transformers, or needing another package
        raise ValueError(f"{folder}: transformers cannot load this model: {error}") from error
    network, loading = loaded
    # Transformers makes up weights that are not there; we do not.
    if absent := sorted(loading["missing_keys"]) + sorted(map(str, loading["mismatched_keys"])):
        raise ValueError(f"the weights in {folder} lack {', '.join(absent[:3])}, or have them in another shape")
    network.eval().requires_grad_(False).to(device)
    network.config.pad_token_id = None  # no batch is padded here: GPT-2 would look for it in each, and warn
    try:
        model = Foreign(network, probe.trace(network))
        probe.compare(model, network, ATTENTION)
    except probe.Unfit as error:
        kind = network.config.model_type
        raise ValueError(f"{folder}: a model of type {kind!r} does not run right here: {error}") from error
    return model


def _layout(network: transformers.PreTrainedModel, trace: Trace) -> Layout:
    transposed = False
    layers: list[dict[Site, tuple[Linear, ...]]] = []
    for index, names in enumerate(trace.linears):
        layers.append({})
        for name in names:
            linear = network.get_submodule(f"{trace.path}.{index}.{name}")
            outputs, inputs = linear.get_parameter("weight").shape
            if not isinstance(linear, nn.Linear):  # Conv1D
                outputs, inputs, transposed = inputs, outputs, True
            layers[-1][name] = (Linear(name, outputs, inputs),)
    return Layout(trace.path, tuple(layers), transposed, _embedding(network))


def _embedding(network: transformers.PreTrainedModel) -> Linear | None:
    module = network.get_input_embeddings()
    if not isinstance(module, nn.Embedding):
        return None
    name = next(name for name, other in network.named_modules() if other is module)
    return Linear(name, outputs=module.embedding_dim, inputs=module.num_embeddings)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention, with q, k, v as [1, heads, N, d]; gives [1, N, H, d]."""
    call = _CALL.get()
    assert call is not None, "the model is run by `Foreign.hidden` only"
    layer: int = module.layer_idx  # type: ignore[assignment]
    q_NHd, k_NKd, v_NKd = (x[0].transpose(0, 1) for x in (query, key, value))
    if scaling is not None and not math.isclose(scaling, q_NHd.shape[-1] ** -0.5):
        q_NHd = q_NHd * (scaling * q_NHd.shape[-1] ** 0.5)  # `attend` divides by sqrt(d)
    window = call.windows[layer]
    more = {} if window is None else {"window": window}
    return call.attend(layer, q_NHd, k_NKd, v_NKd, **more)[None], None


def _add_delta(layer: int, site: Site, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    call = _CALL.get()
    if call is None or call.adapters is None:
        return None
    delta_NO = call.adapters.delta(layer, site, inputs[0].flatten(0, -2))
    return None if delta_NO is None else output + delta_NO.view_as(output)


def _add_embedding_delta(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    call = _CALL.get()
    if call is None or call.adapters is None:
        return None
    delta_ND = call.adapters.embedding_delta(inputs[0].flatten())
    if delta_ND is None:
        return None
    scale = getattr(module, "embed_scale", None)  # Gemma's embedding multiplies what it looks up; so does PEFT
    return output + (delta_ND if scale is None else delta_ND * scale.to(delta_ND.dtype)).view_as(output)


transformers.AttentionInterface.register(ATTENTION, _attention)
