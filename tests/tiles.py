"""Tests of code that multiplies tiles of bf16: skipped where compiler or processor have none, and only there.

They are asked here and not the code under test: where that fails to compile, its tests are to fail.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tunesmith import compiled

MACROS = ("__AMX_BF16__", "__AVX512BF16__")
"""What a compiler that builds for this processor defines."""


def _here() -> bool:
    compiler = next(filter(None, map(shutil.which, compiled.COMPILERS)), None)
    if compiler is None or sys.platform != "linux":
        return False
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    return all(macro in found for macro in MACROS)


needs_tiles = pytest.mark.skipif(not _here(), reason="compiler or processor have no tiles of bf16")
