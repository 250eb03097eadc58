"""`nas keys` and `nas projects` on the database of this machine, and what a user is told whose key is not enough."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.app import create_app
from nas.client import ApiError, Client, read_api_key
from nas.errors import InvalidSpec
from nas.settings import Settings
from nas.store.quotas import Quotas
from nas.store.store import Store
from tests.served import served
from tests.test_cli import Nas, nas

__all__ = ["nas"]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NAS_API_KEY", "NAS_API_KEY_FILE"):
        monkeypatch.setenv(name, "")  # restored afterwards, also where a command has set it


def opened(tmp_path: Path) -> Store:
    return Store.open(f"sqlite:///{tmp_path / 'data' / 'nas.db'}")


def test_a_key_is_shown_once_and_opens_what_it_says(nas: Nas, tmp_path: Path) -> None:
    first = nas("keys", "create", "--name", "me")
    second = nas("keys", "create", "--name", "ci", "--scope", "read", "--expires-days", "30", "--json")

    store = opened(tmp_path)
    key, other = store.authenticate_key(first.out.strip()), store.authenticate_key(json.loads(second.out)["key"])
    assert (key.project, key.name, key.scopes, key.expires_at) == ("default", "me", frozenset({"read", "submit"}), None)
    assert (other.scopes, other.expires_at is None) == (frozenset({"read"}), False)
    assert "from now on the service wants one from everybody" in first.err
    assert "from now on" not in second.err
    listed = nas("keys", "list")
    assert key.id in listed.out
    assert first.out.strip().removeprefix(key.id) not in listed.out + first.err
    store.close()


@pytest.mark.parametrize("whole", [False, True])
def test_a_key_is_revoked_by_its_id_or_as_a_whole(nas: Nas, whole: bool) -> None:
    secret = nas("keys", "create", "--name", "me").out.strip()
    key_id = "_".join(secret.split("_")[:2])

    assert nas("keys", "revoke", secret if whole else key_id).code == 0
    assert json.loads(nas("keys", "list", "--json").out)[0]["revoked_at"] is not None


def test_projects_have_quotas_that_change_one_by_one(nas: Nas, tmp_path: Path) -> None:
    assert nas("projects", "create", "team-a", "max_active_searches=2", "max_device_seconds_per_day=3600.5").code == 0
    assert nas("projects", "set-quota", "team-a", "max_active_searches=none", "max_tokens_per_day=1000").code == 0

    store = opened(tmp_path)
    assert store.get_project("team-a")[0].quotas == Quotas(max_tokens_per_day=1000, max_device_seconds_per_day=3600.5)
    store.close()
    rows = {row["name"]: row for row in json.loads(nas("projects", "list", "--json").out)}
    assert rows["team-a"]["max_tokens_per_day"] == 1000
    assert rows["default"]["active_searches"] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("projects", "create", "A b"), 2, "project: expected"),
        (("projects", "create", "default"), 4, "taken"),
        (("projects", "set-quota", "nobody", "max_active_searches=1"), 3, "nobody"),
        (("projects", "set-quota", "default", "max_searches=1"), 2, "max_active_searches"),
        (("projects", "set-quota", "default", "max_active_searches=many"), 2, "a number, or none"),
        (("projects", "set-quota", "default", "max_active_searches=-1"), 2, "0 or more"),
        (("projects", "set-quota", "default", "max_device_seconds_per_day=nan"), 2, "0 or more"),
        (("keys", "create", "--name", "x", "--scope", "root"), 2, "read, submit, admin"),
        (("keys", "create", "--name", "x", "--project", "nobody"), 3, "nobody"),
        (("keys", "revoke", "nas_000000000000"), 3, "nas_000000000000"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(nas: Nas, arguments: tuple[str, ...], code: int, words: str) -> None:
    answer = nas(*arguments)

    assert (answer.code, answer.out) == (code, "")
    assert words in answer.err
    assert "Traceback" not in answer.err


class TestReadApiKey:
    def test_it_comes_from_a_file_or_the_environment_or_not_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("nas_file\n")

        assert read_api_key({}) is None
        assert read_api_key({"NAS_API_KEY": " nas_1 "}) == "nas_1"
        assert read_api_key({"NAS_API_KEY": "nas_1", "NAS_API_KEY_FILE": str(tmp_path / "key")}) == "nas_file"

    @pytest.mark.parametrize("text", ["", "a b", "nas_1\nnas_2", "é", "\0"])
    def test_what_is_no_key_is_refused_and_not_repeated(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "key").write_text(text or " ")

        with pytest.raises(InvalidSpec, match=r"NAS_API_KEY_FILE: expected one API key, nas_\.\.\., and nothing else, got something else"):
            read_api_key({"NAS_API_KEY_FILE": str(tmp_path / "key")})


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A service in this process, on the database of `nas`."""
    settings = Settings.from_environment({"NAS_DATA": str(tmp_path / "data"), "NAS_REQUESTS_PER_SECOND": "2"})
    store = Store.open(settings.database_url, migrate=True)
    with served(create_app(store=store, settings=settings)) as address:
        yield address
    store.close()


def test_the_command_sends_its_key_and_says_what_is_wrong_with_it(nas: Nas, address: str, tmp_path: Path) -> None:
    assert nas("list", "--url", address).code == 0
    reading = nas("keys", "create", "--name", "me", "--scope", "read").out.strip()
    (tmp_path / "key").write_text(reading + "\n")

    missing = nas("list", "--url", address)
    whoami = nas("--key-file", tmp_path / "key", "whoami", "--url", address)
    assert (whoami.code, "default" in whoami.out, "max_active_searches" in whoami.out) == (0, True, True)
    given = nas("--key-file", tmp_path / "key", "list", "--url", address)
    not_enough = nas("--key-file", tmp_path / "key", "cancel", "srch_1", "--url", address)
    nas("keys", "revoke", reading)
    revoked = nas("--key-file", tmp_path / "key", "list", "--url", address)

    assert [answer.code for answer in (missing, given, not_enough, revoked)] == [6, 0, 6, 6]
    assert "NAS_API_KEY or `nas --key-file FILE`" in missing.err
    assert "needs a key with the scope submit" in not_enough.err
    assert "was revoked" in revoked.err
    assert reading.rsplit("_", 1)[1] not in missing.err + given.err + not_enough.err + revoked.err


def test_the_client_waits_where_its_key_asks_too_often(nas: Nas, address: str) -> None:
    secret = nas("keys", "create", "--name", "me").out.strip()
    with Client(address, api_key=secret) as client:
        for _ in range(6):  # four at once, two a second
            client.teachers()
    with Client(address, api_key=secret + "x") as client, pytest.raises(ApiError, match="not one of this service"):
        client.teachers()
