"""Weights of models on their way out and in: packed, merged, checked by the engine that will serve them."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import anyio
import anyio.to_thread
from starlette.concurrency import run_in_threadpool

from tunesmith.core import packages
from tunesmith.core.accounts import Caller
from tunesmith.core.models import Model, ModelRef, Models
from tunesmith.engine.base import Engine, GenerateRequest, SampledToken, SamplingParams
from tunesmith.errors import InvalidRequest
from tunesmith.rundir import holds_all_weights

Kind = Literal["adapter", "merged", "gguf"]
Precision = Literal["f32", "bf16", "q8_0"]
PACKED_AT_ONCE = 2
"""Exports under way; each may hold the weights of a base in memory."""


@dataclass(frozen=True, slots=True)
class Form:
    """What to export a model as."""

    kind: Kind | None = None
    """An adapter in PEFT's format; a checkpoint that needs no adapter; llama.cpp's GGUF. None: what was trained."""
    precision: Precision | None = None
    """Of GGUF, and of nothing else."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A model on its way out."""

    content: IO[bytes]
    """A zip, or a GGUF file; to be read from where it stands."""
    checked: str = ""
    """A sentence: what its numbers were held against, and how far they are from the model's."""


class Weights:
    """Exports and imports. For one event loop."""

    def __init__(self, models: Models, engine: Engine, *, spool: Path, limit_bytes: int) -> None:
        """`spool`: a folder for packages on their way; `limit_bytes` bounds an imported model."""
        self._models = models
        self._engine = engine
        self._spool = spool
        self._limit_bytes = limit_bytes
        self._packing = anyio.CapacityLimiter(PACKED_AT_ONCE)

    @asynccontextmanager
    async def exported(self, ref: ModelRef, form: Form) -> AsyncGenerator[Exported, None]:
        """The model as one file.

        Raises InvalidRequest where the model has no adapter, or cannot be merged or written as GGUF here.
        """
        whole = ref.adapter_dir is None or holds_all_weights(ref.adapter_dir)
        if whole and form.kind == "adapter":
            raise InvalidRequest(
                f"`{ref.name}` has no adapter: it is all weights. Ask for format merged.", param="format"
            )
        async with self._packing:
            with tempfile.TemporaryDirectory(dir=self._spool) as beside:
                out = Path(beside) / "model"
                folder, said = ref.adapter_dir or ref.base_dir, ""
                if form.kind == "gguf" or (form.kind == "merged" and not whole):
                    said = await _export(ref, out, form.precision)
                    folder = out
                if form.kind == "gguf":
                    with out.open("rb") as written:
                        yield Exported(written, said)
                    return
                with tempfile.TemporaryFile(dir=self._spool) as package:
                    await run_in_threadpool(packages.pack, folder, package)
                    package.seek(0)
                    yield Exported(package)

    async def imported(self, caller: Caller, package: IO[bytes], base_name: str, suffix: str | None) -> Model:
        """Makes a model of a zip, once the engine has loaded it and it says numbers.

        Raises InvalidRequest for a package that is none (`core.packages.unpack`), a base that is none, and a model that
        does not fit it.
        """
        base = await run_in_threadpool(self._models.resolve, caller, base_name)
        if base.adapter_dir is not None:
            raise InvalidRequest(
                f"model must be the base that the weights are for; `{base_name}` is a tuned model.", param="model"
            )
        with tempfile.TemporaryDirectory(dir=self._spool) as beside:
            folder = Path(beside) / "model"
            await run_in_threadpool(packages.unpack, package, folder, limit_bytes=self._limit_bytes)
            await self._try(base.base_dir, folder)
            return await run_in_threadpool(self._models.adopt, caller, folder, base_name, suffix)

    async def _try(self, base_dir: Path, folder: Path) -> None:
        try:
            handle = await self._engine.load(base_dir, folder)
        except ValueError as error:
            reason = (
                str(error).replace(f"{folder}/", "").replace(str(folder), "it").replace(str(base_dir), base_dir.name)
            )
            raise InvalidRequest(f"The model does not fit its base: {reason}.", param="file") from error
        try:
            sampling = SamplingParams(max_tokens=1, temperature=0.0)
            tokens = self._engine.generate(GenerateRequest(handle, (0,), sampling, top_logprobs=0))
            scores = [token.score.logprob async for token in tokens if isinstance(token, SampledToken)]
        finally:
            await self._engine.unload(handle)
        if any(score is None or not math.isfinite(score) for score in scores):
            raise InvalidRequest(
                "The model says no numbers: its weights hold infinities or what is no number.", param="file"
            )


async def _export(ref: ModelRef, out: Path, precision: Precision | None) -> str:
    """Has a model written whole, as GGUF if it is of a precision; what it was held against."""
    whole = ref.adapter_dir is not None and holds_all_weights(ref.adapter_dir)
    command = [
        sys.executable,
        "-m",
        "tunesmith.decoder.export",
        str(ref.adapter_dir if whole else ref.base_dir),
        str(out),
    ]
    if ref.adapter_dir is not None and not whole:
        command += ["--adapter", str(ref.adapter_dir)]
    if precision is not None:
        command += ["--gguf", precision, "--tokenizer", str(ref.base_dir), "--name", ref.name]
    done = await anyio.run_process(command, check=False)
    if done.returncode == 1 and done.stderr.count(b"\n") == 1:  # a sentence; more lines are a fault of ours
        form = "merged" if precision is None else "written as GGUF"
        raise InvalidRequest(f"`{ref.name}` cannot be {form}: {done.stderr.decode().strip()}.", param="format")
    if done.returncode != 0:
        raise RuntimeError(f"the export of {ref.name} ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
    return done.stdout.decode().strip()
