"""The pages in `docs/models` are what the recorded facts and scores say."""

from __future__ import annotations

from pretraining import card
from pretraining.shapes import SHAPES
from tunesmith.core.bases import BOX_NAMES


def test_the_cards_are_up_to_date() -> None:
    written = {path.name: path.read_text() for path in card.CARDS.glob("*.md")}
    assert written == card.pages(), "run: python -m pretraining.card"


def test_every_model_in_the_box_has_a_card() -> None:
    assert {packed for packed, _ in BOX_NAMES.values()} == card.family().keys()


def test_tokens_of_the_models_it_was_grown_from_count() -> None:
    family = card.family()
    babbage, curie = family["babbage"], family["curie"]
    assert card.tokens_read(curie, family) == card.tokens_read(babbage, family) + curie.tokens
    assert babbage.tokens_before is not None  # ada has read on since
    assert babbage.tokens_before < family["ada"].tokens
    assert card.tokens_read(babbage, family) == babbage.tokens_before + babbage.tokens


def test_shapes_have_about_the_parameters_they_are_known_by() -> None:
    counts = {name: card.parameters(SHAPES[name]) for name in ("ada", "babbage", "curie", "davinci")}
    assert all(
        abs(counts[name] / million / 1e6 - 1) < 0.11 for name, million in zip(counts, (5, 10, 20, 40), strict=True)
    )
