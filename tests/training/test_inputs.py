"""A base that cannot be trained ends the run with the reason, in words for whoever asked for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.training.rows import CLASSIFY, examples, make_run
from tunesmith.training.__main__ import main

Change = Callable[[Path], object]


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def with_config(**fields: object) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_a_weight, "the weights of odd lack model.layers.1.mlp.up_proj.weight"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors in odd; pickled weights are never"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "header"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "the tokenizer's decoder is none"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json in odd"),
        (with_config(model_type="no-such-model"), "transformers cannot load this model"),
    ],
)
def test_the_reason_is_in_the_outcome(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, change: Change, reason: str
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "odd"))
    change(base)
    run_dir = make_run(tmp_path / "run", base, train=examples(4), hyperparameters=CLASSIFY)
    monkeypatch.setattr("tunesmith.training.__main__.die_with_parent", lambda: None)
    monkeypatch.setattr("tunesmith.training.__main__.stop_on_sigterm", lambda: lambda: False)
    assert main([str(run_dir.path)]) == 0
    outcome = run_dir.read_outcome()
    assert outcome is not None and outcome.error is not None
    assert outcome.status == "failed"
    assert outcome.error.startswith("The base model cannot be trained here: ")
    assert reason in outcome.error
    assert str(tmp_path) not in outcome.error
