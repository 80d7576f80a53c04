"""OpenAI's description of its API, to hold answers against; read where a copy lies beside the checkout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

SPEC = Path(__file__).parents[3] / "shared" / "contract" / "openapi" / "openai-2026-08-21-newest-cut.yaml"
needs_spec = pytest.mark.skipif(not SPEC.exists(), reason="no copy of the API description here")


def check(name: str, value: Any) -> None:
    """Fails if a JSON value does not keep the schema of that name."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = _spec() | {"$ref": f"#/components/schemas/{name}"}
    jsonschema.Draft202012Validator(schema).validate(value)


@cache
def _spec() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    spec: dict[str, Any] = _as_json_schema(yaml.load(SPEC.read_text(), yaml.CSafeLoader))
    return spec


def _as_json_schema(value: Any) -> Any:
    """OpenAPI 3.0's `nullable` and `exclusiveMinimum: true` in words of JSON Schema."""
    if isinstance(value, list):
        return [_as_json_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    plain = {key: _as_json_schema(item) for key, item in value.items() if key != "nullable"}
    if plain.get("exclusiveMinimum") is True:
        plain["exclusiveMinimum"] = plain.pop("minimum")
    return {"anyOf": [plain, {"type": "null"}]} if value.get("nullable") is True else plain
