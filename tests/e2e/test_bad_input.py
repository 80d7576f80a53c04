"""Bad input gets the right answer and leaves nothing: neither rows nor bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.bad_input import CASES, METRICS, Case, MountRefused, World, complete, fine_tune, rows, upload
from tests.e2e.harness import Server, put_base


@pytest.fixture(scope="module")
def world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server of its own: what it holds must be known to the row."""
    home = tmp_path_factory.mktemp("bad-input")
    put_base(home, "ada", tiny_base)
    with Server(home) as server, World(server) as world:
        yield world


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input(world: World, case: Case) -> None:
    try:
        finding = world.find(case)
    except MountRefused:
        pytest.skip("mounting a file system is not allowed here")
    assert finding.faults() == []


def test_the_same_requests_without_the_mistake_pass(world: World) -> None:
    """So that no case is refused for another reason than its own."""
    assert upload(rows(2))(world).status_code == 200
    assert complete(n=2, best_of=2, logprobs=5, max_tokens=1)(world).status_code == 200
    job = fine_tune(**METRICS, classification_n_classes=2, classification_positive_class=" positive")(world)
    assert job.status_code == 200
