"""`tunesmith complete`: text for people, probabilities in colours and without."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Live
from tests.cli.terminal import COLOUR
from tunesmith.cli.complete import Token, shown, tokens_of

ASKED = ["complete", "-m", "ada", "-M", "6", "-t", "0"]


def test_text_as_it_comes_from_an_argument_or_a_pipe(live: Live) -> None:
    given = live.run(*ASKED, "The plot")
    assert (given.returncode, given.stderr) == (0, "")
    assert live.run(*ASKED, input="The plot").stdout == given.stdout
    assert live.json(*ASKED, "The plot")["choices"][0]["text"] + "\n" == given.stdout


def test_a_person_without_a_prompt_is_not_left_waiting(live: Live) -> None:
    with live.at_terminal(*ASKED) as terminal:
        assert terminal.end() == 2
    assert "There is no prompt: give it as an argument, or on standard input." in terminal.text


def test_probabilities_with_and_without_colour(live: Live) -> None:
    answer = live.json(*ASKED, "The plot", "--show-probs")
    text, tokens = answer["choices"][0]["text"], answer["tokens"]
    assert "".join(token["token"] for token in tokens) == text
    assert all(0 < token["probability"] <= 1 for token in tokens)
    assert all(len(token["instead"]) == 4 for token in tokens)  # greedy: the token itself is the fifth

    plain = live.quick(*ASKED, "The plot", "--show-probs").stdout
    assert plain.startswith(f"The plot{text}\n\ntoken ")
    with live.at_terminal(*ASKED, "The plot", "--show-probs") as terminal:
        assert terminal.end() == 0
    assert "probability   90%+   50%+   20%+   5%+   under 5%" in terminal.text
    assert COLOUR.search(terminal.written)
    for listed in (plain, terminal.text):
        for token in tokens:
            assert f"{token['probability']:.1%}" in listed
    with live.at_terminal(*ASKED, "The plot", "--show-probs", columns=40, NO_COLOR="1") as terminal:
        assert terminal.end() == 0
    assert COLOUR.search(terminal.written) is None
    assert terminal.text.count("likely instead  ") == len(tokens)  # too narrow for a table: a block for each token


@pytest.mark.parametrize(
    ("probability", "colour"),
    [(1.0, "green"), (0.9, "green"), (0.5, "cyan"), (0.2, "yellow"), (0.05, "magenta"), (0.01, "red")],
)
def test_the_surer_the_greener(probability: float, colour: str) -> None:
    assert Token("x", probability, {}).colour == colour


def test_tokens_of_a_choice() -> None:
    logprobs = {"tokens": [" a"], "token_logprobs": [-1.0], "top_logprobs": [{" b": -2.0, " a": -1.0, " c": -1.5}]}
    (token,) = tokens_of(logprobs)
    assert token.probability == pytest.approx(0.3679, abs=1e-4)
    assert list(token.instead) == [" c", " b"]


def test_a_token_is_shown_on_one_line() -> None:
    assert shown(" a\n\t\\") == "␣a\\n\\t\\\\"
