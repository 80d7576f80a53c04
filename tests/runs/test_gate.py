"""The gate against mutations: each makes the served model another than the trained one, and each is caught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.rows import LABELS, examples, make_run
from tunesmith.engine.embedded import EmbeddedEngine
from tunesmith.rundir import ResolvedHyperparameters, RunDir
from tunesmith.runs.parity import ParityRow, check_run, compare
from tunesmith.training.loop import train

ASKED = ResolvedHyperparameters(
    n_epochs=2, batch_size=4, learning_rate_multiplier=0.2, prompt_loss_weight=0.01, epoch_checkpoints=1
)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, RunDir]:
    """Two jobs on one base, each with its last epoch as a model of its own."""
    folder = tmp_path_factory.mktemp("gate")
    swapped = [e | {"completion": LABELS[i % 2 == 0]} for i, e in enumerate(examples(9))]
    made = tuple(
        make_run(folder / name, tiny_base, train=rows, valid=examples(4), hyperparameters=ASKED)
        for name, rows in (("one", examples(9)), ("other", swapped))
    )
    for run_dir in made:
        outcome = train(run_dir)
        assert outcome is not None
        assert outcome.status == "succeeded"
    return made[0], made[1]


@pytest.fixture
def run_dir(runs: tuple[RunDir, RunDir], tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(runs[0].path, tmp_path / "run"))


async def _verdict(run_dir: RunDir) -> str | None:
    engine = EmbeddedEngine(threads=1)
    try:
        return await check_run(engine, run_dir, run_dir.read_spec())
    finally:
        await engine.close()


def _edit_tensors(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path, {"format": "pt"})


def _not_applied(run_dir: RunDir, other: RunDir) -> None:
    _edit_tensors(run_dir.adapter / WEIGHTS, lambda name, tensor: tensor * 0)


def _of_another_job(run_dir: RunDir, other: RunDir) -> None:
    shutil.copy(other.adapter / WEIGHTS, run_dir.adapter / WEIGHTS)


def _alpha_scaled(run_dir: RunDir, other: RunDir) -> None:
    config = json.loads((run_dir.adapter / CONFIG).read_text())
    (run_dir.adapter / CONFIG).write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))


def _embedding_lost(run_dir: RunDir, other: RunDir) -> None:
    _edit_tensors(run_dir.adapter / WEIGHTS, lambda name, tensor: None if "embedding" in name else tensor)


def _embedding_dropped(run_dir: RunDir, other: RunDir) -> None:
    """Its configuration does not tell that it was there."""
    _embedding_lost(run_dir, other)
    config = json.loads((run_dir.adapter / CONFIG).read_text())
    config["target_modules"].remove("embed_tokens")
    (run_dir.adapter / CONFIG).write_text(json.dumps(config))


def _head_dropped(run_dir: RunDir, other: RunDir) -> None:
    """The base is served with a head of its own that its training did not have."""
    spec = run_dir.read_spec()
    base = shutil.copytree(spec.base_dir, run_dir.path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    state = load_file(base / "model.safetensors")
    state["lm_head.weight"] = torch.zeros_like(state["model.embed_tokens.weight"])
    save_file(state, base / "model.safetensors", {"format": "pt"})
    run_dir.write_spec(replace(spec, base_dir=str(base)))


def _wrong_template(run_dir: RunDir, other: RunDir) -> None:
    """What users send has another separator than what was trained on."""
    text = run_dir.validation_file.read_text()
    run_dir.validation_file.write_text(text.replace(" ->", "\\n\\n###\\n\\n"))


def _epoch_of_another_job(run_dir: RunDir, other: RunDir) -> None:
    (_, folder), (_, foreign) = run_dir.snapshots()[0], other.snapshots()[0]
    shutil.copy(foreign.adapter / WEIGHTS, folder.adapter / WEIGHTS)


@pytest.mark.anyio
async def test_a_run_as_it_was_trained_passes(run_dir: RunDir) -> None:
    assert await _verdict(run_dir) is None


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("mutation", "words"),
    [
        (_not_applied, "does not give the numbers of its training"),
        (_of_another_job, "does not give the numbers of its training"),
        (_alpha_scaled, "does not give the numbers of its training"),
        (_embedding_lost, "cannot load what was trained: adapter/adapter_model.safetensors has no"),
        (_embedding_dropped, "does not give the numbers of its training"),
        (_head_dropped, "does not give the numbers of its training"),
        (_epoch_of_another_job, "does not give the numbers of its training"),
        (_wrong_template, "other tokens in a request than in training"),
    ],
)
async def test_a_mutation_is_caught(
    runs: tuple[RunDir, RunDir], run_dir: RunDir, mutation: Callable[[RunDir, RunDir], None], words: str
) -> None:
    mutation(run_dir, runs[1])
    assert words in (await _verdict(run_dir) or "it passed")


def test_rounding_is_no_effect_unless_there_is_nothing_to_add() -> None:
    row = ParityRow((1, 2), 1, (-1.0,))
    assert "no effect" in (compare([row], [(-1.0,)], [(-1.000001,)]) or "")
    assert compare([row], [(-1.0,)], [(-1.0001,)]) is None
    sure = ParityRow((1, 2), 1, (-0.000_002,))
    assert compare([sure], [(-0.000_002,)], [(-0.000_003,)]) is None
    assert compare([sure], [(-0.000_002,)], [(-0.000_002,)]) is not None
