"""The unmodified openai==0.28.1: as a command line and as a library."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.harness import Server
from tests.sdk import flow
from tests.sdk.conftest import N_TRAINING
from tests.sdk.environments import HERE, client_environment
from tests.sdk.flow import CommandLine

pytestmark = pytest.mark.sdk


@pytest.fixture(scope="module")
def cli(python_028: Path, environment: dict[str, str], data: Path) -> CommandLine:
    return CommandLine([str(python_028.parent / "openai")], environment, data)


def test_whole_flow(cli: CommandLine) -> None:
    flow.check_whole_flow(cli, steps=2 * N_TRAINING // 8, training_rows=N_TRAINING)


def test_follow_after_ctrl_c(cli: CommandLine) -> None:
    flow.check_interrupted_follow(cli)


def test_cancel(cli: CommandLine) -> None:
    flow.check_cancel(cli)


def test_files(cli: CommandLine) -> None:
    flow.check_files(cli)


def test_models_delete_needs_the_owner(
    cli: CommandLine, server: Server, member_key: str, data: Path, doomed: str
) -> None:
    member = CommandLine(cli.program, client_environment(server.base_url, member_key), data)
    flow.check_deletion(cli, member, doomed)


def test_base_url_with_a_slash_at_its_end(cli: CommandLine, data: Path) -> None:
    environment = dict(cli.environment) | {"OPENAI_API_BASE": cli.environment["OPENAI_API_BASE"] + "/"}
    CommandLine(cli.program, environment, data).run("models.list")


def test_library(python_028: Path, environment: dict[str, str], data: Path) -> None:
    done = subprocess.run(
        [python_028, HERE / "programs" / "library_028.py"],
        env=environment,
        cwd=data,
        capture_output=True,
        text=True,
        timeout=flow.COMMAND_WITHIN_S,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert flow.NAME.fullmatch(report["model"])
    assert report["streamed"] == report["plain"]
    assert report["text_offset"] == [len("The plot was dull.\n\n###\n\n")]
    assert report["tops"] in (2, 3)  # the sampled token stands beside the two likeliest if it is not among them
    assert report["rows"] == 1 + N_TRAINING // 8
    assert report["wrong_key"] == ["AuthenticationError", 401, "invalid_api_key"]
    assert report["wrong_model"] == ["InvalidRequestError", 404, "model_not_found"]
    assert report["too_long"] == ["InvalidRequestError", 400, None]


def test_our_command_line_has_every_flag_of_theirs(python_028: Path, environment: dict[str, str]) -> None:
    program = HERE / "programs" / "flags_028.py"
    done = subprocess.run([python_028, program], env=environment, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    ours = flow.flags_of_our_api()
    shared = ours.keys() & theirs.keys()  # ours has verbs of its own
    assert len(shared) >= 18
    for verb in shared:
        assert set(theirs[verb]) <= set(ours[verb]), verb
