"""The run folder: the only thing platform and trainer share. Knows names and formats, does no training and no SQL.

A trainer is `python -m tunesmith.training <run folder>...`. It exits 0 once `outcome.json` is written, 75 when SIGTERM
asked it to stop (checkpointed, no outcome: start it again and it goes on), anything else when it died, be it of a disk
without room: then too it goes on when it is started again. It ends with the process whose pid stands in the environment
variable PARENT_PID, by default the one that started it. Of several runs each goes its own way: one can end, be stopped
or fail while the others go on. With ORDERS among its arguments a trainer reads lines from its standard input:

    take <run folder>    train this one too
    save <run folder>    write a checkpoint and let go of the run
    drop <run folder>    let go of the run as it is

The platform writes `spec.json` and the data, then starts a trainer on the folder; the trainer writes the rest:

    spec.json        RunSpec: everything that decides the result
    train.jsonl      the training file, one {"prompt", "completion"} object a line
    valid.jsonl      the validation file, where there is one
    lock             held (flock) by the one trainer that may write here
    progress.jsonl   what the trainer reports: one ProgressLine a line, dense `seq` from 1
    heartbeat        touched while the trainer is alive
    released         there once a trainer of several runs has let go of this one without an outcome
    shortages        a byte for each time memory ran out; the executor adds those that killed the trainer
    kernels          which kernels the run began with, or on which device: it goes on with the same
    checkpoints/     step-<n>/ folders of safetensors + JSON, manifest written last
    epochs/          step-<n>/ folders of adapter/, parity.json and snapshot.json: epochs that become models too
    results.csv      one row a step
    adapter/         adapter_config.json, adapter_model.safetensors (PEFT's format); where all weights were trained, an
                     ordinary checkpoint: config.json, model.safetensors, tokenizer.json
    parity.json      {"rows": [{"token_ids", "completion_start", "logprobs"}]}: rows of the validation (or training)
                     file; `logprobs` are the trainer's own for the tokens from `completion_start` on
    outcome.json     Outcome, written last and renamed into place: no outcome, no success
    trainer.log      the operator's log
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

PARENT_PID = "TRAINER_PARENT_PID"
"""Given from outside, for a parent may die before its child can ask who it is."""
ORDERS = "--orders"
SNAPSHOT = "snapshot.json"
CHECKPOINT_CONFIG = "config.json"
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The system's errors for a disk, a quota or a limit of file size without room: they pass when there is room again."""
BROKEN_DISK = frozenset({errno.EROFS, errno.EIO})
"""Those for a disk that became read-only, or does not do what it is told: they pass when it has been mended."""


@dataclass(frozen=True, slots=True)
class ResolvedHyperparameters:
    """What a run trains with: every default filled in."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    prompt_loss_weight: float
    compute_classification_metrics: bool = False
    classification_n_classes: int | None = None
    """None where no metrics are computed; 2 where only a positive class was given."""
    classification_positive_class: str | None = None
    """None where no metrics are computed, or for more than two classes."""
    classification_betas: tuple[float, ...] = (1.0,)
    method: Literal["lora", "full"] = "lora"
    """Whether an adapter is trained, or all weights."""
    lora_rank: int | None = None
    """Of the adapter; None where training goes on with that of a tuned model, and where all weights are trained."""
    lora_alpha: float | None = None
    """The adapter's products are scaled by alpha / rank; None as for the rank."""
    lora_targets: tuple[str, ...] | None = None
    """What a new adapter covers, by the last part of the names of modules; None: all that it can."""
    best_epoch: bool = False
    """Whether the model is that of the epoch with the lowest validation loss, instead of the last."""
    early_stopping_patience: int | None = None
    """After so many epochs without a lower validation loss training ends; None: never before the last epoch."""
    epoch_checkpoints: int = 0
    """How many of the last epochs become models of their own."""


