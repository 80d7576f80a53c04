"""Which server, which key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cli.connection import connect
from tunesmith.cli.output import UsageError
from tunesmith.cli.parser import build_parser


def asked(*words: str, **environment: str) -> tuple[str, str]:
    """(base URL, Authorization header) of a command with these flags and variables."""
    with connect(build_parser().parse_args([*words, "models"]), environment) as client:
        return client.base_url, client._http.headers["authorization"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "owner.key").write_text("sk-owner\n")
    return tmp_path


def test_the_owner_key_of_the_home_is_the_last_resort(home: Path) -> None:
    assert asked(TUNESMITH_HOME=str(home)) == ("http://127.0.0.1:8000/v1", "Bearer sk-owner")
    assert asked(TUNESMITH_HOME=str(home), OPENAI_API_KEY="sk-env")[1] == "Bearer sk-env"
    assert asked("-k", "sk-flag", TUNESMITH_HOME=str(home), OPENAI_API_KEY="sk-env")[1] == "Bearer sk-flag"


def test_base_url_flag_then_ours_then_new_then_old() -> None:
    variables = {
        "OPENAI_API_BASE": "http://old/v1",
        "OPENAI_BASE_URL": "http://new/v1",
        "TUNESMITH_BASE_URL": "http://ours/v1",
        "OPENAI_API_KEY": "sk-x",
    }
    assert asked("-b", "http://flag/v1/", **variables)[0] == "http://flag/v1"
    for name in ("TUNESMITH_BASE_URL", "OPENAI_BASE_URL", "OPENAI_API_BASE"):
        assert asked(**variables)[0] == variables.pop(name)


def test_a_file_with_a_key_goes_before_a_key(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("sk-file\n")
    variables = {"OPENAI_API_KEY": "sk-env", "OPENAI_API_KEY_PATH": str(path)}
    assert asked(**variables)[1] == "Bearer sk-file"
    assert asked("-k", "sk-flag", **variables)[1] == "Bearer sk-flag"
    path.unlink()
    with pytest.raises(UsageError, match="OPENAI_API_KEY_PATH names"):
        asked(**variables)


def test_organisation_flag_then_variable() -> None:
    def organization(*flags: str, **variables: str) -> str | None:
        args = build_parser().parse_args([*flags, "api", "models.list"])
        with connect(args, {"OPENAI_API_KEY": "sk-x", **variables}) as client:
            header: str | None = client._http.headers.get("OpenAI-Organization")
        return header

    assert organization() is None
    assert organization(OPENAI_ORGANIZATION="") is None
    assert organization(OPENAI_ORGANIZATION="org-env") == "org-env"
    assert organization("-o", "org-flag", OPENAI_ORGANIZATION="org-env") == "org-flag"
    with pytest.raises(UsageError, match="check -o and OPENAI_ORGANIZATION"):
        organization(OPENAI_ORGANIZATION="örg")


def test_the_owner_key_does_not_leave_the_machine(home: Path) -> None:
    with pytest.raises(UsageError, match="needs an API key"):
        asked("-b", "https://elsewhere.example/v1", TUNESMITH_HOME=str(home))


def test_no_key_at_all_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"owner\.key"):
        asked(TUNESMITH_HOME=str(tmp_path))


def test_a_base_url_without_scheme_is_refused() -> None:
    with pytest.raises(UsageError, match="http://"):
        asked("-b", "localhost:8000/v1", "-k", "sk-x")
