"""What shells are told to suggest."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Live
from tests.cli.terminal import PROGRAM

ASK_BASH = """
eval "$(tunesmith completion bash)"
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
COMP_WORDS=($1) COMP_CWORD=${#COMP_WORDS[@]}
_python_argcomplete tunesmith 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an executable `tunesmith` that is this one."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "tunesmith"
    script.write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
    script.chmod(0o755)
    return folder


def suggested(live: Live, command: Path, line: str, **variables: str) -> list[str]:
    """What bash would offer after `line`."""
    environment = live.environment | {"PATH": f"{command}:{live.environment['PATH']}"} | variables
    done = subprocess.run(
        ["bash", "-c", ASK_BASH, "bash", line], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [word.strip() for word in done.stdout.splitlines() if word.strip()]


def test_commands_verbs_and_flags(live: Live, command: Path) -> None:
    assert suggested(live, command, "tunesmith jo") == ["jobs"]
    assert set(suggested(live, command, "tunesmith jobs ")) == {
        *("create", "list", "show", "cancel", "pause", "resume", "watch"),
    }
    assert suggested(live, command, "tunesmith api fine_tunes.create --n_ep") == ["--n_epochs"]
    assert suggested(live, command, "tunesmith jobs list -o ") == ["table", "csv", "json"]
    assert suggested(live, command, "tunesmith api d") == []  # all that begin so are refused


def test_ids_come_from_the_server(live: Live, command: Path, tuned: dict[str, Any]) -> None:
    assert tuned["id"] in suggested(live, command, "tunesmith jobs watch ft-")
    assert tuned["id"] in suggested(live, command, "tunesmith api fine_tunes.get -i ft-")
    offered = suggested(live, command, "tunesmith complete -m ada:ft-p")
    # bash takes the colon for the end of a word, and wants what comes after it alone.
    assert tuned["fine_tuned_model"].removeprefix("ada:") in offered


def test_without_a_server_there_are_no_ids_and_no_noise(live: Live, command: Path) -> None:
    nobody = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_BASE": "http://127.0.0.1:9/v1"}
    assert suggested(live, command, "tunesmith jobs watch ft-", **nobody) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_takes_its_script(live: Live, shell: str) -> None:
    script = live.quick("completion", shell).stdout
    assert "tunesmith" in script
    assert live.json("completion", shell) == {"shell": shell, "script": script}
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_completing_needs_nothing_that_takes_time() -> None:
    heavy = ("torch", "sqlalchemy", "starlette", "numpy")
    program = f"import sys, tunesmith.cli.completion\nprint(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
