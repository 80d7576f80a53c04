"""Organisations, API keys, roles: who is asking. Secrets are shown once and kept as hashes; clients see masks."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from tunesmith.core.names import slug
from tunesmith.core.schema import api_keys, organizations
from tunesmith.core.store import Store
from tunesmith.errors import AuthenticationFailed, InvalidRequest, NotFound, PermissionDenied

SECRET_BYTES = 32


class Role(StrEnum):
    """What a key may do: an owner deletes models and revokes keys, a member does everything else."""

    OWNER = "owner"
    MEMBER = "member"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request, as `Accounts.authenticate` found out."""

    organization_id: str
    organization_title: str
    organization_slug: str
    key_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key without its secret."""

    id: str
    organization_id: str
    name: str
    role: Role
    hint: str
    """The secret, masked but for its ends."""
    created_unix: int
    revoked_unix: int | None


class Accounts:
    """All organisations and keys of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def bootstrap(
        self, title: str, owner_key: str | None, *, keep: Callable[[str], None] = lambda secret: None
    ) -> str | None:
        """Make sure there is an organisation and an owner; return the owner's secret if it is new, else None.

        On an empty store: makes the organisation and a key (`owner_key` if given). On another: adds `owner_key` to the
        oldest organisation unless it is known, revoked ones included. Raises InvalidRequest for an unusable key or
        title.

        `keep` is given the new secret before anything is committed: if it raises, nothing was made, so there is never
        an owner whose key nobody has.
        """
        with self._store.transaction() as connection:
            first = connection.scalar(select(organizations.c.id).order_by(organizations.c.position).limit(1))
            if first is None:
                first = self._insert_organization(connection, title)
            elif owner_key is None or _known(connection, owner_key):
                return None
            secret = self._insert_key(connection, first, Role.OWNER, "owner", owner_key)[1]
            keep(secret)
            return secret

    def create_organization(self, title: str) -> str:
        """Return the id of a new organisation.

        Raises InvalidRequest for a title without letter or digit, or one written like another in model names.
        """
        with self._store.transaction() as connection:
            return self._insert_organization(connection, title)

    def create_key(self, organization_id: str, role: Role, name: str, secret: str | None = None) -> tuple[ApiKey, str]:
        """Return a new key and its secret, which is not to be had again. `secret` chooses it.

        Raises NotFound for an unknown organisation, InvalidRequest for a secret that is unusable or taken.
        """
        with self._store.transaction() as connection:
            if connection.scalar(select(organizations.c.id).where(organizations.c.id == organization_id)) is None:
                raise NotFound(f"No such organization: {organization_id}", param="organization")
            return self._insert_key(connection, organization_id, role, name, secret)

    def authenticate(self, secret: str) -> Caller:
        """Who holds `secret`. Raises AuthenticationFailed, its message with the secret masked."""
        if not secret:
            raise AuthenticationFailed(
                "You didn't provide an API key. Send it in the Authorization header, as `Authorization: Bearer "
                "YOUR_KEY`; the clients read it from OPENAI_API_KEY."
            )
        hashed = _hash(secret)
        query = select(api_keys, organizations.c.title, organizations.c.slug).join(organizations)
        with self._store.reading() as connection:
            row = connection.execute(query.where(api_keys.c.secret_sha256 == hashed)).one_or_none()
        # The index has compared hashes; this compares them again in constant time, whatever the index leaks.
        if row is None or row.revoked_unix is not None or not hmac.compare_digest(row.secret_sha256, hashed):
            raise AuthenticationFailed(
                f"Incorrect API key provided: {masked(secret)}. The server's owner lists keys with `tunesmith keys`.",
                code="invalid_api_key",
            )
        return Caller(
            organization_id=row.organization_id,
            organization_title=row.title,
            organization_slug=row.slug,
            key_id=row.id,
            role=Role(row.role),
        )

    def keys(self, caller: Caller) -> list[ApiKey]:
        """Keys of the caller's organisation, revoked ones included, oldest first; for a member, only the key in use."""
        query = select(api_keys).where(api_keys.c.organization_id == caller.organization_id)
        if caller.role is not Role.OWNER:
            query = query.where(api_keys.c.id == caller.key_id)
        with self._store.reading() as connection:
            return [_api_key(row) for row in connection.execute(query.order_by(api_keys.c.position))]

    def revoke(self, caller: Caller, key_id: str) -> None:
        """End a key of the caller's organisation. Idempotent.

        Raises PermissionDenied for a member, NotFound for an unknown key, InvalidRequest for the last owner key.
        """
        if caller.role is not Role.OWNER:
            raise PermissionDenied("Revoking a key needs role owner; this key has role member.")
        of_organization = api_keys.c.organization_id == caller.organization_id
        with self._store.transaction() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id, of_organization)).one_or_none()
            if row is None:
                raise NotFound(f"No such API key: {key_id}", param="id")
            other_owner = select(api_keys.c.id).where(
                of_organization,
                api_keys.c.role == Role.OWNER,
                api_keys.c.revoked_unix.is_(None),
                api_keys.c.id != key_id,
            )
            if row.role == Role.OWNER and connection.scalar(other_owner.limit(1)) is None:
                raise InvalidRequest(
                    f"{key_id} is the organization's last owner key. Make another owner key first, then revoke this.",
                    param="id",
                )
            connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked_unix.is_(None))
                .values(revoked_unix=int(self._store.clock()))
            )

    def _insert_organization(self, connection: Connection, title: str) -> str:
        short = slug(title)
        if not short:
            raise InvalidRequest(
                f"The organization title {title!r} has no letter or digit; it stands in model names and needs one.",
                param="organization",
            )
        taken = connection.scalar(select(organizations.c.title).where(organizations.c.slug == short))
        if taken is not None:
            raise InvalidRequest(
                f"The organization title {title!r} would be written {short!r} in model names, as {taken!r} is already. "
                "Choose another title.",
                param="organization",
            )
        organization_id = self._store.new_id("org-")
        connection.execute(
            insert(organizations).values(
                id=organization_id, title=title, slug=short, created_unix=int(self._store.clock()), last_turn=0
            )
        )
        return organization_id

    def _insert_key(
        self, connection: Connection, organization_id: str, role: Role, name: str, secret: str | None
    ) -> tuple[ApiKey, str]:
        secret = new_secret() if secret is None else secret
        if not secret or not all("!" <= character <= "~" for character in secret):
            raise InvalidRequest(
                "An API key is one word of ASCII letters, digits and punctuation, so that it can stand in a header.",
                param="secret",
            )
        if _known(connection, secret):
            raise InvalidRequest("This API key exists already. Choose another secret.", param="secret")
        key = ApiKey(
            id=self._store.new_id("key-"),
            organization_id=organization_id,
            name=name,
            role=role,
            hint=masked(secret),
            created_unix=int(self._store.clock()),
            revoked_unix=None,
        )
        connection.execute(
            insert(api_keys).values(
                id=key.id,
                organization_id=organization_id,
                name=name,
                role=role,
                secret_sha256=_hash(secret),
                hint=key.hint,
                created_unix=key.created_unix,
            )
        )
        return key, secret


def new_secret() -> str:
    """`sk-` and 256 random bits."""
    return "sk-" + secrets.token_urlsafe(SECRET_BYTES)


def masked(secret: str) -> str:
    """At most the first five and last four characters, and only of a secret three times as long or more.

    >>> masked("sk-abcdefghijklmnopqrstuvwxyz")
    'sk-ab***wxyz'
    """
    return "***" if len(secret) < 27 else f"{secret[:5]}***{secret[-4:]}"


def _hash(secret: str) -> str:
    # The secrets are random and long, so a fast hash without salt gives nothing away.
    return sha256(secret.encode()).hexdigest()


def _known(connection: Connection, secret: str) -> bool:
    return bool(connection.scalar(select(func.count()).where(api_keys.c.secret_sha256 == _hash(secret))))


def _api_key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        id=row.id,
        organization_id=row.organization_id,
        name=row.name,
        role=Role(row.role),
        hint=row.hint,
        created_unix=row.created_unix,
        revoked_unix=row.revoked_unix,
    )
