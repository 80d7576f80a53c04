from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core import names
from tunesmith.core.names import fine_tuned_name, slug


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(names).failed == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Custom model  name!", "custom-model-name"),
        ("--a__b..c--", "a-b-c"),
        ("Ünïcode", "ünïcode"),
        ("!!!", ""),
        ("", ""),
    ],
)
def test_slug(text: str, expected: str) -> None:
    assert slug(text) == expected


@given(st.text())
def test_a_slug_is_its_own_slug_and_has_no_double_dash(text: str) -> None:
    once = slug(text)
    assert slug(once) == once
    assert "--" not in once
    assert once == once.strip("-")
    assert not any(character.isspace() for character in once)


def test_the_date_is_utc_and_the_colon_depends_on_the_suffix() -> None:
    assert fine_tuned_name("curie", "personal", None, 1681811328) == "curie:ft-personal-2023-04-18-09-48-48"
    assert fine_tuned_name("ada", "o", "x y", 0) == "ada:ft-o:x-y-1970-01-01-00-00-00"
