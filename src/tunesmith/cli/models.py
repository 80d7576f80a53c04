"""`tunesmith models list`, `export` and `import`: what can be called and tuned, and weights on their way out and in."""

from __future__ import annotations

import argparse
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.cli.connection import connect
from tunesmith.cli.output import Output, UsageError
from tunesmith.cli.tables import Column, show_list


def list_models(args: argparse.Namespace, output: Output) -> int:
    """Bases first, then tuned models with what they were tuned from."""
    with connect(args) as client:
        models = client.get("models")["data"]
    show_list(output, models, [Column("model", lambda model: model["id"]), Column("what it is", _story)])
    return 0


def export_model(args: argparse.Namespace, output: Output) -> int:
    """Writes a zip or a GGUF file, whole or not at all. A file that is there stays as it is."""
    suffix = ".gguf" if args.format == "gguf" else ".zip"
    path = Path(args.output or re.sub(r"[^\w.-]", "-", args.model) + suffix)
    query = {name: value for name in ("format", "precision") if (value := getattr(args, name)) is not None}
    try:
        with connect(args) as client, whole_or_nothing(path) as file:
            headers = client.download("models", args.model, "weights", to=file, **query)
    except FileExistsError as error:
        raise UsageError(f"{path} is there already; name another with -o.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
    checked = headers.get("tunesmith-checked")
    if output.machine:
        output.show({"model": args.model, "file": str(path), "bytes": path.stat().st_size, "checked": checked})
    output.say(f"Wrote {path} ({path.stat().st_size:,} bytes)")
    if checked:
        output.say(checked)
    return 0


def import_model(args: argparse.Namespace, output: Output) -> int:
    """Sends a zip, or a folder as one."""
    path = Path(args.path)
    try:
        with connect(args) as client, path.open("rb") if path.is_file() else _packed(path) as package:
            model = client.import_model(package, args.base, args.suffix)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    if output.machine:
        output.show(model)
    output.say(f"Imported model: {model['id']}")
    return 0


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, which takes its place once the block has ended. Raises FileExistsError at once."""
    if path.exists():
        raise FileExistsError(path)
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            yield file
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _packed(folder: Path) -> Iterator[BinaryIO]:
    names = [path for path in sorted(folder.iterdir()) if path.is_file()]
    with tempfile.TemporaryDirectory() as beside:
        package = Path(beside) / "model.zip"
        with zipfile.ZipFile(package, "w", zipfile.ZIP_STORED) as opened:
            for path in names:
                opened.write(path, path.name)
        with package.open("rb") as reading:
            yield reading


def _story(model: dict[str, Any]) -> str:
    if model["parent"] is not None and "alias" not in model:
        return f"fine-tuned from {model['parent']}"
    return model["description"] or "base"
