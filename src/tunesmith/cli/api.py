"""`tunesmith api files.*`, `models.*`, `engines.*` and `completions.create`: one request each, the answer shown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from tunesmith.cli.connection import connect
from tunesmith.cli.output import Output, UsageError
from tunesmith.cli.uploads import upload


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
    return _get(args, output, "files")


def list_models(args: argparse.Namespace, output: Output) -> int:
    """`models.list`."""
    return _get(args, output, "models")


def get_model(args: argparse.Namespace, output: Output) -> int:
    """`models.get`."""
    return _get(args, output, "models", args.id)


def delete_model(args: argparse.Namespace, output: Output) -> int:
    """`models.delete`."""
    return _delete(args, output, "models", args.id)


def list_engines(args: argparse.Namespace, output: Output) -> int:
    """`engines.list`."""
    return _get(args, output, "engines")


def get_engine(args: argparse.Namespace, output: Output) -> int:
    """`engines.get`."""
    return _get(args, output, "engines", args.id)


def create_completion(args: argparse.Namespace, output: Output) -> int:
    """`completions.create`: prompt and completion as text; with --json the whole answer, log-probabilities and all."""
    if args.n is not None and args.n > 1 and args.stream:
        raise UsageError("-n above 1 and --stream do not go together: the texts would come mixed. Leave one away.")
    if (args.model is None) == (args.engine is None):
        raise UsageError("Name the model with -m/--model (or -e/--engine, its old name).")
    asked = {
        name: getattr(args, name)
        for name in ("prompt", "n", "max_tokens", "temperature", "top_p", "logprobs", "stop")
        if getattr(args, name) is not None
    }
    body: dict[str, Any] = asked | {"echo": True}
    if args.engine is not None:
        segments: tuple[str, ...] = ("engines", args.engine, "completions")
    else:
        segments, body["model"] = ("completions",), args.model
    with connect(args) as client:
        if args.stream:
            _write(client.stream(*segments, body=body | {"stream": True}), output)
        else:
            _write([client.post(*segments, body=body)], output)
    return 0


def _write(answers: Iterable[Any], output: Output) -> None:
    """The texts, nothing added but headings where one answer holds several."""
    for answer in answers:
        if output.machine:
            output.record(answer)
            continue
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        for number, choice in enumerate(choices):
            heading, end = (f"===== Completion {number} =====\n", "\n") if len(choices) > 1 else ("", "")
            sys.stdout.write(f"{heading}{choice['text']}{end}")
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
