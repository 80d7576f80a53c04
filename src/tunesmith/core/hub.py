"""The model hub over HTTP: what a repository holds at a commit, and its files. The one module that reaches out.

Speaks the two addresses of the Hugging Face hub that a download needs, so any mirror with them serves too:
`/api/models/{repository}/revision/{revision}` and `/{repository}/resolve/{commit}/{file}`. Why not with the hub's own
library: docs/design/decisions/hub.md.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import quote

import httpx

from tunesmith import __version__
from tunesmith.core.catalogue import COMMIT, REPOSITORY
from tunesmith.core.checkpoint_folder import chunks_of, parse_object
from tunesmith.errors import TunesmithError

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT = httpx.Timeout(30.0, connect=15.0)
MAX_LISTING_BYTES = 32 << 20
MAX_REDIRECTS = 5
LISTING_TRIES = 3
TRIES = 5
"""In a row without a byte more; a download that moves on is tried again for as long as it does."""
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Status codes of answers that may be another a moment later."""


class PullFailed(TunesmithError):
    """A model could not be brought here; the message says why, and how to go on."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository as the hub lists it."""

    name: str
    size_bytes: int
    sha256: str | None
    """Of large files; the hub knows others by `git_sha1` alone."""
    git_sha1: str | None
    """The digest git gives a file: of `blob <size>\\0` and its content."""

    def matches(self, path: Path) -> str | None:
        """The sha256 of a file on disk if it is this one, else None."""
        if path.stat().st_size != self.size_bytes:
            return None
        digest = hashlib.sha256()
        git = hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)
        for chunk in chunks_of(path):
            digest.update(chunk)
            if self.sha256 is None:
                git.update(chunk)
        known, found = (self.git_sha1, git) if self.sha256 is None else (self.sha256, digest)
        return digest.hexdigest() if found.hexdigest() == known else None


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit."""

    name: str
    """As the hub spells it today: `ORG/NAME`."""
    commit: str
    licence: str | None
    """As its card states it."""
    files: tuple[RemoteFile, ...]


class Progress(Protocol):
    """Hears how a download goes."""

    def began(self, file: RemoteFile, have_bytes: int) -> None:
        """A file is being fetched, `have_bytes` of it from an earlier attempt."""

    def moved(self, change_bytes: int) -> None:
        """So many bytes more; fewer than 0 where what was there had to be thrown away."""

    def stalled(self, reason: str) -> None:
        """The connection broke; it is being opened again."""

    def ended(self, file: RemoteFile, sha256: str) -> None:
        """The file is here, whole, and what the hub says it is."""


class Hub:
    """A model hub. The token goes to its own address alone, not to where it redirects downloads."""

    def __init__(self, endpoint: str, token: str | None, *, sleep: Callable[[float], None] = time.sleep) -> None:
        headers = {"user-agent": f"tunesmith/{__version__}", "accept-encoding": "identity"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        if not endpoint.startswith(("https://", "http://")):
            raise PullFailed(f"The hub's address {endpoint!r} does not start with https:// or http://.")
        self._token_given = bool(token)
        self._endpoint = endpoint.rstrip("/")
        self._http = httpx.Client(headers=headers, timeout=TIMEOUT)
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def repository(self, name: str, revision: str) -> Repository:
        """The files of a repository at a branch, tag or commit, and the commit. Raises PullFailed."""
        url = f"{self._endpoint}/api/models/{name}/revision/{quote(revision, safe='')}?blobs=true"
        for attempt in range(LISTING_TRIES):
            try:
                with self._get(url, {}) as response:
                    self._check(response, name, revision)
                    content = b"".join(_at_most(MAX_LISTING_BYTES, response.iter_bytes(), name))
                break
            except (httpx.TransportError, _Passing) as error:
                if attempt == LISTING_TRIES - 1:
                    raise PullFailed(f"{self._endpoint} cannot be reached: {_reason(error)}.") from error
                self._sleep(2.0**attempt)
        return _repository(name, parse_listing(content))

    def fetch(self, repository: Repository, file: RemoteFile, path: Path, progress: Progress) -> None:
        """Downloads into `path`, going on after the bytes that are there already.

        Raises PullFailed when the hub refuses, or when nothing more comes; then `path` keeps what came. Whether it is
        the right content is for `RemoteFile.matches` to say.
        """
        url = f"{self._endpoint}/{repository.name}/resolve/{repository.commit}/{file.name}"
        have = path.stat().st_size if path.exists() else 0
        progress.began(file, have)
        failures = 0
        while have < file.size_bytes or not path.exists():
            try:
                self._append(url, repository, file, path, progress)
            except (httpx.TransportError, _Passing) as error:
                now = path.stat().st_size if path.exists() else 0
                failures = failures + 1 if now <= have else 1
                if failures == TRIES:
                    raise PullFailed(
                        f"{file.name} stopped coming after {now:,} of {file.size_bytes:,} bytes: {_reason(error)}. "
                        "What came is kept: the same command goes on from there."
                    ) from error
                progress.stalled(_reason(error))
                self._sleep(2.0 ** (failures - 1))
            have = path.stat().st_size if path.exists() else 0

    def _append(self, url: str, repository: Repository, file: RemoteFile, path: Path, progress: Progress) -> None:
        """One request for what lacks. A server that sends the file from its start anyway is taken at its word."""
        have = path.stat().st_size if path.exists() else 0
        # No link that somebody left in the folder is followed to write elsewhere.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with (
            os.fdopen(descriptor, "wb") as part,
            self._get(url, {"range": f"bytes={have}-"} if have else {}) as response,
        ):
            self._check(response, repository.name, repository.commit, file.name)
            resumed = response.status_code == 206 and response.headers.get("content-range", "").startswith(
                f"bytes {have}-"
            )
            if not resumed:
                part.truncate(0)
                progress.moved(-have)
                have = 0
            part.seek(have)
            for chunk in _at_most(file.size_bytes - have, response.iter_raw(), file.name):
                part.write(chunk)
                progress.moved(len(chunk))
            part.flush()
            os.fsync(part.fileno())
            if part.tell() < file.size_bytes:
                raise _Passing("the connection was closed before the end of the file")

    @contextmanager
    def _get(self, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """The answer after redirects: few of them, and never from an encrypted address to one that is not."""
        request = self._http.build_request("GET", url, headers=headers)
        for _ in range(MAX_REDIRECTS):
            response = self._http.send(request, stream=True)
            try:
                following = response.next_request
                if following is None:
                    yield response
                    return
                if request.url.scheme == "https" and following.url.scheme != "https":
                    raise PullFailed(f"{request.url.host} redirects to {following.url.host} without encryption.")
                request = following  # without the token where the host is another: httpx sees to that
            finally:
                response.close()
        raise PullFailed(f"{self._endpoint} redirects more than {MAX_REDIRECTS} times.")

    def _check(self, response: httpx.Response, repository: str, revision: str, file: str | None = None) -> None:
        """Raises PullFailed with the way out, or _Passing for an answer that may soon be another."""
        status, code = response.status_code, response.headers.get("x-error-code", "")
        if response.is_success:
            return
        if status in _PASSING:
            raise _Passing(f"the hub answers with status {status}")
        page = f"{self._endpoint}/{repository}"
        if code == "GatedRepo":
            raise PullFailed(
                f"{repository} is gated: accept its terms at {page} with your account, then set HF_TOKEN to a token of "
                f"that account.{self._token_note()}"
            )
        if code == "RevisionNotFound" or (status == 404 and code == "" and revision != "main" and file is None):
            raise PullFailed(f"{repository} has no revision {revision!r}. Its commits are at {page}/commits/main.")
        if code == "EntryNotFound" or (status == 404 and file is not None):
            raise PullFailed(f"{repository} lists {file} at {revision[:12]} and does not have it.")
        if status in (401, 403, 404):
            # The hub does not tell a stranger whether a private repository is there: 401 and 404 mean either.
            raise PullFailed(
                f"The hub shows no repository {repository} (status {status}). Check the name at {page}; for a private "
                f"one set HF_TOKEN to a token that may read it.{self._token_note()}"
            )
        raise PullFailed(f"The hub refuses {repository} with status {status}.")

    def _token_note(self) -> str:
        return " The HF_TOKEN that is set was sent, and does not suffice." if self._token_given else ""


class _Passing(Exception):
    """The same request may succeed a moment later."""


def parse_listing(content: bytes) -> dict[str, Any]:
    """The JSON object of an answer. Raises PullFailed where it is none."""
    try:
        return parse_object("the answer of the hub", content)
    except ValueError as error:
        raise PullFailed(f"{error}. HF_ENDPOINT, if set, has to name a model hub.") from error


def _repository(asked: str, listing: dict[str, Any]) -> Repository:
    match listing:
        case {"sha": str(commit), "siblings": list(siblings)} if COMMIT.fullmatch(commit):
            pass
        case _:
            raise PullFailed("The answer of the hub names no commit. HF_ENDPOINT, if set, has to name a model hub.")
    name = listing.get("id", asked)
    if not isinstance(name, str) or not REPOSITORY.fullmatch(name):
        name = asked
    card = listing.get("cardData")
    licence = card.get("license") if isinstance(card, dict) else None
    files = tuple(file for one in siblings if (file := _file(one)) is not None)
    return Repository(name, commit, licence if isinstance(licence, str) else None, files)


def _file(listed: Any) -> RemoteFile | None:
    """None for what is not described well enough to be verified: it cannot be pulled then."""
    match listed:
        case {"rfilename": str(name), "lfs": {"sha256": str(sha256), "size": int(size)}}:
            return RemoteFile(name, size, sha256, None)
        case {"rfilename": str(name), "blobId": str(git_sha1), "size": int(size)}:
            return RemoteFile(name, size, None, git_sha1)
        case _:
            return None


def _at_most(limit_bytes: int, chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    for chunk in chunks:
        limit_bytes -= len(chunk)
        if limit_bytes < 0:
            raise PullFailed(f"The hub sends more bytes of {name} than it said there are.")
        yield chunk


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
