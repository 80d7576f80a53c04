"""The training loop on one page. Reads a run folder, fills a run folder; knows no HTTP and no database."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator

from tunesmith.errors import InvalidRequest
from tunesmith.rundir import Outcome, RunDir
from tunesmith.training import checkpoint
from tunesmith.training.batches import Schedule, validation_batch
from tunesmith.training.checkpoint import Position
from tunesmith.training.device import MICRO_BATCH_TOKENS, description, prepare
from tunesmith.training.epochs import Epochs
from tunesmith.training.evaluate import Evaluator
from tunesmith.training.folded import product_dtype
from tunesmith.training.inputs import read_inputs
from tunesmith.training.memory import Room
from tunesmith.training.metrics import Tally
from tunesmith.training.native import confirm
from tunesmith.training.optimizer import FlatAdamW
from tunesmith.training.products import save_trained, write_parity
from tunesmith.training.results import (
    CLASSIFICATION_PREFIX,
    FULL_VALIDATION,
    VALIDATION_COLUMNS,
    Progress,
    Results,
    columns,
)
from tunesmith.training.together import Shared, Wanted

WARM_UP_SHARE = 0.03
"""Share of the steps over which the learning rate rises to its peak; from there it falls to nothing, both linearly."""
LARGEST_GRADIENT_NORM = 1.0
WEIGHT_DECAY = 0.01
REPORTS_PER_RUN = 100
"""How often a validation batch is measured, and the metrics of a step are reported."""


def train(
    run_dir: RunDir, *, stop_asked: Callable[[], bool] = lambda: False, clock: Callable[[], float] = time.monotonic
) -> Outcome | None:
    """One run by itself; see `lessons` for what it does, returns and raises."""
    with Shared(clock) as shared:
        run = lessons(run_dir, shared, stop_asked=stop_asked)
        tally: Tally | None = None
        while True:
            try:
                wanted = run.send(tally)
            except StopIteration as end:
                outcome: Outcome | None = end.value
                return outcome
            (found,) = shared.learn([wanted])
            if isinstance(found, Exception):
                raise found
            tally = found


def lessons(
    run_dir: RunDir, shared: Shared, *, stop_asked: Callable[[], bool] = lambda: False
) -> Generator[Wanted, Tally | None, Outcome | None]:
    """Trains as `spec.json` says, from the last checkpoint if there is one; None if it stopped because it was asked.

    Yields the rows of each step, and goes on when it is sent what came of them, their gradient being in the factors: so
    the steps of many runs can be one. Equal folders get equal adapters, results and progress, however often training
    was interrupted and whatever was trained beside. Raises InvalidRequest where data or hyperparameters are at fault.
    The caller writes the outcome.
    """
    spec = run_dir.read_spec()
    asked = spec.hyperparameters
    beat = shared.beat
    shared.watch(run_dir)
    device = prepare(spec.device)

    # What is trained, on what, how.
    inputs = read_inputs(run_dir, spec, beat, shared.base, shared.encoded)
    dtype = product_dtype(spec.precision, device)
    confirm(run_dir.kernels, None if device.type == "cpu" else description(inputs.model, dtype))
    rows, validation, classes = inputs.rows, inputs.validation, inputs.classes
    schedule = Schedule(len(rows), asked.n_epochs, asked.batch_size, spec.seed)
    trained = inputs.trained
    optimizer = FlatAdamW(
        trained.flat, trained.flat_gradient, weight_decay=WEIGHT_DECAY, largest_norm=LARGEST_GRADIENT_NORM
    )
    weight = asked.prompt_loss_weight
    peak_learning_rate = spec.base_learning_rate * asked.learning_rate_multiplier
    report_every = math.ceil(schedule.n_steps / REPORTS_PER_RUN)

    # Where it goes on.
    resumed = checkpoint.latest(run_dir.checkpoints, results=run_dir.results, progress=run_dir.progress)
    position, best = resumed[0] if resumed else Position(), None
    if resumed:
        state = {name: tensor.to(device) for name, tensor in resumed[1].items()}
        trained.flat.copy_(state.pop("trained"))
        best = state.pop("best", None)
        optimizer.state = state
    elapsed_tokens, saved_at = position.elapsed_tokens, shared.clock()

    with (
        Results(run_dir.results, position.results_bytes, columns(asked, has_validation=bool(validation))) as results,
        Progress(run_dir.progress, position.progress_bytes, position.progress_seq) as progress,
    ):
        room = Room(run_dir) if device.type == "cpu" else Room(run_dir, MICRO_BATCH_TOKENS)
        workers = shared.workers(spec.threads)
        prompt_head = shared.prompt_head(inputs.model, trained, spec) if validation else None
        evaluator = Evaluator(inputs.model, trained.adapters, workers, beat, room, prompt_head)
        epochs = Epochs(run_dir, spec, trained, evaluator, validation or rows, position.standing, best)

        if position.step == 0 and classes is not None and classes.warning is not None:
            progress.say(classes.warning, level="warn")
        taken = position.step
        for step, indices in enumerate(schedule.batches(position.step), start=position.step + 1):
            if epochs.enough:
                break

            # One step.
            batch = [rows[index] for index in indices]
            training = yield Wanted(inputs.model, trained, batch, spec, room)
            assert training is not None
            if not math.isfinite(training.loss):
                raise InvalidRequest(
                    f"The training loss was no longer a number at step {step}. Use a smaller learning_rate_multiplier "
                    f"than {asked.learning_rate_multiplier}.",
                    param="learning_rate_multiplier",
                )
            optimizer.step(peak_learning_rate * warm_up_and_fall(step, schedule.n_steps))
            taken = step
            elapsed_tokens += sum(len(row.token_ids) for row in batch)

            # What it shows: one row of results, metrics now and then, a message for each epoch that ended.
            cells: dict[str, float | None] = {
                "step": step,
                "elapsed_tokens": elapsed_tokens,
                "elapsed_examples": (step - 1) * asked.batch_size + len(batch),
                "training_loss": training.loss,
                "training_sequence_accuracy": training.sequence_accuracy,
                "training_token_accuracy": training.token_accuracy,
            }
            ended = range(schedule.epochs_completed(step - 1) + 1, schedule.epochs_completed(step) + 1)
            reporting = step % report_every == 0 or bool(ended)
            if validation and reporting:
                chosen = validation_batch(len(validation), asked.batch_size, spec.seed, step)
                measured = evaluator.tally([validation[index] for index in chosen], prompt_loss_weight=weight)
                values = (measured.loss, measured.sequence_accuracy, measured.token_accuracy)
                cells |= dict(zip(VALIDATION_COLUMNS, values, strict=True))
            full: Tally | None = None
            if validation and ended and classes is not None:
                full, probabilities = evaluator.classified(validation, classes.token_ids, prompt_loss_weight=weight)
                metrics = classes.metrics(validation, probabilities)
                cells |= {CLASSIFICATION_PREFIX + name: value for name, value in metrics.items()}
            elif validation and ended:
                full = evaluator.tally(validation, prompt_loss_weight=weight)
            results.write(cells)
            if full is not None:
                cells |= dict(zip(FULL_VALIDATION, (full.loss, full.token_accuracy), strict=True))
            measures = {name: value for name, value in cells.items() if value is not None and math.isfinite(value)}
            if reporting:
                progress.metrics(step, schedule.n_steps, measures)
            for epoch in ended:
                progress.epoch_completed(epoch, asked.n_epochs, measures)
            if ended:
                epochs.end(step, measures)
                if epochs.enough and step < schedule.n_steps:
                    progress.say(
                        f"Stopped after epoch {ended[-1]}/{asked.n_epochs}: the validation loss was lowest at step "
                        f"{epochs.standing.best_step}"
                    )

            # What a crash must not cost.
            stopping = stop_asked()
            if stopping or shared.clock() - saved_at >= spec.checkpoint_interval_s:
                position = Position(
                    step, elapsed_tokens, results.sync(), progress.sync(), progress.seq, epochs.standing
                )
                state = {"trained": trained.flat, **optimizer.state, **epochs.state}
                checkpoint.save(run_dir.checkpoints, position, state)
                saved_at = shared.clock()
            if stopping:
                return None

        # What is left behind.
        if epochs.restore_best():
            progress.say(f"The model is that of step {epochs.standing.best_step}, where the validation loss was lowest")
        results.sync()
        progress.sync()
        save_trained(trained, run_dir, spec)
        write_parity(run_dir, evaluator, validation or rows)
        return Outcome("succeeded", trained_tokens=elapsed_tokens, steps=taken)


def warm_up_and_fall(step: int, n_steps: int) -> float:
    """The share of the peak learning rate that step `step` of 1..n_steps takes, in (0, 1]."""
    warm_up_steps = max(1, round(WARM_UP_SHARE * n_steps))
    return min(step / warm_up_steps, (n_steps + 1 - step) / (n_steps + 1 - warm_up_steps))
