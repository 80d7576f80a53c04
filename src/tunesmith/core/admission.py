"""Whether a request and its data go together. Knows examples and flags; no row, no caller, no training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tunesmith.core.requests import FineTuneRequest
from tunesmith.data.checks import Survey, survey
from tunesmith.data.doctor_classes import Encode
from tunesmith.data.formats import Example
from tunesmith.errors import InvalidRequest


def admit(
    request: FineTuneRequest,
    training: Iterable[Example],
    validation: Iterable[Example] | None,
    *,
    count_tokens: Callable[[Example], int],
    limit_tokens: int,
    encode: Encode,
) -> int:
    """Read both files once; return the number of training examples.

    Raises InvalidRequest with param `training_file` or `validation_file` for a row longer than `limit_tokens`, and with
    a classification field for flags that contradict the data, or classes that metrics could not tell apart. `request`
    has passed `requests.check`; `encode` is that of the base, for texts that follow a prompt.
    """
    n_classes = request.n_classes
    # One more than the flags allow is enough to see, and to show, that there are too many.
    max_completions = 0 if n_classes is None else n_classes + 1

    def facts(param: str, examples: Iterable[Example]) -> Survey:
        found = survey(examples, count_tokens=count_tokens, limit_tokens=limit_tokens, max_completions=max_completions)
        _check_lengths(param, found, limit_tokens)
        return found

    trained = facts("training_file", training)
    validated = None if validation is None else facts("validation_file", validation)
    if n_classes is not None and validated is not None:
        _check_classes(request, n_classes, trained, validated)
        _check_first_tokens(list(trained.completions), encode)
    return trained.examples


def _check_lengths(param: str, found: Survey, limit_tokens: int) -> None:
    if not found.over_long:
        return
    rows = ", ".join(f"row {one.row} ({one.tokens} tokens)" for one in found.over_long)
    raise InvalidRequest(
        f"{param} has examples longer than the {limit_tokens} tokens that prompt and completion may have together: "
        f"{rows}. Shorten or remove them.",
        param=param,
    )


def _check_classes(request: FineTuneRequest, n_classes: int, trained: Survey, validated: Survey) -> None:
    classes, positive = trained.completions, request.classification_positive_class
    counted = f"{len(classes)} different completions"
    if len(classes) > n_classes:
        extra, row = list(classes.items())[-1]
        if positive is not None:
            raise InvalidRequest(
                f"classification_positive_class is for two classes, and training_file has more: row {row} adds "
                f"{_shown(extra)}. Give classification_n_classes instead, or make the completions alike.",
                param="classification_positive_class",
            )
        counted = f"at least {counted}: row {row} adds {_shown(extra)}"
    # The positive class first: a misspelt one is the likelier mistake, and the message shows what there is.
    if positive is not None and positive not in classes:
        near = next((name for name in classes if name.strip().lower() == positive.strip().lower()), None)
        raise InvalidRequest(
            f"classification_positive_class {_shown(positive)} is no completion of training_file. "
            + (
                f"Did you mean {_shown(near)}? White space and capitals count."
                if near is not None
                else f"Its completions are {', '.join(map(_shown, classes))}."
            ),
            param="classification_positive_class",
        )
    if len(classes) != n_classes:
        param = "classification_positive_class" if request.classification_n_classes is None else None
        raise InvalidRequest(
            f"The metrics are asked for {n_classes} classes, and training_file has {counted}. A class is one "
            "completion, spelt the same in every row: correct classification_n_classes or the file.",
            param=param or "classification_n_classes",
        )
    for name, row in validated.completions.items():
        if name not in classes:
            raise InvalidRequest(
                f"validation_file has a class that training_file never shows: {_shown(name)} in row {row}. Classes "
                f"are {', '.join(map(_shown, list(classes)[:10]))}. Remove the row, or train on that class too.",
                param="validation_file",
            )


def _check_first_tokens(classes: Sequence[str], encode: Encode) -> None:
    """The trainer would refuse the same, but after the job has waited its turn."""
    firsts: dict[tuple[int, ...], str] = {}
    for name, ids in zip(classes, encode(classes), strict=True):
        other = firsts.setdefault(tuple(ids[:1]), name)
        if other != name:
            raise InvalidRequest(
                f"The classes {_shown(other)} and {_shown(name)} begin with the same token of this base, and metrics "
                "tell classes apart by it. Rename classes (`tunesmith doctor --fix --only class_first_tokens` proposes "
                "names) or leave compute_classification_metrics out.",
                param="compute_classification_metrics",
            )


def _shown(completion: str) -> str:
    return repr(completion if len(completion) <= 60 else completion[:57] + "...")
