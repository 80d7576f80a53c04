"""What the end of an epoch decides: which is the best, which become models of their own, whether training goes on."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tunesmith.rundir import RunDir, RunSpec, Snapshot
from tunesmith.training.batches import Row
from tunesmith.training.evaluate import Evaluator
from tunesmith.training.factors import TrainableLora
from tunesmith.training.products import save_trained, write_parity
from tunesmith.training.results import FULL_VALIDATION
from tunesmith.training.whole import TrainableWeights


@dataclass(frozen=True, slots=True)
class Standing:
    """What is remembered of the epochs so far; part of every checkpoint."""

    best_step: int = 0
    """The step after which the validation loss was lowest; 0 before the first epoch has ended."""
    best_loss: float | None = None
    """Over the whole validation set."""
    worse_epochs: int = 0
    """Epochs since the best."""

    def after(self, step: int, loss: float) -> Standing:
        """With the epoch that ended with `step`; of equal ones the earlier stays the best."""
        if self.best_loss is None or loss < self.best_loss:
            return Standing(step, loss)
        return Standing(self.best_step, self.best_loss, self.worse_epochs + 1)


class Epochs:
    """The ends of the epochs of one run."""

    def __init__(
        self,
        run_dir: RunDir,
        spec: RunSpec,
        trained: TrainableLora | TrainableWeights,
        evaluator: Evaluator,
        parity_rows: Sequence[Row],
        standing: Standing,
        best: Tensor | None,
    ) -> None:
        """`standing` and `best`, what was trained by the best epoch, are those of the checkpoint gone on from."""
        self._run_dir = run_dir
        self._spec = spec
        self._trained = trained
        self._evaluator = evaluator
        self._parity_rows = parity_rows
        self.standing = standing
        self._best = best

    def end(self, step: int, metrics: dict[str, float]) -> None:
        """After `step`, which ended an epoch (or several) with these metrics, all finite."""
        asked = self._spec.hyperparameters
        if asked.best_epoch or asked.early_stopping_patience is not None:
            self.standing = self.standing.after(step, metrics.get(FULL_VALIDATION[0], math.inf))
            if asked.best_epoch and self.standing.best_step == step:
                self._best = self._trained.flat.clone()
        if asked.epoch_checkpoints:
            self._keep(Snapshot(step, metrics))

    @property
    def enough(self) -> bool:
        """Whether the job asked to end where the validation loss no longer falls, and it does not."""
        patience = self._spec.hyperparameters.early_stopping_patience
        return patience is not None and self.standing.worse_epochs >= patience

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold besides `standing`."""
        return {} if self._best is None else {"best": self._best}

    def restore_best(self) -> bool:
        """Puts what was trained by the best epoch in place, where the job asked for them; whether that changed them."""
        if self._best is None or self.standing.worse_epochs == 0:
            return False
        self._trained.flat.copy_(self._best)
        return True

    def _keep(self, snapshot: Snapshot) -> None:
        final = self._run_dir.snapshot(snapshot.step)
        beside = RunDir(final.path.with_suffix(".tmp"))
        for leftover in (beside.path, final.path):  # of a trainer that was killed after this step
            shutil.rmtree(leftover, ignore_errors=True)
        beside.path.mkdir(parents=True)
        save_trained(self._trained, beside, self._spec)
        write_parity(beside, self._evaluator, self._parity_rows)
        beside.write_snapshot(snapshot)
        beside.path.replace(final.path)
        for old, folder in self._run_dir.snapshots()[: -self._spec.hyperparameters.epoch_checkpoints]:
            if old.step < snapshot.step:  # a later one is of a trainer that got further, and comes again
                shutil.rmtree(folder.path)
