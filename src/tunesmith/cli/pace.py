"""How fast this machine trains a base: from the run folders that are left, else from its processor. Asks no server."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.compiled import processor
from tunesmith.core.checkpoint_folder import read_tensors
from tunesmith.rundir import RunDir

RECENT_RUNS = 20
FLOPS_PER_WEIGHT = 4
"""Of a trained token: a product and a sum forward, the same backward; frozen weights have no gradient."""
TRAINING_SHARE = 0.3
"""Of the rate of plain matrix products that a fine-tune reaches, its start and its small steps included."""
TILES_GAIN, VECTORS_GAIN = 6, 4
"""How much faster training multiplies by matrix units or vectors for bfloat16, which NumPy does not use."""
_SIDE, _TRIES = 512, 3


@dataclass(frozen=True, slots=True)
class Speed:
    """What to expect of fine-tuning a base here."""

    tokens_per_s: float
    measured: bool
    """Whether fine-tunes of this base have shown it; otherwise the speed of the processor speaks for it."""

    def because(self, base: str) -> str:
        """Where it is from, as the second half of a sentence about the time."""
        rate = f"{self.tokens_per_s:,.0f} tokens a second"
        if self.measured:
            return f"earlier fine-tunes of {base} on this machine did {rate}"
        return f"a guess of {rate} from how fast this machine multiplies matrices, until a fine-tune of {base} has run"


def speed(home: Path, base_dir: Path) -> Speed:
    """What runs that started from this checkpoint folder did, or else a guess, which may be off by a factor of 3."""
    done = tokens_per_s(home, base_dir)
    return Speed(_guess(base_dir), measured=False) if done is None else Speed(done, measured=True)


def tokens_per_s(home: Path, base_dir: Path) -> float | None:
    """Trained tokens a second, the median of the latest runs that started from this checkpoint folder.

    A run counts from its start to its end, with the loading of the model and the saving of adapters in it. None where
    no such run has succeeded here.
    """
    newest = sorted((home / "runs").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    rates = list(_rates(newest, base_dir))
    return statistics.median(rates) if rates else None


def _guess(base_dir: Path) -> float:
    tensors = [tensor for path in base_dir.glob("*.safetensors") for tensor in read_tensors(path).values()]
    weights = sum(tensor.elements for tensor in tensors if len(tensor.shape) > 1)
    flags = processor()
    gain = TILES_GAIN if "amx_bf16" in flags else VECTORS_GAIN if "avx512_bf16" in flags else 1
    return TRAINING_SHARE * gain * _products_per_s() / (FLOPS_PER_WEIGHT * max(1, weights))


def _products_per_s() -> float:
    """Floating-point operations a second of matrix products in float32, at best: other work only ever slows them."""
    matrix, best_s = np.ones((_SIDE, _SIDE), dtype=np.float32), math.inf
    for _ in range(_TRIES):
        began_s = time.perf_counter()
        matrix @ matrix
        best_s = min(best_s, time.perf_counter() - began_s)
    return float(2 * _SIDE**3 / best_s)


def _rates(run_dirs: list[Path], base_dir: Path) -> Iterator[float]:
    found = 0
    for path in run_dirs:
        run_dir = RunDir(path)
        try:
            spec, outcome = json.loads(run_dir.spec.read_text()), run_dir.read_outcome()
            took_s = run_dir.outcome.stat().st_mtime - run_dir.spec.stat().st_mtime
        except (OSError, ValueError, TypeError):  # not a run, one still under way, or one of another version
            continue
        if outcome is None or outcome.status != "succeeded" or not outcome.trained_tokens or took_s <= 0:
            continue
        if isinstance(spec, dict) and spec.get("base_dir") == str(base_dir):
            yield outcome.trained_tokens / took_s
            found += 1
            if found == RECENT_RUNS:
                return
