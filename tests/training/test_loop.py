from __future__ import annotations

import csv
import itertools
import json
import math
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from tests.training.rows import CLASSIFY, LABELS, examples, make_run
from tunesmith.adapters import checkpoint as adapter_checkpoint
from tunesmith.decoder import llama
from tunesmith.errors import InvalidRequest
from tunesmith.rundir import Outcome, ResolvedHyperparameters, RunDir
from tunesmith.tokenizer import Tokenizer
from tunesmith.training.batches import Row
from tunesmith.training.loop import train, warm_up_and_fall
from tunesmith.training.packing import micro_batches
from tunesmith.training.results import Results

PLAIN = ResolvedHyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=0.1, prompt_loss_weight=0.01)
ADAPTER = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")
PRODUCTS = ("results.csv", "progress.jsonl", "parity.json", *ADAPTER)


def test_a_whole_run_learns_and_leaves_what_is_promised(tiny_base: Path, tmp_path: Path) -> None:
    asked = replace(CLASSIFY, n_epochs=10, learning_rate_multiplier=0.4)
    run_dir = make_run(tmp_path / "r", tiny_base, train=examples(22), valid=examples(8), hyperparameters=asked)

    outcome = train(run_dir)

    rows = _results(run_dir)
    assert ",".join(rows[0]) == (
        "step,elapsed_tokens,elapsed_examples,training_loss,training_sequence_accuracy,training_token_accuracy,"
        "validation_loss,validation_sequence_accuracy,validation_token_accuracy,"
        "classification/accuracy,classification/precision,classification/recall,classification/auroc,"
        "classification/auprc,classification/f1.0,classification/f0.5"
    )
    assert outcome == Outcome("succeeded", trained_tokens=int(rows[-1]["elapsed_tokens"]), steps=55)
    assert [int(row["step"]) for row in rows] == list(range(1, 56))
    assert float(rows[0]["training_loss"]) > 8  # knows nothing: about log(16384)
    assert float(rows[-1]["classification/accuracy"]) == 1.0
    assert float(rows[-1]["validation_loss"]) < float(rows[0]["validation_loss"]) - 2
    measured = [int(row["step"]) for row in rows if row["classification/accuracy"]]
    assert measured == [6, 11, 17, 22, 28, 33, 39, 44, 50, 55]  # the steps in which an epoch of 22 rows ends
    lines = [json.loads(line) for line in run_dir.progress.read_text().splitlines()]
    said = [line["message"] for line in lines if line["kind"] == "message"]
    assert said == [f"Completed epoch {k}/10" for k in range(1, 11)]
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    reported = [line for line in lines if line["kind"] == "metrics"]
    assert [line["data"]["step"] for line in reported] == list(range(1, 56))
    assert reported[9]["message"] == f"Step 10/55: training loss={float(rows[9]['training_loss']):.2f}"
    # An epoch's end reports the whole validation set; every row is in the batch's part too, for four rows make half.
    assert [line["data"]["step"] for line in lines if "full_validation_loss" in line["data"]][::2] == measured
    assert run_dir.heartbeat.exists()


def test_elapsed_columns_count_repeats(tiny_base: Path, tmp_path: Path) -> None:
    data = examples(6)
    run_dir = make_run(tmp_path / "r", tiny_base, train=data, hyperparameters=replace(PLAIN, n_epochs=3))

    outcome = train(run_dir)

    rows = _results(run_dir)
    tokenizer = Tokenizer.from_folder(tiny_base)
    epoch_tokens = sum(len(tokenizer.encode(e["prompt"])) + len(tokenizer.encode(e["completion"])) for e in data)
    assert [int(row["elapsed_examples"]) for row in rows] == [4, 8, 12, 16, 18]
    assert int(rows[2]["elapsed_tokens"]) == 2 * epoch_tokens
    assert int(rows[4]["elapsed_tokens"]) == 3 * epoch_tokens
    assert outcome is not None
    assert outcome.trained_tokens == 3 * epoch_tokens
    assert list(rows[0])[-1] == "training_token_accuracy"  # no columns of what was not asked for


