"""Connections on which a client lets the server wait are closed; those on which it waits for the server are not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from api.server import ImpatientProtocol, make_server
from tests.api.conftest import Service

PATIENCE_SECONDS = 0.3
SOON_SECONDS = 3.0


class Hasty(ImpatientProtocol):
    patience_seconds = PATIENCE_SECONDS


async def slow(scope: object, receive: object, send: object) -> None:
    """An answer that takes longer than the patience with clients, and is larger than what the system buffers."""
    await asyncio.sleep(4 * PATIENCE_SECONDS)
    await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"x" * 2**25})  # type: ignore[operator]


@pytest.fixture
def address(free_port: int, request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    app = getattr(request, "param", None) or request.getfixturevalue("service").client.app
    server = make_server(app, host="127.0.0.1", port=free_port, protocol=Hasty)
    server.config.lifespan = "off"
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield "127.0.0.1", free_port
    server.should_exit = True
    thread.join()


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side closes it soon, whatever it says before."""
    connection.settimeout(SOON_SECONDS)
    try:
        while connection.recv(2**16):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\nkey=",
        b"POST /v1/searches HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{",
    ],
)
def test_a_client_that_does_not_finish_its_request_is_not_waited_for(address: tuple[str, int], said: bytes) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(said)

        assert is_closed(connection)


def test_a_byte_now_and_then_buys_no_time(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        began, is_open = time.monotonic(), True
        while is_open and time.monotonic() - began < SOON_SECONDS:
            time.sleep(PATIENCE_SECONDS / 5)
            try:
                connection.sendall(b"a")
            except OSError:  # a broken pipe, or a reset
                is_open = False

        assert not is_open


@pytest.mark.parametrize("address", [slow], indirect=True)
def test_a_client_that_waits_for_its_answer_is_served(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        connection.settimeout(10)
        received = 0
        while chunk := connection.recv(2**20):
            received += len(chunk)

        assert received > 2**25


@pytest.mark.parametrize("address", [slow], indirect=True)
def test_a_client_that_does_not_take_its_answer_is_not_waited_for(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        time.sleep((4 + 3) * PATIENCE_SECONDS)
        connection.settimeout(10)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(2**20):
                received += len(chunk)

        assert received < 2**25


@pytest.mark.parametrize("first", ["Content-Length: 4\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 4"])
def test_a_request_of_two_lengths_is_refused_and_nothing_behind_it_is_read(address: tuple[str, int], first: str, service: Service) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(f"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\n{first}\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        connection.settimeout(SOON_SECONDS)
        answer = b""
        while chunk := connection.recv(2**16):
            answer += chunk

    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1 ") == 1
