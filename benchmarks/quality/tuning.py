"""A model tuned as a user would have it: a real server, an uploaded file, a job with every hyperparameter left out."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.sets import Row
from tests.e2e.harness import Server, messages, upload, wait_for
from tunesmith.client import Client
from tunesmith.core import box
from tunesmith.core.bases import BOX_LEARNING_RATES, BOX_NAMES
from tunesmith.tokenizer import Tokenizer

LONGEST_JOB_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Tuned:
    """A model that a job has made, and what it took."""

    model: str
    hyperparameters: dict[str, Any]
    trained_tokens: int
    job_s: float
    """From the request to `succeeded`, on the clock of the wall."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base as a server of ours will have it."""

    name: str
    folder: Path | None
    """None: the one in the box."""

    @property
    def digest(self) -> str:
        """Of the weights; twelve hexadecimal digits."""
        folder = self.folder or box.BOX / BOX_NAMES[self.name][0]
        content = hashlib.sha256()
        for path in sorted(folder.glob("*.safetensors")):
            content.update(path.read_bytes())
        return content.hexdigest()[:12]

    @property
    def tokenizer(self) -> Tokenizer:
        """How it reads text."""
        return Tokenizer.from_folder(self.folder or box.BOX)


@contextmanager
def serving(base: BaseModel, threads: int) -> Iterator[Client]:
    """A server with this base, on a home that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-quality-") as folder:
        home = Path(folder)
        if base.folder is not None:
            rate = BOX_LEARNING_RATES[base.name]
            entry = f'[{base.name}]\nfolder = "{base.folder.absolute()}"\nlearning_rate = {rate}\n'
            (home / "bases.toml").write_text(entry)
        settings = {"TUNESMITH_TRAINER_THREADS": str(threads), "TUNESMITH_ENGINE_THREADS": str(threads)}
        with Server(home, settings) as server, server.client() as client:
            yield client


def tune(client: Client, base: str, train: Sequence[Row]) -> Tuned:
    """Uploads, asks for a fine-tune with nothing but file and base, waits for its end."""
    started_s = time.monotonic()
    file_id = upload(client, (asdict(row) for row in train), "train.jsonl")
    job = client.post("fine-tunes", body={"training_file": file_id, "model": base})
    job = wait_for(client, job["id"], within_s=LONGEST_JOB_S)
    if job["status"] != "succeeded":
        raise RuntimeError(f"the fine-tune ended as {job['status']}: {messages(job)[-1]}")
    results = client.content(job["result_files"][0]["id"]).decode().splitlines()
    last = dict(zip(results[0].split(","), results[-1].split(","), strict=True))
    return Tuned(
        model=job["fine_tuned_model"],
        hyperparameters=job["hyperparams"],
        trained_tokens=int(last["elapsed_tokens"]),
        job_s=time.monotonic() - started_s,
    )
