"""How good the predictions are: loss and accuracies of a batch, classification metrics of a validation set.

Equal to scikit-learn's, which the tests compare with; written out here so that a trainer does not need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.training.loss import Scores
from tunesmith.training.packing import MicroBatch


@dataclass(slots=True)
class Tally:
    """Sums over micro-batches, and the means that the result columns show."""

    weighted_nll: float = 0.0
    weight: float = 0.0
    sequences: int = 0
    right_sequences: int = 0
    tokens: int = 0
    right_tokens: int = 0

    def add(self, batch: MicroBatch, scores: Scores) -> None:
        """Counts the rows of a micro-batch."""
        self.weighted_nll += float(scores.nll_M.double() @ batch.weight_M.double())
        self.weight += float(batch.weight_M.double().sum())
        right_C = scores.right_M[batch.completion_C].cpu()
        self.count([part.tolist() for part in right_C.split(batch.completion_lengths)])

    def merge(self, other: Tally) -> None:
        """Adds what another has counted."""
        self.weighted_nll += other.weighted_nll
        self.weight += other.weight
        self.sequences += other.sequences
        self.right_sequences += other.right_sequences
        self.tokens += other.tokens
        self.right_tokens += other.right_tokens

    def count(self, right: Sequence[Sequence[bool]]) -> None:
        """Counts the completion tokens of some rows by whether they were predicted right.

        Teacher-forced: each token is predicted from the true prefix. For completions [[1, 2], [0, 5], [4, 2]] and
        predictions [[1, 1], [0, 5], [4, 2]] the sequence accuracy is 2/3 and the token accuracy 5/6.
        Source: OpenAI fine-tuning guide (2023), "Analyzing your fine-tuned model".
        """
        self.sequences += len(right)
        self.right_sequences += sum(all(row) for row in right)
        self.tokens += sum(len(row) for row in right)
        self.right_tokens += sum(sum(row) for row in right)

    @property
    def loss(self) -> float:
        """Weighted mean of the tokens' negative log-probabilities, nats."""
        return self.weighted_nll / self.weight

    @property
    def sequence_accuracy(self) -> float:
        """Share of rows whose completion tokens were all predicted, in [0, 1]."""
        return self.right_sequences / self.sequences

    @property
    def token_accuracy(self) -> float:
        """Share of completion tokens that were predicted, in [0, 1]."""
        return self.right_tokens / self.tokens


def binary_metrics(
    positive: NDArray[np.bool_], probability: NDArray[np.float64], betas: Sequence[float]
) -> dict[str, float | None]:
    """Accuracy, precision, recall, auroc, auprc and one f<beta> each: `probability` is that of the positive class.

    An example is called positive from probability 0.5 on. Precision, recall and F are 0 where nothing is divided by
    nothing, as is auprc without positive examples; auroc is None (undefined) if all examples are of one class.
    """
    called = probability >= 0.5
    hits = int((called & positive).sum())
    false_alarms = int((called & ~positive).sum())
    misses = int((~called & positive).sum())
    return {
        "accuracy": float((called == positive).mean()),
        "precision": _ratio(hits, hits + false_alarms),
        "recall": _ratio(hits, hits + misses),
        "auroc": _auroc(positive, probability),
        "auprc": _auprc(positive, probability),
    } | {
        f"f{float(beta)}": _ratio((1 + beta**2) * hits, (1 + beta**2) * hits + beta**2 * misses + false_alarms)
        for beta in betas
    }


def multiclass_metrics(actual: NDArray[np.int64], called: NDArray[np.int64]) -> dict[str, float | None]:
    """Accuracy, and the mean of the classes' F1 weighted by how often each class is actual; arguments are class ids."""
    weighted = 0.0
    for each in np.unique(actual):
        hits = int(((actual == each) & (called == each)).sum())
        n_actual, n_called = int((actual == each).sum()), int((called == each).sum())
        weighted += n_actual * _ratio(2 * hits, n_actual + n_called)
    return {"accuracy": float((actual == called).mean()), "weighted_f1_score": weighted / len(actual)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _auroc(positive: NDArray[np.bool_], score: NDArray[np.float64]) -> float | None:
    """Chance that a positive example scores above a negative one, ties counting half (Mann-Whitney)."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if n_positive == 0 or n_negative == 0:
        return None
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2  # ranks from 1; equal scores share the mean of theirs
    rank_sum = float(mean_rank[place][positive].sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def _auprc(positive: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    """Average precision: the mean of the precisions at each threshold, weighted by the gain in recall."""
    n_positive = int(positive.sum())
    if n_positive == 0:
        return 0.0
    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.diff(score[order]) != 0, True)
    hits = np.cumsum(positive[order])[last_of_tie]
    called = np.flatnonzero(last_of_tie) + 1
    gains = np.diff(hits, prepend=0)
    return float((gains * (hits / called)).sum() / n_positive)
