"""Where else a job's numbers go while it trains: what users ask for, and its bounds. Pure; runs no tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.errors import InvalidRequest

WANDB = "wandb"
KINDS = (WANDB,)
MAX_INTEGRATIONS = 5
MAX_TAGS = 50
MAX_NAME_CHARACTERS = 128
MAX_TAG_CHARACTERS = 64
NOT_IN_PROJECTS = "/\\#?%:"
"""Source: W&B's documentation of projects."""


@dataclass(frozen=True, slots=True)
class Integration:
    """A tracker that follows one job."""

    kind: str
    """One of KINDS."""
    project: str
    name: str | None = None
    """What the run is called there; None: by the id of the job."""
    entity: str | None = None
    """The user or team there; None: the one that the server's key belongs to."""
    tags: tuple[str, ...] = ()


def check_kind(kind: str, param: str) -> None:
    """Raises InvalidRequest for a tracker that cannot follow jobs."""
    if kind not in KINDS:
        raise InvalidRequest(
            f"{param} must be one of {', '.join(KINDS)}; you gave {kind[:40]!r}. For other trackers there is "
            "`tunesmith export`, once the job has ended.",
            param=param,
        )


def check_integrations(integrations: Sequence[Integration]) -> None:
    """Raises InvalidRequest for the first field that is out of bounds. Kinds are known: `check_kind`."""
    if len(integrations) > MAX_INTEGRATIONS:
        raise InvalidRequest(
            f"integrations takes at most {MAX_INTEGRATIONS} entries; you gave {len(integrations)}.",
            param="integrations",
        )
    for number, integration in enumerate(integrations):
        within = f"integrations[{number}].{integration.kind}."
        _check_text(f"{within}project", integration.project, MAX_NAME_CHARACTERS)
        forbidden = sorted(set(integration.project) & set(NOT_IN_PROJECTS))
        if forbidden:
            raise InvalidRequest(
                f"{within}project must not hold any of {NOT_IN_PROJECTS}; yours holds {' '.join(forbidden)}.",
                param=f"{within}project",
            )
        for name in ("name", "entity"):
            value = getattr(integration, name)
            if value is not None:
                _check_text(f"{within}{name}", value, MAX_NAME_CHARACTERS)
        if len(integration.tags) > MAX_TAGS:
            raise InvalidRequest(
                f"{within}tags takes at most {MAX_TAGS} tags; you gave {len(integration.tags)}.", param=f"{within}tags"
            )
        for tag in integration.tags:
            _check_text(f"{within}tags", tag, MAX_TAG_CHARACTERS)


def integrations_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[Integration, ...]:
    """The inverse of `asdict`, where JSON has made lists of tuples."""
    return tuple(Integration(**{**value, "tags": tuple(value["tags"])}) for value in values)


def integration_to_wire(integration: Integration) -> dict[str, Any]:
    """In the shape of the published API: the fields stand within the name of the kind."""
    values = asdict(integration)
    kind = values.pop("kind")
    return {"type": kind, kind: values}


def _check_text(param: str, value: str, most: int) -> None:
    if not 1 <= len(value) <= most or not value.isprintable() or value != value.strip():
        raise InvalidRequest(
            f"{param} must have 1 to {most} printable characters and no space at its ends; you gave {value[:100]!r}.",
            param=param,
        )
