"""Jobs: what users ask to be trained, and who is at work on it. Knows rows and leases; starts and watches nothing.

A dispatcher works on a job under a lease. Every claim makes the job's `lease` number grow, and every write of a
dispatcher is guarded by that number (a fencing token), so one that was thought dead and comes back writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, and_, bindparam, func, insert, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.core import requests
from tunesmith.core.accounts import Caller
from tunesmith.core.admission import admit
from tunesmith.core.base_fit import chat, check_base, codec, count_all_tokens, count_tokens
from tunesmith.core.bases import Bases
from tunesmith.core.blobs import read_chunks
from tunesmith.core.events import Events
from tunesmith.core.files import DELETED, FINE_TUNE, FINE_TUNE_RESULTS, File, Files
from tunesmith.core.job_rows import Job, job_from_row, with_files
from tunesmith.core.models import Model, Models
from tunesmith.core.notices import Notice, about_job
from tunesmith.core.outlook import Outlook, outlook
from tunesmith.core.queue import queue
from tunesmith.core.requests import FineTuneRequest
from tunesmith.core.schema import jobs, organizations
from tunesmith.core.statuses import ENDED, MOVES, JobStatus
from tunesmith.core.store import Store
from tunesmith.core.trackings import insert_trackings
from tunesmith.core.usage import Ledger
from tunesmith.data.sample import Sample
from tunesmith.errors import InvalidRequest, LeaseLost, NotFound
from tunesmith.rundir import ProgressLine, ResolvedHyperparameters, Snapshot

__all__ = ["MOVES", "Claim", "FineTuneRequest", "Job", "JobStatus", "Jobs"]

RESULTS_FILENAME = "compiled_results.csv"
INTERRUPTED = "Training was interrupted and goes on from what it had saved"
"""Said for each trainer after the first: of one that died, or was stopped with the server."""

_PAUSED = jobs.c.paused_unix.is_not(None)
_ABANDONED = and_(
    jobs.c.status == JobStatus.RUNNING,
    ~_PAUSED,
    or_(jobs.c.lease_holder.is_(None), jobs.c.lease_expires_unix <= bindparam("now")),
)
"""Work of nobody any more, as far as is known `now`."""
_AWAITED = select(jobs.c.id).where(or_(and_(jobs.c.status == JobStatus.PENDING, ~_PAUSED), _ABANDONED)).limit(1)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on a job until the lease runs out."""

    job: Job
    lease: int
    """Fencing token: grows with every claim."""
    run_id: str
    """The same for every claim of the job."""
    handle: str | None
    """What an executor returned to an earlier dispatcher."""
    progress_seq: int
    """Progress lines up to here are recorded."""


