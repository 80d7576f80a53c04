"""`tunesmith api` but for fine-tunes: files, models, engines, completions. One request each, the answer shown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tunesmith.cli.connection import connect
from tunesmith.cli.flags.api import REFUSED
from tunesmith.cli.output import Output, UsageError
from tunesmith.cli.tables import Column, show_list, time_column
from tunesmith.cli.uploads import upload

FILE_COLUMNS = (
    Column("id", lambda file: file["id"]),
    Column("filename", lambda file: file["filename"]),
    Column("purpose", lambda file: file["purpose"]),
    Column("bytes", lambda file: file["bytes"], "{:,}".format, number=True),
    Column("status", lambda file: file["status"]),
    time_column("created", lambda file: file["created_at"]),
)
MODEL_COLUMNS = (
    Column("id", lambda model: model["id"]),
    Column("root", lambda model: model["root"]),
    Column("parent", lambda model: model["parent"]),
    Column("owned by", lambda model: model["owned_by"]),
    time_column("created", lambda model: model["created"]),
)
ENGINE_COLUMNS = (
    Column("id", lambda engine: engine["id"]),
    Column("owner", lambda engine: engine["owner"]),
    Column("ready", lambda engine: engine["ready"]),
)


def show_listed(args: argparse.Namespace, output: Output, columns: Sequence[Column], *segments: str) -> int:
    """The list object as published, unless another form is asked for."""
    with connect(args) as client:
        answer = client.get(*segments)
    if output.format in (None, "json"):
        output.show(answer)
    else:
        show_list(output, answer["data"], columns)
    return 0


def create_file(args: argparse.Namespace, output: Output) -> int:
    """`files.create`: the file is named as typed."""
    with connect(args) as client:
        output.show(upload(client, args.file, args.purpose))
    return 0


def get_file(args: argparse.Namespace, output: Output) -> int:
    """`files.get`."""
    return _get(args, output, "files", args.id)


def delete_file(args: argparse.Namespace, output: Output) -> int:
    """`files.delete`."""
    return _delete(args, output, "files", args.id)


def list_files(args: argparse.Namespace, output: Output) -> int:
    """`files.list`."""
    return show_listed(args, output, FILE_COLUMNS, "files")


def list_models(args: argparse.Namespace, output: Output) -> int:
    """`models.list`."""
    return show_listed(args, output, MODEL_COLUMNS, "models")


def get_model(args: argparse.Namespace, output: Output) -> int:
    """`models.get`."""
    return _get(args, output, "models", args.id)


def delete_model(args: argparse.Namespace, output: Output) -> int:
    """`models.delete`."""
    return _delete(args, output, "models", args.id)


def list_engines(args: argparse.Namespace, output: Output) -> int:
    """`engines.list`."""
    return show_listed(args, output, ENGINE_COLUMNS, "engines")


def get_engine(args: argparse.Namespace, output: Output) -> int:
    """`engines.get`."""
    return _get(args, output, "engines", args.id)


def update_engine(args: argparse.Namespace, output: Output) -> int:
    """`engines.update`: with -r 1 returns when the model is loaded."""
    body = {} if args.replicas is None else {"replicas": args.replicas}
    with connect(args) as client:
        output.show(client.post("engines", args.id, body=body))
    return 0


def generate(args: argparse.Namespace, output: Output) -> int:
    """`engines.generate`: context and completion as text; with --json the whole answer, log-probabilities and all."""
    _refuse_mixed_streams(args.completions, args.stream)
    names = ("completions", "context", "length", "temperature", "top_p", "logprobs", "stop", "model")
    body = {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    def text(item: dict[str, Any]) -> str:
        return "".join(item["text"])

    _generate(args, ("engines", args.id, "generate"), body, text, "Completion", output, within="data")
    return 0


def create_completion(args: argparse.Namespace, output: Output) -> int:
    """`completions.create`: prompt and completion as text; with --json the whole answer, log-probabilities and all."""
    segments, body = _asked(args, "prompt", "logprobs")
    body |= {"echo": True}

    def text(choice: dict[str, Any]) -> str:
        shown: str = choice["text"]
        return shown

    _generate(args, segments, body, text, "Completion", output)
    return 0


def create_chat_completion(args: argparse.Namespace, output: Output) -> int:
    """`chat_completions.create`: the answer as text; with --json the whole answer."""
    _, body = _asked(args)
    body |= {
        "model": args.model or args.engine,
        "messages": [{"role": role, "content": content} for role, content in args.message],
    }

    def text(choice: dict[str, Any]) -> str:
        part: dict[str, Any] = choice["delta" if args.stream else "message"]
        return part.get("content") or ""

    _generate(args, ("chat", "completions"), body, text, "Chat Completion", output)
    return 0


def refuse(args: argparse.Namespace, _output: Output) -> int:
    """Verbs of the published command line that are not here."""
    raise UsageError(f"{args.verb} is not here: {REFUSED[args.verb]}.")


def _asked(args: argparse.Namespace, *more: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Where a completion is asked for, and what is asked of it. Raises UsageError for flags that do not go together."""
    _refuse_mixed_streams(args.n, args.stream)
    if args.model is None and args.engine is None:
        raise UsageError("Name the model with -m/--model (or -e/--engine, its old name).")
    names = ("n", "max_tokens", "temperature", "top_p", "stop", *more)
    body = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.model is not None:
        body["model"] = args.model
    # Both may be given, if they agree: what they mean together, the server says.
    return ("completions",) if args.engine is None else ("engines", args.engine, "completions"), body


def _refuse_mixed_streams(how_many: int | None, stream: bool) -> None:
    if how_many is not None and how_many > 1 and stream:
        raise UsageError("-n above 1 and --stream do not go together: the texts would come mixed. Leave one away.")


def _generate(
    args: argparse.Namespace,
    segments: tuple[str, ...],
    body: dict[str, Any],
    text: Callable[[dict[str, Any]], str],
    heading: str,
    output: Output,
    *,
    within: str = "choices",
) -> None:
    """The texts `within` each answer, nothing added but headings where one answer holds several."""
    with connect(args) as client:
        if args.stream:
            answers: Iterable[Any] = client.stream(*segments, body=body | {"stream": True})
        else:
            answers = [client.post(*segments, body=body)]
        for answer in answers:
            if output.machine:
                output.record(answer)
                continue
            choices = sorted(answer[within], key=lambda choice: choice["index"])
            for number, choice in enumerate(choices):
                before, after = (f"===== {heading} {number} =====\n", "\n") if len(choices) > 1 else ("", "")
                sys.stdout.write(f"{before}{text(choice)}{after}")
                sys.stdout.flush()
    if output.terminal:
        sys.stdout.write("\n")


def _get(args: argparse.Namespace, output: Output, *segments: str) -> int:
    with connect(args) as client:
        output.show(client.get(*segments))
    return 0


def _delete(args: argparse.Namespace, output: Output, *segments: str) -> int:
    with connect(args) as client:
        output.show(client.delete(*segments))
    return 0
