"""Makes a larger model that computes what a smaller one does, and writes it where `pretraining.train` goes on with it.

    python -m pretraining.grow build/ada babbage --out build/babbage

Where compute is short, reading on with a grown model beats reading from the start again. Everything new is silent at
first: new channels of the residual stream hold zeros, new heads, feed-forward units and layers write with zero weights.
What reads from them is random or copied, so gradients flow at once, and Muon's updates give the new directions the same
size as the old ones. Source of the idea: Chen et al. 2016, "Net2Net"; Wu et al. 2024, "LLaMA Pro" (silent new layers).

Legend: D = width, F = feed-forward width, d = head width.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from pretraining.optimizer import Optimizer
from pretraining.shapes import SHAPES, random_llama
from pretraining.train import Progress, save
from tunesmith.decoder.llama import Layer, Llama, LlamaConfig, load


def grow(small: Llama, shape: LlamaConfig, generator: torch.Generator) -> Llama:
    """A model of `shape` with the function of `small`. Raises ValueError if the shape is not larger in every way."""
    old = small.config
    smaller = [f for f in ("width", "layers", "heads", "kv_heads", "feed_forward_width") if _less(shape, old, f)]
    if smaller or shape.head_width != old.head_width:
        raise ValueError(f"a model grows in every measure and keeps its head width; smaller: {smaller or 'head_width'}")
    grown = random_llama(shape, generator)
    # The norm divides by the mean square over all channels, of which the new ones are zero.
    gain = (old.width / shape.width) ** 0.5
    source = _layer_sources(old.layers, shape.layers)
    for layer, (index, is_copy) in zip(grown.layers, source, strict=True):
        _fill(layer, small.layers[index], old, shape, gain)
        if is_copy:
            layer.o.zero_()
            layer.down.zero_()
    grown.embedding_VD[:, : old.width] = small.embedding_VD
    grown.embedding_VD[:, old.width :] = 0.0
    grown.norm_D[: old.width] = small.norm_D * gain
    return replace(grown, head_VD=grown.embedding_VD)


def _less(shape: LlamaConfig, old: LlamaConfig, field: str) -> bool:
    return bool(getattr(shape, field) < getattr(old, field))


def _layer_sources(old: int, new: int) -> list[tuple[int, bool]]:
    """(layer of the small model, whether it is a silent copy) of each new layer; copies stand evenly among the rest."""
    copies = [max(0, round((i + 1) * old / (new - old + 1)) - 1) for i in range(new - old)]
    return [entry for index in range(old) for entry in [(index, False)] + [(index, True)] * copies.count(index)]


def _fill(layer: Layer, small: Layer, old: LlamaConfig, shape: LlamaConfig, gain: float) -> None:
    """Writes the weights of `small` into a fresh random layer of the larger shape, whose `o` and `down` are zero."""
    heads = _head_places(old, shape)
    kv_heads = [group * old.kv_heads // shape.kv_heads for group in range(shape.kv_heads)]
    small_q, small_k, small_v = small.qkv.split_with_sizes([old.query_width, old.key_width, old.key_width])
    q, k, v = layer.qkv.split_with_sizes([shape.query_width, shape.key_width, shape.key_width])
    d = old.head_width
    for new_head, old_head in heads.items():
        q[_rows(new_head, d), : old.width] = small_q[_rows(old_head, d)]
        layer.o[: old.width, _rows(new_head, d)] = small.o[:, _rows(old_head, d)]
    for new_head, old_head in enumerate(kv_heads):
        k[_rows(new_head, d), : old.width] = small_k[_rows(old_head, d)]
        v[_rows(new_head, d), : old.width] = small_v[_rows(old_head, d)]
    for part, small_part in zip(layer.gate_up.chunk(2), small.gate_up.chunk(2), strict=True):
        part[: old.feed_forward_width, : old.width] = small_part
    layer.down[: old.width, : old.feed_forward_width] = small.down
    layer.attention_norm_D[: old.width] = small.attention_norm_D * gain
    layer.feed_norm_D[: old.width] = small.feed_norm_D * gain


def _head_places(old: LlamaConfig, shape: LlamaConfig) -> dict[int, int]:
    """New query head -> the old one that it continues. A head moves only to a key head that copies its own.

    Raises ValueError if the key heads do not copy evenly or offer too few places.
    """
    copies = shape.kv_heads // old.kv_heads
    group, old_group = shape.heads // shape.kv_heads, old.heads // old.kv_heads
    if shape.kv_heads % old.kv_heads or copies * group < old_group:
        raise ValueError(f"{old.heads} heads over {old.kv_heads} have no place in {shape.heads} over {shape.kv_heads}")
    return {
        kv_head * copies * group + place: kv_head * old_group + place
        for kv_head in range(old.kv_heads)
        for place in range(old_group)
    }


def _rows(head: int, width: int) -> slice:
    return slice(head * width, (head + 1) * width)


def tokens_read(folder: Path, batch_tokens: int) -> int:
    """Tokens that the model in `folder` and those it was grown from have read."""
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as checkpoint:
        progress = Progress(**{key: int(value) for key, value in checkpoint.metadata().items()})
    return progress.tokens_before + progress.step * batch_tokens


def grow_folder(small: Path, name: str, out: Path, *, batch_tokens: int, seed: int = 0) -> int:
    """A folder to go on with, of a larger shape, from that of a trained model; returns the tokens that has read.

    `batch_tokens` are those of the run that made the small one.
    """
    with torch.no_grad():
        grown = grow(load(small), SHAPES[name], torch.Generator().manual_seed(seed))
    before = tokens_read(small, batch_tokens)
    out.mkdir(parents=True, exist_ok=True)
    save(out, Optimizer.over(list(grown.parameters())), Progress(step=0, tokens_before=before))
    return before


def main() -> None:
    """Command line: a trained folder and a larger shape in, a folder to go on with out."""
    parser = argparse.ArgumentParser(description="Make a larger model that computes what a smaller one does.")
    parser.add_argument("small", type=Path, help="a folder of pretraining.train")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-tokens", type=int, default=8_192, help="of the run that made the small model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = {"batch_tokens": arguments.batch_tokens, "seed": arguments.seed}
    before = grow_folder(arguments.small, arguments.shape, arguments.out, **chosen)
    print(json.dumps({"out": str(arguments.out), "shape": arguments.shape, "tokens_before": before}))


if __name__ == "__main__":
    main()
