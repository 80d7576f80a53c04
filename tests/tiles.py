"""Tests of code that multiplies bf16: by the processor's tiles or vectors or, where it has none, by emulated tiles.

What the processor has is asked here and not of the code under test: where that fails to compile, its tests are to fail.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tunesmith import compiled
from tunesmith.decoder import packed
from tunesmith.engine import tiled
from tunesmith.training import folded, native, step, whole_step

VECTORS = frozenset({"__AVX512BF16__", "__AVX512VNNI__"})
"""What a compiler that builds for a processor with products of bf16 defines ..."""
TILES_TOO = VECTORS | {"__AMX_BF16__", "__AMX_INT8__"}
"""... where they are of tiles, which the code then takes ..."""
EMULATION = frozenset({"__AVX2__", "__FMA__"})
"""... and what it does where they can be emulated."""
CANNOT = "tiles of bf16 can be emulated with GCC or Clang on x86-64 with AVX2 alone"
TILES = Path(packed.__file__).with_name("tiles.h")
EMULATED = Path(__file__).parent / "native" / "emulated_tiles.h"


@cache
def _macros() -> frozenset[str]:
    """Those of this processor; none without a compiler, or where code for tiles is not compiled."""
    compiler = next(filter(None, map(shutil.which, compiled.COMPILERS)), None)
    if compiler is None or sys.platform != "linux" or platform.machine() != "x86_64":
        return frozenset()
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    return frozenset(line.split()[1] for line in found.splitlines())


def _emulating() -> list[str]:
    version = hashlib.sha256(EMULATED.read_bytes()).hexdigest()[:16]
    return ["-include", str(EMULATED), f"-DEMULATED_TILES=0x{version}"]


def built(source: Path, to: Path, *, vectors: bool) -> ctypes.CDLL:
    """A source of tests, compiled with what the processor has of tiles or vectors, and else emulated."""
    compiler = next(filter(None, map(shutil.which, compiled.COMPILERS)), None)
    has = _macros() >= (VECTORS if vectors else TILES_TOO)
    if compiler is None or not (has or _macros() >= EMULATION):
        pytest.skip(CANNOT)
    flags = [*compiled.FLAGS, *([] if has else _emulating()), *(["-DVECTORS"] if vectors else [])]
    subprocess.run([compiler, *flags, str(source), "-o", str(to)], check=True, timeout=compiled.COMPILE_WITHIN_S)
    return ctypes.CDLL(str(to))


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this process; those that it starts have what the processor has."""
    if _macros() >= VECTORS:
        yield
        return
    if not _macros() >= EMULATION:
        pytest.skip(CANNOT)
    flags = (*compiled.FLAGS, *_emulating())

    @cache
    def load(source: Path, *included: Path, reordering: bool = True) -> ctypes.CDLL | None:
        with monkeypatch.context() as patch:
            if TILES in included:
                patch.setattr(compiled, "FLAGS", flags)
            return compiled_load(source, *included, reordering=reordering)

    compiled_load = compiled.load.__wrapped__
    monkeypatch.setattr(compiled, "load", load)
    monkeypatch.setattr(folded, "multiplies_bf16", lambda: True)
    cached = (packed.library, native.load, step._library, whole_step._library, tiled._library)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


needs_tiles = pytest.mark.usefixtures("tiles")
needs_bf16 = pytest.mark.skipif(not _macros() >= VECTORS, reason="no compiler, or no products of bf16 in the processor")
"""For what other processes do."""
