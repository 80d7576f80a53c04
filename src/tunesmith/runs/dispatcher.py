"""The only loop over jobs: claim -> prepare folder -> start -> watch -> register.

Knows jobs, run folders and an executor; nothing of HTTP or training. All that matters is in the store and the run
folders, so a dispatcher can be killed at any line: the next one goes on from what they hold.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tunesmith.core.bases import Bases
from tunesmith.core.files import Files
from tunesmith.core.jobs import Claim, Job, Jobs
from tunesmith.core.models import Models
from tunesmith.errors import InvalidRequest, LeaseLost, NotFound, PermissionDenied, StorageFull
from tunesmith.rundir import BROKEN_DISK, NO_ROOM, Outcome, ResolvedHyperparameters, RunDir, RunSpec
from tunesmith.runs import folder
from tunesmith.runs.company import company
from tunesmith.runs.executor import Executor, RunState, trainer_of

logger = logging.getLogger(__name__)

Parity = Callable[[RunDir, RunSpec], str | None]
"""Why the adapter in a run folder may not be served, in words for the user; None if it may. See `runs/parity.py`."""
Verdict = Future[str | None]
"""What a `Parity` says, or will say."""


def at_once(gate: Callable[[], str | None]) -> Verdict:
    """Asks before it returns."""
    verdict = Verdict()
    try:
        verdict.set_result(gate())
    except Exception as error:
        verdict.set_exception(error)
    return verdict


FRUITLESS_STARTS = 6
"""A trainer that died is started again this often without getting further, each time after a longer pause, a minute
in all: a full disk may have room again by then. After that the job fails with the trainer's last words."""
FAULTS = 8
"""This often in a row a step of one job may meet an error of ours before the job fails; about two minutes."""
LONGEST_PAUSE_S = 30.0
TIDY_EVERY_S = 60.0
"""A job that is cancelled while it is paused has nobody who would see its run off."""


@dataclass(slots=True)
class _Run:
    """A job this dispatcher holds, and what it remembers about the attempt between ticks."""

    claim: Claim
    run_dir: RunDir
    handle: str | None
    recorded_seq: int
    company: str | None
    """Runs of the same may share a trainer; None: it has one of its own."""
    pulse_at: float
    """When the heartbeat file was last seen to change."""
    pulse: int | None = None
    reached: tuple[int, str | None] | None = None
    """How far the run had come when it was last started."""
    fruitless: int = 0
    """How many starts it is since the run got further."""
    restart_at: float = 0.0
    """When a run that does not get further may be started again."""
    unnoted: ResolvedHyperparameters | None = None
    """What the trainer was started with, while the store does not know of the start."""
    faults: int = 0
    not_before: float = 0.0
    trained: bool = False
    """Whether it needs no trainer any more: what is left is the gate, and to become a model."""
    at_gate: Verdict | None = None
    verdict: str | None = None
    """Why the job is to fail; written as soon as the store takes it."""


