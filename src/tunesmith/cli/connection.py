"""Which server a command talks to, with which key, and as which organisation."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from tunesmith.cli.output import UsageError
from tunesmith.client import Client, is_loopback
from tunesmith.settings import read_settings

BASE_VARIABLES = ("TUNESMITH_BASE_URL", "OPENAI_BASE_URL", "OPENAI_API_BASE")
"""The first that is set wins: ours, then the one of today's clients, then the one of the old clients."""
DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"


def connect(
    args: argparse.Namespace, environment: Mapping[str, str] = os.environ, *, timeout_s: float | None = None
) -> Client:
    """A client for the server that flags and environment name. Raises UsageError where no key is to be had."""
    base_url = args.api_base or next(
        (environment[name] for name in BASE_VARIABLES if environment.get(name)), DEFAULT_BASE_URL
    )
    if not base_url.startswith(("http://", "https://")):
        raise UsageError(f"The base URL {base_url!r} does not start with http:// or https://.")
    api_key = args.api_key or _given_key(environment) or _owner_key(base_url, environment)
    if not api_key.isascii() or not api_key.isprintable():
        raise UsageError("The API key holds characters that no key has; check -k/--api-key and OPENAI_API_KEY.")
    organization = args.organization or environment.get("OPENAI_ORGANIZATION") or None
    if organization is not None and not (organization.isascii() and organization.isprintable()):
        raise UsageError("The organisation holds characters that no header may; check -o and OPENAI_ORGANIZATION.")
    for proxy in args.proxy:
        if not proxy.startswith(("http://", "https://")):
            raise UsageError(f"The proxy {proxy!r} does not start with http:// or https://.")
    try:
        return Client(base_url, api_key, organization, args.proxy, timeout_s=timeout_s)
    except ValueError as error:
        raise UsageError(f"{base_url!r} or a proxy is no URL: {error}.") from error


def _given_key(environment: Mapping[str, str]) -> str | None:
    """The key that the environment holds or, before that, names a file of, as the published clients look for it."""
    path = environment.get("OPENAI_API_KEY_PATH")
    if not path:
        return environment.get("OPENAI_API_KEY")
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"OPENAI_API_KEY_PATH names {path}, and no key can be read there: {error}.") from error


def _owner_key(base_url: str, environment: Mapping[str, str]) -> str:
    """The key in the local home folder, which is for a server on this machine alone."""
    if not is_loopback(base_url):
        raise UsageError(f"{base_url} needs an API key: set OPENAI_API_KEY, or give -k/--api-key.")
    home = read_settings({name: value for name, value in environment.items() if name == "TUNESMITH_HOME"}).home
    try:
        return (home / "owner.key").read_text().strip()
    except OSError as error:
        raise UsageError(
            f"No API key: neither -k/--api-key nor OPENAI_API_KEY is given, and {home / 'owner.key'} cannot be read "
            f"({error.strerror}). `tunesmith serve` makes it; TUNESMITH_HOME says where to look."
        ) from error
