"""What is to be done to rows, and doing it. Pure: rows in, rows out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tunesmith.data.facts import Facts, Lengths, over_long, without_empty
from tunesmith.data.rows import Batch, for_each

MOST_LOWER_CHARACTERS = 3
"""What a character may become in lower case. Source: the Unicode standard, 5.18, "Case mappings"."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The fixes that were accepted. They are applied in the order of the fields; rows without completion always go."""

    drop_duplicates: bool = False
    drop_long: bool = False
    lower_prompts: bool = False
    lower_completions: bool = False
    prompt_suffix: str = ""
    """Added to each prompt."""
    prompt_prefix: str = ""
    """Taken off each prompt, which begins with it."""
    completion_prefix: str = ""
    """Taken off each completion, which begins with it; a space at its start stays."""
    completion_suffix: str = ""
    """Added to each completion."""
    completion_space: bool = False
    """Each completion begins with a space."""

    def apply(self, batches: Iterable[Batch], facts: Facts) -> Iterator[Batch]:
        """The rows as they are to be written, numbered anew. `facts` are those of the same rows."""
        place, first = 0, 1
        for batch in batches:
            prompts, completions = batch.prompts, batch.completions
            if "" in completions:
                prompts, completions = without_empty(prompts, completions)
            start, place = place, place + len(completions)
            keep = self._keep(facts, start, place)
            if keep is not None:
                prompts = list(itertools.compress(prompts, keep))
                completions = list(itertools.compress(completions, keep))
            prompts, completions = self._prompts(prompts), self._completions(completions)
            if "" in completions:
                prompts, completions = without_empty(prompts, completions)
            if completions:
                yield Batch(first, prompts, completions, batch.read_bytes)
                first += len(completions)

    def most_characters(self, before: int) -> int:
        """How many a row may have that had so many before."""
        if self.lower_prompts or self.lower_completions:
            before *= MOST_LOWER_CHARACTERS
        return before + len(self.prompt_suffix) + len(self.completion_suffix) + self.completion_space

    def _keep(self, facts: Facts, start: int, end: int) -> list[bool] | None:
        """Which of the rows stay; None for all."""
        dropped = [
            rows[start:end]
            for wanted, rows in ((self.drop_duplicates, facts.drop_duplicates), (self.drop_long, facts.drop_long))
            if wanted and rows[start:end].any()
        ]
        if not dropped:
            return None
        keep: list[bool] = (~sum(dropped[1:], dropped[0])).tolist()
        return keep

    def _prompts(self, texts: list[str]) -> list[str]:
        if self.lower_prompts:
            texts = [text.lower() for text in texts]
        if self.prompt_suffix:
            texts = [text + self.prompt_suffix for text in texts]
        if self.prompt_prefix:
            cut = len(self.prompt_prefix)
            texts = [text[cut:] for text in texts]
        return texts

    def _completions(self, texts: list[str]) -> list[str]:
        if not (self.lower_completions or self.completion_prefix or self.completion_suffix or self.completion_space):
            return texts
        return for_each(self._completion, texts)

    def _completion(self, text: str) -> str:
        if self.lower_completions:
            text = text.lower()
        if self.completion_prefix:
            kept = " " if self.completion_prefix.startswith(" ") else ""
            text = kept + text[len(self.completion_prefix) :]
        text += self.completion_suffix
        return " " + text if self.completion_space and not text.startswith(" ") else text


def without_long(batches: Iterable[Batch], lengths: Lengths, numbers: list[int]) -> Iterator[Batch]:
    """The rows that a base reads whole, numbered anew; `numbers` takes up those of the others, as they came."""
    for batch in batches:
        places = [place for place, _ in over_long(batch.prompts, batch.completions, lengths)]
        first = batch.first - len(numbers)
        numbers += [batch.first + place for place in places]
        gone = set(places)
        kept = [place for place in range(len(batch)) if place not in gone] if gone else None
        if kept is None:
            yield replace(batch, first=first)
        elif kept:
            prompts, completions = ([texts[place] for place in kept] for texts in (batch.prompts, batch.completions))
            yield Batch(first, prompts, completions, batch.read_bytes)