def steps_of(n_rows: int, n_epochs: int, batch_size: int) -> int:
    """Steps of a run. One epoch follows the other without a break, so that only the last step can be short.

    >>> [steps_of(n_rows, n_epochs=4, batch_size=8) for n_rows in (1, 2, 3, 400)]
    [1, 1, 2, 200]
    """
    return -(-n_rows * n_epochs // batch_size)


def hyperparameters_from_json(values: dict[str, Any]) -> ResolvedHyperparameters:
    """The inverse of `asdict`, where JSON has made lists of tuples."""
    targets = values.get("lora_targets")
    return ResolvedHyperparameters(
        **values
        | {
            "classification_betas": tuple(values["classification_betas"]),
            "lora_targets": None if targets is None else tuple(targets),
        }
    )


@dataclass(frozen=True, slots=True)
class RunSpec:
    """Everything that decides the result of a run. The same spec and data give the same bytes."""

    run_id: str
    job_id: str
    base_dir: str
    """Checkpoint folder of the base model, with its tokenizer.json."""
    parent_adapter_dir: str | None
    """What a model that is already fine-tuned consists of, to go on training from: an adapter, or all weights."""
    context_tokens: int
    hyperparameters: ResolvedHyperparameters
    base_learning_rate: float
    """Peak learning rate = this times `learning_rate_multiplier`."""
    lora_rank: int | None
    """None where a parent adapter has them: rank and alpha are those of the adapter that is trained."""
    lora_alpha: float | None
    seed: int
    threads: int
    checkpoint_interval_s: float
    """0 takes a checkpoint after every step."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the products in training steps; auto: bfloat16 where the device multiplies it, fixed point of 16 bits on a
    processor that does not. All else is float32."""
    device: str = "cpu"
    """Where the model is trained, by torch's name for it: `cpu`, `cuda`, `cuda:1`."""


@dataclass(frozen=True, slots=True)
class ProgressLine:
    """One report of the trainer; becomes one event of the job. A resumed trainer repeats equal lines with equal seq."""

    seq: int
    level: Literal["info", "warn", "error"]
    message: str
    data: dict[str, float] | None = None
    """Numbers for machines, such as {"step": 10, "training_loss": 0.4}."""
    kind: Literal["message", "metrics"] = "message"
    """Metrics are for machines and modern clients; the clients of 2021-2023 are shown messages alone."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The model as it was when an epoch had ended."""

    step: int
    metrics: dict[str, float]
    """Numbers of that step, by the names of the modern service."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. A run that was asked to stop leaves a checkpoint and no outcome: it can be taken up again."""

    status: Literal["succeeded", "failed"]
    error: str | None = None
    """One sentence for the user, when failed."""
    trained_tokens: int = 0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths of one run folder."""

    path: Path

    @property
    def spec(self) -> Path:
        """Written by the platform."""
        return self.path / "spec.json"

    @property
    def training_file(self) -> Path:
        """Written by the platform."""
        return self.path / "train.jsonl"

    @property
    def validation_file(self) -> Path:
        """Written by the platform; may be absent."""
        return self.path / "valid.jsonl"

    @property
    def lock(self) -> Path:
        """Held by the trainer."""
        return self.path / "lock"

    @property
    def progress(self) -> Path:
        """Appended to by the trainer."""
        return self.path / "progress.jsonl"

    @property
    def heartbeat(self) -> Path:
        """Touched by the trainer."""
        return self.path / "heartbeat"

    @property
    def released(self) -> Path:
        """Written by the trainer, removed by the executor."""
        return self.path / "released"

    @property
    def shortages(self) -> Path:
        """Added to by trainer and executor; see `note_shortage`."""
        return self.path / "shortages"

    @property
    def kernels(self) -> Path:
        """Written by the trainer before the first step."""
        return self.path / "kernels"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        """Written by the trainer."""
        return self.path / "results.csv"

    @property
    def epochs(self) -> Path:
        """Folder of the epochs that become models of their own."""
        return self.path / "epochs"

    @property
    def adapter(self) -> Path:
        """Folder of the finished adapter, or of all weights."""
        return self.path / "adapter"

    @property
    def parity(self) -> Path:
        """Written by the trainer before the outcome."""
        return self.path / "parity.json"

    @property
    def outcome(self) -> Path:
        """Written last."""
        return self.path / "outcome.json"

    @property
    def log(self) -> Path:
        """Output of the trainer process."""
        return self.path / "trainer.log"

    def write_spec(self, spec: RunSpec) -> None:
        """Durable before it returns."""
        write_json(self.spec, asdict(spec))

    def read_spec(self) -> RunSpec:
        """Raises ValueError naming a field that is unknown or missing."""
        raw = json.loads(self.spec.read_text())
        known = {f.name for f in fields(RunSpec)}
        if raw.keys() != known:
            raise ValueError(f"{self.spec}: fields differ from RunSpec: {sorted(raw.keys() ^ known)}")
        asked = raw["hyperparameters"]
        return RunSpec(**raw | {"hyperparameters": hyperparameters_from_json(asked)})

    def write_outcome(self, outcome: Outcome) -> None:
        """Durable before it returns; the last thing a trainer does."""
        write_json(self.outcome, asdict(outcome))

    def read_outcome(self) -> Outcome | None:
        """None while the run has not ended."""
        try:
            return Outcome(**json.loads(self.outcome.read_text()))
        except FileNotFoundError:
            return None

    def snapshot(self, step: int) -> RunDir:
        """The folder of the epoch that ended with `step`, laid out as a run folder is."""
        return RunDir(self.epochs / f"step-{step}")

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """In the folder of an epoch: says what is in it. Durable before it returns."""
        write_json(self.path / SNAPSHOT, asdict(snapshot))

    def snapshots(self) -> list[tuple[Snapshot, RunDir]]:
        """The epochs that were kept, in their order, each with its folder."""
        found = [
            (Snapshot(**json.loads((path / SNAPSHOT).read_text())), RunDir(path))
            for path in self.epochs.glob("step-*")
            if not path.suffix  # .tmp is half written
        ]
        return sorted(found, key=lambda pair: pair[0].step)

    def note_shortage(self) -> None:
        """Memory ran out: the next trainer takes smaller micro-batches."""
        with self.shortages.open("ab") as file:
            file.write(b".")

    def count_shortages(self) -> int:
        """How often memory ran out in this run."""
        return self.shortages.stat().st_size if self.shortages.exists() else 0

    def read_progress(self, after_seq: int) -> list[ProgressLine]:
        """Lines with `seq > after_seq`; a last line still being written is left for the next call."""
        try:
            content = self.progress.read_bytes()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        lines = [ProgressLine(**json.loads(line)) for line in whole.splitlines()]
        return [line for line in lines if line.seq > after_seq]


def holds_all_weights(folder: Path) -> bool:
    """Whether a tuned model is a checkpoint of its own, and no adapter on its base."""
    return (folder / CHECKPOINT_CONFIG).is_file()


def write_json(path: Path, value: Any) -> None:
    """Writes beside, syncs and renames, so that a reader sees the old content or the new, whole."""
    write_bytes(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes beside, syncs and renames; the folder entry is durable too when this returns."""
    write_parts(path, [content])


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """`write_bytes` of what is too large to be in memory as a whole."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