def test_the_same_folder_gives_the_same_bytes_wherever_it_lies(tiny_base: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "elsewhere" / "two"]
    for folder in folders:
        train(make_run(folder, tiny_base, train=examples(9), valid=examples(4), hyperparameters=CLASSIFY))

    for name in PRODUCTS:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_losses_of_a_seed_stay_what_they_are(tiny_base: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "r", tiny_base, train=examples(8), hyperparameters=PLAIN)

    train(run_dir)

    assert [float(row["training_loss"]) for row in _results(run_dir)] == pytest.approx(FROZEN_LOSSES, abs=2e-5)


FROZEN_LOSSES = [10.132284, 10.565212, 9.006393, 9.175015]


def test_stopped_and_resumed_at_every_step_gives_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    prepared = {"train": examples(9), "valid": examples(4), "hyperparameters": CLASSIFY}
    whole = make_run(tmp_path / "whole", tiny_base, **prepared)  # type: ignore[arg-type]
    halting = make_run(tmp_path / "halting", tiny_base, **prepared)  # type: ignore[arg-type]
    expected = train(whole)

    starts = 1
    while (outcome := train(halting, stop_asked=lambda: True)) is None:
        starts += 1

    assert starts == 8  # seven steps, then the end
    assert outcome == expected
    for name in PRODUCTS:
        assert (whole.path / name).read_bytes() == (halting.path / name).read_bytes(), name


def test_a_damaged_checkpoint_is_passed_over(tiny_base: Path, tmp_path: Path) -> None:
    prepared = {"train": examples(9), "hyperparameters": PLAIN}
    whole = make_run(tmp_path / "whole", tiny_base, **prepared)  # type: ignore[arg-type]
    torn = make_run(tmp_path / "torn", tiny_base, checkpoint_interval_s=0.0, **prepared)  # type: ignore[arg-type]
    train(whole)
    asked = iter([False, False, True])
    assert train(torn, stop_asked=lambda: next(asked)) is None
    assert sorted(path.name for path in torn.checkpoints.iterdir()) == ["step-2", "step-3"]
    state = torn.checkpoints / "step-3" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"\xff")

    train(torn)

    for name in ("results.csv", "progress.jsonl", "adapter/adapter_model.safetensors"):
        assert (whole.path / name).read_bytes() == (torn.path / name).read_bytes(), name


def test_results_that_lost_bytes_cost_work_and_not_the_run(tiny_base: Path, tmp_path: Path) -> None:
    prepared = {"train": examples(9), "hyperparameters": PLAIN}
    whole = make_run(tmp_path / "whole", tiny_base, **prepared)  # type: ignore[arg-type]
    torn = make_run(tmp_path / "torn", tiny_base, checkpoint_interval_s=0.0, **prepared)  # type: ignore[arg-type]
    train(whole)
    asked = iter([False, False, True])
    assert train(torn, stop_asked=lambda: next(asked)) is None
    torn.results.write_bytes(torn.results.read_bytes()[:-1])

    train(torn)

    for name in ("results.csv", "progress.jsonl", "adapter/adapter_model.safetensors"):
        assert (whole.path / name).read_bytes() == (torn.path / name).read_bytes(), name


