"""Trains the whole family in the time that there is: each model grown from the one before it, taken while it was hot.

    python -m pretraining.family --data build/train.bin --tokenizer build/tokenizer.json --valid CORPUS/valid.txt.xz \
        --minutes 60 --device cuda --compile --out build/family

Started again, it goes on: models that are there stay. Each ends in a folder of its own, and packed for the box in
`OUT/packed`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from pretraining.corpus import read_documents
from pretraining.evaluate import bits_per_byte
from pretraining.export import export
from pretraining.grow import grow_folder, tokens_read
from pretraining.recipe import Recipe
from pretraining.shapes import SHAPES
from pretraining.train import NEVER, Run, train
from tunesmith.decoder import loading

SHARES = {"ada": 0.10, "babbage": 0.15, "curie": 0.25, "davinci": 0.50}
"""Of the time, by default. A larger model needs more for each token, and more of them."""

FOR_A_GPU: dict[str, float] = {
    "batch_tokens": 131_072,
    "micro_batch_tokens": 65_536,
    "muon_learning_rate": 0.02,
    "adam_learning_rate": 0.006,
    "row_tokens": 1_024,
    "long_share": 0.1,
    "decay_share": 0.5,
}
CHECKPOINT_EVERY_STEPS = 500
"""On a GPU that is a minute or less, and half a gigabyte to be written."""


@dataclass(frozen=True, slots=True)
class Family:
    """What all its models have in common."""

    data: Path
    tokenizer: Path
    out: Path
    recipe: Recipe
    """Its tokens do not count."""
    device: str
    compile: bool
    valid: list[str]
    """Documents that are judged by."""


def train_family(family: Family, shares: dict[str, float], minutes: float) -> None:
    """The models named, smallest first; each takes its share of the time that is left to it and those behind it."""
    ends = time.monotonic() + 60 * minutes
    smaller: Path | None = None
    for index, name in enumerate(shares):
        out, packed = family.out / name, family.out / "packed" / name
        if not packed.exists():  # which is made last
            left_s = max(0.0, ends - time.monotonic())
            behind = [*shares.values()][index:]
            if smaller is not None and not (out / "checkpoint.safetensors").exists():
                grow_folder(smaller, name, out, batch_tokens=family.recipe.batch_tokens)
            run = Run(
                family.device,
                family.compile,
                checkpoint_every_steps=CHECKPOINT_EVERY_STEPS,
                minutes=left_s / 60 * behind[0] / sum(behind),
                keep_hot=len(behind) > 1,
            )
            train(name, family.data, out, family.recipe, run)
            export(out, packed, family.tokenizer)
        print(json.dumps({"name": name, **judge(family, out)}), flush=True)
        smaller = out / "hot" if (out / "hot").exists() else out  # a run of few steps has none


def judge(family: Family, folder: Path) -> dict[str, float]:
    """What is to be known of a model that was trained."""
    found: dict[str, float] = {"tokens": tokens_read(folder, family.recipe.batch_tokens)}
    if family.valid:
        model = loading.load(folder, device=family.device)
        tokenizer = Tokenizer.from_file(str(family.tokenizer))
        found["bits_per_byte"] = round(bits_per_byte(model, tokenizer, family.valid), 4)
    return found


def main() -> None:
    """Command line: tokens, a tokenizer and minutes in, folders of models out."""
    parser = argparse.ArgumentParser(description="Train the whole family in the time that there is.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=list(SHARES), help="smallest first")
    parser.add_argument("--shares", nargs="+", type=float, help="of the time, one for each model")
    parser.add_argument("--valid", type=Path, help="held-out text")
    parser.add_argument("--documents", type=int, default=60, help="of that, the first so many")
    Recipe.add_options(parser, **FOR_A_GPU)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shares = arguments.shares or [SHARES[name] for name in arguments.models]
    recipe = Recipe.of(arguments, tokens=NEVER)
    valid = read_documents(arguments.valid)[: arguments.documents] if arguments.valid else []
    paths = (arguments.data, arguments.tokenizer, arguments.out)
    family = Family(*paths, recipe, arguments.device, arguments.compile, valid)
    train_family(family, dict(zip(arguments.models, shares, strict=True)), arguments.minutes)


if __name__ == "__main__":
    main()
