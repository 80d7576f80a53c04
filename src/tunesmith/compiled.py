"""C++ of ours, compiled once on the machine that runs it, where it has a compiler. Knows compilers, not what it is for.

What was compiled lies in the user's cache folder, under a name that tells source, compiler, flags and processor, and is
loaded from there the next time.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-Wno-psabi"),
    # NaN stays NaN, and loading changes no global state, as it would with -ffast-math.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
REORDERING = ("-fassociative-math", "-freciprocal-math")
"""Sums may be put in another order, so that they can be vectors. Not where numbers may not depend on what is computed
beside them: the same sum may stand in several places of a source."""
COMPILE_WITHIN_S = 120


@cache
def load(source: Path, *included: Path, reordering: bool = True) -> ctypes.CDLL | None:
    """The library of one source file, compiled if need be; None without a compiler, or where it fails, which is logged.

    `included` are the files of ours that it includes; with `reordering` the compiler may do as it likes with sums.

    Calls of its functions let other threads run.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        logger.info("no C++ compiler: what %s does is done by torch's operators, and takes longer", source.name)
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, source, included, REORDERING if reordering else ())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("%s did not compile %s: %s", compiler, source.name, said)
        return None


def _built(compiler: str, source: Path, included: Sequence[Path], more: Sequence[str]) -> Path:
    flags = [*FLAGS, *more, *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_WITHIN_S).stdout
    sources = [path.read_bytes() for path in (source, *included)]
    known_by = b"\0".join([*sources, version, " ".join(flags).encode(), processor().encode()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
    library = folder / f"{source.stem}-{hashlib.sha256(known_by).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Two processes may build at once: the last rename wins.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            beside = Path(scratch) / library.name
            command = [compiler, *flags, str(source), "-o", str(beside)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_WITHIN_S)
            beside.replace(library)
    return library


def processor() -> str:
    """What -march=native depends on: folders of users are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