class Jobs:
    """The jobs of all organisations."""

    def __init__(
        self, store: Store, files: Files, models: Models, bases: Bases, events: Events, concurrent_runs: int = 1
    ) -> None:
        """`concurrent_runs` is how many jobs train at once, for estimates."""
        self._concurrent_runs = concurrent_runs
        self._store = store
        self._files = files
        self._models = models
        self._bases = bases
        self._events = events
        self._ledger = Ledger(store)

    # For users

    def create(self, caller: Caller, request: FineTuneRequest) -> Job:
        """Check everything, then make a pending job and its first events: what the doctor finds in the data is one.

        Raises InvalidRequest naming the field for hyperparameters out of bounds, an unknown or unfit file, rows that
        are too long, flags that contradict the data, and a base that cannot be trained here; NotFound for a model that
        is unknown or whose base is not here. Then nothing was made.
        """
        requests.check(request)
        with self._store.reading() as connection:
            model, training, validation = self._named(connection, caller, request)
        if model.method is not None:
            request = requests.go_on_from(requests.Start(model.name, model.method), request)
        check_base(request, model.base_name, self._bases.folder(model.base_name))
        training_examples, notices = self._admit(request, model, training, validation)
        cost_usd = self._cost_usd(request, model, training, training_examples)
        job_id = self._store.new_id(request.job_prefix)
        now = int(self._store.clock())
        with self._store.transaction() as connection:
            self._named(connection, caller, request)  # again: what was deleted meanwhile is unknown now
            connection.execute(
                insert(jobs).values(
                    id=job_id,
                    organization_id=caller.organization_id,
                    key_id=caller.key_id,
                    model=request.model,
                    base_name=model.base_name,
                    parent_name=None if model.adapter_dir is None else model.name,
                    status=JobStatus.PENDING,
                    created_unix=now,
                    updated_unix=now,
                    asked=asdict(request),
                    training_file_id=training.id,
                    validation_file_id=None if validation is None else validation.id,
                    training_examples=training_examples,
                    cost_usd=cost_usd,
                    seed=requests.DEFAULT_SEED if request.seed is None else request.seed,
                    lease=0,
                    progress_seq=0,
                )
            )
            if request.alias is not None:
                self._models.take_alias(connection, caller.organization_id, request.alias, job_id)
            insert_trackings(connection, job_id, len(request.integrations))
            self._events.append(connection, job_id, "info", f"Created fine-tune: {job_id}")
            for notice in notices:
                self._events.append(connection, job_id, "warn", notice.message, notice.data)
            return self._get(connection, caller, job_id)

    def get(self, caller: Caller, job_id: str) -> Job:
        """Raises NotFound for an id that is unknown or another organisation's."""
        with self._store.reading() as connection:
            return self._get(connection, caller, job_id)

    def cancel(self, caller: Caller, job_id: str) -> Job:
        """End a job at once; its dispatcher finds the lease gone. Raises NotFound, InvalidRequest if it has ended."""
        with self._store.transaction() as connection:
            status = self._get(connection, caller, job_id).status
            if status in ENDED:
                raise InvalidRequest(
                    f"{job_id} has ended already: it is {status}. Only pending or running fine-tunes can be cancelled.",
                    param="id",
                )
            self._move(connection, job_id, JobStatus.CANCELLED)
            self._events.append(connection, job_id, "info", "Fine-tune cancelled")
            return self._get(connection, caller, job_id)

    def pause(self, caller: Caller, job_id: str) -> Job:
        """Let a job rest: a trainer at work saves a checkpoint and ends, a pending job leaves the queue.

        A job that rests already stays as it is. Raises NotFound, InvalidRequest if it has ended.
        """
        return self._rest(caller, job_id, at_unix=self._now(), message="Fine-tune paused")

    def resume(self, caller: Caller, job_id: str) -> Job:
        """Let a paused job go on from where it was; one that is not paused stays as it is.

        Raises NotFound, InvalidRequest if it has ended.
        """
        return self._rest(caller, job_id, at_unix=None, message="Fine-tune resumed")

    def checkpoints(self, caller: Caller, job_id: str) -> list[Model]:
        """The epochs of a job that became models of their own, newest first. Raises NotFound."""
        with self._store.reading() as connection:
            self._get(connection, caller, job_id)
            return self._models.checkpoints(connection, job_id)

    def outlook(self, job: Job) -> Outlook:
        """When a job that has not ended is likely to start and to end."""
        with self._store.reading() as connection:
            found = outlook(connection, now_unix=self._now(), slots=self._concurrent_runs)
        return found.get(job.id, Outlook(None, None))

    def hyperparameters(self, job: Job, n_examples: int) -> ResolvedHyperparameters:
        """What the job trains with: as asked, defaults filled in."""
        return requests.resolve(job.asked, n_examples, job.parent_name)

    def look(self, job_id: str) -> Job:
        """A job that is there, for work on behalf of its organisation."""
        with self._store.reading() as connection:
            return self._one(connection, job_id)

    # For the dispatcher

    def awaited(self) -> bool:
        """Whether there is a job for `enqueue` or `claim`. Waits for no writer; both of them do."""
        with self._store.reading() as connection:
            return connection.scalar(_AWAITED, {"now": self._store.clock()}) is not None

    def enqueue(self) -> None:
        """Tell pending jobs their place: how many pending jobs are before each. Says nothing where nothing changed."""
        with self._store.transaction() as connection:
            self._announce(connection)

    def claim(self, holder: str, lease_s: float, fits: Callable[[Job], bool] = lambda job: True) -> Claim | None:
        """Take a job for `lease_s` seconds; None if there is none, or if the one whose turn it is does not fit.

        Running jobs that nobody holds any more come first, oldest first; then pending ones, an organisation's oldest
        at a time, the organisation first whose last turn is longest ago. None is passed over because one behind it
        fits: it would wait for ever.
        """
        with self._store.transaction() as connection:
            self._announce(connection)
            job_id = self._abandoned(connection)
            if job_id is None:
                job_id = self._start_next(connection, fits)
            elif not fits(self._one(connection, job_id)):
                return None
            if job_id is None:
                return None
            connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id)
                .values(
                    lease=jobs.c.lease + 1,
                    lease_holder=holder,
                    lease_expires_unix=self._store.clock() + lease_s,
                    run_id=func.coalesce(jobs.c.run_id, self._store.new_id("run-")),
                )
            )
            row = connection.execute(with_files(jobs.c.id == job_id)).mappings().one()
            return Claim(
                job=job_from_row(row),
                lease=row[jobs.c.lease],
                run_id=row[jobs.c.run_id],
                handle=row[jobs.c.handle],
                progress_seq=row[jobs.c.progress_seq],
            )

    def started(self, claim: Claim, handle: str, hyperparameters: ResolvedHyperparameters) -> None:
        """Note the executor's handle; the first time, also what the job trains with, later an interruption.

        Raises LeaseLost.
        """
        job_id = claim.job.id
        with self._store.transaction() as connection:
            row = connection.execute(select(jobs.c.hyperparameters, jobs.c.handle).where(jobs.c.id == job_id)).one()
            self._held(connection, claim, handle=handle, updated_unix=self._now())
            if row.hyperparameters is None:
                self._held(connection, claim, hyperparameters=asdict(hyperparameters), started_unix=self._now())
                self._events.append(connection, job_id, "info", "Fine-tune started")
            elif row.handle is not None:  # after a pause there is none, and an event has told of it
                self._events.append(connection, job_id, "warn", INTERRUPTED)

    def heartbeat(self, claim: Claim, lease_s: float) -> bool:
        """Hold the job for at least three quarters of `lease_s` seconds from now; whether it is to rest (see `park`).

        Cheap, so that it can be called often and a cancellation is soon seen: it writes four times a lease at most.
        Raises LeaseLost.
        """
        columns = select(jobs.c.lease_expires_unix, jobs.c.paused_unix)
        with self._store.reading() as connection:
            row = connection.execute(columns.where(*_held_by(claim))).one_or_none()
        now = self._store.clock()
        # A lease that ends later than any lease could is of a clock that has been set back: nobody could take it over.
        if row is None or not now + 0.75 * lease_s <= row.lease_expires_unix <= now + lease_s:
            with self._store.transaction() as connection:
                self._held(connection, claim, lease_expires_unix=now + lease_s)
        return row is not None and row.paused_unix is not None

    def park(self, claim: Claim) -> None:
        """Give a paused job back, its trainer being gone; nobody claims it until it is resumed. Raises LeaseLost."""
        with self._store.transaction() as connection:
            self._held(connection, claim, handle=None, **_NOBODY)

    def record(self, claim: Claim, lines: Sequence[ProgressLine]) -> None:
        """Turn the trainer's lines into events, each once: lines recorded before are passed over. Raises LeaseLost."""
        job_id = claim.job.id
        with self._store.transaction() as connection:
            self._held(connection, claim)
            recorded = connection.scalars(select(jobs.c.progress_seq).where(jobs.c.id == job_id)).one()
            new = [line for line in lines if line.seq > recorded]
            for line in new:
                self._events.append(connection, job_id, line.level, line.message, line.data, line.kind)
            if new:
                self._held(connection, claim, progress_seq=new[-1].seq, updated_unix=self._now())

    def succeed(
        self,
        claim: Claim,
        *,
        adapter_dir: Path,
        results_csv: Path,
        trained_tokens: int,
        snapshots: Sequence[tuple[Snapshot, Path]] = (),
        warm: Callable[[Path], None] = lambda folder: None,
    ) -> Job:
        """Make the adapter a model and the results a file, and end the job, all or nothing.

        `warm` is called with the folder where the model will be, before anybody can ask for it.

        `snapshots` are the epochs that become models too, with their adapters. All is copied, so that after a crash it
        can be done again. Raises LeaseLost and StorageFull: then nothing of it is left.
        """
        with ExitStack() as undo:
            kept = []
            for folder in (adapter_dir, *(folder for _, folder in snapshots)):
                kept.append(self._models.keep(folder))
                undo.callback(self._models.discard, kept[-1])
            model_id, checkpoint_ids = kept[0], kept[1:]
            checkpoints = {one: snapshot for one, (snapshot, _) in zip(checkpoint_ids, snapshots, strict=True)}
            file_id, size_bytes = self._files.keep(read_chunks(results_csv))
            undo.callback(self._files.discard, file_id)
            warm(self._models.folder(model_id))
            try:
                with self._store.transaction() as connection:
                    self._held(connection, claim)
                    ended = self._register(
                        connection, claim.job, model_id, checkpoints, file_id, size_bytes, trained_tokens
                    )
            except SQLAlchemyError:
                undo.pop_all()  # whether the commit took place is not known: the sweeps find out
                raise
            undo.pop_all()
            return ended

    def fail(self, claim: Claim, error: str) -> None:
        """End the job with one sentence for the user. Raises LeaseLost."""
        with self._store.transaction() as connection:
            self._held(connection, claim)
            self._fail(connection, claim.job.id, error)

    def release(self, claim: Claim) -> None:
        """Give the lease back; the job stays running and the next claim takes it up. Nothing happens if it is lost."""
        with self._store.transaction() as connection:
            connection.execute(update(jobs).where(*_held_by(claim)).values(_NOBODY))

    def release_all(self, holder: str) -> None:
        """Give back every lease of `holder`, for its successor to claim."""
        with self._store.transaction() as connection:
            connection.execute(update(jobs).where(jobs.c.lease_holder == holder).values(_NOBODY))

    def ended_runs(self, run_ids: Collection[str]) -> set[str]:
        """Those of `run_ids` whose job has ended: nobody will work in their folders again."""
        query = select(jobs.c.run_id).where(jobs.c.run_id.in_(run_ids), jobs.c.status.in_(ENDED))
        with self._store.reading() as connection:
            return {run_id for run_id in connection.scalars(query) if run_id is not None}

    def list(self, caller: Caller) -> list[Job]:
        """The organisation's jobs, oldest first."""
        query = with_files(jobs.c.organization_id == caller.organization_id).order_by(jobs.c.position)
        with self._store.reading() as connection:
            return [job_from_row(row) for row in connection.execute(query).mappings()]

    def _rest(self, caller: Caller, job_id: str, *, at_unix: int | None, message: str) -> Job:
        with self._store.transaction() as connection:
            job = self._get(connection, caller, job_id)
            if job.status in ENDED:
                raise InvalidRequest(
                    f"{job_id} has ended already: it is {job.status}. Only pending or running fine-tunes can be paused "
                    "and resumed.",
                    param="id",
                )
            if job.paused == (at_unix is None):
                paused = {"paused_unix": at_unix, "updated_unix": self._now()}
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(paused))
                self._events.append(connection, job_id, "info", message)
            return self._get(connection, caller, job_id)

    def _named(
        self, connection: Connection, caller: Caller, request: FineTuneRequest
    ) -> tuple[Model, File, File | None]:
        """What the request names, all of it there and of the right kind."""
        training = self._data(connection, caller, "training_file", request.training_file)
        validation = None
        if request.validation_file is not None:
            validation = self._data(connection, caller, "validation_file", request.validation_file)
        return self._models.find(connection, caller.organization_id, request.model), training, validation

    def _data(self, connection: Connection, caller: Caller, param: str, file_id: str) -> File:
        try:
            file = self._files.find(connection, caller, file_id)
        except NotFound as error:
            raise InvalidRequest(
                f"No such File object: {file_id}. Upload the file with purpose `{FINE_TUNE}`, then give its id as "
                f"{param}.",
                param=param,
            ) from error
        if file.purpose != FINE_TUNE:
            raise InvalidRequest(
                f"{param} {file_id} was uploaded with purpose `{file.purpose}`; training data has purpose "
                f"`{FINE_TUNE}`. Upload it again with that purpose.",
                param=param,
            )
        return file

    def _admit(
        self, request: FineTuneRequest, model: Model, training: File, validation: File | None
    ) -> tuple[int, tuple[Notice, ...]]:
        """How many training examples there are, and what the doctor says of the first of them."""
        folder = self._bases.folder(model.base_name)
        trained, tried = Sample(), None if validation is None else Sample()
        training_examples = admit(
            request,
            trained.of(self._files.examples(training, chat(folder))),
            None if validation is None or tried is None else tried.of(self._files.examples(validation, chat(folder))),
            count_tokens=lambda example: count_tokens(folder, example),
            limit_tokens=self._bases.get(model.base_name).context_tokens,
            encode=codec(folder).encode,
        )
        return training_examples, about_job(trained, tried, codec(folder))

    def _cost_usd(self, request: FineTuneRequest, model: Model, training: File, training_examples: int) -> float:
        """Price times tokens of the training file times epochs. The tokens are counted only where there is a price."""
        base = self._bases.get(model.base_name)
        if base.price_per_1k_training_tokens == 0:
            return 0.0
        folder = self._bases.folder(base.name)
        tokens = count_all_tokens(folder, self._files.examples(training, chat(folder)))
        epochs = requests.resolve(request, training_examples).n_epochs
        return base.price_per_1k_training_tokens * tokens * epochs / 1_000

    def _get(self, connection: Connection, caller: Caller, job_id: str) -> Job:
        query = with_files(jobs.c.id == job_id, jobs.c.organization_id == caller.organization_id)
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFound(f"No such fine-tune: {job_id}", param="id")
        return job_from_row(row)

    def _announce(self, connection: Connection) -> None:
        for number, waiting in enumerate(queue(connection)):
            if waiting.queue_number == number:
                continue
            if waiting.queue_number is None:
                self._events.append(connection, waiting.job_id, "info", f"Fine-tune costs ${waiting.cost_usd:,.2f}")
                message = f"Fine-tune enqueued. Queue number: {number}"
            else:
                message = f"Fine-tune is in the queue. Queue number: {number}"
            self._events.append(connection, waiting.job_id, "info", message)
            connection.execute(update(jobs).where(jobs.c.id == waiting.job_id).values(queue_number=number))

    def _abandoned(self, connection: Connection) -> str | None:
        oldest = select(jobs.c.id).where(_ABANDONED).order_by(jobs.c.position).limit(1)
        return connection.scalar(oldest, {"now": self._store.clock()})

    def _one(self, connection: Connection, job_id: str) -> Job:
        return job_from_row(connection.execute(with_files(jobs.c.id == job_id)).mappings().one())

    def _start_next(self, connection: Connection, fits: Callable[[Job], bool]) -> str | None:
        """Move the first pending job of the queue to running; jobs on the way that have lost their data fail."""
        for waiting in queue(connection):
            job = self._one(connection, waiting.job_id)
            gone = [file for file in (job.training_file, job.validation_file) if file and file.status == DELETED]
            if gone:
                self._fail(
                    connection,
                    job.id,
                    f"The file {gone[0].id} ({gone[0].filename}) was deleted before training began. Upload it again "
                    "and create a new fine-tune.",
                )
                continue
            if not fits(job):
                return None
            turns = select(func.max(organizations.c.last_turn) + 1).scalar_subquery()
            connection.execute(
                update(organizations).where(organizations.c.id == job.organization_id).values(last_turn=turns)
            )
            self._move(connection, job.id, JobStatus.RUNNING)
            return job.id
        return None

    def _register(
        self,
        connection: Connection,
        job: Job,
        model_id: str,
        checkpoints: Mapping[str, Snapshot],
        file_id: str,
        size_bytes: int,
        trained_tokens: int,
    ) -> Job:
        self._files.insert(
            connection,
            file_id,
            organization_id=job.organization_id,
            filename=RESULTS_FILENAME,
            purpose=FINE_TUNE_RESULTS,
            size_bytes=size_bytes,
        )
        name = self._models.insert(
            connection,
            model_id,
            organization_id=job.organization_id,
            job_id=job.id,
            base_name=job.base_name,
            parent_name=job.parent_name,
            suffix=job.asked.suffix,
        )
        for checkpoint_id, snapshot in checkpoints.items():
            self._models.insert_checkpoint(connection, checkpoint_id, of=name, snapshot=snapshot)
        key_id = connection.scalars(select(jobs.c.key_id).where(jobs.c.id == job.id)).one()
        self._ledger.record(connection, key_id, name, trained_tokens=trained_tokens)
        for message in (f"Uploaded model: {name}", f"Uploaded result file: {file_id}", "Fine-tune succeeded"):
            self._events.append(connection, job.id, "info", message)
        self._move(
            connection,
            job.id,
            JobStatus.SUCCEEDED,
            fine_tuned_model=name,
            result_file_id=file_id,
            trained_tokens=trained_tokens,
        )
        return job_from_row(connection.execute(with_files(jobs.c.id == job.id)).mappings().one())

    def _fail(self, connection: Connection, job_id: str, error: str) -> None:
        self._move(connection, job_id, JobStatus.FAILED, error=error)
        self._events.append(connection, job_id, "error", f"Fine-tune failed. {error}")

    def _move(self, connection: Connection, job_id: str, to: JobStatus, **values: object) -> None:
        """The one place where a status changes. Nobody holds a job that has just started or ended."""
        if to in ENDED:
            values |= {"finished_unix": self._now(), "paused_unix": None}
        origins = [status for status, targets in MOVES.items() if to in targets]
        changed = connection.execute(
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.status.in_(origins))
            .values(_NOBODY | values | {"status": to, "updated_unix": self._now()})
        ).rowcount
        assert changed == 1, f"{job_id} cannot become {to}"  # callers have looked, within this transaction

    def _held(self, connection: Connection, claim: Claim, **values: object) -> None:
        """Write under the lease. Raises LeaseLost if another claim, a cancellation or an ending has taken it."""
        guarded = update(jobs).where(*_held_by(claim)).values({"lease": claim.lease} | values)
        if not connection.execute(guarded).rowcount:
            raise LeaseLost(f"The lease {claim.lease} on {claim.job.id} is lost: nothing was written.")

    def _now(self) -> int:
        return int(self._store.clock())


_NOBODY: dict[str, object] = {"lease_holder": None, "lease_expires_unix": None}


def _held_by(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    # A holder means the job is running: the table has a constraint.
    return jobs.c.id == claim.job.id, jobs.c.lease == claim.lease, jobs.c.lease_holder.is_not(None)
