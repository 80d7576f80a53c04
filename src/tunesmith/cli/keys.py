"""`tunesmith keys`: the organisation's API keys, over HTTP."""

from __future__ import annotations

import argparse
from datetime import datetime

from tunesmith.cli.connection import connect
from tunesmith.cli.output import Output
from tunesmith.cli.tables import show_table


def list_keys(args: argparse.Namespace, output: Output) -> int:
    """Every key; revoked ones say when."""
    with connect(args) as client:
        keys = client.get("organization", "keys")["data"]
    if output.machine:
        output.show(keys)
        return 0
    rows = [
        [key["id"], key["role"], key["name"], key["hint"], _minute(key["created_at"]), _minute(key["revoked_at"])]
        for key in keys
    ]
    show_table(output, ["id", "role", "name", "secret", "created", "revoked"], rows)
    return 0


def create_key(args: argparse.Namespace, output: Output) -> int:
    """Makes a key; its secret is in this answer and nowhere else."""
    with connect(args) as client:
        key = client.post("organization", "keys", body={"role": args.role, "name": args.name})
    if output.machine:
        output.show(key)
        return 0
    output.say(f"Key {key['id']} ({key['role']}) for {key['name']}. Its secret is shown this once:\n")
    output.say(f"  {key['secret']}")
    return 0


def revoke_key(args: argparse.Namespace, output: Output) -> int:
    """Ends a key; requests with it are refused from now on."""
    with connect(args) as client:
        answer = client.delete("organization", "keys", args.id)
    if output.machine:
        output.show(answer)
    else:
        output.say(f"Key {args.id} is revoked.")
    return 0


def _minute(unix: int | None) -> str:
    return "" if unix is None else datetime.fromtimestamp(unix).strftime("%Y-%m-%d %H:%M")
