"""Measures of predicted classes and of generated text. Pure functions over lists and strings.

Text is compared as `words` gives it: lower case, punctuation apart. BLEU and ROUGE depend on such choices, so numbers
from here compare with each other and only roughly with published ones.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

BLEU_ORDER = 4


def words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case.

    >>> words("Café Rouge's menu, £20.")
    ['café', 'rouge', "'", 's', 'menu', ',', '£', '20', '.']
    """
    return re.findall(r"\w+|[^\w\s]", text.lower())


def accuracy(truth: Sequence[str], given: Sequence[str]) -> float:
    """Share of answers that are right."""
    return sum(a == b for a, b in zip(truth, given, strict=True)) / len(truth)


def weighted_f1(truth: Sequence[str], given: Sequence[str]) -> float:
    """F1 of each class, weighted by how often it is the truth; as `sklearn.metrics.f1_score(average="weighted")`."""
    right = Counter(a for a, b in zip(truth, given, strict=True) if a == b)
    true, answered = Counter(truth), Counter(given)
    return sum(count * 2 * right[name] / (count + answered[name]) for name, count in true.items()) / len(truth)


def bleu(given: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 of texts against one or more references each, in [0, 1], not smoothed.

    Source: Papineni et al. 2002. Counts are clipped by the most any one reference has; the brevity penalty takes the
    reference whose length is closest, the shorter of two.
    """
    matched, total = [0] * BLEU_ORDER, [0] * BLEU_ORDER
    given_length = reference_length = 0
    for text, others in zip(given, references, strict=True):
        tokens, wanted = words(text), [words(other) for other in others]
        given_length += len(tokens)
        reference_length += min((len(other) for other in wanted), key=lambda n: (abs(n - len(tokens)), n))
        for order in range(1, BLEU_ORDER + 1):
            counts = _ngrams(tokens, order)
            most: Counter[tuple[str, ...]] = Counter()
            for other in wanted:
                most |= _ngrams(other, order)
            matched[order - 1] += (counts & most).total()
            total[order - 1] += counts.total()
    if not all(matched):
        return 0.0
    precision = sum(math.log(m / n) for m, n in zip(matched, total, strict=True)) / BLEU_ORDER
    return math.exp(min(0.0, 1 - reference_length / given_length) + precision)


def rouge_l(given: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 of the longest common subsequence of words, with the best of a text's references, in [0, 1].

    Source: Lin 2004, with recall and precision weighted alike.
    """
    scores = (
        max(_rouge_l(words(text), words(other)) for other in others)
        for text, others in zip(given, references, strict=True)
    )
    return sum(scores) / len(given)


def entity_scores(truth: Sequence[Sequence[str]], given: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact_match`: share of lists that are the same, order included. `precision`, `recall`, `f1`: over all entities.

    An entity that a list names twice counts twice. Letters' case counts.
    """
    exact = sum(list(a) == list(b) for a, b in zip(truth, given, strict=True)) / len(truth)
    found = sum((Counter(a) & Counter(b)).total() for a, b in zip(truth, given, strict=True))
    n_true, n_given = sum(map(len, truth)), sum(map(len, given))
    return {
        "exact_match": exact,
        "precision": found / n_given if n_given else 0.0,
        "recall": found / n_true if n_true else 0.0,
        "f1": 2 * found / (n_true + n_given) if n_true + n_given else 0.0,
    }


def slot_coverage(values: Iterable[Sequence[str]], given: Sequence[str]) -> float:
    """Share of the attribute values of all texts that stand in their text, word for word."""
    stated = total = 0
    for wanted, text in zip(values, given, strict=True):
        spaced = f" {' '.join(words(text))} "
        stated += sum(f" {' '.join(words(value))} " in spaced for value in wanted)
        total += len(wanted)
    return stated / total


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def _rouge_l(given: Sequence[str], reference: Sequence[str]) -> float:
    common = _longest_common_subsequence(given, reference)
    return 2 * common / (len(given) + len(reference)) if common else 0.0


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    previous = [0] * (len(other) + 1)
    for a in one:
        current = [0]
        for index, b in enumerate(other):
            current.append(previous[index] + 1 if a == b else max(previous[index + 1], current[index]))
        previous = current
    return previous[-1]
