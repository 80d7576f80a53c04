"""A server that answers in bf16 or int8: what is tuned passes the gate, and answers as trained but for rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.architectures import OWN, make_base
from tests.e2e.drill import run_dir_of
from tests.e2e.harness import Server, messages, put_base, reviews, upload, wait_for
from tests.engine.test_rounded import WIDE


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.1), ("int8", 0.4)])
def test_a_tuned_model_answers_as_it_was_trained(tmp_path: Path, precision: str, bound: float) -> None:
    home = tmp_path / "home"
    put_base(home, "ada", make_base(tmp_path / "base", OWN["llama"] | WIDE))
    with Server(home, {"TUNESMITH_ENGINE_PRECISION": precision}) as server, server.client() as client:
        asked = {"model": "ada", "training_file": upload(client, reviews(16, 1)), "n_epochs": 2}
        job = wait_for(client, client.post("fine-tunes", body=asked)["id"])
        assert job["status"] == "succeeded", messages(job)
        assert client.get("models", job["fine_tuned_model"])["state"] == "resident"  # before anybody asked for it

        differences = []
        for row in json.loads(run_dir_of(server, job["id"]).parity.read_text())["rows"]:
            question = {"model": job["fine_tuned_model"], "prompt": row["token_ids"], "max_tokens": 0, "echo": True}
            (choice,) = client.post("completions", body=question | {"logprobs": 0})["choices"]
            served = choice["logprobs"]["token_logprobs"][row["completion_start"] :]
            differences += [abs(a - b) for a, b in zip(served, row["logprobs"], strict=True)]

    assert max(differences) < bound
    assert max(differences) > 1e-5  # else it was fp32 that answered
