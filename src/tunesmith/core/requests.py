"""What a user asks of a fine-tune: its fields, their bounds and their defaults. Pure; knows no file and no row."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

from tunesmith.core.integrations import Integration, check_integrations
from tunesmith.core.names import check_alias, slug
from tunesmith.errors import InvalidRequest
from tunesmith.rundir import ResolvedHyperparameters

MAX_SUFFIX_CHARACTERS = 40
"""Of the API of 2021-2023."""
MAX_MODERN_SUFFIX_CHARACTERS = 64
MAX_METADATA = 16
MAX_METADATA_KEY_CHARACTERS = 64
MAX_METADATA_VALUE_CHARACTERS = 512
"""The last four: source: the published API of fine-tuning jobs."""
DEFAULT_N_EPOCHS = 4
MAX_N_EPOCHS = 50
MAX_BATCH_SIZE = 256
BATCH_SHARE = 0.002
"""The default batch size is about this share of the training examples."""
DEFAULT_LEARNING_RATE_MULTIPLIERS = ((1, 0.1), (16, 0.2))
"""(from this batch size on, multiplier), rising.

The fine-tuning guide (2023) names 0.05, 0.1 and 0.2 "depending on final batch size" and no thresholds. Published jobs
with batch size 1 show 0.1, and a larger batch never gets a smaller rate, so 0.05 is never the default.
"""
MAX_LEARNING_RATE_MULTIPLIER = 10.0
DEFAULT_PROMPT_LOSS_WEIGHT = 0.01
MAX_BETAS = 10
MAX_SEED = 2**31 - 1
"""Source: the published API."""
DEFAULT_SEED = 0
"""The same for every job: the same file and hyperparameters give the same model."""
DEFAULT_LORA_RANK = 32
DEFAULT_LORA_SCALE = 16.0
"""Adapters are scaled by alpha / rank, by default 16, where 2 is customary: B, which starts at zero, then moves eight
times as fast beside A. The learning rates of `core/bases.py` are for this scale. What it gains, and why it is not a
learning rate of B's own: docs/design/decisions/defaults.md."""
MAX_LORA_RANK = 256
MAX_LORA_ALPHA = 65_536.0
METHODS = ("lora", "full")
"""An adapter, or all weights."""
DEFAULT_MODEL = "curie"
"""Source: the published API of 2021-2023."""
RULES = {
    "batch_size": f"about {BATCH_SHARE:.1%} of the examples, as a power of two, at most {MAX_BATCH_SIZE}",
    "learning_rate_multiplier": ", ".join(
        f"{multiplier:g}" if least == 1 else f"from batches of {least} on {multiplier:g}"
        for least, multiplier in DEFAULT_LEARNING_RATE_MULTIPLIERS
    ),
    "prompt_loss_weight": f"{DEFAULT_PROMPT_LOSS_WEIGHT:g}, where a completion token weighs 1",
    "classification_n_classes": "2 with a positive class",
    "seed": "the same for all, so that equal jobs give equal models",
    "method": "an adapter, unless it goes on from a model of which all weights were trained",
    "lora_alpha": f"{DEFAULT_LORA_SCALE:g} times the rank",
    "lora_targets": "every linear layer, and the embedding",
}
"""The rule behind a default that is more than a number, for people."""
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_targets")


@dataclass(frozen=True, slots=True)
class FineTuneRequest:
    """A fine-tune as asked. None: not given, the default counts."""

    training_file: str
    model: str
    validation_file: str | None = None
    suffix: str | None = None
    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    prompt_loss_weight: float | None = None
    compute_classification_metrics: bool = False
    classification_n_classes: int | None = None
    classification_positive_class: str | None = None
    classification_betas: tuple[float, ...] | None = None
    seed: int | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    """Which modules the adapter covers, by the last part of their names: q_proj, embed_tokens."""
    method: str | None = None
    """One of METHODS."""
    best_epoch: bool = False
    early_stopping_patience: int | None = None
    epoch_checkpoints: int | None = None
    integrations: tuple[Integration, ...] = ()
    """Trackers that follow the job."""
    alias: str | None = None
    """Another name for the model, such as one that it had elsewhere."""
    modern: bool = False
    """Whether it was asked for in the dialect of fine-tuning jobs, which came after that of fine-tunes."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Whatever the user wants to find with the job."""

    @property
    def job_prefix(self) -> str:
        """What the ids of such jobs begin with."""
        return "ftjob-" if self.modern else "ft-"

    @property
    def n_classes(self) -> int | None:
        """How many classes the metrics are for; None without metrics. A positive class alone means two."""
        if not self.compute_classification_metrics:
            return None
        return 2 if self.classification_n_classes is None else self.classification_n_classes


