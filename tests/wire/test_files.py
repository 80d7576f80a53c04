"""Files on the wire."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from tests.wire.harness import FILE, ROWS, error_of, masked, upload
from tunesmith.server import Parts

pytestmark = pytest.mark.anyio

BOUNDARY = "limit-of-parts"


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    more = f'; filename="{filename}"\r\nContent-Type: application/octet-stream' if filename is not None else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


async def send(client: httpx.AsyncClient, body: bytes | AsyncIterator[bytes]) -> httpx.Response:
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return await client.post("/v1/files", content=body, headers=headers)


def leftovers(parts: Parts) -> list[str]:
    home = parts.services.spool.parent
    return [path.name for folder in ("uploads", "files") for path in (home / folder).rglob("*") if path.is_file()]


PURPOSE = part("purpose", b"fine-tune")
DATA = part("file", ROWS, "train.jsonl")


@pytest.mark.parametrize("body", [form(PURPOSE, DATA), form(DATA, PURPOSE)], ids=["purpose first", "file first"])
async def test_upload_with_the_parts_in_either_order(client: httpx.AsyncClient, body: bytes) -> None:
    response = await send(client, body)
    assert response.status_code == 200
    assert masked(response.json()) == FILE


async def test_upload_byte_by_byte_without_length(client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for byte in form(DATA, PURPOSE):
            yield bytes([byte])

    response = await send(client, chunks())
    assert response.status_code == 200
    assert response.json()["bytes"] == len(ROWS)


@pytest.mark.parametrize(
    "filename", ["./data/train.jsonl", "/abs/train.jsonl", "https://host/a b.jsonl", "größe.jsonl"]
)
async def test_filenames_are_kept_as_given(client: httpx.AsyncClient, filename: str) -> None:
    file_id = await upload(client, filename=filename)
    assert (await client.get(f"/v1/files/{file_id}")).json()["filename"] == filename
    content = await client.get(f"/v1/files/{file_id}/content")
    assert content.content == ROWS
    assert "\n" not in content.headers["content-disposition"]


async def test_get_list_content_delete(client: httpx.AsyncClient) -> None:
    file_id = await upload(client)
    assert masked((await client.get(f"/v1/files/{file_id}")).json()) == FILE
    listed = (await client.get("/v1/files")).json()
    assert masked(listed) == {
        "object": "list",
        "data": [FILE],
        "has_more": False,
        "first_id": "file-*",
        "last_id": "file-*",
    }
    content = await client.get(f"/v1/files/{file_id}/content", headers={"Accept": "application/binary"})
    assert content.content == ROWS
    assert content.headers["content-type"] == "application/octet-stream"
    deleted = await client.delete(f"/v1/files/{file_id}")
    assert deleted.json() == {"id": file_id, "object": "file", "deleted": True}
    for method, path in [("GET", ""), ("GET", "/content"), ("DELETE", "")]:
        assert (await client.request(method, f"/v1/files/{file_id}{path}")).status_code == 404
    assert (await client.get("/v1/files")).json()["data"] == []


async def test_pages(client: httpx.AsyncClient) -> None:
    ids = [await upload(client, filename=f"{n}.jsonl") for n in range(3)]

    async def listed(**query: str) -> tuple[list[str], bool]:
        body = (await client.get("/v1/files", params=query)).json()
        return [file["id"] for file in body["data"]], body["has_more"]

    assert await listed() == (ids, False)
    assert await listed(limit="2") == (ids[:2], True)
    assert await listed(limit="2", after=ids[1]) == (ids[2:], False)
    assert await listed(order="desc", limit="1") == (ids[2:], True)
    assert await listed(order="desc", after=ids[1]) == (ids[:1], False)
    assert await listed(purpose="fine-tune-results") == ([], False)


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=10001",
        "limit=x",
        "limit=-1",
        "order=up",
        "after=file-nope",
        "limit=²",
        "limit=٣",
        "limit=" + "9" * 5_000,
    ],
)
async def test_pages_that_are_none(shared: httpx.AsyncClient, query: str) -> None:
    response = await shared.get(f"/v1/files?{query}")
    assert response.status_code == 400
    assert error_of(response)["param"] == query.partition("=")[0]


@pytest.mark.parametrize(
    "path",
    ["train.jsonl", "./train.jsonl", "some/dir/train.jsonl", "/abs/train.jsonl", "http://host/t.jsonl", "a\x00b"],
)
@pytest.mark.parametrize("suffix", ["", "/content"])
async def test_a_path_as_id_is_an_unknown_file(shared: httpx.AsyncClient, path: str, suffix: str) -> None:
    response = await shared.get(f"/v1/files/{quote(path, safe='')}{suffix}")
    assert response.status_code == 404
    error = error_of(response)
    assert path in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "id")


async def test_files_of_others_are_unknown(client: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    file_id = await upload(client)
    for method, path in [("GET", ""), ("GET", "/content"), ("DELETE", "")]:
        assert (await stranger.request(method, f"/v1/files/{file_id}{path}")).status_code == 404
    assert (await stranger.get("/v1/files")).json()["data"] == []


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        (form(PURPOSE), "file", "no file"),
        (form(DATA), "purpose", "no part 'purpose'"),
        (form(PURPOSE, part("file", ROWS)), "file", "must be a file"),
        (form(PURPOSE, part("file", b"", "")), "file", "must be a file"),
        (form(PURPOSE, DATA, DATA), "file", "more than one part 'file'"),
        (form(part("purpose", b"training"), DATA), "purpose", "training"),
        (form(PURPOSE, part("expires", b"1"), DATA), "expires", "Unrecognized request argument"),
        (form(PURPOSE, part("file", b"", "train.jsonl")), "file", ""),
        (form(PURPOSE, part("file", ROWS + b'{"prompt": "x"}\n', "train.jsonl")), "file", "9"),
        (form(PURPOSE, part("file", b"not JSON\n", "train.jsonl")), "file", "1"),
        (form(PURPOSE, part("file", b"\x00\xff" * 50_000, "train.jsonl")), "file", "1"),
        (form(PURPOSE, part("file", b" " * 1_000_001, "train.jsonl")), "file", "1000000 bytes"),
        (form(part("purpose", b"p" * 70_000), DATA), "purpose", "longer than"),
        (PURPOSE + DATA, None, "ends before"),
        (b"--other\r\n\r\n", None, "broken"),
        (b"", None, "ends before"),
    ],
)
async def test_uploads_that_are_refused(
    shared_parts: Parts, shared: httpx.AsyncClient, body: bytes, param: str | None, told: str
) -> None:
    response = await send(shared, body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert told in error["message"]
    assert leftovers(shared_parts) == []
    assert (await shared.get("/v1/files")).json()["data"] == []


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "", "text/plain; boundary=x"])
async def test_upload_that_is_no_form(shared: httpx.AsyncClient, kind: str) -> None:
    response = await shared.post("/v1/files", content=form(PURPOSE, DATA), headers={"Content-Type": kind})
    assert response.status_code == 415
    assert "multipart/form-data" in error_of(response)["message"]


async def test_disk_full(client: httpx.AsyncClient, parts: Parts, tmp_path: Path) -> None:
    """A file system of one page, where there is leave to mount one."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    spool = parts.services.spool
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(spool)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        rows = ROWS * 1000
        response = await send(client, form(PURPOSE, part("file", rows, "train.jsonl")))
    finally:
        subprocess.run(["umount", str(spool)], check=True)
    assert response.status_code == 507
    assert "no room" in error_of(response)["message"]
    assert response.headers["x-should-retry"] == "false"
    assert leftovers(parts) == []
