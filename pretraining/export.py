"""Puts a trained model into the box: int8 rows with scales, as package data.

python -m pretraining.export build/ada src/tunesmith/weights/ada --tokenizer build/tokenizer.json
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from tunesmith.core import box


def export(model: Path, packed: Path, tokenizer: Path) -> None:
    """Packs a model, whose folder gets the tokenizer too."""
    if tokenizer.resolve() != (model / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, model / "tokenizer.json")
    box.pack(model, packed)


def main() -> None:
    """Command line: a model folder and its tokenizer in, a packed folder out."""
    parser = argparse.ArgumentParser(description="Pack a trained model into the box.")
    parser.add_argument("model", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    arguments = parser.parse_args()
    export(arguments.model, arguments.packed, arguments.tokenizer)
    print(f"{arguments.packed / box.PACKED}: {(arguments.packed / box.PACKED).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