def check(request: FineTuneRequest) -> None:
    """Raises InvalidRequest for the first field that is out of bounds or does not go with the others."""
    check_suffix(request.suffix, MAX_MODERN_SUFFIX_CHARACTERS if request.modern else MAX_SUFFIX_CHARACTERS)
    _check_range("n_epochs", request.n_epochs, 1, MAX_N_EPOCHS)
    _check_range("batch_size", request.batch_size, 1, MAX_BATCH_SIZE)
    multiplier = request.learning_rate_multiplier
    if multiplier is not None and not 0 < multiplier <= MAX_LEARNING_RATE_MULTIPLIER:
        raise InvalidRequest(
            f"learning_rate_multiplier must be above 0 and at most {MAX_LEARNING_RATE_MULTIPLIER:g}; you gave "
            f"{multiplier!r}. Values from 0.02 to 0.2 usually work best.",
            param="learning_rate_multiplier",
        )
    _check_range("prompt_loss_weight", request.prompt_loss_weight, 0, 1)
    _check_range("seed", request.seed, 0, MAX_SEED)
    _check_range("lora_rank", request.lora_rank, 1, MAX_LORA_RANK)
    if request.lora_alpha is not None and not 0 < request.lora_alpha <= MAX_LORA_ALPHA:
        raise InvalidRequest(
            f"lora_alpha must be above 0 and at most {MAX_LORA_ALPHA:g}; you gave {request.lora_alpha!r}. Leave it out "
            f"for {DEFAULT_LORA_SCALE:g} times the rank.",
            param="lora_alpha",
        )
    _check_method(request)
    _check_epochs(request)
    check_integrations(request.integrations)
    check_alias(request.alias)
    _check_metadata(request.metadata)
    if request.compute_classification_metrics:
        _check_metrics(request)
    else:
        _check_no_metrics(request)


@dataclass(frozen=True, slots=True)
class Start:
    """The tuned model that a job goes on from."""

    name: str
    method: Literal["lora", "full"]


def go_on_from(start: Start, request: FineTuneRequest) -> FineTuneRequest:
    """The request with what `start` decides filled in.

    Raises InvalidRequest where a job that goes on from a tuned model asks for what that model does not have.
    """
    if start.method == "full" and request.method == "lora":
        raise InvalidRequest(
            f"method cannot be 'lora' for a job that goes on from {start.name}: all its weights were trained, and so "
            "they will be. Leave method out, or start from the base.",
            param="method",
        )
    for name in LORA_FIELDS:
        if getattr(request, name) is not None:
            has = "an adapter, and training goes on with it as it is" if start.method == "lora" else "no adapter"
            raise InvalidRequest(
                f"{name} cannot be set for a job that goes on from a tuned model: {start.name} has {has}. Leave {name} "
                "out, or start from the base.",
                param=name,
            )
    return replace(request, method="full") if start.method == "full" else request


def resolve(
    request: FineTuneRequest, training_examples: int, parent_name: str | None = None
) -> ResolvedHyperparameters:
    """Fill in every default. `request` has passed `check` and `go_on_from`; `training_examples` is at least 1."""
    method: Literal["lora", "full"] = "full" if request.method == "full" else "lora"
    new_adapter = method == "lora" and parent_name is None
    batch_size = default_batch_size(training_examples) if request.batch_size is None else request.batch_size
    multiplier = request.learning_rate_multiplier
    rank = DEFAULT_LORA_RANK if request.lora_rank is None else request.lora_rank
    alpha = DEFAULT_LORA_SCALE * rank if request.lora_alpha is None else request.lora_alpha
    return ResolvedHyperparameters(
        n_epochs=DEFAULT_N_EPOCHS if request.n_epochs is None else request.n_epochs,
        batch_size=batch_size,
        learning_rate_multiplier=default_learning_rate_multiplier(batch_size) if multiplier is None else multiplier,
        prompt_loss_weight=(
            DEFAULT_PROMPT_LOSS_WEIGHT if request.prompt_loss_weight is None else request.prompt_loss_weight
        ),
        compute_classification_metrics=request.compute_classification_metrics,
        classification_n_classes=request.n_classes,
        classification_positive_class=request.classification_positive_class,
        classification_betas=(1.0,) if request.classification_betas is None else request.classification_betas,
        method=method,
        lora_rank=rank if new_adapter else None,
        lora_alpha=alpha if new_adapter else None,
        lora_targets=request.lora_targets,
        best_epoch=request.best_epoch,
        early_stopping_patience=request.early_stopping_patience,
        epoch_checkpoints=request.epoch_checkpoints or 0,
    )


def default_batch_size(training_examples: int) -> int:
    """The largest power of two that is at most 0.2 % of the examples, from 1 to 256.

    >>> [default_batch_size(n) for n in (1, 999, 1_000, 9_000, 10**9)]
    [1, 1, 2, 16, 256]
    """
    share = max(1, min(MAX_BATCH_SIZE, math.floor(BATCH_SHARE * training_examples)))
    return 1 << (share.bit_length() - 1)


def default_learning_rate_multiplier(batch_size: int) -> float:
    """0.1 for batches under 16, 0.2 from there on; see DEFAULT_LEARNING_RATE_MULTIPLIERS."""
    return max(multiplier for least, multiplier in DEFAULT_LEARNING_RATE_MULTIPLIERS if batch_size >= least)


