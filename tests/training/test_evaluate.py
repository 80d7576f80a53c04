"""What is measured of rows, against each row by itself through the decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.rows import random_lora, random_model, random_rows
from tunesmith.adapters.lora import Lora
from tunesmith.decoder.llama import Llama
from tunesmith.rundir import RunDir
from tunesmith.training.batches import Row
from tunesmith.training.evaluate import Evaluator
from tunesmith.training.factors import TrainableLora
from tunesmith.training.gradients import Learner
from tunesmith.training.loss import Head
from tunesmith.training.memory import Room
from tunesmith.training.packing import micro_batches
from tunesmith.training.workers import Workers

ROWS = random_rows([(5, 1), (12, 3), (1, 4), (60, 2), (7, 2), (33, 9)])
CLASSES = (3, 17, 40)
WEIGHT = 0.01


def _evaluator(model: Llama, lora: Lora, workers: Workers, folder: Path, prompt_head: Head | None = None) -> Evaluator:
    return Evaluator(model, lora, workers, lambda: None, Room(RunDir(folder), most_tokens=80), prompt_head)


@torch.no_grad()
def _alone(model: Llama, lora: Lora, row: Row) -> tuple[Tensor, Tensor]:
    """Logits of the weighed positions of a row, those of its completion last, and the tokens that follow."""
    (batch,) = micro_batches([row], prompt_loss_weight=1.0)
    hidden_ND = model.hidden(batch.token_ids_N, batch.positions_N, batch.attend, lora)
    return hidden_ND[batch.predicting_M] @ model.head_VD.T, batch.target_M


@pytest.mark.parametrize("threads", [1, 2])
def test_losses_and_classes_of_one_pass_are_those_of_each_row_by_itself(tmp_path: Path, threads: int) -> None:
    model = random_model()
    lora = random_lora(model.config.layout, rank=4, alpha=8.0)
    with Workers(threads) as workers:
        evaluator = _evaluator(model, lora, workers, tmp_path)
        tally, probabilities = evaluator.classified(ROWS, CLASSES, prompt_loss_weight=WEIGHT)
        plain = evaluator.tally(ROWS, prompt_loss_weight=WEIGHT)

    nll = weight = 0.0
    right = []
    for row, found in zip(ROWS, probabilities, strict=True):
        logits_MV, target_M = _alone(model, lora, row)
        weight_M = torch.full((len(target_M),), WEIGHT).index_fill_(
            0, torch.arange(-row.n_completion, 0) % len(target_M), 1
        )
        nll_M = -logits_MV.log_softmax(1).gather(1, target_M[:, None]).squeeze(1)
        nll, weight = nll + float(nll_M @ weight_M), weight + float(weight_M.sum())
        right.append((logits_MV.argmax(1) == target_M)[-row.n_completion :].tolist())
        expected = logits_MV[-row.n_completion, list(CLASSES)].softmax(0)
        assert found == pytest.approx(expected.numpy(), abs=1e-6)
    assert tally.loss == pytest.approx(nll / weight, abs=1e-6)
    assert tally.right_tokens == sum(map(sum, right))
    assert tally.right_sequences == sum(map(all, right))
    assert plain == tally


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-6), (torch.int16, 1e-5), (torch.bfloat16, 1e-4)])
def test_prompt_tokens_are_measured_by_the_head_of_steps_and_completions_in_fp32(
    tmp_path: Path, dtype: torch.dtype, apart: float
) -> None:
    model = random_model()
    lora = random_lora(model.config.layout, rank=4, alpha=8.0)
    with Workers(1) as workers:
        learner = Learner(model, TrainableLora(lora).site_outputs, workers, beat=lambda: None, dtype=dtype)
        exact = _evaluator(model, lora, workers, tmp_path)
        coarse = _evaluator(model, lora, workers, tmp_path, learner.prompt_head)
        wrong = _evaluator(model, lora, workers, tmp_path, _Even(model.config.vocabulary_size))
        known, near, far = (each.tally(ROWS, prompt_loss_weight=WEIGHT) for each in (exact, coarse, wrong))
        of_completions = [each.tally(ROWS, prompt_loss_weight=0.0).loss for each in (exact, coarse, wrong)]
        logprobs = [each.completion_logprobs(ROWS) for each in (exact, wrong)]

    assert near.loss == pytest.approx(known.loss, abs=apart)
    assert abs(far.loss - known.loss) > 10 * apart
    assert (near.right_tokens, far.right_tokens) == (known.right_tokens, known.right_tokens)
    assert of_completions == [of_completions[0]] * 3
    assert logprobs[0] == logprobs[1]


class _Even:
    """A `Head` to which all tokens are equally likely."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def logits(self, states_MD: Tensor) -> Tensor:
        return states_MD.new_zeros(len(states_MD), self.vocabulary)

    def back(self, grad_MV: Tensor) -> Tensor:
        raise AssertionError("nothing learns from what is measured")
