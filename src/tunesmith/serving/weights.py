"""Weights of models on their way out and in: packed, merged, checked by the engine that will serve them."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
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

Kind = Literal["adapter", "merged"]
PACKED_AT_ONCE = 2
"""Exports under way; each may hold the weights of a base in memory."""


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
    async def exported(self, ref: ModelRef, kind: Kind | None) -> AsyncGenerator[IO[bytes], None]:
        """A zip of the model, read from its start: its adapter in PEFT's format, or a checkpoint that needs no adapter.

        Without `kind`, what was trained. Raises InvalidRequest where the model has no adapter, or none that can be
        merged here.
        """
        whole = ref.adapter_dir is None or holds_all_weights(ref.adapter_dir)
        if whole and kind == "adapter":
            raise InvalidRequest(
                f"`{ref.name}` has no adapter: it is all weights. Ask for format merged.", param="format"
            )
        async with self._packing:
            with tempfile.TemporaryFile(dir=self._spool) as package:
                if whole:
                    await run_in_threadpool(packages.pack, ref.adapter_dir or ref.base_dir, package)
                elif kind == "merged":
                    with tempfile.TemporaryDirectory(dir=self._spool) as folder:
                        await _merge(ref, Path(folder))
                        await run_in_threadpool(packages.pack, Path(folder), package)
                else:
                    assert ref.adapter_dir is not None
                    await run_in_threadpool(packages.pack, ref.adapter_dir, package)
                package.seek(0)
                yield package

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
            reason = str(error).replace(str(folder), "it").replace(str(base_dir), base_dir.name)
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


async def _merge(ref: ModelRef, folder: Path) -> None:
    command = [sys.executable, "-m", "tunesmith.decoder.export", str(ref.base_dir), str(ref.adapter_dir), str(folder)]
    done = await anyio.run_process(command, check=False)
    if done.returncode == 1 and done.stderr.count(b"\n") == 1:  # a sentence; more lines are a fault of ours
        raise InvalidRequest(
            f"`{ref.name}` cannot be merged: {done.stderr.decode().strip()}. Ask for format adapter.", param="format"
        )
    if done.returncode != 0:
        raise RuntimeError(f"the export of {ref.name} ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
