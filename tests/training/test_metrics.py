from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from tunesmith.training.metrics import Tally, binary_metrics, multiclass_metrics


def test_accuracies_of_the_guides_example() -> None:
    completions, predictions = [[1, 2], [0, 5], [4, 2]], [[1, 1], [0, 5], [4, 2]]
    tally = Tally()

    tally.count([[a == b for a, b in zip(*pair, strict=True)] for pair in zip(completions, predictions, strict=True)])

    assert tally.sequence_accuracy == 2 / 3
    assert tally.token_accuracy == 5 / 6


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.5, 0.5, 0.7, 1.0, 1 / 3])), min_size=1, max_size=40),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_binary_metrics_are_those_of_scikit_learn(rows: list[tuple[bool, float]], beta: float) -> None:
    positive, probability = np.array([label for label, _ in rows]), np.array([score for _, score in rows])
    called = probability >= 0.5
    found = binary_metrics(positive, probability, [beta])

    assert found["accuracy"] == pytest.approx(reference.accuracy_score(positive, called), abs=1e-12)
    assert found["precision"] == pytest.approx(_quiet(reference.precision_score, positive, called), abs=1e-12)
    assert found["recall"] == pytest.approx(_quiet(reference.recall_score, positive, called), abs=1e-12)
    assert found["auprc"] == pytest.approx(_quiet(reference.average_precision_score, positive, probability), abs=1e-12)
    assert found[f"f{beta}"] == pytest.approx(_quiet(reference.fbeta_score, positive, called, beta=beta), abs=1e-12)
    if positive.all() or not positive.any():
        assert found["auroc"] is None
    else:
        assert found["auroc"] == pytest.approx(reference.roc_auc_score(positive, probability), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_multiclass_metrics_are_those_of_scikit_learn(rows: list[tuple[int, int]]) -> None:
    actual, called = np.array([a for a, _ in rows]), np.array([c for _, c in rows])

    found = multiclass_metrics(actual, called)

    assert found["accuracy"] == pytest.approx(reference.accuracy_score(actual, called), abs=1e-12)
    expected = _quiet(reference.f1_score, actual, called, average="weighted")
    assert found["weighted_f1_score"] == pytest.approx(expected, abs=1e-12)


def test_metrics_of_a_large_set_with_many_ties() -> None:
    chance = np.random.default_rng(0)
    positive = chance.random(5_000) < 0.3
    probability = np.round(np.clip(chance.normal(0.4 + 0.2 * positive, 0.2), 0, 1), 2)

    found = binary_metrics(positive, probability, [1.0])

    assert found["auroc"] == pytest.approx(reference.roc_auc_score(positive, probability), abs=1e-12)
    assert found["auprc"] == pytest.approx(reference.average_precision_score(positive, probability), abs=1e-12)


def _quiet(metric: Callable[..., float], *arguments: Any, **options: Any) -> float:
    with warnings.catch_warnings():  # it warns of the degenerate cases, which are the point here
        warnings.simplefilter("ignore")
        return metric(*arguments, **options)
