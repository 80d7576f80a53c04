from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import select

from tests.core.conftest import World
from tunesmith.core.accounts import Accounts, Role, masked
from tunesmith.core.schema import api_keys
from tunesmith.core.store import Store
from tunesmith.errors import AuthenticationFailed, InvalidRequest, NotFound, PermissionDenied


@pytest.fixture
def accounts(database_url: str) -> Iterator[Accounts]:
    store = Store(database_url)
    store.migrate()
    yield Accounts(store)
    store.close()


def test_the_first_start_makes_an_owner_and_the_next_ones_nothing(accounts: Accounts) -> None:
    secret = accounts.bootstrap("My Team", None)
    assert secret is not None
    caller = accounts.authenticate(secret)
    assert (caller.organization_title, caller.organization_slug, caller.role) == ("My Team", "my-team", Role.OWNER)
    assert caller.organization_id.startswith("org-")
    assert accounts.bootstrap("My Team", None) is None
    assert accounts.bootstrap("Renamed", None) is None


def test_an_owner_key_that_could_not_be_kept_is_made_anew(accounts: Accounts) -> None:
    def no_room(secret: str) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        accounts.bootstrap("t", None, keep=no_room)
    kept: list[str] = []
    assert [accounts.bootstrap("t", None, keep=kept.append)] == kept
    accounts.authenticate(kept[0])
    assert accounts.bootstrap("t", None, keep=no_room) is None


def test_a_chosen_owner_key_is_used_and_later_ones_are_added(accounts: Accounts) -> None:
    assert accounts.bootstrap("t", "sk-chosen") == "sk-chosen"
    assert accounts.bootstrap("t", "sk-chosen") is None
    assert accounts.bootstrap("t", "sk-another") == "sk-another"
    first, second = accounts.authenticate("sk-chosen"), accounts.authenticate("sk-another")
    assert first.organization_id == second.organization_id
    assert second.role is Role.OWNER


def test_a_revoked_owner_key_does_not_come_back(accounts: Accounts) -> None:
    accounts.bootstrap("t", "sk-leaked")
    accounts.bootstrap("t", "sk-new")
    leaked, owner = accounts.authenticate("sk-leaked"), accounts.authenticate("sk-new")
    accounts.revoke(owner, leaked.key_id)
    assert accounts.bootstrap("t", "sk-leaked") is None
    with pytest.raises(AuthenticationFailed):
        accounts.authenticate("sk-leaked")


def test_secrets_are_long_and_kept_as_hashes(world: World) -> None:
    key, secret = world.accounts.create_key(world.owner.organization_id, Role.MEMBER, "ci")
    assert secret.startswith("sk-")
    assert len(secret) >= 3 + 256 / 6
    with world.store.reading() as connection:
        row = connection.execute(select(api_keys).where(api_keys.c.id == key.id)).one()
    assert secret not in " ".join(map(str, row))
    assert key.hint == masked(secret)


@pytest.mark.parametrize("secret", ["sk-wrong", "x" * 60, "sk-ungültig" * 9, "sk-\x00"])
def test_a_wrong_key_is_refused_and_not_repeated(world: World, secret: str) -> None:
    with pytest.raises(AuthenticationFailed) as caught:
        world.accounts.authenticate(secret)
    assert caught.value.code == "invalid_api_key"
    assert secret not in caught.value.message
    assert masked(secret) in caught.value.message


def test_no_key_is_another_fault_than_a_wrong_one(world: World) -> None:
    with pytest.raises(AuthenticationFailed, match="didn't provide") as caught:
        world.accounts.authenticate("")
    assert caught.value.code is None


@pytest.mark.parametrize("secret", ["", "two words", "sk-ü", "sk-\n"])
def test_a_secret_that_fits_no_header_is_refused(world: World, secret: str) -> None:
    with pytest.raises(InvalidRequest, match="one word of ASCII"):
        world.accounts.create_key(world.owner.organization_id, Role.MEMBER, "x", secret)


def test_two_keys_cannot_have_the_same_secret(world: World) -> None:
    world.accounts.create_key(world.owner.organization_id, Role.MEMBER, "x", "sk-same")
    with pytest.raises(InvalidRequest, match="exists already"):
        world.accounts.create_key(world.stranger.organization_id, Role.MEMBER, "y", "sk-same")


def test_a_key_of_no_organization_is_refused(world: World) -> None:
    with pytest.raises(NotFound, match="org-none"):
        world.accounts.create_key("org-none", Role.MEMBER, "x")


def test_owners_see_all_keys_of_theirs_and_members_their_own(world: World) -> None:
    assert [key.role for key in world.accounts.keys(world.owner)] == [Role.OWNER, Role.MEMBER]
    assert [key.id for key in world.accounts.keys(world.member)] == [world.member.key_id]
    assert [key.id for key in world.accounts.keys(world.stranger)] == [world.stranger.key_id]


def test_a_revoked_key_opens_nothing_and_stays_listed(world: World) -> None:
    key, secret = world.accounts.create_key(world.owner.organization_id, Role.MEMBER, "x")
    world.accounts.revoke(world.owner, key.id)
    world.clock.now += 60
    world.accounts.revoke(world.owner, key.id)
    with pytest.raises(AuthenticationFailed):
        world.accounts.authenticate(secret)
    assert world.accounts.keys(world.owner)[-1].revoked_unix == world.clock.now - 60


def test_who_may_revoke_what(world: World) -> None:
    with pytest.raises(PermissionDenied, match="role owner"):
        world.accounts.revoke(world.member, world.member.key_id)
    with pytest.raises(NotFound):
        world.accounts.revoke(world.stranger, world.member.key_id)
    with pytest.raises(InvalidRequest, match="last owner key"):
        world.accounts.revoke(world.owner, world.owner.key_id)
    assert world.accounts.keys(world.owner)[0].revoked_unix is None


@pytest.mark.parametrize(("title", "words"), [("!!!", "no letter"), ("your org", "already")])
def test_organization_titles_must_make_names(world: World, title: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        world.accounts.create_organization(title)


def test_masks_show_little() -> None:
    assert masked("short") == "***"
    assert masked("sk-abcdefghijklmnopqrstuvwxyz") == "sk-ab***wxyz"
