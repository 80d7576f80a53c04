"""A server process for tests: settings from the environment, announcements as lines of JSON."""

from __future__ import annotations

import json
import os
import sys

from tunesmith.errors import TunesmithError
from tunesmith.server import run
from tunesmith.settings import read_settings


def announce(base_url: str, new_owner_key: str | None) -> None:
    print(json.dumps({"base_url": base_url, "key": new_owner_key}), flush=True)


if __name__ == "__main__":
    try:
        run(read_settings(os.environ), announce=announce)
    except TunesmithError as error:
        sys.exit(error.message)