def check_suffix(suffix: str | None, most: int = MAX_SUFFIX_CHARACTERS) -> None:
    """Raises InvalidRequest for one that is too long, or of which nothing is left in a name."""
    if suffix is None:
        return
    if not 1 <= len(suffix) <= most:
        raise InvalidRequest(
            f"suffix must have 1 to {most} characters; yours has {len(suffix)}. "
            + ("Leave it out for a name without suffix." if not suffix else "Shorten it."),
            param="suffix",
        )
    if not slug(suffix):
        raise InvalidRequest(
            f"suffix {suffix!r} has no letter or digit, and all else becomes dashes in the model's name. Add one.",
            param="suffix",
        )


def _check_range(name: str, value: float | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise InvalidRequest(
            f"{name} must be from {least} to {most}; you gave {value!r}. Leave it out for the default.", param=name
        )


def _check_epochs(request: FineTuneRequest) -> None:
    _check_range("epoch_checkpoints", request.epoch_checkpoints, 0, MAX_N_EPOCHS)
    _check_range("early_stopping_patience", request.early_stopping_patience, 1, MAX_N_EPOCHS)
    for name in ("best_epoch", "early_stopping_patience"):
        if getattr(request, name) and request.validation_file is None:
            raise InvalidRequest(
                f"{name} goes by the loss on a validation_file, and there is none. Give one, or leave {name} out.",
                param="validation_file",
            )


def _check_method(request: FineTuneRequest) -> None:
    if request.method not in (None, *METHODS):
        raise InvalidRequest(
            f"method must be 'lora' (an adapter, the default) or 'full' (all weights); you gave {request.method!r}.",
            param="method",
        )
    for name in LORA_FIELDS:
        if request.method == "full" and getattr(request, name) is not None:
            raise InvalidRequest(
                f"{name} is for adapters, and method 'full' trains all weights. Leave one of the two out.", param=name
            )
    targets = request.lora_targets
    if targets is None:
        return
    if not targets or len(set(targets)) < len(targets) or not all(re.fullmatch(r"\w{1,64}", name) for name in targets):
        raise InvalidRequest(
            "lora_targets must be different names of modules, such as ['q_proj', 'v_proj']; you gave "
            f"{list(targets)[:20]!r}. Leave it out to cover all.",
            param="lora_targets",
        )


def _check_metadata(metadata: dict[str, str]) -> None:
    if len(metadata) > MAX_METADATA:
        raise InvalidRequest(
            f"metadata may have {MAX_METADATA} entries; yours has {len(metadata)}. Leave some out.", param="metadata"
        )
    for key, value in metadata.items():
        if not 1 <= len(key) <= MAX_METADATA_KEY_CHARACTERS or len(value) > MAX_METADATA_VALUE_CHARACTERS:
            raise InvalidRequest(
                f"metadata has keys of 1 to {MAX_METADATA_KEY_CHARACTERS} characters and values of at most "
                f"{MAX_METADATA_VALUE_CHARACTERS}; {key[:MAX_METADATA_KEY_CHARACTERS]!r} has {len(key)} and its value "
                f"{len(value)}. Shorten it.",
                param="metadata",
            )


def _check_no_metrics(request: FineTuneRequest) -> None:
    for name in ("classification_n_classes", "classification_positive_class", "classification_betas"):
        if getattr(request, name) is not None:
            raise InvalidRequest(
                f"{name} is only used for classification metrics. Set compute_classification_metrics to true and give "
                f"a validation_file, or leave {name} out.",
                param=name,
            )


def _check_metrics(request: FineTuneRequest) -> None:
    if request.validation_file is None:
        raise InvalidRequest(
            "compute_classification_metrics needs a validation_file: the metrics are measured on it. Give one, or "
            "leave compute_classification_metrics out.",
            param="validation_file",
        )
    positive, n_classes, betas = (
        request.classification_positive_class,
        request.classification_n_classes,
        request.classification_betas,
    )
    if positive is None and n_classes is None:
        raise InvalidRequest(
            "compute_classification_metrics needs classification_n_classes, or classification_positive_class for two "
            "classes. Give one of them.",
            param="classification_n_classes",
        )
    if n_classes is not None and n_classes < 2:
        raise InvalidRequest(
            f"classification_n_classes must be at least 2; you gave {n_classes}.", param="classification_n_classes"
        )
    if positive is not None and n_classes is not None and n_classes > 2:
        raise InvalidRequest(
            f"classification_positive_class is for two classes and classification_n_classes is {n_classes}. Leave one "
            "of them out.",
            param="classification_positive_class",
        )
    if positive == "":
        raise InvalidRequest(
            "classification_positive_class must be a completion of the training file, its leading space included; "
            "you gave an empty string.",
            param="classification_positive_class",
        )
    if betas is None:
        return
    if positive is None:
        raise InvalidRequest(
            "classification_betas are for two classes with a classification_positive_class. Give that too, or leave "
            "classification_betas out.",
            param="classification_betas",
        )
    if not 1 <= len(betas) <= MAX_BETAS or len(set(betas)) < len(betas) or not all(0 < b < math.inf for b in betas):
        raise InvalidRequest(
            f"classification_betas must be 1 to {MAX_BETAS} different numbers above 0; you gave {list(betas)!r}.",
            param="classification_betas",
        )
