"""`tunesmith serve`: settings from flags and environment, then the server, then how to reach it."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from tunesmith import __version__
from tunesmith.cli.output import Output, UsageError
from tunesmith.engine.process import EngineProcess
from tunesmith.settings import Settings, read_settings

FLAGS = {
    "home": "TUNESMITH_HOME",
    "host": "TUNESMITH_HOST",
    "port": "TUNESMITH_PORT",
    "organization_title": "TUNESMITH_ORGANIZATION",
    "max_concurrent_runs": "TUNESMITH_MAX_CONCURRENT_RUNS",
}
"""Flag -> the variable it stands for; the flag wins."""
SECRETS = ("TUNESMITH_OWNER_KEY", "TUNESMITH_DATABASE_URL", "HF_TOKEN")
NO_HUB = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Models come with `tunesmith models pull` and in no other way: not through a library that looks for updates either."""
OF_THE_CLIENT = "TUNESMITH_BASE_URL"
"""Tells commands where the server is; it is no setting of the server."""


def serve(args: argparse.Namespace, output: Output) -> int:
    """Runs until SIGTERM or Ctrl-C, which drain it."""
    settings = settings_of(args, os.environ)
    for name in SECRETS:
        os.environ.pop(name, None)  # engine and trainers inherit the environment, and need none of these
    os.environ.update(NO_HUB)
    engine_process = None
    if settings.engine == "embedded":
        engine_process = EngineProcess(
            threads=settings.engine_threads, precision=settings.engine_precision, device=settings.engine_device
        )
    from tunesmith.server import run  # now, not before: the engine imports torch meanwhile

    def announce(base_url: str, new_owner_key: str | None) -> None:
        if output.machine:
            output.record({"base_url": base_url, "home": str(settings.home), "pid": os.getpid()})
        else:
            output.say(greeting(base_url, settings, new_owner_key))

    run(settings, announce=announce, engine_process=engine_process)
    return 0


def settings_of(args: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """Settings of the environment, with the flags in their place. Raises UsageError naming what does not parse."""
    flags = {variable: getattr(args, flag) for flag, variable in FLAGS.items() if getattr(args, flag) is not None}
    variables = {name: value for name, value in environment.items() if name != OF_THE_CLIENT}
    try:
        return read_settings(variables | flags)
    except ValueError as error:
        raise UsageError(str(error)) from error


def greeting(base_url: str, settings: Settings, new_owner_key: str | None) -> str:
    """Lines to paste, for every generation of clients."""
    key_file = settings.home / "owner.key"
    lines = [f"tunesmith {__version__} at {base_url}, home {settings.home}", ""]
    if new_owner_key is not None:
        lines += [f"Owner key, shown this once and kept in {key_file}:", "", f"  {new_owner_key}", ""]
    lines += [
        "To use it from another terminal, paste:",
        "",
        f"  export OPENAI_API_KEY={_key_source(settings, key_file)}",
        f"  export OPENAI_API_BASE={base_url}    # Python openai up to 0.28",
        f"  export OPENAI_BASE_URL={base_url}    # Python openai 1 and later, npm openai of today",
        "",
        f'npm openai 3: new Configuration({{ basePath: "{base_url}", apiKey: process.env.OPENAI_API_KEY }})',
        "Stop with Ctrl-C; a job that is training goes on where it was when the server starts again.",
    ]
    return "\n".join(lines)


def _key_source(settings: Settings, key_file: Path) -> str:
    return '"$TUNESMITH_OWNER_KEY"' if settings.owner_key is not None else f'"$(cat {shlex.quote(str(key_file))})"'
