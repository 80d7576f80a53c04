"""Which runs one trainer trains together: small ones of one base. Knows what is asked of them, no jobs and no trainers.

Steps of few tokens cost a trainer little more together than one of them alone, and each run gets the same bytes either
way. Where a single run fills the machine, company would only make it wait: docs/design/decisions/together.md.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.rundir import ResolvedHyperparameters

LARGEST_BATCH = 4
"""Examples of a step. With more, or with long ones, a step gains nothing from others beside it."""
LARGEST_BASE_BYTES = 256_000_000
"""Of weights on disk: the trainer shares passes up to 64 M weights."""


def company(base_dir: Path, hyperparameters: ResolvedHyperparameters, threads: int) -> str | None:
    """Runs for which this is the same may share a trainer; None for one that goes alone."""
    if hyperparameters.method == "full" or hyperparameters.batch_size > LARGEST_BATCH:
        return None
    if sum(path.stat().st_size for path in base_dir.glob("*.safetensors")) > LARGEST_BASE_BYTES:
        return None
    return f"{base_dir} on {threads} threads"
