"""A server told to train on a GPU, on a machine without: the job says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.harness import Server, messages, put_base, reviews, upload, wait_for


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_job_says_that_its_device_is_not_there(tiny_base: Path, tmp_path: Path) -> None:
    put_base(tmp_path / "home", "ada", tiny_base)
    with Server(tmp_path / "home", {"TUNESMITH_TRAINER_DEVICE": "cuda"}) as server, server.client() as client:
        asked = {"model": "ada", "training_file": upload(client, reviews(8, 1))}
        job = wait_for(client, client.post("fine-tunes", body=asked)["id"])
    assert job["status"] == "failed"
    assert "TUNESMITH_TRAINER_DEVICE" in " ".join(messages(job))
