from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.engine.base import GenerateRequest, PromptScored, SampledToken, SamplingParams, TokenScore
from tunesmith.engine.messages import (
    Cancel,
    Command,
    Ended,
    Event,
    Generate,
    Load,
    Loaded,
    Produced,
    Unload,
    command_from_line,
    command_to_line,
    events_from_line,
    events_to_line,
)

numbers = st.integers(0, 2**40)
values = st.floats(allow_nan=False, allow_infinity=False)
ids = st.integers(0, 10**6)
id_tuples = st.lists(ids, max_size=5).map(tuple)
sampling = st.builds(
    SamplingParams,
    max_tokens=numbers,
    temperature=values,
    top_p=values,
    logit_bias=st.dictionaries(ids, values, max_size=3),
    seed=numbers,
    stop_token_ids=id_tuples,
)
requests = st.builds(
    GenerateRequest,
    handle=st.text(),
    prompt_ids=id_tuples,
    sampling=sampling,
    top_logprobs=st.none() | numbers,
    score_prompt=st.booleans(),
)
commands = st.one_of(
    st.builds(Load, numbers, st.text(), st.text(), st.none() | st.text()),
    st.builds(Unload, st.text()),
    st.builds(Generate, numbers, requests),
    st.builds(Cancel, numbers),
)
tops = st.lists(st.tuples(ids, values), max_size=3).map(tuple)
scores = st.builds(TokenScore, ids, st.none() | values, tops)
produced = st.builds(
    Produced,
    numbers,
    st.builds(SampledToken, scores, st.sampled_from([None, "stop", "length"]))
    | st.builds(PromptScored, st.lists(scores, max_size=3).map(tuple)),
)
ended = st.builds(Ended, numbers, st.sampled_from([None, "unknown handle", "refused", "failed"]), st.text())
events = st.lists(st.one_of(st.builds(Loaded, numbers, st.none() | st.text()), produced, ended), max_size=4)


@given(commands)
def test_commands_make_the_round_trip(command: Command) -> None:
    line = command_to_line(command)
    assert line.count(b"\n") == 1
    assert command_from_line(line) == command


@given(events)
def test_events_make_the_round_trip(several: list[Event]) -> None:
    line = events_to_line(several)
    assert line.count(b"\n") == 1
    assert events_from_line(line) == several


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(ValueError, match="not a command"):
        command_from_line(b'["dance"]')
    with pytest.raises(ValueError, match="not an event"):
        events_from_line(b'[["dance"]]')
