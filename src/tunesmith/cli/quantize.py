"""`tunesmith models quantize`: a base in 4 bits, of one that is here."""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path

from tunesmith.cli.home import home_settings
from tunesmith.cli.output import Output, UsageError
from tunesmith.core import box
from tunesmith.core.bases import BOX_NAMES
from tunesmith.core.catalogue import FILE, NAME, put, read_catalogue
from tunesmith.core.checkpoint_folder import sha256_of
from tunesmith.core.pull import pulling
from tunesmith.decoder.quantizing import quantize
from tunesmith.rundir import sync_folder


def quantize_model(args: argparse.Namespace, output: Output) -> int:
    """Writes the folder whole or not at all, then its entry in the catalogue."""
    home = home_settings(args).home
    folder, keys = _source(home, args.base)
    name = args.alias or f"{args.base}-4bit"
    out = home / "bases" / name
    beside = out.with_name(f".quantizing-{name}")
    with pulling(home):
        _check_name(home, name)
        try:
            shutil.rmtree(beside, ignore_errors=True)  # of one that was killed
            quantize(folder, beside, lambda file, before, after: output.say(f"{file}: {before:,} bytes -> {after:,}"))
            sha256 = {path.name: sha256_of(path) for path in sorted(beside.iterdir())}
            sync_folder(beside)
            beside.rename(out)
            sync_folder(out.parent)
        except ValueError as error:
            raise UsageError(f"{args.base} cannot be brought to 4 bits: {error}.") from error
        except OSError as error:
            raise UsageError(f"{error.filename or out} cannot be written: {error.strerror}.") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        try:
            put(home, name, {"folder": str(out.relative_to(home)), **keys}, sha256)
        except (ValueError, OSError) as error:
            shutil.rmtree(out)  # what no base names would be in the way of the next attempt
            reason = f"{error.filename} cannot be written: {error.strerror}." if isinstance(error, OSError) else error
            raise UsageError(f"{name} was not added. {reason}") from error
    if output.machine:
        output.show({"name": name, "base": args.base, "folder": str(out), "sha256": sha256})
    where = "" if args.home is None else f" --home {shlex.quote(args.home)}"
    output.say(f"{name} is {args.base} in 4 bits, in {out}.")
    output.say(f"What it needs: tunesmith models check {name}{where}")
    output.say("A server that is running takes up new names when it starts again.")
    return 0


def _source(home: Path, base: str) -> tuple[Path, dict[str, str | int | float]]:
    """The folder of a base, and what its entry says besides."""
    try:
        entry = read_catalogue(home).get(base)
        if entry is None and base in BOX_NAMES:
            packed, rate = BOX_NAMES[base]
            return box.unpack(box.BOX / packed, home), {"learning_rate": rate}
    except ValueError as error:
        raise UsageError(str(error)) from error
    if entry is None:
        raise UsageError(f"{base} is no base of {home}. `tunesmith models check` lists them.")
    if not entry.folder.is_dir():
        missing = (
            f"It is not on this machine yet: {entry.pull_command}" if entry.hub else f"{entry.folder} is not there"
        )
        raise UsageError(f"{missing}.")
    keys: dict[str, str | int | float] = {}
    if entry.learning_rate is not None:
        keys["learning_rate"] = entry.learning_rate
    if entry.context_tokens is not None:
        keys["context_tokens"] = entry.context_tokens
    if entry.price_per_1k_training_tokens:
        keys["price_per_1k_training_tokens"] = entry.price_per_1k_training_tokens
    return entry.folder, keys


def _check_name(home: Path, name: str) -> None:
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a base: lower-case letters, digits, '.', '_' and '-' only, at most 64. Give --as."
        )
    if name in BOX_NAMES or name in read_catalogue(home):
        raise UsageError(f"{name} is a base of {home / FILE} or of the box already. Give another name with --as.")
    if (home / "bases" / name).exists():
        raise UsageError(f"{home / 'bases' / name} is there already. Give another name with --as, or remove it.")
