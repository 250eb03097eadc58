from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from nas.errors import Conflict, InvalidSpec, KeyRefused, NotFound
from nas.store import access
from nas.store.access import KeyRecord
from nas.store.quotas import Quotas
from nas.store.records import SearchRecord, utc_now
from nas.store.store import Store

NewKey = Callable[..., tuple[KeyRecord, str]]


@pytest.fixture
def new_key(store: Store) -> NewKey:
    def make(**changes: object) -> tuple[KeyRecord, str]:
        values = {"project": "default", "name": "a key", "scopes": ["read"]}
        return store.create_key(**values | changes)  # type: ignore[arg-type]

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[datetime]]:
    """The time that the store of keys sees, which a test moves."""
    moments = [utc_now()]
    monkeypatch.setattr(access, "utc_now", lambda: moments[0])
    return moments  # type: ignore[return-value]


class TestProjects:
    def test_there_is_a_default_one_without_quotas(self, store: Store) -> None:
        assert [(project.name, project.quotas) for project, _ in store.list_projects()] == [("default", Quotas())]

    def test_a_project_keeps_its_quotas_and_new_ones_replace_them(self, store: Store) -> None:
        made = store.create_project("team-a", quotas=Quotas(max_active_searches=2, max_device_seconds_per_day=3600.5))
        assert made.quotas == Quotas(max_active_searches=2, max_device_seconds_per_day=3600.5)

        changed = store.set_quotas("team-a", Quotas(max_tokens_per_day=10**12))

        assert changed.quotas == Quotas(max_tokens_per_day=10**12)
        assert [project for project, _ in store.list_projects()][1] == changed

    @pytest.mark.parametrize("name", ["", "A", "-a", "a b", "a/b", "a" * 64, "ä", "a\n"])
    def test_a_name_that_is_none_is_refused(self, store: Store, name: str) -> None:
        with pytest.raises(InvalidSpec, match="project: expected"):
            store.create_project(name)

    def test_a_name_stands_for_one_project(self, store: Store) -> None:
        with pytest.raises(Conflict, match="default"):
            store.create_project("default")

    def test_an_unknown_project_is_not_found(self, store: Store) -> None:
        with pytest.raises(NotFound, match="nobody"):
            store.set_quotas("nobody", Quotas())
        with pytest.raises(NotFound, match="nobody"):
            store.create_key(project="nobody", name="", scopes=["read"])
        with pytest.raises(NotFound, match="nobody"):
            store.create_search(spec={}, inputs={}, plan={}, label="", project="nobody")

    @pytest.mark.parametrize("value", [-1, 2**60])
    def test_a_quota_that_is_none_is_refused(self, value: int) -> None:
        with pytest.raises(InvalidSpec, match="max_tokens_per_day: expected 0 or more"):
            Quotas(max_tokens_per_day=value)


