from __future__ import annotations

import doctest
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core import requests
from tunesmith.core.requests import (
    FineTuneRequest,
    Start,
    check,
    default_batch_size,
    default_learning_rate_multiplier,
    go_on_from,
    resolve,
)
from tunesmith.errors import InvalidRequest
from tunesmith.rundir import ResolvedHyperparameters

METRICS = {"compute_classification_metrics": True, "validation_file": "file-v"}


def asked(**fields: object) -> FineTuneRequest:
    return FineTuneRequest(training_file="file-t", model="ada", **fields)  # type: ignore[arg-type]


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(requests).failed == 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"suffix": "x" * 40},
        {"suffix": "Custom model name"},
        {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 0.02, "prompt_loss_weight": 0.0},
        {"n_epochs": 50, "batch_size": 256, "learning_rate_multiplier": 10, "prompt_loss_weight": 1},
        {"seed": 0, "lora_rank": 1, "lora_alpha": 0.5, "epoch_checkpoints": 0},
        {"lora_targets": ("q_proj", "v_proj"), "method": "lora"},
        {"method": "full"},
        {"seed": 2**31 - 1, "lora_rank": 256, "lora_alpha": 65_536, "epoch_checkpoints": 50},
        {"best_epoch": True, "early_stopping_patience": 1, "validation_file": "file-v"},
        METRICS | {"classification_n_classes": 2},
        METRICS | {"classification_n_classes": 14},
        METRICS | {"classification_positive_class": " yes"},
        METRICS | {"classification_positive_class": " yes", "classification_n_classes": 2},
        METRICS | {"classification_positive_class": " yes", "classification_betas": (0.5, 1.0, 2.0)},
    ],
)
def test_what_is_within_the_rules_passes(fields: dict[str, object]) -> None:
    check(asked(**fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 41}, "suffix"),
        ({"suffix": "!?"}, "suffix"),
        ({"n_epochs": 0}, "n_epochs"),
        ({"n_epochs": 51}, "n_epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 257}, "batch_size"),
        ({"learning_rate_multiplier": 0.0}, "learning_rate_multiplier"),
        ({"learning_rate_multiplier": -0.1}, "learning_rate_multiplier"),
        ({"learning_rate_multiplier": 10.1}, "learning_rate_multiplier"),
        ({"learning_rate_multiplier": math.nan}, "learning_rate_multiplier"),
        ({"prompt_loss_weight": -0.1}, "prompt_loss_weight"),
        ({"prompt_loss_weight": 1.1}, "prompt_loss_weight"),
        ({"prompt_loss_weight": math.nan}, "prompt_loss_weight"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_rank": 257}, "lora_rank"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_targets": ()}, "lora_targets"),
        ({"lora_targets": ("q_proj", "q_proj")}, "lora_targets"),
        ({"lora_targets": ("self_attn.q_proj",)}, "lora_targets"),
        ({"method": "qlora"}, "method"),
        ({"method": "full", "lora_rank": 4}, "lora_rank"),
        ({"method": "full", "lora_targets": ("q_proj",)}, "lora_targets"),
        ({"epoch_checkpoints": -1}, "epoch_checkpoints"),
        ({"early_stopping_patience": 0, "validation_file": "file-v"}, "early_stopping_patience"),
        ({"early_stopping_patience": 1}, "validation_file"),
        ({"best_epoch": True}, "validation_file"),
        ({"classification_n_classes": 2}, "classification_n_classes"),
        ({"classification_positive_class": " yes"}, "classification_positive_class"),
        ({"classification_betas": (1.0,)}, "classification_betas"),
        ({"compute_classification_metrics": True, "classification_n_classes": 2}, "validation_file"),
        (METRICS, "classification_n_classes"),
        (METRICS | {"classification_n_classes": 1}, "classification_n_classes"),
        (METRICS | {"classification_n_classes": -2}, "classification_n_classes"),
        (
            METRICS | {"classification_n_classes": 3, "classification_positive_class": "a"},
            "classification_positive_class",
        ),
        (METRICS | {"classification_positive_class": ""}, "classification_positive_class"),
        (METRICS | {"classification_n_classes": 3, "classification_betas": (1.0,)}, "classification_betas"),
        (METRICS | {"classification_n_classes": 2, "classification_betas": (1.0,)}, "classification_betas"),
        (METRICS | {"classification_positive_class": "a", "classification_betas": ()}, "classification_betas"),
        (METRICS | {"classification_positive_class": "a", "classification_betas": (0.0,)}, "classification_betas"),
        (METRICS | {"classification_positive_class": "a", "classification_betas": (1.0, 1)}, "classification_betas"),
        (METRICS | {"classification_positive_class": "a", "classification_betas": (math.inf,)}, "classification_betas"),
        (METRICS | {"classification_positive_class": "a", "classification_betas": (math.nan,)}, "classification_betas"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(asked(**fields))
    assert caught.value.param == param
    assert param.split("_")[0] in caught.value.message


def test_the_message_about_a_suffix_has_rule_and_length() -> None:
    with pytest.raises(InvalidRequest, match=r"suffix must have 1 to 40 characters; yours has 41\. Shorten it\."):
        check(asked(suffix="x" * 41))


def test_defaults() -> None:
    assert resolve(asked(), 9_000) == ResolvedHyperparameters(
        n_epochs=4,
        batch_size=16,
        learning_rate_multiplier=0.2,
        prompt_loss_weight=0.01,
        compute_classification_metrics=False,
        classification_n_classes=None,
        classification_positive_class=None,
        classification_betas=(1.0,),
        lora_rank=32,
        lora_alpha=512.0,
    )
    few = resolve(asked(), 300)
    assert (few.batch_size, few.learning_rate_multiplier) == (1, 0.1)


def test_all_weights_need_no_adapter() -> None:
    resolved = resolve(asked(method="full"), 9_000)
    assert (resolved.method, resolved.lora_rank, resolved.lora_alpha) == ("full", None, None)


def test_a_job_goes_on_with_what_was_trained_before() -> None:
    adapter, whole = Start("ada:ft-a", "lora"), Start("ada:ft-b", "full")
    assert go_on_from(adapter, asked()).method is None
    assert go_on_from(adapter, asked(method="full")).method == "full"
    assert go_on_from(whole, asked()).method == "full"
    with pytest.raises(InvalidRequest, match="all its weights were trained, and so they will be") as caught:
        go_on_from(whole, asked(method="lora"))
    assert caught.value.param == "method"
    with pytest.raises(InvalidRequest, match="ada:ft-b has no adapter"):
        go_on_from(whole, asked(lora_rank=4))


def test_what_is_asked_stands_even_if_it_is_zero() -> None:
    given = resolve(asked(n_epochs=2, batch_size=3, learning_rate_multiplier=0.07, prompt_loss_weight=0.0), 10**6)
    assert (given.n_epochs, given.batch_size, given.learning_rate_multiplier) == (2, 3, 0.07)
    assert given.prompt_loss_weight == 0


def test_a_positive_class_alone_means_two_classes() -> None:
    resolved = resolve(asked(**METRICS, classification_positive_class=" yes"), 10)
    assert resolved.compute_classification_metrics
    assert resolved.classification_n_classes == 2
    assert resolved.classification_positive_class == " yes"


@given(st.integers(1, 10**7))
def test_the_default_batch_size_is_the_largest_power_of_two_within_the_share(examples: int) -> None:
    size = default_batch_size(examples)
    assert size & (size - 1) == 0
    assert 1 <= size <= 256
    assert size == 1 or size <= 0.002 * examples
    assert size == 256 or size * 2 > 0.002 * examples


@given(st.integers(1, 256), st.integers(1, 256))
def test_larger_batches_never_get_a_smaller_rate(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert default_learning_rate_multiplier(small) <= default_learning_rate_multiplier(large)
    assert default_learning_rate_multiplier(small) in (0.05, 0.1, 0.2)
