"""What a user would do without a language model: always the largest class, or TF-IDF with logistic regression."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.quality.sets import SEED, Row

PLAIN = {"C": 1.0, "sublinear_tf": False}
"""The library's own defaults."""
CHOICES = [PLAIN, *({"C": c, "sublinear_tf": True} for c in (3.0, 10.0, 30.0, 100.0))]
HELD_OUT = 0.2


def majority(train: Sequence[Row], valid: Sequence[Row]) -> list[str]:
    """The training file's largest class, for every row."""
    return [Counter(row.completion for row in train).most_common(1)[0][0]] * len(valid)


def tfidf(train: Sequence[Row], valid: Sequence[Row]) -> tuple[list[str], dict[str, Any]]:
    """Answers of logistic regression over TF-IDF of single words and pairs, and the choice it was fitted with.

    The choice is the most accurate on a fifth of the training rows, fitted on the others; validation rows play no part
    in it. Then it is fitted on all training rows.
    """
    from sklearn.model_selection import train_test_split

    texts, classes = [row.prompt for row in train], [row.completion for row in train]
    fit_x, held_x, fit_y, held_y = train_test_split(
        texts, classes, test_size=HELD_OUT, stratify=classes, random_state=SEED
    )
    scores = [_pipeline(choice).fit(fit_x, fit_y).score(held_x, held_y) for choice in CHOICES]
    chosen = CHOICES[scores.index(max(scores))]
    fitted = _pipeline(chosen).fit(texts, classes)
    return [str(answer) for answer in fitted.predict([row.prompt for row in valid])], chosen


def _pipeline(choice: dict[str, Any]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=choice["sublinear_tf"]),
        LogisticRegression(C=choice["C"], max_iter=1000),
    )
