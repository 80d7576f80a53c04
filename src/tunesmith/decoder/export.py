"""`python -m tunesmith.decoder.export BASE ADAPTER FOLDER`: a base and an adapter become one checkpoint.

A process of its own, because the platform does without torch. Exits 1 with a sentence on standard error for a base
whose adapters cannot be merged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tunesmith.adapters import checkpoint
from tunesmith.decoder import loading
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.merging import merged
from tunesmith.decoder.saving import save_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: three folders, the last of them to be written."""
    base_dir, adapter_dir, folder = map(Path, sys.argv[1:] if arguments is None else arguments)
    model = loading.load(base_dir)
    if not isinstance(model, Llama):
        sys.stderr.write("adapters are merged for models of the Llama family, and the base is of another\n")
        return 1
    lora, _ = checkpoint.load(adapter_dir, model.config.layout)
    with torch.inference_mode():
        save_checkpoint(merged(model, lora), folder, base_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