def test_parity_rows_are_what_the_saved_adapter_says(tiny_base: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "r", tiny_base, train=examples(9), valid=examples(5), hyperparameters=PLAIN)
    train(run_dir)

    model = llama.load(tiny_base)
    lora, _ = adapter_checkpoint.load(run_dir.adapter, model.config.layout)
    rows = json.loads(run_dir.parity.read_text())["rows"]
    assert len(rows) == 5
    for row in rows:
        ids = torch.tensor(row["token_ids"])
        with torch.no_grad():
            hidden = model.hidden(ids, torch.arange(len(ids)), _plain_attention, lora)
            logprobs = model.logits(hidden).log_softmax(-1)
        start = row["completion_start"]
        expected = logprobs[range(start - 1, len(ids) - 1), ids[start:]]
        assert row["logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_parent_adapter_is_trained_on(tiny_base: Path, tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", tiny_base, train=examples(22), hyperparameters=replace(PLAIN, n_epochs=4))
    train(first)
    second = make_run(
        tmp_path / "second",
        tiny_base,
        train=examples(22),
        hyperparameters=replace(PLAIN, n_epochs=1, learning_rate_multiplier=1e-9),
        parent_adapter_dir=first.adapter,
    )

    train(second)

    before, after = (load_file(run.adapter / "adapter_model.safetensors") for run in (first, second))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert float(_results(second)[0]["training_loss"]) < float(_results(first)[0]["training_loss"]) - 1


def test_all_weights_learn_and_come_out_the_same_however_often_interrupted(tiny_base: Path, tmp_path: Path) -> None:
    whole = replace(PLAIN, method="full", n_epochs=2, epoch_checkpoints=1)
    make = partial(make_run, base=tiny_base, train=examples(22), hyperparameters=whole, base_learning_rate=0.02)
    undisturbed = make(tmp_path / "one")
    train(undisturbed)
    interrupted = make(tmp_path / "two", checkpoint_interval_s=0)
    while train(interrupted, stop_asked=lambda: True) is None:
        pass

    assert float(_results(undisturbed)[-1]["training_loss"]) < float(_results(undisturbed)[0]["training_loss"]) - 1
    files = sorted(path.relative_to(undisturbed.path) for path in undisturbed.adapter.iterdir())
    assert [path.name for path in files] == ["config.json", "model.safetensors", "tokenizer.json"]
    for path in [*files, Path("results.csv"), Path("parity.json")]:
        assert (undisturbed.path / path).read_bytes() == (interrupted.path / path).read_bytes()
    ((_, kept),) = undisturbed.snapshots()
    assert (kept.adapter / "model.safetensors").read_bytes() == (undisturbed.adapter / "model.safetensors").read_bytes()

    model = llama.load(undisturbed.adapter)
    (batch, *_) = micro_batches([Row(array("i", range(100, 120)), 5)], prompt_loss_weight=0.0)
    moved = model.hidden(batch.token_ids_N, batch.positions_N, batch.attend)
    assert not torch.allclose(moved, llama.load(tiny_base).hidden(batch.token_ids_N, batch.positions_N, batch.attend))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_all_weights_go_on_from_a_tuned_model(tiny_base: Path, tmp_path: Path, method: Literal["lora", "full"]) -> None:
    first = make_run(
        tmp_path / "first",
        tiny_base,
        train=examples(22),
        hyperparameters=replace(PLAIN, n_epochs=4, method=method),
        base_learning_rate=0.05 if method == "lora" else 0.02,
    )
    train(first)
    second = make_run(
        tmp_path / "second",
        tiny_base,
        train=examples(22),
        hyperparameters=replace(PLAIN, n_epochs=1, method="full", learning_rate_multiplier=1e-9),
        parent_adapter_dir=first.adapter,
    )

    train(second)

    last, goes_on = (float(_results(run)[place]["training_loss"]) for run, place in ((first, -1), (second, 0)))
    assert goes_on == pytest.approx(last, abs=1.0)
    assert goes_on < float(_results(first)[0]["training_loss"]) - 1
    assert llama.load(second.adapter).config.tied is (method == "full")  # an adapter of the embedding unties the head


def test_many_classes(tiny_base: Path, tmp_path: Path) -> None:
    labels = (" red", " green", " blue")
    data = [{"prompt": f"{labels[i % 3]} thing {i} ->", "completion": labels[i % 3]} for i in range(12)]
    asked = replace(CLASSIFY, n_epochs=1, classification_n_classes=3, classification_positive_class=None, batch_size=64)
    run_dir = make_run(tmp_path / "r", tiny_base, train=data, valid=data, hyperparameters=asked)

    train(run_dir)

    (row,) = _results(run_dir)
    assert list(row)[-2:] == ["classification/accuracy", "classification/weighted_f1_score"]
    assert 0 <= float(row["classification/weighted_f1_score"]) <= 1


