"""Settings of one server process: the environment, read once, typed; what does not parse stops with a sentence."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

PREFIX = "TUNESMITH_"
BOUNDS: dict[str, tuple[float, float]] = {
    "port": (0, 65_535),
    "max_upload_bytes": (1, math.inf),
    "max_concurrent_runs": (1, math.inf),
    "jobs_per_run": (1, math.inf),
    "trainer_threads": (1, math.inf),
    "trainer_niceness": (0, 19),
    "engine_threads": (1, math.inf),
    "max_resident_adapters": (1, math.inf),
    "max_resident_full_models": (1, math.inf),
    "max_sequences": (1, math.inf),
    "lease_s": (1, 86_400),
    "checkpoint_interval_s": (0, 86_400),
    "heartbeat_s": (0.1, 300),  # clients give up after 600 s of silence
}
"""Least and most of every setting that is a number."""
CHOICES = {"engine_precision": ("float32", "bfloat16", "int8")}
"""Of settings that are one of a few words."""
DEVICES = ("trainer_device", "engine_device")
"""Settings that name one: `cpu`, `cuda` (the first there is), `cuda:1`."""


def _default_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Settings:
    """Each field is read from `TUNESMITH_<FIELD>` in capitals, for example `TUNESMITH_HOME`."""

    home: Path = field(default_factory=lambda: Path.home() / ".tunesmith")
    """Where everything is kept: database, files, runs, adapters, unpacked bases."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback needs `owner_key`, so that no default key guards a network."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    owner_key: str | None = None
    """The owner's API key. Absent: the first start makes one and writes it to `<home>/owner.key`."""
    organization: str = "personal"
    """Title of the organisation that the first start creates; it stands in the names of tuned models."""
    database_url: str | None = None
    """SQLAlchemy URL. Absent: SQLite in `<home>/tunesmith.db`."""
    blobs_url: str | None = None
    """Where uploaded and result bytes live: a folder or an object store URL. Absent: `<home>/files`."""
    max_upload_bytes: int = 1_000_000_000
    """Largest file accepted."""
    max_concurrent_runs: int = 1
    """How many trainer processes work at once. Each has one job, or several small ones: see `jobs_per_run`."""
    jobs_per_run: int = 16
    """How many small jobs of one base one trainer trains together, step by step; 1: each has a trainer of its own."""
    trainer_threads: int = field(default_factory=_default_threads)
    """CPU threads of one trainer process."""
    trainer_device: str = "cpu"
    """Where jobs are trained: `cpu`, `cuda` or, of several, `cuda:1`. On a GPU a Llama's products are of bf16."""
    trainer_niceness: int = 10
    """Scheduling niceness of trainer processes, so that answering comes before training."""
    engine: str = "embedded"
    """`embedded` (torch, in a process of its own) or `scripted` (fixed answers, for tests of clients)."""
    engine_threads: int = field(default_factory=_default_threads)
    """CPU threads of the engine process."""
    engine_device: str = "cpu"
    """Where answers are computed: as `trainer_device`. There `bfloat16` is right to about 0.02 nats, and no `int8`."""
    engine_precision: str = "float32"
    """`float32`; `bfloat16` (to 0.01 nats) and `int8` (0.03): up to 3 times as fast, with AMX or AVX512-BF16 more."""
    max_resident_adapters: int = 64
    """Adapters kept in memory; the least recently used make room."""
    max_sequences: int = 16_384
    """Completions under way at a time, `n` and `best_of` counted; past that: 429. An eighth is for keys with none."""
    max_resident_full_models: int = 4
    """Models with all weights tuned kept in memory; the least recently used make room. Each is as large as its base."""
    lease_s: float = 60.0
    """How long a dispatcher may be silent before another may take over its job."""
    checkpoint_interval_s: float = 30.0
    """At most this much training is lost to a crash."""
    heartbeat_s: float = 15.0
    """Pause between keep-alive comments on event streams."""
    offline: bool = False
    """Refuse `tunesmith models pull`, the one command that downloads. The server never does, offline or not."""

    @property
    def database(self) -> str:
        """The database URL in force."""
        return self.database_url or f"sqlite:///{self.home / 'tunesmith.db'}"

    @property
    def blobs(self) -> str:
        """The blob URL in force."""
        given = self.blobs_url or str(self.home / "files")
        return given if "://" in given else Path(given).expanduser().absolute().as_uri()


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Settings from `TUNESMITH_*` variables. Raises ValueError naming the variable for one unknown or unreadable."""
    kinds = {f.name: str(f.type) for f in fields(Settings)}
    values: dict[str, object] = {}
    for name, text in environment.items():
        if not name.startswith(PREFIX):
            continue
        key = name.removeprefix(PREFIX).lower()
        if key not in kinds:
            known = ", ".join(PREFIX + k.upper() for k in kinds)
            raise ValueError(f"{name} is not a setting of tunesmith. Settings are: {known}.")
        try:
            values[key] = _parse(kinds[key], text)
        except ValueError as error:
            raise ValueError(f"{name}={text!r} is not a valid {kinds[key]}: {error}") from error
        value = values[key]
        if key in CHOICES and value not in CHOICES[key]:
            raise ValueError(f"{name}={text} is not known: it is {' or '.join(CHOICES[key])}.")
        if key in DEVICES and re.fullmatch(r"cpu|cuda(:\d+)?", text) is None:
            raise ValueError(f"{name}={text} is no device: it is cpu, cuda or, of several, cuda:1.")
        if (
            key in BOUNDS and isinstance(value, int | float) and not BOUNDS[key][0] <= value <= BOUNDS[key][1]
        ):  # NaN is in no bounds
            raise ValueError(f"{name}={text} is out of bounds: it is from {BOUNDS[key][0]:g} to {BOUNDS[key][1]:g}.")
    if values.get("engine_precision") == "int8" and values.get("engine_device", "cpu") != "cpu":
        raise ValueError(f"{PREFIX}ENGINE_PRECISION=int8 is for processors: with a GPU it is float32 or bfloat16.")
    return Settings(**values)  # type: ignore[arg-type]


def read_flag(text: str) -> bool:
    """A switch in the environment: 1, true, yes or on; 0, false, no, off or empty. Raises ValueError."""
    match text.strip().lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "" | "0" | "false" | "no" | "off":
            return False
        case _:
            raise ValueError("it is 1 or 0")


def _parse(kind: str, text: str) -> object:
    match kind.removesuffix(" | None"):
        case "int":
            return int(text)
        case "float":
            return float(text)
        case "bool":
            return read_flag(text)
        case "Path":
            return Path(text).expanduser().absolute()
        case _:
            return text
