"""The training loop on one page. Reads a run folder, fills a run folder; knows no HTTP and no database."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from tunesmith.errors import InvalidRequest
from tunesmith.rundir import Outcome, RunDir
from tunesmith.training import checkpoint
from tunesmith.training.batches import Schedule, validation_batch
from tunesmith.training.checkpoint import Position
from tunesmith.training.evaluate import Evaluator
from tunesmith.training.factors import TrainableLora
from tunesmith.training.gradients import Learner
from tunesmith.training.inputs import read_inputs
from tunesmith.training.process import Heartbeat
from tunesmith.training.products import save_adapter, write_parity
from tunesmith.training.results import CLASSIFICATION_PREFIX, VALIDATION_COLUMNS, Progress, Results, columns
from tunesmith.training.workers import Workers

WARM_UP_SHARE = 0.03
"""Share of the steps over which the learning rate rises to its peak; from there it falls to nothing, both linearly."""
LARGEST_GRADIENT_NORM = 1.0
WEIGHT_DECAY = 0.01
VALIDATIONS_PER_RUN = 100


def train(
    run_dir: RunDir, *, stop_asked: Callable[[], bool] = lambda: False, clock: Callable[[], float] = time.monotonic
) -> Outcome | None:
    """Trains as `spec.json` says, from the last checkpoint if there is one; None if it stopped because it was asked.

    Equal folders get equal adapters, results and progress, however often training was interrupted. Raises
    InvalidRequest where data or hyperparameters are at fault. The caller writes the outcome.
    """
    spec = run_dir.read_spec()
    asked = spec.hyperparameters
    beat = Heartbeat(run_dir.heartbeat, clock)
    beat()

    # What is trained, on what, how.
    inputs = read_inputs(run_dir, spec, beat)
    rows, validation, classes = inputs.rows, inputs.validation, inputs.classes
    schedule = Schedule(len(rows), asked.n_epochs, asked.batch_size, spec.seed)
    factors = TrainableLora(inputs.start)
    factors.flat.grad = factors.flat_gradient
    optimizer = torch.optim.AdamW([factors.flat], weight_decay=WEIGHT_DECAY, fused=True)
    peak_learning_rate = spec.base_learning_rate * asked.learning_rate_multiplier
    validate_every = math.ceil(schedule.n_steps / VALIDATIONS_PER_RUN)

    # Where it goes on.
    resumed = checkpoint.latest(run_dir.checkpoints)
    position = resumed[0] if resumed else Position()
    if resumed:
        factors.flat.copy_(resumed[1].pop("factors"))
        optimizer.state[factors.flat] = resumed[1]
    elapsed_tokens, saved_at = position.elapsed_tokens, clock()

    with (
        Workers(spec.threads, asked.batch_size) as workers,
        Results(run_dir.results, position.results_bytes, columns(asked, has_validation=bool(validation))) as results,
        Progress(run_dir.progress, position.progress_bytes, position.progress_seq) as progress,
    ):
        learner = Learner(inputs.model, factors, workers, beat=beat)
        evaluator = Evaluator(inputs.model, factors.lora, workers, beat)
        for step, indices in enumerate(schedule.batches(position.step), start=position.step + 1):
            # One step.
            batch = [rows[index] for index in indices]
            training = learner.learn(batch, prompt_loss_weight=asked.prompt_loss_weight)
            if not math.isfinite(training.loss):
                raise InvalidRequest(
                    f"The training loss was no longer a number at step {step}. Use a smaller learning_rate_multiplier "
                    f"than {asked.learning_rate_multiplier}.",
                    param="learning_rate_multiplier",
                )
            torch.nn.utils.clip_grad_norm_([factors.flat], LARGEST_GRADIENT_NORM)
            optimizer.param_groups[0]["lr"] = peak_learning_rate * warm_up_and_fall(step, schedule.n_steps)
            optimizer.step()
            elapsed_tokens += sum(len(row.token_ids) for row in batch)

            # What it shows: one row of results, an event for each epoch that ended.
            cells: dict[str, float | None] = {
                "step": step,
                "elapsed_tokens": elapsed_tokens,
                "elapsed_examples": (step - 1) * asked.batch_size + len(batch),
                "training_loss": training.loss,
                "training_sequence_accuracy": training.sequence_accuracy,
                "training_token_accuracy": training.token_accuracy,
            }
            if validation and (step % validate_every == 0 or step == schedule.n_steps):
                chosen = validation_batch(len(validation), asked.batch_size, spec.seed, step)
                measured = evaluator.tally(
                    [validation[index] for index in chosen], prompt_loss_weight=asked.prompt_loss_weight
                )
                values = (measured.loss, measured.sequence_accuracy, measured.token_accuracy)
                cells |= dict(zip(VALIDATION_COLUMNS, values, strict=True))
            ended = range(schedule.epochs_completed(step - 1) + 1, schedule.epochs_completed(step) + 1)
            if classes is not None and validation and ended:
                metrics = classes.metrics(evaluator, validation)
                cells |= {CLASSIFICATION_PREFIX + name: value for name, value in metrics.items()}
            results.write(cells)
            for epoch in ended:
                progress.epoch_completed(epoch, asked.n_epochs, {"step": step, "training_loss": training.loss})

            # What a crash must not cost.
            stopping = stop_asked()
            if stopping or clock() - saved_at >= spec.checkpoint_interval_s:
                position = Position(step, elapsed_tokens, results.sync(), progress.sync(), progress.seq)
                checkpoint.save(
                    run_dir.checkpoints, position, {"factors": factors.flat, **optimizer.state[factors.flat]}
                )
                saved_at = clock()
            if stopping:
                return None

        # What is left behind.
        results.sync()
        progress.sync()
        save_adapter(factors.lora, run_dir, spec)
        write_parity(run_dir, evaluator, validation or rows)
        return Outcome("succeeded", trained_tokens=elapsed_tokens, steps=schedule.n_steps)


def warm_up_and_fall(step: int, n_steps: int) -> float:
    """The share of the peak learning rate that step `step` of 1..n_steps takes, in (0, 1]."""
    warm_up_steps = max(1, round(WARM_UP_SHARE * n_steps))
    return min(step / warm_up_steps, (n_steps + 1 - step) / (n_steps + 1 - warm_up_steps))
