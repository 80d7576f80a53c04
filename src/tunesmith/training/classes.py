"""The classes of a classification job, told apart by their first completion token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import InvalidRequest
from tunesmith.rundir import ResolvedHyperparameters
from tunesmith.tokenizer import Tokenizer
from tunesmith.training.batches import Row
from tunesmith.training.metrics import binary_metrics, multiclass_metrics

SHOWN = 5
"""Classes that a message names at most."""


def metric_names(hyperparameters: ResolvedHyperparameters) -> tuple[str, ...]:
    """Names of the metrics in the order of their columns; none if they are not asked for."""
    if not hyperparameters.compute_classification_metrics:
        return ()
    if hyperparameters.classification_positive_class is None:
        return ("accuracy", "weighted_f1_score")
    f_names = (f"f{float(beta)}" for beta in hyperparameters.classification_betas)
    return ("accuracy", "precision", "recall", "auroc", "auprc", *f_names)


@dataclass(frozen=True, slots=True)
class Classes:
    """The first tokens of the classes, in the order of their ids."""

    token_ids: tuple[int, ...]
    positive_id: int | None
    """First token of the positive class; None asks for the metrics of many classes."""
    betas: tuple[float, ...]
    longer: tuple[str, ...] = ()
    """Classes of more than one token, of which the metrics judge the first alone."""

    @classmethod
    def find(
        cls, rows: Sequence[Row], hyperparameters: ResolvedHyperparameters, tokenizer: Tokenizer
    ) -> Classes | None:
        """The classes of training and validation `rows`; None if no metrics are asked for.

        Raises InvalidRequest if their number is not the one asked for, or if the positive class is not among them.
        """
        if not hyperparameters.compute_classification_metrics:
            return None
        token_ids = tuple(sorted({row.token_ids[row.completion_start] for row in rows}))
        shown = ", ".join(repr(tokenizer.decode([token_id])) for token_id in token_ids[:10])
        if len(token_ids) != hyperparameters.classification_n_classes:
            raise InvalidRequest(
                f"classification_n_classes is {hyperparameters.classification_n_classes}, but the completions of the "
                f"training and validation file begin with {len(token_ids)} different tokens: {shown}. Classes are told "
                "apart by their first token: make each class a single token, such as ' yes' and ' no', or correct "
                "classification_n_classes.",
                param="classification_n_classes",
            )
        positive = hyperparameters.classification_positive_class
        positive_id = None
        if positive is not None:
            positive_id = next(iter(tokenizer.encode(positive)), None)
            if positive_id not in token_ids:
                raise InvalidRequest(
                    f"classification_positive_class is {positive!r}, but no completion begins as it does; completions "
                    f"begin with: {shown}. Mind the space in front.",
                    param="classification_positive_class",
                )
        completions = {tuple(row.token_ids[row.completion_start :]) for row in rows if row.n_completion > 1}
        longer = tuple(tokenizer.decode(list(ids)) for ids in sorted(completions))
        return cls(token_ids, positive_id, hyperparameters.classification_betas, longer)

    @property
    def warning(self) -> str | None:
        """What to tell a user whose classes are not single tokens."""
        if not self.longer:
            return None
        shown = ", ".join(map(repr, self.longer[:SHOWN])) + (", ..." if len(self.longer) > SHOWN else "")
        return (
            f"Classification metrics judge the first token of a completion, and these have more: {shown}. Ask with "
            "max_tokens=1 to get what is measured, or make each class a single token, such as ' yes' and ' no'."
        )

    def metrics(self, rows: Sequence[Row], probabilities: NDArray[np.float64]) -> dict[str, float | None]:
        """The metrics over `rows`, by the names of `metric_names`; None where one is undefined.

        Of the probabilities of `token_ids` [rows, classes].
        """
        actual = np.array([self.token_ids.index(row.token_ids[row.completion_start]) for row in rows])
        if self.positive_id is None:
            return multiclass_metrics(actual, probabilities.argmax(1))
        positive = self.token_ids.index(self.positive_id)
        return binary_metrics(actual == positive, probabilities[:, positive], self.betas)
