"""What the runs of one trainer share: the base model, the threads, and each step. Knows no run folder's content."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch

from tunesmith.decoder.base import Decoder
from tunesmith.rundir import RunDir, RunSpec
from tunesmith.training.batches import Row
from tunesmith.training.factors import TrainableLora
from tunesmith.training.folded import product_dtype
from tunesmith.training.gradients import Learner, Lesson
from tunesmith.training.inputs import Encoded, ReadBase, read_base
from tunesmith.training.loss import Head
from tunesmith.training.memory import Room, is_shortage
from tunesmith.training.metrics import Tally
from tunesmith.training.packing import PROCESSOR
from tunesmith.training.process import Heartbeat
from tunesmith.training.whole import TrainableWeights, WholeLearner
from tunesmith.training.workers import Workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The rows of a run's next step."""

    model: Decoder
    trained: TrainableLora | TrainableWeights
    rows: Sequence[Row]
    spec: RunSpec
    room: Room

    @property
    def prompt_loss_weight(self) -> float:
        """As the run asks."""
        return self.spec.hyperparameters.prompt_loss_weight


class Shared:
    """To be closed (`with`). Runs that name the same base, number of threads and precision share their steps."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` counts seconds."""
        self.clock = clock
        self.check: Callable[[], None] = lambda: None
        """Called with every beat; what it raises ends what the run at work is doing."""
        self.encoded = Encoded()
        self._heartbeats: dict[Path, Heartbeat] = {}
        self._bases: dict[tuple[Path, torch.device], ReadBase] = {}
        self._workers: dict[int, Workers] = {}
        self._learners: dict[tuple[int, torch.dtype, int], Learner] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for workers in self._workers.values():
            workers.close()

    def watch(self, run_dir: RunDir) -> None:
        """From now on the run's heartbeat says that work goes on."""
        self._heartbeats[run_dir.path] = Heartbeat(run_dir.heartbeat, self.clock)
        self.beat()

    def forget(self, run_dir: RunDir) -> None:
        """The end of `watch`."""
        self._heartbeats.pop(run_dir.path, None)

    def beat(self) -> None:
        """Says that work goes on, in all runs: the others wait for the one at work."""
        for heartbeat in self._heartbeats.values():
            heartbeat()
        self.check()

    def base(self, folder: Path, device: torch.device = PROCESSOR) -> ReadBase:
        """See `read_base`; each is read once."""
        if (folder, device) not in self._bases:
            self._bases[folder, device] = read_base(folder, device)
        return self._bases[folder, device]

    def workers(self, threads: int) -> Workers:
        """Made once."""
        if threads not in self._workers:
            self._workers[threads] = Workers(threads)
        return self._workers[threads]

    def learn(self, wanted: Sequence[Wanted]) -> list[Tally | Exception]:
        """A step of each of these runs, as one; for a run whose step fails, the reason.

        Where they fail together, each is tried alone: memory may suffice for that, and a fault of one is no other's.
        """
        found: dict[int, Tally] = {}
        groups: defaultdict[Learner, dict[int, Lesson]] = defaultdict(dict)
        for index, each in enumerate(wanted):
            if isinstance(each.trained, TrainableLora):
                lesson = Lesson(each.trained, each.rows, each.prompt_loss_weight, each.room.tokens)
                groups[self._learner(each.model, each.trained, each.spec)][index] = lesson
        for learner, lessons in groups.items():
            if len(lessons) == 1:
                continue
            try:
                found.update(zip(lessons, learner.learn([*lessons.values()]), strict=True))
            except Exception as error:
                log = logger.warning if is_shortage(error) else logger.exception
                log("a step of %d runs failed, each is tried alone: %s", len(lessons), error)
        return [found[index] if index in found else self._learn_alone(each) for index, each in enumerate(wanted)]

    def _learn_alone(self, wanted: Wanted) -> Tally | Exception:
        try:
            return wanted.room.fit(partial(self._learn_within, wanted))
        except Exception as error:
            return error

    def _learn_within(self, wanted: Wanted, max_tokens: int) -> Tally:
        trained, weight = wanted.trained, wanted.prompt_loss_weight
        if isinstance(trained, TrainableLora):
            lesson = Lesson(trained, wanted.rows, weight, max_tokens)
            return self._learner(wanted.model, trained, wanted.spec).learn([lesson])[0]
        workers = self.workers(wanted.spec.threads)
        whole = WholeLearner(trained, workers, beat=self.beat, dtype=_dtype(wanted.model, wanted.spec))
        return whole.learn(wanted.rows, prompt_loss_weight=weight, max_tokens=max_tokens)

    def prompt_head(self, model: Decoder, trained: TrainableLora | TrainableWeights, spec: RunSpec) -> Head | None:
        """For what a run measures, see `Learner.prompt_head`; None where the head itself is trained."""
        return self._learner(model, trained, spec).prompt_head if isinstance(trained, TrainableLora) else None

    def _learner(self, model: Decoder, factors: TrainableLora, spec: RunSpec) -> Learner:
        dtype = _dtype(model, spec)
        key = id(model), dtype, spec.threads
        if key not in self._learners:
            workers = self.workers(spec.threads)
            self._learners[key] = Learner(model, factors.site_outputs, workers, beat=self.beat, dtype=dtype)
        return self._learners[key]


def _dtype(model: Decoder, spec: RunSpec) -> torch.dtype:
    """That of the products."""
    return product_dtype(spec.precision, model.head_VD.device)
