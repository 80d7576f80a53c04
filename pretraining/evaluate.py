"""Bits per byte of a model on held-out text.

    python -m pretraining.evaluate build/ada --corpus CORPUS/valid.txt.xz

Documents are read from their start in windows of the model's context, each window seeing only itself; the first token
of a window is predicted from `<|endoftext|>`. Bits per byte does not depend on the tokenizer, so models with other
vocabularies compare.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer

from pretraining.corpus import read_documents
from pretraining.kernels import CausalRows
from tunesmith.decoder import loading
from tunesmith.decoder.base import Decoder


def bits_per_byte(model: Decoder, tokenizer: Tokenizer, documents: list[str]) -> float:
    """Total negative log2-likelihood of the documents over their UTF-8 size."""
    nats = 0.0
    for document in documents:
        ids = tokenizer.encode(document).ids
        for start in range(0, len(ids), model.config.context_tokens):
            window = torch.tensor([0, *ids[start : start + model.config.context_tokens]], device=model.head_VD.device)
            nats += _negative_log_likelihood(model, window)
    return nats / math.log(2) / sum(len(document.encode()) for document in documents)


@torch.inference_mode()
def _negative_log_likelihood(model: Decoder, window: torch.Tensor) -> float:
    hidden_ND = model.hidden(window[:-1], torch.arange(len(window) - 1, device=window.device), CausalRows(1))
    losses = [
        torch.nn.functional.cross_entropy(model.logits(h).float(), target, reduction="sum")
        for h, target in zip(hidden_ND.split(512), window[1:].split(512), strict=True)
    ]
    return float(sum(losses))


def main() -> None:
    """Command line: checkpoint folders in, a line each out."""
    parser = argparse.ArgumentParser(description="Bits per byte of models on held-out text.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=None, help="only the first so many")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    documents = read_documents(arguments.corpus)[: arguments.documents]
    for folder in arguments.models:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        model = loading.load(folder, device=arguments.device)
        print(f"{folder}: {bits_per_byte(model, tokenizer, documents):.4f} bits per byte")


if __name__ == "__main__":
    main()
