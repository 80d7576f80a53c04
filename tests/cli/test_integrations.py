"""The flags beyond the published ones that say where a job goes besides here."""

from __future__ import annotations

from tunesmith.cli.jobs import fields_of
from tunesmith.cli.parser import build_parser
from tunesmith.cli.plan import _flags

WANDB = [{"type": "wandb", "wandb": {"project": "film reviews"}}]


def test_wandb_is_an_integration_of_the_job() -> None:
    args = build_parser().parse_args(["jobs", "create", "-t", "x", "--wandb", "film reviews", "--alias", "old:name"])
    assert fields_of(args) == {"alias": "old:name", "integrations": WANDB}
    assert fields_of(build_parser().parse_args(["jobs", "create", "-t", "x"])) == {}


def test_the_command_that_a_plan_shows_has_the_flag() -> None:
    assert _flags({"training_file": "x", "integrations": WANDB}) == "--training_file x --wandb 'film reviews'"
