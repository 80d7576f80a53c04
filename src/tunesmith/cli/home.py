"""Which home folder a command works in that needs no server."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from tunesmith.cli.output import UsageError
from tunesmith.settings import Settings, read_settings

READ = ("TUNESMITH_HOME", "TUNESMITH_OFFLINE")
"""The settings that matter without a server; another that is wrong is no reason to refuse."""


def home_settings(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Settings:
    """Home folder and offline mode, `--home` first. Raises UsageError naming a variable that does not parse."""
    variables = {name: value for name, value in environment.items() if name in READ}
    try:
        return read_settings(variables | ({} if args.home is None else {"TUNESMITH_HOME": args.home}))
    except ValueError as error:
        raise UsageError(str(error)) from error