class TestKeys:
    def test_a_key_opens_its_project_with_its_scopes(self, store: Store, new_key: NewKey) -> None:
        store.create_project("team-a")
        key, secret = new_key(project="team-a", scopes=["submit"])

        found = store.authenticate_key(secret)

        assert (found.id, found.project, found.scopes) == (key.id, "team-a", frozenset({"read", "submit"}))

    @pytest.mark.parametrize(("asked", "given"), [(["read"], 1), (["submit"], 2), (["admin"], 3), (["admin", "read"], 3), (["read", "read"], 1)])
    def test_a_scope_includes_those_before_it(self, new_key: NewKey, asked: list[str], given: int) -> None:
        assert new_key(scopes=asked)[0].scopes == set(access.SCOPES[:given])

    def test_the_secret_is_in_no_table(self, store: Store, url: str, new_key: NewKey) -> None:
        key, secret = new_key()
        token = store.begin_session(key, seconds=60)

        with store.read() as connection:
            rows = [str(connection.execute(text(f"SELECT * FROM {table}")).all()) for table in ("api_keys", "sessions")]

        hidden = secret.removeprefix(key.id + "_")
        assert key.id in rows[0]
        assert not any(word in row for row in rows for word in (hidden, token))

    def test_every_secret_is_another_one(self, new_key: NewKey) -> None:
        assert len({new_key()[1] for _ in range(20)}) == 20

    @pytest.mark.parametrize("scopes", [[], ["write"], ["read", "root"]])
    def test_an_unknown_scope_is_refused(self, new_key: NewKey, scopes: list[str]) -> None:
        with pytest.raises(InvalidSpec, match="scopes: expected one or more of read, submit, admin"):
            new_key(scopes=scopes)

    def test_another_secret_under_a_known_id_opens_nothing(self, store: Store, new_key: NewKey) -> None:
        _, secret = new_key()
        forged = secret[:-1] + ("A" if secret[-1] != "A" else "B")

        for wrong in (forged, secret.upper(), secret + "A", " " + secret, secret[:16]):
            with pytest.raises(KeyRefused, match="not one of this service"):
                store.authenticate_key(wrong)

    def test_a_revoked_key_opens_nothing_and_neither_do_its_sessions(self, store: Store, new_key: NewKey) -> None:
        key, secret = new_key()
        token = store.begin_session(key, seconds=60)

        first = store.revoke_key(key.id)

        assert store.revoke_key(key.id).revoked_at == first.revoked_at
        with pytest.raises(KeyRefused, match=f"{key.id} was revoked"):
            store.authenticate_key(secret)
        with pytest.raises(KeyRefused):
            store.authenticate_session(token)

    def test_an_expired_key_opens_nothing_and_neither_do_its_sessions(self, store: Store, new_key: NewKey, clock: list[datetime]) -> None:
        key, secret = new_key(expires_at=clock[0] + timedelta(seconds=10))
        token = store.begin_session(key, seconds=60)
        store.authenticate_key(secret)

        clock[0] += timedelta(seconds=10)

        with pytest.raises(KeyRefused, match=f"{key.id} has expired"):
            store.authenticate_key(secret)
        with pytest.raises(KeyRefused, match="expired"):
            store.authenticate_session(token)

    def test_an_unknown_key_cannot_be_revoked(self, store: Store) -> None:
        with pytest.raises(NotFound, match="nas_000000000000"):
            store.revoke_key("nas_000000000000")

    def test_a_service_that_ever_had_a_key_has_keys(self, store: Store, new_key: NewKey) -> None:
        assert not store.has_keys()
        store.revoke_key(new_key()[0].id)
        assert store.has_keys()

    def test_the_last_use_is_written_once_a_minute(self, store: Store, new_key: NewKey, clock: list[datetime]) -> None:
        _, secret = new_key()
        first = clock[0]
        for seconds, expected in ((0, 0), (59, 0), (60, 60), (61, 60), (200, 200)):
            clock[0] = first + timedelta(seconds=seconds)
            store.authenticate_key(secret)
            assert store.list_keys()[0].last_used_at == first + timedelta(seconds=expected)

    def test_keys_are_listed_by_project_without_their_secret(self, store: Store, new_key: NewKey) -> None:
        store.create_project("team-a")
        ours, secret = new_key(project="team-a")
        new_key()

        assert store.list_keys(project="team-a") == [ours]
        assert len(store.list_keys()) == 2
        assert secret not in repr(store.list_keys())

    @given(text=st.text() | st.from_regex(r"nas_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", fullmatch=True))
    def test_any_text_is_refused_and_none_is_repeated(self, text: str) -> None:
        store = Store.open("sqlite:///no/such/file.db")
        if access._KEY.fullmatch(text) is None:  # never reaches the database
            with pytest.raises(KeyRefused) as refusal:
                store.authenticate_key(text)
            assert str(refusal.value) == "the API key is not one of this service"


class TestSessions:
    def test_a_session_is_its_keys_until_it_ends(self, store: Store, new_key: NewKey, clock: list[datetime]) -> None:
        key, _ = new_key()
        token = store.begin_session(key, seconds=60)
        assert store.authenticate_session(token).id == key.id

        clock[0] += timedelta(seconds=60)

        with pytest.raises(KeyRefused, match="session is over"):
            store.authenticate_session(token)

    def test_after_logging_out_it_opens_nothing(self, store: Store, new_key: NewKey) -> None:
        key, _ = new_key()
        kept, ended = store.begin_session(key, seconds=60), store.begin_session(key, seconds=60)

        store.end_session(ended)
        store.end_session(ended)

        assert store.authenticate_session(kept).id == key.id
        with pytest.raises(KeyRefused):
            store.authenticate_session(ended)

    @pytest.mark.parametrize("token", ["", "x", "\0", "\ud800", "' or 1=1"])
    def test_any_other_text_is_none(self, store: Store, token: str) -> None:
        with pytest.raises(KeyRefused):
            store.authenticate_session(token)


class TestTenants:
    def test_searches_are_listed_by_project(self, store: Store, new_search: Callable[..., SearchRecord]) -> None:
        store.create_project("team-a")
        ours, theirs = new_search(project="team-a"), new_search()

        assert store.list_searches(project="team-a") == [ours]
        assert store.list_searches(project="default") == [theirs]
        assert len(store.list_searches()) == 2
        assert (ours.project, theirs.project) == ("team-a", "default")
