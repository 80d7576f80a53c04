"""`tunesmith models list`: what can be called and tuned, and what stands behind each name."""

from __future__ import annotations

import argparse
from typing import Any

from tunesmith.cli.connection import connect
from tunesmith.cli.output import Output
from tunesmith.cli.tables import show_table


def list_models(args: argparse.Namespace, output: Output) -> int:
    """Bases first, then tuned models with what they were tuned from."""
    with connect(args) as client:
        models = client.get("models")["data"]
    if output.machine:
        output.show(models)
        return 0
    show_table(output, ["model", "what it is"], [[model["id"], _story(model)] for model in models])
    return 0


def _story(model: dict[str, Any]) -> str:
    if model["parent"] is not None:
        return f"fine-tuned from {model['parent']}"
    return model["description"] or "base"
