"""What `tunesmith serve` makes of flags and environment, and what it tells."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from tunesmith.cli.output import UsageError
from tunesmith.cli.parser import build_parser
from tunesmith.cli.serve import greeting, settings_of
from tunesmith.settings import BOUNDS, Settings


def settings(*words: str, **environment: str) -> Settings:
    return settings_of(build_parser().parse_args(["serve", *words]), environment)


def test_flags_win_over_the_environment(tmp_path: Path) -> None:
    flags = [
        "--port",
        "0",
        "--home",
        str(tmp_path),
        "--host",
        "::1",
        "--organization",
        "Acme",
        "--max-concurrent-runs",
        "2",
    ]
    made = settings(*flags, TUNESMITH_PORT="9000", TUNESMITH_ENGINE_THREADS="3", PATH="/bin")
    assert (made.port, made.home, made.host, made.organization) == (0, tmp_path, "::1", "Acme")
    assert (made.max_concurrent_runs, made.engine_threads) == (2, 3)
    assert settings(TUNESMITH_PORT="9000").port == 9000


def test_the_variable_of_the_client_is_no_setting_of_the_server() -> None:
    assert settings(TUNESMITH_BASE_URL="http://127.0.0.1:1/v1") == settings()


@pytest.mark.parametrize(("words", "named"), [(["--port", "many"], "TUNESMITH_PORT='many'"), ([], "TUNESMITH_PORTT")])
def test_what_does_not_parse_is_wrong_usage(words: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        settings(*words, **({} if words else {"TUNESMITH_PORTT": "1"}))


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("MAX_UPLOAD_BYTES", "0"),
        ("MAX_CONCURRENT_RUNS", "0"),
        ("MAX_RESIDENT_ADAPTERS", "0"),
        ("TRAINER_NICENESS", "20"),
        ("LEASE_S", "nan"),
        ("LEASE_S", "0"),
        ("HEARTBEAT_S", "0"),
        ("HEARTBEAT_S", "inf"),
    ],
)
def test_a_number_out_of_bounds_is_wrong_usage(variable: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"TUNESMITH_{variable}={text} is out of bounds"):
        settings(**{f"TUNESMITH_{variable}": text})


def test_every_setting_that_is_a_number_has_bounds() -> None:
    made = Settings()
    for name, (least, most) in BOUNDS.items():
        assert least <= getattr(made, name) <= most
    assert {field.name for field in fields(Settings) if field.type in ("int", "float")} == set(BOUNDS)


def test_the_greeting_has_a_line_for_every_generation_of_clients(tmp_path: Path) -> None:
    told = greeting("http://127.0.0.1:8000/v1", settings("--home", str(tmp_path)), "sk-new")
    assert "sk-new" in told
    assert f'OPENAI_API_KEY="$(cat {tmp_path}/owner.key)"' in told
    for line in ("OPENAI_API_BASE=http://127.0.0.1:8000/v1", "OPENAI_BASE_URL=http://127.0.0.1:8000/v1", "basePath"):
        assert line in told


def test_a_chosen_or_known_key_is_not_shown(tmp_path: Path) -> None:
    told = greeting("http://127.0.0.1:8000/v1", settings("--home", str(tmp_path), TUNESMITH_OWNER_KEY="sk-mine"), None)
    assert "sk-mine" not in told
    assert '"$TUNESMITH_OWNER_KEY"' in told


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "CUDA", ""])
def test_a_device_is_named_as_torch_names_it(text: str) -> None:
    assert settings(TUNESMITH_TRAINER_DEVICE="cuda", TUNESMITH_ENGINE_DEVICE="cuda:1").engine_device == "cuda:1"
    with pytest.raises(UsageError, match=f"TUNESMITH_ENGINE_DEVICE={text} is no device"):
        settings(TUNESMITH_ENGINE_DEVICE=text)
