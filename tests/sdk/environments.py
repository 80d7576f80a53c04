"""Published clients, unmodified, each in an environment of its own beside these tests; made once, then kept."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INSTALL_WITHIN_S = 300


def python_with(*requirements: str) -> Path:
    """The interpreter of an environment with these and what they need; skips where no registry answers."""
    folder = HERE / ".venvs" / "+".join(requirements).replace("==", "-")
    python, ready = folder / "bin" / "python", folder / ".ready"
    with _one_at_a_time():
        if not ready.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _install([sys.executable, "-m", "venv", str(folder)])
            _install([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
            ready.touch()
    return python


def packages_of(python: Path) -> str:
    """Where the packages of such an environment are, for another interpreter's PYTHONPATH."""
    (folder,) = python.parent.parent.glob("lib/python*/site-packages")
    return str(folder)


def node_modules() -> Path:
    """The folder of tests/sdk, with what its package.json asks for installed; skips without node, npm or registry."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    with _one_at_a_time():
        if not (HERE / "node_modules" / "openai" / "package.json").exists():
            _install(
                ["npm", "install", "--prefix", str(HERE), "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
            )
    return HERE


def client_environment(base_url: str, api_key: str) -> dict[str, str]:
    """What `tunesmith serve` tells to export, in an environment that knows of no other server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "TUNESMITH_"))}
    return kept | {
        "OPENAI_API_BASE": base_url,
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_KEY": api_key,
        "NO_PROXY": "127.0.0.1",
        "PYTHONWARNINGS": "default",
    }


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Among the processes that run these tests."""
    (HERE / ".venvs").mkdir(exist_ok=True)
    with (HERE / ".venvs" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_WITHIN_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"no registry answered within {INSTALL_WITHIN_S} s: {' '.join(command)}")
    if done.returncode != 0:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
