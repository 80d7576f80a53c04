"""Whether a model of transformers fits `decoder.foreign`: what is asked of it, and proof that the numbers are right.

`trace` runs a few tokens and looks at what each layer asks of its attention; `compare` runs a few more both ways. What
is not understood is refused: better no model than one that is slightly wrong.

Legend: as in `decoder.base`; T = tokens of one sequence.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.decoder.base import Attend, Shape

TRACE = "tunesmith-trace"
HARMLESS = {"dropout", "scaling", "sliding_window", "position_ids", "use_cache", "output_attentions", "is_causal"}
"""Arguments of an attention function that say nothing we must heed. Windows are read off the mask; dropout is off."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Largest difference from plain transformers, as a share of the largest logit."""
COARSE_TOLERANCE = 5e-2
"""In half precision: two orders of summation differ by that much."""
_PLACE = re.compile(r"(?P<path>.+?)\.(?P<layer>\d+)\.(?P<name>.+)")


class Unfit(Exception):
    """Why a model cannot be run; a clause that names the reason."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What was seen of a model."""

    path: str
    """Where its decoder layers are, as in `transformer.h`."""
    linears: tuple[tuple[str, ...], ...]
    """By layer: the names of the linear layers that see every token, in the order of the model."""
    windows: tuple[int | None, ...]
    """By layer: how many tokens a token sees, itself included; None for all before it."""
    context_tokens: int
    kv_heads: int
    head_width: int


class Runnable(Protocol):
    """The part of a `Decoder` that `compare` looks at."""

    @property
    def config(self) -> Shape:
        """See `Decoder`."""

    def hidden(self, token_ids_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
        """See `Decoder`."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """See `Decoder`."""


@dataclass(frozen=True, slots=True)
class _Mask:
    """Stands for a mask that transformers would make."""

    visible: Callable[..., Tensor]
    """(batch, head, query position, key position) -> whether the query sees the key."""


@dataclass(frozen=True, slots=True)
class _Attended:
    """One call of an attention function."""

    module: nn.Module
    shapes: tuple[torch.Size, torch.Size, torch.Size]
    mask: object
    arguments: dict[str, object]


@dataclass(slots=True)
class _Seen:
    attended: list[_Attended] = field(default_factory=list)
    linears: dict[nn.Module, int] = field(default_factory=dict)
    """Linear layers and the rows each was given, in the order of their calls."""


@torch.no_grad()
def trace(network: transformers.PreTrainedModel) -> Trace:
    """Runs a few tokens. Raises Unfit. The model's attention is left as it was."""
    config = network.config.get_text_config()
    context_tokens = _context_tokens(config)
    if "position_ids" not in inspect.signature(network.base_model.forward).parameters:
        raise Unfit("it takes no position_ids")
    if network.get_output_embeddings() is None:
        raise Unfit("it has no output projection")
    for name, value in config.to_dict().items():  # small numbers hardly show a cap, large ones do
        if "softcap" in name and value is not None:
            raise Unfit(f"its scores are soft-capped, which is not computed here ({name} = {value})")
    tokens = 5
    seen = _run_watched(network, tokens)

    modules = {module: name for name, module in network.named_modules()}
    places = [_place(modules[attended.module]) for attended in seen.attended]
    paths = {path for path, _, _ in places}
    if not paths:
        raise Unfit("transformers does not let its attention be replaced")
    if len(paths) != 1:
        raise Unfit(f"its attention is in {sorted(paths)}, not in one list of layers")
    (path,) = paths
    n_layers = len(network.get_submodule(path))  # type: ignore[arg-type]
    if [layer for _, layer, _ in places] != list(range(n_layers)) or any(
        attended.module.layer_idx != layer for attended, (_, layer, _) in zip(seen.attended, places, strict=True)
    ):
        raise Unfit(f"not each of the {n_layers} layers in {path} attends once")
    shapes = {attended.shapes[1:] for attended in seen.attended}
    if len(shapes) != 1 or len({*next(iter(shapes))}) != 1:
        raise Unfit("its layers keep keys and values of different shapes")
    _, kv_heads, _, head_width = seen.attended[0].shapes[1]

    linears: list[list[str]] = [[] for _ in range(n_layers)]
    for module, rows in seen.linears.items():
        place = _PLACE.fullmatch(modules[module])
        if place and place["path"] == path and rows == tokens:
            linears[int(place["layer"])].append(place["name"])
    if not all(linears):
        raise Unfit("a layer has no linear layers that an adapter could be added to")
    windows = tuple(_window(attended, context_tokens) for attended in seen.attended)
    return Trace(path, tuple(map(tuple, linears)), windows, context_tokens, kv_heads, head_width)


@torch.no_grad()
def compare(model: Runnable, network: transformers.PreTrainedModel, attention: str) -> None:
    """Raises Unfit if `model` does not give the logits of `network` with its own attention; ends with `attention` set.

    Two sequences share a forward pass of ours, and one of them goes on in a second pass: what is not kept apart, or is
    lost between passes, shows.
    """
    chance = torch.Generator().manual_seed(0)
    device, vocabulary = network.device, model.config.vocabulary_size
    long, short = (torch.randint(vocabulary, (n,), generator=chance).to(device) for n in (11, 6))
    places = torch.arange(len(long), device=device)
    network.set_attn_implementation("eager")
    try:
        # Some models count places by adding up fp32 where they are not told, which deterministic CUDA refuses.
        expected = torch.cat(
            [
                network(input_ids=ids[None], position_ids=places[None, : len(ids)], use_cache=False).logits[0]
                for ids in (long, short)
            ]
        )
    finally:
        network.set_attn_implementation(attention)

    first, memory = 7, _Memory()
    memory.owners = torch.tensor([0] * first + [1] * len(short), device=device)
    token_ids, positions = torch.cat([long[:first], short]), torch.cat([places[:first], places[: len(short)]])
    both = model.hidden(token_ids, positions, memory.attend)
    memory.owners = torch.zeros(len(long) - first, dtype=torch.long, device=device)
    rest = model.hidden(long[first:], places[first:], memory.attend)
    actual = model.logits(torch.cat([both[:first], rest, both[first:]]))

    if actual.shape != expected.shape:
        raise Unfit(f"its logits have the shape {tuple(expected.shape[1:])}, its head makes {tuple(actual.shape[1:])}")
    share = float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())
    allowed = TOLERANCE.get(expected.dtype, COARSE_TOLERANCE)
    if not share <= allowed:  # written so that NaN does not pass
        raise Unfit(
            f"its logits differ from those of transformers by {share:.1e} of the largest, which may be {allowed:g}; "
            "it computes something between its layers, or after its head, that is not kept apart or not known here"
        )


