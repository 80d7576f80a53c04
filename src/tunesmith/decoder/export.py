"""`python -m tunesmith.decoder.export BASE OUT`: a base, its adapter added, as one checkpoint folder or GGUF file.

A process of its own, because the platform does without torch. Says on standard output what a GGUF file was held
against. Exits 1 with a sentence on standard error for a model that cannot be written so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tunesmith.adapters import checkpoint
from tunesmith.decoder import loading
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.merging import merged
from tunesmith.decoder.saving import save_checkpoint
from tunesmith.tokenizer import Tokenizer

PRECISIONS = ("f32", "bf16", "q8_0")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code."""
    asked = _arguments(arguments)
    try:
        model = _model(asked.base, asked.adapter)
        if asked.gguf is None:
            save_checkpoint(model, asked.out, asked.base)
        else:
            sys.stdout.write(f"{_to_gguf(model, asked)}\n")
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tunesmith.decoder.export", description=__doc__)
    parser.add_argument("base", type=Path, help="folder of the base, or of a model that is all weights")
    parser.add_argument("out", type=Path, help="folder or file to write")
    parser.add_argument("--adapter", type=Path, help="folder of the adapter")
    parser.add_argument("--gguf", choices=PRECISIONS, help="write a GGUF file of this precision")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: that of the base)")
    parser.add_argument("--name", default="", help="what a GGUF file calls the model")
    return parser.parse_args(arguments)


def _model(base_dir: Path, adapter_dir: Path | None) -> Llama:
    model = loading.load(base_dir)
    if not isinstance(model, Llama):
        raise ValueError("only models of the Llama family are written so, and the base is of another")
    if adapter_dir is None:
        return model
    lora, _ = checkpoint.load(adapter_dir, model.config.layout)
    with torch.inference_mode():
        return merged(model, lora)


def _to_gguf(model: Llama, asked: argparse.Namespace) -> str:
    try:  # here: `gguf` is optional
        from tunesmith.decoder import gguf_check, gguf_file, gguf_words
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ValueError("the package gguf is not installed here; to add it: pip install 'tunesmith[gguf]'") from error
    folder = asked.tokenizer or asked.base
    precision = gguf_file.Precision(asked.gguf)
    words = gguf_words.words_of(folder, model.config.vocabulary_size)
    gguf_file.write(model, words, asked.out, precision, name=asked.name)
    try:
        return str(gguf_check.check(asked.out, model, Tokenizer.from_folder(folder), precision))
    except gguf_check.NotTheSame as error:
        raise ValueError(f"the file that was written is not the model: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
