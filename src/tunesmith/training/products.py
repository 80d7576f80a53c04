"""What a run leaves behind besides its results: what was trained, and the numbers that serving it must reproduce."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tunesmith.rundir import RunDir, RunSpec, sync_folder, write_json
from tunesmith.training.batches import Row
from tunesmith.training.evaluate import Evaluator
from tunesmith.training.factors import TrainableLora
from tunesmith.training.whole import TrainableWeights

PARITY_ROWS, PARITY_TOKENS = 200, 20_000
"""At most this many rows and, but for the first row, tokens are compared: enough to see any fault, in seconds."""


def save_trained(trained: TrainableLora | TrainableWeights, run_dir: RunDir, spec: RunSpec) -> None:
    """The folder of the adapter, or of all weights, renamed into place whole."""
    beside = run_dir.path / "adapter.tmp"
    for leftover in (beside, run_dir.adapter):  # of an attempt that was killed after its last step
        shutil.rmtree(leftover, ignore_errors=True)
    trained.save(beside, Path(spec.base_dir))
    beside.replace(run_dir.adapter)
    sync_folder(run_dir.path)


def write_parity(run_dir: RunDir, evaluator: Evaluator, rows: Sequence[Row]) -> None:
    """Writes `parity.json` for the first of `rows`, within `PARITY_ROWS` and `PARITY_TOKENS`."""
    chosen: list[Row] = []
    n_tokens = 0
    for row in rows[:PARITY_ROWS]:
        n_tokens += len(row.token_ids)
        if chosen and n_tokens > PARITY_TOKENS:
            break
        chosen.append(row)
    entries = [
        {"token_ids": list(row.token_ids), "completion_start": row.completion_start, "logprobs": logprobs}
        for row, logprobs in zip(chosen, evaluator.completion_logprobs(chosen), strict=True)
    ]
    write_json(run_dir.parity, {"rows": entries})
