from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.engine.scripted import ScriptedEngine
from tunesmith.errors import EngineUnavailable
from tunesmith.rundir import ResolvedHyperparameters, RunDir, RunSpec
from tunesmith.runs.parity import ParityRow, check, compare, read_rows, score_rows

VOCABULARY = 64
TOKENS = [(3, 9, 27, 17), (5, 25), (1, 2, 3, 4, 5, 6)]


def _spec(base: Path) -> RunSpec:
    return RunSpec(
        run_id="run-1",
        job_id="ft-1",
        base_dir=str(base),
        parent_adapter_dir=None,
        context_tokens=2048,
        hyperparameters=ResolvedHyperparameters(4, 1, 0.1, 0.01),
        base_learning_rate=0.02,
        lora_rank=4,
        lora_alpha=8.0,
        seed=1,
        threads=1,
        checkpoint_interval_s=30.0,
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"tuned")
    return folder


async def _leave_rows(run_dir: RunDir, base: Path, adapter: Path | None, off_by: float = 0.0) -> None:
    """As a trainer would whose numbers are those of the engine, but for `off_by` at the very last token."""
    engine = ScriptedEngine(VOCABULARY)
    handle = await engine.load(base, adapter)
    unknown = [ParityRow(ids, len(ids) - 1, (0.0,)) for ids in TOKENS]
    scored = await score_rows(engine, handle, unknown)
    rows = [
        {"token_ids": ids, "completion_start": len(ids) - 1, "logprobs": list(s)}
        for ids, s in zip(TOKENS, scored, strict=True)
    ]
    rows[-1]["logprobs"] = [scored[-1][0] + off_by]
    run_dir.path.mkdir(exist_ok=True)
    run_dir.parity.write_text(json.dumps({"rows": rows}))


@pytest.mark.anyio
async def test_an_adapter_that_serves_as_it_trained_passes(base: Path, adapter: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    await _leave_rows(run_dir, base, adapter, off_by=0.9e-4)
    assert await check(ScriptedEngine(VOCABULARY), run_dir, _spec(base), adapter) is None


@pytest.mark.anyio
async def test_a_difference_beyond_the_tolerance_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    await _leave_rows(run_dir, base, adapter, off_by=1.2e-4)
    reason = await check(ScriptedEngine(VOCABULARY), run_dir, _spec(base), adapter)
    assert reason is not None
    assert "token 1 of row 3" in reason


@pytest.mark.anyio
async def test_an_adapter_without_effect_does_not_pass(base: Path, adapter: Path, tmp_path: Path) -> None:
    class Deaf(ScriptedEngine):
        """Serves the base whatever adapter is asked for."""

        async def load(self, base_dir: Path, adapter_dir: Path | None) -> str:
            return await super().load(base_dir, None)

    run_dir = RunDir(tmp_path / "run")
    await _leave_rows(run_dir, base, None)
    reason = await check(Deaf(VOCABULARY), run_dir, _spec(base), adapter)
    assert reason is not None
    assert "no effect" in reason


@pytest.mark.anyio
async def test_an_adapter_that_cannot_be_loaded_is_a_reason_and_not_an_error(base: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    await _leave_rows(run_dir, base, None)
    reason = await check(ScriptedEngine(VOCABULARY), run_dir, _spec(base), tmp_path / "nowhere")
    assert reason is not None
    assert "cannot load" in reason


@pytest.mark.anyio
async def test_an_engine_that_dies_is_no_verdict(base: Path, adapter: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    await _leave_rows(run_dir, base, adapter)
    engine = ScriptedEngine(VOCABULARY)
    await engine.close()
    with pytest.raises(EngineUnavailable):
        await check(engine, run_dir, _spec(base), adapter)


@pytest.mark.anyio
async def test_the_adapter_is_unloaded_again(base: Path, adapter: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    await _leave_rows(run_dir, base, adapter)
    engine = ScriptedEngine(VOCABULARY)
    await check(engine, run_dir, _spec(base), adapter)
    with pytest.raises(KeyError):
        await score_rows(engine, await _handle(base, adapter), read_rows(run_dir))


async def _handle(base: Path, adapter: Path) -> str:
    return await ScriptedEngine(VOCABULARY).load(base, adapter)


def test_not_a_number_does_not_pass() -> None:
    row = ParityRow((1, 2), 1, (-1.0,))
    assert compare([row], [(float("nan"),)], [(-2.0,)]) is not None
    assert compare([replace(row, logprobs=(float("nan"),))], [(-1.0,)], [(-2.0,)]) is not None
    assert compare([row], [(-1.0,)], [(-2.0,)]) is None


def test_a_file_without_rows_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "parity.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="no rows"):
        read_rows(RunDir(tmp_path))