@dataclass
class Dispatcher:
    """Keeps up to `max_concurrent_runs` trainers at work, each on up to `jobs_per_run` jobs.

    `tick` does one round and never waits for a run. It is to be called from one thread that lives until `drain` has
    returned: trainers end with the thread that started them.
    """

    jobs: Jobs
    files: Files
    bases: Bases
    models: Models
    executor: Executor
    parity: Parity
    home: Path
    holder: str
    """Names this dispatcher in leases; a successor of the same name takes its jobs up at once."""
    max_concurrent_runs: int = 1
    jobs_per_run: int = 1
    """Small jobs of one base are trained together; see `runs/company.py`."""
    trainer_threads: int = 1
    trainer_device: str = "cpu"
    checkpoint_interval_s: float = 30.0
    lease_s: float = 60.0
    stalled_after_s: float = 120.0
    """A trainer whose heartbeat file is silent for so long is killed and started again."""
    drain_s: float = 30.0
    """How long trainers may take for their checkpoint when the server stops."""
    tick_s: float = 0.25
    """Pause between rounds; a cancelled job's trainer is gone after about this long."""
    monotonic: Callable[[], float] = time.monotonic
    warm: Callable[[Path, Path], None] = lambda base_dir, adapter_dir: None
    """Loads a model that is about to be announced, so that its first call is answered at once. Never raises."""
    ask: Callable[[Callable[[], str | None]], Verdict] = at_once
    """Puts the question of `parity`, which takes the engine seconds: elsewhere, so that no other job waits for it."""
    _gate: Verdict | None = field(default=None, init=False)
    """The question that was put last: one at a time, be its job still held or not."""
    _tidied_at: float = field(default=-math.inf, init=False)
    _ticked_at: float | None = field(default=None, init=False)
    _runs: dict[str, _Run] = field(default_factory=dict, init=False)
    _leaving: list[str] = field(default_factory=list, init=False)
    """Handles of runs to be ended by force, until they are seen to be gone."""

    def run(self, stop: threading.Event) -> None:
        """Ticks until `stop` is set, then drains."""
        self._survive("take over", lambda: self.jobs.release_all(self.holder))
        self._survive("tidy", self._tidy)
        while not stop.is_set():
            self.tick()
            stop.wait(self.tick_s)
        self.drain()

    def tick(self) -> None:
        """One round over the jobs held, then new ones as far as there is room."""
        # Jobs held come first: their leases are renewed before the round looks for expired ones to take over.
        for run in list(self._runs.values()):
            self._advance(run)
        self._survive("see off", self._see_off)
        if self.monotonic() - self._tidied_at >= TIDY_EVERY_S:
            self._survive("tidy", self._tidy)
        self._survive("take", self._take)
        self._ticked_at = self.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since the last whole round; infinite before the first. Safe to read from any thread."""
        return math.inf if self._ticked_at is None else self.monotonic() - self._ticked_at

    def drain(self) -> None:
        """Stops the trainers at a checkpoint, waits for them at most `drain_s`, and gives the jobs back.

        A job at the gate is given back when the engine has answered; the next dispatcher asks again.
        """
        waiting = [run.handle for run in self._runs.values() if run.handle is not None]
        while waiting or self._leaving:
            for handle in waiting:
                self.executor.stop(handle, self.drain_s)
            waiting = [handle for handle in waiting if self.executor.state(handle) is RunState.RUNNING]
            self._survive("see off", self._see_off)
            time.sleep(0.02)
        wait([] if self._gate is None else [self._gate])
        for run in self._runs.values():
            self._survive("release", partial(self.jobs.release, run.claim))
        self._runs.clear()

    def _take(self) -> None:
        if not self.jobs.awaited():
            return
        self.jobs.enqueue()
        while (claim := self.jobs.claim(self.holder, self.lease_s, self._fits)) is not None:
            logger.info("job claimed job=%s run=%s lease=%d", claim.job.id, claim.run_id, claim.lease)
            run_dir = RunDir(self.home / "runs" / claim.run_id)
            together, now = self._company(claim.job), self.monotonic()
            run = _Run(claim, run_dir, claim.handle, claim.progress_seq, together, pulse_at=now)
            self._runs[claim.run_id] = run
            self._advance(run)

    def _fits(self, job: Job) -> bool:
        """Whether there is a trainer to spare for the job, or one that it can join."""
        at_work = [run for run in self._runs.values() if not run.trained]
        trainers = {run.claim.run_id if run.handle is None else trainer_of(run.handle) for run in at_work}
        return len(trainers) < self.max_concurrent_runs or self._host(self._company(job)) is not None

    def _company(self, job: Job) -> str | None:
        if self.jobs_per_run == 1:
            return None
        try:
            base_dir = self.bases.folder(job.base_name)
        except NotFound:  # the job fails of it when it is prepared
            return None
        return company(base_dir, self.jobs.hyperparameters(job, job.training_examples), self.trainer_threads)

    def _host(self, together: str | None) -> str | None:
        """Handle of a run whose trainer has room for another of this company."""
        if together is None:
            return None
        at_work = [run for run in self._runs.values() if run.company == together and run.handle is not None]
        crowds = Counter(trainer_of(run.handle) for run in at_work if run.handle is not None)
        for run in at_work:
            if run.handle is None or run.fruitless or crowds[trainer_of(run.handle)] >= self.jobs_per_run:
                continue
            if self.executor.state(run.handle) is RunState.RUNNING:
                return run.handle
        return None

    def _advance(self, run: _Run) -> None:
        """One step of one job; whatever goes wrong stays with this job."""
        error = self._survive(f"step of job={run.claim.job.id}", partial(self._step, run))
        match error:
            case None:
                pass
            case LeaseLost():
                logger.info("job cancelled or taken over job=%s", run.claim.job.id)
                self._part(run)
            case InvalidRequest() | NotFound() | PermissionDenied():
                run.verdict = error.message  # asking again would not mend these
            case _ if self.monotonic() < run.not_before:
                pass  # the heartbeat failed within the pause: still the same fault
            case _:
                run.faults += 1
                run.not_before = self.monotonic() + min(2.0**run.faults, LONGEST_PAUSE_S)
                if run.faults > FAULTS and run.verdict is None:
                    run.verdict = _reason(error)

    def _step(self, run: _Run) -> None:
        to_rest = self.jobs.heartbeat(run.claim, self.lease_s)
        if self.monotonic() < run.not_before:
            return
        if run.verdict is not None:
            self._fail(run, run.verdict)
        elif to_rest:
            self._rest(run)
        else:
            self._watch(run)
        run.faults = 0

    def _watch(self, run: _Run) -> None:
        self._note_start(run)
        # The state is read before the folder: when a run has ended, all it wrote is then there to read.
        state = RunState.LOST if run.handle is None else self.executor.state(run.handle)
        self._record(run)
        if state is RunState.RUNNING:
            self._feel_pulse(run)
            return
        outcome = run.run_dir.read_outcome()
        if outcome is None:
            self._start(run)
        elif outcome.status == "failed":
            self._fail(run, outcome.error or "The trainer gave no reason.")
        else:
            self._register(run, outcome)

    def _rest(self, run: _Run) -> None:
        """Lets the trainer of a paused job save a checkpoint and end, then gives the job back."""
        if run.handle is not None and self.executor.state(run.handle) is RunState.RUNNING:
            self.executor.stop(run.handle, self.drain_s)
            return
        self._record(run)
        if run.run_dir.read_outcome() is not None:
            self._watch(run)  # it was about to end
            return
        self.jobs.park(run.claim)
        logger.info("job paused job=%s", run.claim.job.id)
        del self._runs[run.claim.run_id]

    def _start(self, run: _Run) -> None:
        """Starts a trainer, for the first time or again: it goes on from its last checkpoint."""
        reached = (run.recorded_seq, folder.newest_checkpoint(run.run_dir))
        fruitless = run.fruitless + 1 if reached == run.reached else 0
        if fruitless > FRUITLESS_STARTS:
            words = folder.last_words(run.run_dir)
            self._fail(run, f"The trainer ended {fruitless} times without getting further. Its last words: {words}")
            return
        now = self.monotonic()
        if fruitless and now < run.restart_at:
            return
        spec = self._prepare(run)
        if (spec.threads, spec.device) != (self.trainer_threads, self.trainer_device):
            run.company = None  # begun under other settings, which decide its bytes
        # A trainer that died is started again with all its runs together. One that did not get further goes alone, so
        # that it takes no other with it.
        run.handle = self.executor.start(run.run_dir.path, None if fruitless else self._host(run.company))
        run.fruitless, run.restart_at = fruitless, now + min(2.0**fruitless, LONGEST_PAUSE_S)
        run.reached, run.pulse, run.pulse_at = reached, None, now
        run.unnoted = spec.hyperparameters
        logger.info("run started run=%s handle=%s fruitless=%d", run.claim.run_id, run.handle, run.fruitless)
        self._note_start(run)

    def _note_start(self, run: _Run) -> None:
        if run.unnoted is not None and run.handle is not None:
            self.jobs.started(run.claim, run.handle, run.unnoted)
            run.unnoted = None

    def _prepare(self, run: _Run) -> RunSpec:
        """The run folder, ready for a trainer. The spec is written last, and once: a run keeps what it began with."""
        run_dir, job = run.run_dir, run.claim.job
        if run_dir.spec.exists():
            return run_dir.read_spec()
        run_dir.path.mkdir(parents=True, exist_ok=True)
        self.files.fetch(job.training_file, run_dir.training_file)
        if job.validation_file is not None:
            self.files.fetch(job.validation_file, run_dir.validation_file)
        base = self.bases.get(job.base_name)
        start = self.models.resolve_in(job.organization_id, job.parent_name or job.base_name)
        hyperparameters = self.jobs.hyperparameters(job, job.training_examples)
        rank, alpha = hyperparameters.lora_rank, hyperparameters.lora_alpha
        spec = RunSpec(
            run_id=run.claim.run_id,
            job_id=job.id,
            base_dir=str(start.base_dir),
            parent_adapter_dir=None if start.adapter_dir is None else str(start.adapter_dir),
            context_tokens=base.context_tokens,
            hyperparameters=hyperparameters,
            base_learning_rate=base.learning_rate,
            lora_rank=rank,
            lora_alpha=alpha,
            seed=job.seed,
            threads=self.trainer_threads,
            device=self.trainer_device,
            checkpoint_interval_s=self.checkpoint_interval_s,
        )
        run_dir.write_spec(spec)
        return spec

    def _record(self, run: _Run) -> None:
        lines = run.run_dir.read_progress(run.recorded_seq)
        if lines:
            self.jobs.record(run.claim, lines)
            run.recorded_seq = lines[-1].seq

    def _feel_pulse(self, run: _Run) -> None:
        """Ends a trainer whose heartbeat file no longer changes: it is frozen. It is then started again."""
        # Changes of the file are timed by our own monotonic clock, so that setting the machine's clock kills nothing.
        try:
            pulse = run.run_dir.heartbeat.stat().st_mtime_ns
        except FileNotFoundError:
            pulse = None
        now = self.monotonic()
        if pulse != run.pulse:
            run.pulse, run.pulse_at = pulse, now
        elif now - run.pulse_at > self.stalled_after_s and run.handle is not None:
            logger.warning("run stalled for %.0f s run=%s", now - run.pulse_at, run.claim.run_id)
            self.executor.stop(run.handle, 0.0)

    def _register(self, run: _Run, outcome: Outcome) -> None:
        """Makes the adapter a model, if it serves as it trained. The store does so once, however often it is asked."""
        run.trained = True
        if run.at_gate is None:
            if self._gate is not None and not self._gate.done():
                return
            spec = run.run_dir.read_spec()
            run.at_gate = self._gate = self.ask(lambda: self.parity(run.run_dir, spec))
        if not run.at_gate.done():
            return
        answer, run.at_gate = run.at_gate, None
        reason = answer.result()
        if reason is not None:
            self._fail(run, reason)
            return
        self.jobs.succeed(
            run.claim,
            adapter_dir=run.run_dir.adapter,
            results_csv=run.run_dir.results,
            trained_tokens=outcome.trained_tokens,
            snapshots=[(snapshot, folder.adapter) for snapshot, folder in run.run_dir.snapshots()],
            warm=lambda folder: self.warm(Path(run.run_dir.read_spec().base_dir), folder),
        )
        self._part(run)

    def _fail(self, run: _Run, reason: str) -> None:
        run.verdict = reason
        self.jobs.fail(run.claim, reason)
        self._part(run)

    def _part(self, run: _Run) -> None:
        """Forgets a job that is no longer ours; what is left of its run is seen off."""
        del self._runs[run.claim.run_id]
        if run.handle is not None:
            self.executor.stop(run.handle, 0.0)
            self._leaving.append(run.handle)

    def _see_off(self) -> None:
        left = [handle for handle in self._leaving if self.executor.state(handle) is RunState.RUNNING]
        for handle in left:
            self.executor.stop(handle, 0.0)
        if len(left) < len(self._leaving):
            self._leaving = left
            self._tidy()

    def _tidy(self) -> None:
        """Takes from the folders of ended runs what nobody needs any more."""
        self._tidied_at = self.monotonic()
        unpruned = {path.parent.name: RunDir(path.parent) for path in (self.home / "runs").glob("*/train.jsonl")}
        for run_id in self.jobs.ended_runs(unpruned.keys() - self._runs.keys()):
            folder.prune(unpruned[run_id])

    def _survive(self, what: str, step: Callable[[], None]) -> Exception | None:
        """Does `step`; gives back what it raised instead of letting it end the loop over all jobs."""
        try:
            step()
        except LeaseLost as lost:
            return lost
        except Exception as error:
            logger.exception("dispatcher: %s", what)
            return error
        return None


def _reason(error: Exception | None) -> str:
    """Why a job fails that met the same error again and again, in words for its user."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, StorageFull) or number in NO_ROOM:
        return "There is no room on the server's disk: free some, and fine-tune again."
    if number in BROKEN_DISK:
        return "The server's disk can only be read, or gives errors: it has to be mended; then fine-tune again."
    return f"The server could not go on with this run: {type(error).__name__}: {error}"