class _Memory:
    """Plain attention over all tokens so far, by sequence: `attend` of a reader, not of an engine."""

    def __init__(self) -> None:
        self.owners = torch.empty(0)
        """The sequence of each token of the next pass."""
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def attend(self, layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, *, window: int | None = None) -> Tensor:
        """See `Attend`. Tokens of a sequence come in order, so their number is their place."""
        kept = self._kept.get(layer)
        new = (k_NKd, v_NKd, self.owners)
        keys, values, owners = new if kept is None else (torch.cat(pair) for pair in zip(kept, new, strict=True))
        self._kept[layer] = keys, values, owners
        groups = q_NHd.shape[1] // keys.shape[1]
        k_HLd, v_HLd = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (keys, values))
        scores_HNL = q_NHd.transpose(0, 1) @ k_HLd.transpose(1, 2) * q_NHd.shape[-1] ** -0.5
        indices_L = torch.arange(len(owners), device=owners.device)
        indices_N = indices_L[len(owners) - len(q_NHd) :, None]
        seen_NL = (owners == self.owners[:, None]) & (indices_L <= indices_N)
        if window is not None:
            behind_NL = seen_NL.flip(1).cumsum(1).flip(1)  # 1 for the token itself, 2 for the one before it, ...
            seen_NL &= behind_NL <= window
        mixed_HNd: Tensor = scores_HNL.masked_fill(~seen_NL, -torch.inf).softmax(-1) @ v_HLd
        return mixed_HNd.transpose(0, 1)


def _run_watched(network: transformers.PreTrainedModel, tokens: int) -> _Seen:
    seen = _Seen()

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **arguments: object
    ) -> tuple[Tensor, None]:
        seen.attended.append(_Attended(module, (query.shape, key.shape, value.shape), mask, arguments))
        return torch.zeros_like(query).transpose(1, 2), None

    def count(module: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        seen.linears[module] = inputs[0].shape[:-1].numel()

    before = network.config._attn_implementation
    transformers.AttentionInterface.register(TRACE, attention)
    transformers.AttentionMaskInterface.register(TRACE, lambda *_, mask_function, **__: _Mask(mask_function))
    hooks = [
        module.register_forward_hook(count) for module in network.modules() if isinstance(module, nn.Linear | Conv1D)
    ]
    positions = torch.arange(tokens, device=network.device)[None]
    try:
        network.set_attn_implementation(TRACE)
        network.base_model(input_ids=positions, position_ids=positions, use_cache=False)
    except Exception as error:  # any code of any architecture, met with what it may not expect
        raise Unfit(f"its attention cannot be replaced ({type(error).__name__}: {error})") from error
    finally:
        network.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    return seen


def _context_tokens(config: transformers.PretrainedConfig) -> int:
    context: int | None = getattr(config, "max_position_embeddings", None)
    if context is None:
        raise Unfit("its config.json names no max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if parameters.get("rope_type") == "longrope":
            # Beyond this, the rotations of a whole batch would depend on its longest sequence.
            context = min(context, parameters["original_max_position_embeddings"])
    return context


def _place(name: str) -> tuple[str, int, str]:
    place = _PLACE.fullmatch(name)
    if place is None:
        raise Unfit(f"its attention {name!r} is in no list of layers")
    return place["path"], int(place["layer"]), place["name"]


def _window(attended: _Attended, context_tokens: int) -> int | None:
    """How many tokens a token sees in this layer, as far as its mask, asked at some positions, tells."""
    for name, value in attended.arguments.items():
        if name not in HARMLESS and value is not None and value is not False:
            raise Unfit(f"its attention needs {name!r}")
    mask = attended.mask
    if not isinstance(mask, _Mask):
        raise Unfit("it adds something of its own to the scores of attention, or masks them by itself")
    keys_L = torch.arange(context_tokens)
    zero, last = torch.tensor(0), context_tokens - 1

    def seen(query: int) -> Tensor:
        return mask.visible(zero, zero, torch.tensor(query), keys_L).expand(context_tokens)

    window = int(seen(last).sum())
    for query in sorted({0, 1, last // 4, last // 2 + 1, last * 3 // 4, last - 1, last}):
        if not torch.equal(seen(query), (keys_L <= query) & (keys_L > query - window)):
            raise Unfit("its attention is neither causal over all tokens nor over a sliding window")
    return None if window >= context_tokens else window
