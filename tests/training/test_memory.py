"""Memory that runs out: the same batch in smaller parts, the same result within rounding, as often as it takes."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.rows import examples, make_run
from tunesmith.rundir import ResolvedHyperparameters, RunDir
from tunesmith.training import evaluate, gradients
from tunesmith.training.loop import train
from tunesmith.training.memory import LEAST_TOKENS, Room, is_shortage
from tunesmith.training.packing import MicroBatch, micro_batches

ASKED = ResolvedHyperparameters(n_epochs=2, batch_size=8, learning_rate_multiplier=0.1, prompt_loss_weight=0.01)


def _run(folder: Path, base: Path) -> RunDir:
    return make_run(folder, base, train=examples(20), valid=examples(4), hyperparameters=ASKED)


def test_the_same_batch_in_smaller_parts_gives_the_same_within_rounding(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy, tight = (_run(tmp_path / name, tiny_base) for name in ("roomy", "tight"))
    train(roomy)
    seen: list[int] = []

    def bounded(*arguments: Any, **options: Any) -> list[MicroBatch]:
        batches = micro_batches(*arguments, **options)
        seen.extend(len(batch.token_ids_N) for batch in batches)
        if max(len(batch.token_ids_N) for batch in batches) > 40:
            raise torch.OutOfMemoryError("no room")
        return batches

    for module in (evaluate, gradients):
        monkeypatch.setattr(module, "micro_batches", bounded)
    train(tight)

    assert max(seen) > 40
    assert max(seen[-5:]) <= 40
    assert Room(tight).tokens == 32
    found, expected = (load_file(run.adapter / "adapter_model.safetensors") for run in (tight, roomy))
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-4, name
    columns = [run.results.read_text().splitlines() for run in (tight, roomy)]
    assert [line.split(",")[:3] for line in columns[0]] == [line.split(",")[:3] for line in columns[1]]


def test_a_run_remembers_and_stops_halving_at_the_least(tmp_path: Path) -> None:
    tried: list[int] = []

    def work(tokens: int) -> None:
        tried.append(tokens)
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        Room(RunDir(tmp_path), 128).fit(work)
    with pytest.raises(MemoryError):
        Room(RunDir(tmp_path), 128).fit(work)

    assert tried == [128, 64, LEAST_TOKENS, LEAST_TOKENS]


def test_other_errors_are_no_shortage(tmp_path: Path) -> None:
    def work(tokens: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Room(RunDir(tmp_path)).fit(work)
    assert RunDir(tmp_path).count_shortages() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to a limit of address space")
def test_what_the_processors_allocator_says_is_known() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import torch; torch.empty(1 << 42, dtype=torch.uint8)"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    assert is_shortage(RuntimeError(said.splitlines()[-1]))
