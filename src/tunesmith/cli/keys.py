"""`tunesmith keys`: the organisation's API keys, over HTTP."""

from __future__ import annotations

import argparse

from tunesmith.cli.connection import connect
from tunesmith.cli.output import Output
from tunesmith.cli.tables import Column, show_list, time_column

COLUMNS = (
    Column("id", lambda key: key["id"]),
    Column("role", lambda key: key["role"]),
    Column("name", lambda key: key["name"]),
    Column("secret", lambda key: key["hint"]),
    time_column("created", lambda key: key["created_at"]),
    time_column("revoked", lambda key: key["revoked_at"]),
)


def list_keys(args: argparse.Namespace, output: Output) -> int:
    """Every key; revoked ones say when."""
    with connect(args) as client:
        keys = client.get("organization", "keys")["data"]
    show_list(output, keys, COLUMNS)
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
