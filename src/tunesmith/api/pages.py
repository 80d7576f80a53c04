"""List envelopes. A list is whole unless the client asks for a page of it: the oldest clients know no pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.api.body import whole_number
from tunesmith.errors import InvalidRequest

MAX_PAGE = 10_000


def envelope(objects: Sequence[dict[str, Any]], has_more: bool = False) -> dict[str, Any]:
    """A list object. Clients that page end at `has_more: false`; those that do not, ignore it."""
    return {
        "object": "list",
        "data": list(objects),
        "has_more": has_more,
        "first_id": objects[0].get("id") if objects else None,
        "last_id": objects[-1].get("id") if objects else None,
    }


def page(objects: Sequence[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """The part of `objects`, given oldest first, that `limit`, `after` and `order` (`asc` | `desc`) ask for."""
    order = query.get("order", "asc")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"'order' must be asc or desc; it is {order!r}.", param="order")
    ordered = list(objects) if order == "asc" else list(reversed(objects))
    rest = ordered[_position_after(ordered, query.get("after")) :]
    limit = _limit(query.get("limit"))
    return envelope(rest[:limit], has_more=limit is not None and len(rest) > limit)


def _position_after(objects: Sequence[dict[str, Any]], object_id: str | None) -> int:
    if object_id is None:
        return 0
    for index, item in enumerate(objects):
        if item["id"] == object_id:
            return index + 1
    raise InvalidRequest(f"'after' must be the id of an object in this list; {object_id!r} is none.", param="after")


def _limit(text: str | None) -> int | None:
    if text is None:
        return None
    limit = whole_number(text)
    if limit is None or not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"'limit' must be a number from 1 to {MAX_PAGE}; it is {text[:40]!r}.", param="limit")
    return limit
