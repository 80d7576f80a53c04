"""A client that hangs up gives its place in the batch to the next, with the real engine."""

from __future__ import annotations

import time

import httpx

from tests.e2e.harness import OWNER_KEY, Server
from tunesmith.client import Client

ENDLESS = {"model": "ada", "prompt": "x", "max_tokens": 2000, "n": 64, "logit_bias": {"0": -100}}
"""Takes every place in the batch for longer than any test waits."""


def test_a_full_batch_is_free_again_when_its_client_hangs_up(server: Server, client: Client) -> None:
    headers = {"Authorization": f"Bearer {OWNER_KEY}"}
    with httpx.Client(base_url=server.base_url, headers=headers, timeout=60, trust_env=False) as other:
        with other.stream("POST", "completions", json={**ENDLESS, "stream": True}) as response:
            assert next(response.iter_lines()).startswith("data: ")
        begun = time.monotonic()
        client.post("completions", body={"model": "ada", "prompt": "y", "max_tokens": 1})
        whole = time.monotonic() - begun
    assert whole < 10  # with the places still taken it would be a minute
