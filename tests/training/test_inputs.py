"""A base that cannot be trained ends the run with the reason, in words for whoever asked for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.training.rows import CLASSIFY, examples, make_run
from tunesmith.rundir import RunDir
from tunesmith.training.__main__ import main
from tunesmith.training.inputs import Encoded, Inputs, read_base, read_inputs

Change = Callable[[Path], object]


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def without_most_tokens(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300].copy()
    save_file(tensors, folder / "model.safetensors")
    with_config(vocab_size=300)(folder)


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
        (without_most_tokens, "have rows for 300 tokens: they do not belong together"),
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


def test_a_file_of_many_runs_is_encoded_once_while_one_has_it(tiny_base: Path, tmp_path: Path) -> None:
    rows = [examples(4), examples(4), examples(5)]
    runs = [
        make_run(tmp_path / f"run-{index}", tiny_base, train=each, valid=examples(5), hyperparameters=CLASSIFY)
        for index, each in enumerate(rows)
    ]
    encoded, base = Encoded(), read_base(tiny_base)

    def read(run_dir: RunDir, **changes: int) -> Inputs:
        spec = replace(run_dir.read_spec(), **changes)
        return read_inputs(run_dir, spec, lambda: None, lambda *_: base, encoded)

    one, same, other, shorter = read(runs[0]), read(runs[1]), read(runs[2]), read(runs[0], context_tokens=100)

    assert one.rows is same.rows
    assert one.validation is other.rows
    assert [len(each.rows) for each in (one, other)] == [4, 5]
    assert shorter.rows is not one.rows
    known = len(encoded)
    del one, same
    assert len(encoded) == known - 1
