"""Recordings say what was recorded, and whatever goes wrong with one leaves the results as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from tests.devices import DEVICE, Tape, of_pretence, pretended
from tunesmith.decoder.replays import Replays


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with pretended():
        yield


def _given(*numbers: float) -> Tensor:
    return torch.tensor(numbers).to(DEVICE)


def test_the_second_time_it_is_recorded_and_then_replayed() -> None:
    tape, asked = Tape(), []
    replays = Replays(tape)

    def work(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        asked.append(len(inputs))
        (x,) = inputs
        return x.mul(2.0).add_(1.0), x > 1.5

    for number in range(5):
        doubled, more = replays.run("double", [_given(number, number + 1)], work)
        assert doubled.tolist() == [2 * number + 1, 2 * number + 3]
        assert more.tolist() == [number > 1.5, number > 0.5]
    assert len(asked) == 4  # once, then once to compare with and once to be recorded, then once more to compare with
    assert (tape.recorded, tape.replayed) == (1, 4)


def test_results_are_not_written_over() -> None:
    replays = Replays(Tape())
    found = [replays.run("", [_given(number)], lambda inputs: [inputs[0] + 1])[0] for number in range(4)]
    assert [result.tolist() for result in found] == [[1], [2], [3], [4]]


def test_other_shapes_and_keys_are_other_recordings_and_the_latest_few_are_kept() -> None:
    tape = Tape()
    replays = Replays(tape, kept=2)

    def run(key: str, size: int) -> None:
        given = torch.ones(size).to(DEVICE)
        (result,) = replays.run(key, [given], lambda inputs: [inputs[0] * len(key)])
        assert result.tolist() == [len(key)] * size

    def twice(key: str, size: int) -> int:
        before = tape.recorded
        run(key, size)
        run(key, size)
        return tape.recorded - before

    assert [twice("a", 1), twice("a", 2), twice("bb", 1)] == [1, 1, 1]
    assert [twice("a", 2), twice("bb", 1)] == [0, 0]
    assert twice("a", 1) == 1


def _waits(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return [inputs[0] * float(inputs[0].sum())]


def _brings(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return [inputs[0] * torch.tensor([2.0, 3.0]).to(DEVICE)]


def _picks(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return [inputs[0][inputs[0] > 1.5]]


def _repeats(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return [inputs[0].repeat_interleave(inputs[0].long())]


@of_pretence  # CUDA has its own words for each
@pytest.mark.parametrize("work", [_waits, _brings, _picks, _repeats])
def test_what_cannot_be_recorded_is_done_again_each_time(
    work: Callable[[Sequence[Tensor]], Sequence[Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    tape = Tape()
    replays = Replays(tape)
    for numbers in ((1.0, 2.0), (2.0, 1.0), (0.0, 3.0)):
        (result,) = replays.run("", [_given(*numbers)], work)
        assert result.tolist() == work([_given(*numbers)])[0].tolist()
    assert "is not permitted when stream is capturing" in caplog.text
    assert (tape.recorded, tape.replayed) == (1, 0)


def test_what_depends_on_more_than_it_says_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    tape, calls = Tape(), iter(range(10))
    replays = Replays(tape)
    found = [replays.run("", [_given(1)], lambda inputs: [inputs[0] * next(calls)])[0].tolist() for _ in range(4)]
    assert found == [[0], [1], [3], [4]]  # by the recording it would have been 2, and 2 ever after
    assert "says something else than what was recorded" in caplog.text
    assert (tape.recorded, tape.replayed) == (1, 1)


class _Idle(Tape):
    """Records nothing, though the results lie where the work has put them."""

    def record(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        return lambda: None, work()


class _Forgetful(Tape):
    """Forgets the first operation on inputs, and so has them as they were when it recorded."""

    def record(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        replay, results = super().record(work)

        def less() -> None:
            if self.replayed == 1:
                self._taken.pop(0)
            replay()

        return less, results


@of_pretence
@pytest.mark.parametrize("recorder", [_Idle(), _Forgetful()])
def test_a_recording_that_does_too_little_is_found_out(recorder: Tape, caplog: pytest.LogCaptureFixture) -> None:
    replays, kept = Replays(recorder), torch.zeros(1).to(DEVICE)

    def work(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        kept.copy_(inputs[0])
        return [kept * 2.0]

    found = [replays.run("", [_given(number)], work, changed=[kept])[0].tolist() for number in range(5)]
    assert found == [[0], [2], [4], [6], [8]]
    assert kept.tolist() == [4]
    assert "says something else than what was recorded" in caplog.text


def test_what_else_it_changes_is_as_if_it_had_been_done() -> None:
    tape, kept = Tape(), torch.zeros(2).to(DEVICE)
    replays = Replays(tape)

    def work(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        kept.copy_(inputs[0])
        kept.add_(1.0)
        return []

    for number in range(5):
        assert list(replays.run("", [_given(number, 0)], work, changed=[kept])) == []
        assert kept.tolist() == [number + 1, 1]
    assert (tape.recorded, tape.replayed) == (1, 4)


def test_where_memory_runs_out_only_that_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    class Short(Tape):
        def record(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
            if not self.recorded:
                self.recorded += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().record(work)

    tape = Short()
    replays = Replays(tape)
    for key in ("a", "b"):
        for number in range(4):
            (result,) = replays.run(key, [_given(number)], lambda inputs: [inputs[0] + 1])
            assert result.tolist() == [number + 1]
    assert "too little memory to record a step" in caplog.text
    assert (tape.recorded, tape.replayed) == (2, 3)


def test_what_is_cleared_is_recorded_anew() -> None:
    tape = Tape()
    replays = Replays(tape)
    for number in range(6):
        if number == 3:
            replays.clear()
        replays.run("", [_given(number)], lambda inputs: [inputs[0] + 1])
    assert (tape.recorded, tape.replayed) == (2, 4)


def test_what_is_no_number_is_the_same_as_itself() -> None:
    tape = Tape()
    replays = Replays(tape)
    for _ in range(3):
        (result,) = replays.run("", [_given(0, 1)], lambda inputs: [inputs[0].log()])
    assert [str(number) for number in result.tolist()] == ["-inf", "0.0"]
    for _ in range(3):
        (result,) = replays.run("", [_given(-1)], lambda inputs: [inputs[0].log()])
    assert str(result.tolist()[0]) == "nan"
    assert (tape.recorded, tape.replayed) == (2, 4)


def test_a_fault_of_the_work_is_its_own() -> None:
    replays = Replays(Tape())

    def broken(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        raise ValueError("a fault")

    for _ in range(3):
        with pytest.raises(ValueError, match="a fault"):
            replays.run("", [_given(1)], broken)


def test_without_a_recorder_nothing_is_kept() -> None:
    calls: list[int] = []
    replays = Replays(None)
    for _ in range(3):
        replays.run("", [_given(1)], lambda inputs: calls.append(1) or inputs)
    assert len(calls) == 3
