"""What a run must know to go on as if nothing had happened: safetensors and JSON, whole or not there at all.

    step-<n>/state.safetensors   factors and optimizer moments
    step-<n>/position.json       Position
    step-<n>/manifest.json       sha256 of both, written last

Written to a folder beside and renamed into place. The newest two are kept, so that one damaged on disk costs a little
work and not the run. There is no generator state: chance is keyed by what it is for (`batches.generator`), so the step
number says all of it; the same goes for the learning rate.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import torch as safetensors_torch
from torch import Tensor

from tunesmith.adapters.writing import write_tensors
from tunesmith.rundir import sync_folder, write_json
from tunesmith.training.epochs import Standing

logger = logging.getLogger(__name__)

STATE, POSITION, MANIFEST = "state.safetensors", "position.json", "manifest.json"
_KEPT = 2


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run has come, and how long its files were then."""

    step: int = 0
    """Steps taken; also the position in the schedule of batches and of the learning rate."""
    elapsed_tokens: int = 0
    results_bytes: int = 0
    progress_bytes: int = 0
    progress_seq: int = 0
    standing: Standing = field(default_factory=Standing)


def save(folder: Path, position: Position, state: dict[str, Tensor]) -> None:
    """Durable before it returns; then all but the newest two are removed. Raises OSError."""
    final = folder / f"step-{position.step}"
    beside = folder / f"{final.name}.tmp"
    # Attempts that were killed or met a full disk, and a damaged one that the run went back behind.
    for leftover in (*folder.glob("step-*.tmp"), final):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    write_tensors(beside / STATE, state)
    write_json(beside / POSITION, asdict(position))
    write_json(beside / MANIFEST, _digests(beside))
    beside.replace(final)
    sync_folder(folder)
    for old in _newest_first(folder)[_KEPT:]:
        shutil.rmtree(old)


def latest(folder: Path, *, results: Path, progress: Path) -> tuple[Position, dict[str, Tensor]] | None:
    """The newest checkpoint that is whole; None if there is none.

    A checkpoint counts on the files that were growing beside it: one is passed over if `results` or `progress` has lost
    bytes that it had then.
    """
    for candidate in _newest_first(folder):
        try:
            position, state = _read(candidate)
            _check_length(results, position.results_bytes)
            _check_length(progress, position.progress_bytes)
            return position, state
        except (OSError, ValueError) as error:
            logger.warning("checkpoint %s is passed over: %s", candidate, error)
    return None


def _read(folder: Path) -> tuple[Position, dict[str, Tensor]]:
    if json.loads((folder / MANIFEST).read_text()) != _digests(folder):
        raise ValueError("its files do not match its manifest")
    raw = json.loads((folder / POSITION).read_text())
    position = Position(**raw | {"standing": Standing(**raw["standing"])})
    return position, safetensors_torch.load((folder / STATE).read_bytes())


def _check_length(path: Path, size_bytes: int) -> None:
    actual_bytes = path.stat().st_size if path.exists() else 0
    if actual_bytes < size_bytes:
        raise ValueError(f"{path.name} has {actual_bytes} bytes and had {size_bytes}")


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.suffix != ".tmp"]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))


def _digests(folder: Path) -> dict[str, str]:
    digests: dict[str, str] = {}
    for name in (STATE, POSITION):
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
