"""Names that people read: organisations in model names, suffixes, names of tuned models. Pure functions."""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime

from tunesmith.errors import InvalidRequest

MAX_ALIAS_CHARACTERS = 256

_NOT_A_WORD = re.compile(r"[\W_]+")


def slug(text: str) -> str:
    """Lower case, every run of punctuation and white space one dash, none at the ends; "" if no letter is left.

    >>> slug("Custom model  name!")
    'custom-model-name'
    """
    return _NOT_A_WORD.sub("-", unicodedata.normalize("NFKC", text).lower()).strip("-")


def fine_tuned_name(base_name: str, organization_slug: str, suffix: str | None, at_unix: float) -> str:
    """What a model made at `at_unix` is called. The suffix is as asked; it has at least one letter or digit.

    >>> fine_tuned_name("ada", "your-org", "Custom model name", 1644897864)
    'ada:ft-your-org:custom-model-name-2022-02-15-04-04-24'
    >>> fine_tuned_name("curie", "personal", None, 1644897864)
    'curie:ft-personal-2022-02-15-04-04-24'
    """
    stamp = datetime.fromtimestamp(at_unix, UTC).strftime("%Y-%m-%d-%H-%M-%S")
    return f"{base_name}:ft-{organization_slug}{'-' if suffix is None else f':{slug(suffix)}-'}{stamp}"


def checkpoint_name(model_name: str, step: int) -> str:
    """The name of a checkpoint of a tuned model: that of the epoch which ended with `step`.

    >>> checkpoint_name("ada:ft-acme-2023-04-18-09-48-38", 88)
    'ada:ft-acme-2023-04-18-09-48-38:ckpt-step-88'
    """
    return f"{model_name}:ckpt-step-{step}"


def check_alias(name: str | None) -> None:
    """Raises InvalidRequest for what could not be called by name."""
    if name is None:
        return
    if not 1 <= len(name) <= MAX_ALIAS_CHARACTERS or not name.isprintable() or " " in name:
        raise InvalidRequest(
            f"alias must have 1 to {MAX_ALIAS_CHARACTERS} printable characters without spaces; you gave "
            f"{name[:100]!r}.",
            param="alias",
        )