def test_an_undefined_metric_is_an_empty_cell(tiny_base: Path, tmp_path: Path) -> None:
    one_class = [example for example in examples(8) if example["completion"] == LABELS[0]]
    asked = replace(CLASSIFY, n_epochs=1)
    run_dir = make_run(tmp_path / "r", tiny_base, train=examples(8), valid=one_class, hyperparameters=asked)

    train(run_dir)

    last = _results(run_dir)[-1]
    assert last["classification/auroc"] == ""
    assert last["classification/accuracy"] != ""


def test_what_is_no_number_is_an_empty_cell(tmp_path: Path) -> None:
    cells = {"step": 1, "training_loss": 0.1 + 0.2, "validation_loss": math.inf, "classification/auroc": math.nan}
    with Results(tmp_path / "results.csv", 0, tuple(cells)) as results:
        results.write(cells)

    assert (tmp_path / "results.csv").read_text().splitlines()[1] == "1,0.30000000000000004,,"


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"classification_n_classes": 3}, "classification_n_classes", "begin with 2 different tokens"),
        ({"classification_positive_class": "positive"}, "classification_positive_class", "Mind the space"),
        ({"learning_rate_multiplier": 1e30}, "learning_rate_multiplier", "smaller learning_rate_multiplier"),
    ],
)
def test_what_contradicts_the_data_is_named(
    tiny_base: Path, tmp_path: Path, change: dict[str, object], param: str, words: str
) -> None:
    asked = replace(CLASSIFY, **change)  # type: ignore[arg-type]
    run_dir = make_run(tmp_path / "r", tiny_base, train=examples(8), valid=examples(4), hyperparameters=asked)

    with pytest.raises(InvalidRequest, match=words) as caught:
        train(run_dir)
    assert caught.value.param == param


def test_a_heartbeat_is_touched_while_work_goes_on(tiny_base: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "r", tiny_base, train=examples(8), hyperparameters=PLAIN)
    touched: list[int] = []

    def stop_asked() -> bool:
        touched.append(run_dir.heartbeat.stat().st_mtime_ns)
        run_dir.heartbeat.unlink()
        return False

    train(run_dir, stop_asked=stop_asked, clock=_seconds())

    assert len(touched) == 4  # there again at every step


@pytest.mark.parametrize("n_steps", [1, 2, 10, 1_000])
def test_the_learning_rate_rises_and_falls(n_steps: int) -> None:
    rates = [warm_up_and_fall(step, n_steps) for step in range(1, n_steps + 1)]

    peak = rates.index(1.0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0
    assert peak <= 0.03 * n_steps


def _results(run_dir: RunDir) -> list[dict[str, str]]:
    with run_dir.results.open(newline="") as file:
        return list(csv.DictReader(file))


def _seconds() -> Callable[[], float]:
    """A clock that goes on a second each time it is read."""
    return map(float, itertools.count()).__next__


def _plain_attention(layer: int, q_NHd: torch.Tensor, k_NKd: torch.Tensor, v_NKd: torch.Tensor) -> torch.Tensor:
    """One row, written out."""
    groups = q_NHd.shape[1] // k_NKd.shape[1]
    k_NHd, v_NHd = (x.repeat_interleave(groups, dim=1) for x in (k_NKd, v_NKd))
    scores = torch.einsum("nhd,mhd->hnm", q_NHd, k_NHd) * q_NHd.shape[-1] ** -0.5
    later = torch.ones(len(q_NHd), len(q_NHd), dtype=torch.bool).triu(1)
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(later, -torch.inf).softmax(-1), v_NHd)
