"""The unmodified openai==0.28.1: as a command line and as a library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.cli.loopback import listening
from tests.e2e.harness import OWNER_KEY, Server, reviews, upload, wait_for
from tests.sdk import flow
from tests.sdk.conftest import N_TRAINING, write_rows
from tests.sdk.environments import HERE, client_environment
from tests.sdk.flow import CommandLine
from tunesmith.cli.flags.api import REFUSED

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


def test_chat(cli: CommandLine) -> None:
    asked = ["chat_completions.create", "-m", "ada", "-g", "user", "Hello there", "-M", "6", "-t", "0"]
    said = cli.run(*asked)
    assert said.strip()
    assert cli.run(*asked, "--stream") == said


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
    assert report["engine"] == ["ada", True, 1]
    assert report["generated"] == report["echoed"]
    assert report["generated_offsets"] == report["echoed_offsets"]
    assert report["generate_streamed"] == report["echoed"]
    assert report["no_replicas"] == ["InvalidRequestError", 400, None]
    assert report["rows"] == 1 + N_TRAINING // 8
    assert report["wrong_key"] == ["AuthenticationError", 401, "invalid_api_key"]
    assert report["wrong_model"] == ["InvalidRequestError", 404, "model_not_found"]
    assert report["too_long"] == ["InvalidRequestError", 400, None]


def test_our_command_line_has_every_flag_of_theirs(python_028: Path, environment: dict[str, str]) -> None:
    program = HERE / "programs" / "flags_028.py"
    done = subprocess.run([python_028, program], env=environment, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    ours = flow.flags_of_our_api()
    assert len(theirs) > 30
    assert theirs.keys() >= REFUSED.keys()
    for verb in theirs.keys() - REFUSED.keys():
        assert set(theirs[verb]) <= set(ours[verb]), verb


OURS = [sys.executable, "-m", "tunesmith"]
SAME_OUTPUT = [
    ["files.list"],
    ["files.get", "-i", "FILE"],
    ["models.list"],
    ["models.get", "-i", "ada"],
    ["engines.list"],
    ["engines.get", "-i", "ada"],
    ["engines.update", "-i", "ada"],
    ["engines.update", "-i", "ada", "-r", "1"],
    ["engines.update", "-i", "ada", "--replicas", "4"],
    ["engines.generate", "-i", "ada", "-c", "Once upon", "-l", "3", "-t", "0"],
    ["engines.generate", "-i", "ada", "-c", "Once upon", "-l", "3", "-t", "0", "-n", "2", "--logprobs", "1"],
    ["engines.generate", "-i", "ada", "--context", "Once é", "--length", "4", "-t", "0", "-p", "0.5", "--stream"],
    ["engines.generate", "-i", "ada", "-m", "MODEL", "-c", "Once", "-l", "2", "-t", "0", "--stop", "q"],
    ["engines.generate", "-i", "ada", "-m", "curie", "-c", "Once"],
    ["engines.generate", "-i", "ada", "-c", "x", "-l", "99999"],
    ["fine_tunes.list"],
    ["fine_tunes.get", "-i", "JOB"],
    ["fine_tunes.events", "-i", "JOB"],
    ["fine_tunes.follow", "-i", "JOB"],
    ["fine_tunes.results", "-i", "JOB"],
    ["fine_tuning.job.list"],
    ["fine_tuning.job.get", "-i", "JOB"],
    ["fine_tuning.job.results", "-i", "JOB"],
    ["fine_tuning.job.events", "-i", "JOB"],
    ["fine_tuning.job.events", "-i", "JOB", "--limit", "3"],
    ["fine_tuning.job.cancel", "-i", "JOB"],
    ["fine_tuning.job.get", "-i", "ftjob-nope"],
    ["completions.create", "-m", "ada", "-p", "Once upon", "-M", "3", "-t", "0"],
    ["completions.create", "-m", "ada", "-p", "Once upon", "-M", "3", "-t", "0", "-n", "2"],
    ["completions.create", "-e", "ada", "-m", "ada", "-p", "Once upon", "-M", "3", "-t", "0"],
    ["completions.create", "-e", "ada", "-p", "Once upon", "-M", "3", "-t", "0", "--stop", "q", "--stream"],
    ["chat_completions.create", "-m", "ada", "-g", "user", "Hello!", "-M", "3", "-t", "0"],
    [
        "chat_completions.create",
        "-m",
        "ada",
        "-g",
        "system",
        "Be brief.",
        "-g",
        "user",
        "Hi",
        "-M",
        "3",
        "-t",
        "0",
        "-n",
        "2",
    ],
    ["chat_completions.create", "-m", "ada", "-g", "user", "Hello!", "-M", "3", "-t", "0", "--stream"],
    ["models.get", "-i", "no-such-model"],
    ["files.get", "-i", "file-nope"],
    ["files.get", "-i", "a/path.jsonl"],
    ["fine_tunes.get", "-i", "ft-nope"],
    ["fine_tunes.cancel", "-i", "JOB"],
    ["fine_tunes.delete", "-i", "JOB"],
    ["fine_tunes.create", "-t", "not-there.jsonl"],
]
"""FILE, JOB and MODEL stand for a training file, a job that has succeeded and what became of it."""


@pytest.mark.parametrize("words", SAME_OUTPUT, ids=" ".join)
def test_both_command_lines_show_the_same(cli: CommandLine, finished: dict[str, str], words: list[str]) -> None:
    ours = CommandLine(OURS, cli.environment, cli.folder)
    words = [finished.get(word, word) for word in words]
    them, us = cli.finished(*words), ours.finished(*words)
    assert us.returncode == them.returncode, us.stderr + them.stderr
    # Theirs prints one more line end after results, and names its own program.
    shown = them.stdout.replace("openai api", "tunesmith api")
    assert _lines(us.stdout) == _lines(shown)
    if them.returncode:
        told, known = us.stderr.removeprefix("Error: ").rstrip().rsplit(" (HTTP", 1)
        assert f"(HTTP{known}" in them.stderr
        assert told in " ".join(them.stderr.split())


def test_both_ask_the_same_of_a_file_that_was_uploaded_before(cli: CommandLine, data: Path) -> None:
    write_rows(data / "once.jsonl", reviews(8, 7))
    uploaded = cli.run("files.create", "-f", "once.jsonl", "-p", "fine-tune")
    file_id = json.loads(uploaded[uploaded.index("{") :])["id"]
    asked = []
    for program in (cli.program, OURS):
        done = subprocess.run(
            [*program, "api", "fine_tunes.create", "-t", "once.jsonl", "-m", "ada", "--no_follow"],
            env=dict(cli.environment),
            cwd=data,
            input=f"file-wrong\n{file_id}\n",
            capture_output=True,
            text=True,
            timeout=flow.COMMAND_WITHIN_S,
        )
        assert done.returncode == 0, done.stderr
        questions, _, job = done.stdout.partition("{")
        asked.append(questions.split())
        assert json.loads("{" + job)["training_files"][0]["id"] == file_id
        cli.run("fine_tunes.cancel", "-i", json.loads("{" + job)["id"])
    assert asked[0] == asked[1]


def test_both_make_jobs_in_the_dialect_of_late_2023(cli: CommandLine, data: Path) -> None:
    jobs = []
    for number, program in enumerate((cli.program, OURS)):
        write_rows(data / f"job-{number}.jsonl", reviews(8, 20 + number))
        client = CommandLine(program, cli.environment, data)
        made = client.run(
            *("fine_tuning.job.create", "-t", f"job-{number}.jsonl", "-m", "ada"),
            *("--n_epochs", "3", "--suffix", "late 2023"),
        )
        job = json.loads(made[made.index("{") :])
        cancelled = json.loads(client.run("fine_tuning.job.cancel", "-i", job["id"]))
        assert (cancelled["id"], cancelled["status"]) == (job["id"], "cancelled")
        jobs.append(job)
    differing = ("id", "created_at", "training_file", "estimated_finish", "status")
    theirs, ours = ({name: job[name] for name in job.keys() - set(differing)} for job in jobs)
    assert ours == theirs
    assert ours["hyperparameters"]["n_epochs"] == 3
    assert ours["user_provided_suffix"] == "late 2023"


def test_both_send_the_same_requests_in_the_same_order(cli: CommandLine, server: Server, data: Path) -> None:
    asked: list[str] = []

    async def forward(request: Request) -> Response:
        asked.append(f"{request.method} {request.scope['raw_path'].decode()}")
        async with httpx.AsyncClient(trust_env=False) as http:
            url = server.base_url.removesuffix("/v1") + request.scope["raw_path"].decode()
            kept = {
                name: request.headers[name] for name in ("authorization", "content-type") if name in request.headers
            }
            answer = await http.request(request.method, url, headers=kept, content=await request.body())
        return Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])

    sequences = []
    for number, program in enumerate((cli.program, OURS)):
        for name in ("first", "second"):
            write_rows(data / f"{name}.jsonl", reviews(8, 10 + number))
        asked.clear()
        with listening(forward_all(forward)) as base_url:
            client = CommandLine(program, client_environment(base_url, OWNER_KEY), data)
            made = client.run(
                "fine_tunes.create", "-t", "first.jsonl", "-v", "second.jsonl", "-m", "ada", "--no_follow"
            )
        sequences.append(list(asked))
        cli.run("fine_tunes.cancel", "-i", json.loads(made[made.index("{") :])["id"])
    assert sequences[0] == sequences[1]
    per_file = ["GET /v1/files", "POST /v1/files"]
    assert sequences[0] == [
        *("GET /v1/files/first.jsonl", *per_file),
        *("GET /v1/files/second.jsonl", *per_file),
        "POST /v1/fine-tunes",
    ]


def forward_all(forward: Callable[[Request], Awaitable[Response]]) -> Starlette:
    return Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])])


@pytest.fixture(scope="module")
def finished(server: Server) -> dict[str, str]:
    with server.client() as client:
        file_id = upload(client, reviews(8, 5))
        job = client.post("fine-tunes", body={"training_file": file_id, "model": "ada"})
        ended = wait_for(client, job["id"])
        assert ended["status"] == "succeeded"
    return {"FILE": file_id, "JOB": job["id"], "MODEL": ended["fine_tuned_model"]}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
