"""The files of a job that is to be made: what -t and -v name, uploaded where it is not on the server yet."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from tunesmith.cli.output import Output, UsageError
from tunesmith.cli.uploads import upload
from tunesmith.client import ApiError, Client


def file_id(client: Client, name: str, check_if_exists: bool, output: Output) -> str:
    """The id behind what -t or -v was given: an id as it is, else a local file or a URL, uploaded.

    With `check_if_exists` a local file of which the server has one of the same name and size is asked about.
    """
    try:
        client.get("files", name)
    except ApiError as error:
        if error.status >= 500 or error.status in (401, 403):
            raise
    else:
        return name
    if Path(name).is_file():
        known = _uploaded_before(client, name) if check_if_exists else []
        return _chosen(known, name, output) or _upload(client, name, name, output)
    if name.lower().startswith(("http://", "https://")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "download.jsonl"
            _download(name, path)
            return _upload(client, str(path), name, output)
    return name  # the server's own words for an unknown file say it best


def _uploaded_before(client: Client, path: str) -> list[str]:
    """Ids of uploaded training files of the same base name and size."""
    size_bytes = Path(path).stat().st_size
    return [
        file["id"]
        for file in client.get("files")["data"]
        if file["purpose"] == "fine-tune"
        and file["bytes"] == size_bytes
        and Path(file["filename"]).name == Path(path).name
    ]


def _chosen(known: list[str], path: str, output: Output) -> str | None:
    """The id to use again, if somebody answers and wants it. The questions are those of the published command line."""
    if not known or output.machine:
        return None
    size_bytes = Path(path).stat().st_size
    output.say(
        f"Found potentially duplicated files with name '{Path(path).name}', purpose 'fine-tune' and size {size_bytes} "
        "bytes"
    )
    output.say("\n".join(known))
    while True:
        output.say()
        try:
            answer = input(
                "Enter file ID to reuse an already uploaded file, or an empty string to upload this file anyway: "
            ).strip()
        except EOFError:
            output.say("\nNobody answers: uploading it again. --no_check_if_files_exist does so without asking.")
            return None
        if not sys.stdin.isatty():
            output.say()  # an answer from a pipe does not end the line of the question
        if answer == "":
            return None
        if answer in known:
            output.say(f"Reusing already uploaded file: {answer}")
            return answer
        output.say(f"File id '{answer}' is not among the IDs of the potentially duplicated files")


def _upload(client: Client, path: str, shown_as: str, output: Output) -> str:
    file: dict[str, Any] = upload(client, path, "fine-tune", filename=shown_as)
    output.say(f"Uploaded file from {shown_as}: {file['id']}")
    uploaded: str = file["id"]
    return uploaded


def _download(url: str, path: Path) -> None:
    """Raises UsageError if the URL cannot be read."""
    try:
        with httpx.stream("GET", url, follow_redirects=True) as response, path.open("wb") as file:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                file.write(chunk)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UsageError(f"{url} cannot be downloaded: {error}.") from error
