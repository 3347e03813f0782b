# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Only public addresses are opened, at first and where they lead on to."""

import http.server
import socket
import threading
import urllib.error
import urllib.request

import pytest

from megatron.bridge.utils import safe_url
from megatron.bridge.utils.safe_url import is_safe_public_http_url, safe_url_open

ADDRESSES = {"public.example": "93.184.216.34", "inside.example": "10.0.0.7", "both.example": "93.184.216.34 ::1"}


@pytest.fixture
def names(monkeypatch):
    """A name service that knows four hosts, and no network."""

    def getaddrinfo(host, port, *args, **options):
        found = ADDRESSES.get(host, host if host[0].isdigit() or ":" in host else "")
        if not found:
            raise socket.gaierror(f"{host} is unknown")
        return [(None, None, None, None, (address, port)) for address in found.split()]

    monkeypatch.setattr(safe_url.socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    ("url", "is_safe"),
    [
        ("https://public.example/cat.png", True),
        ("http://public.example:8080/", True),
        ("http://93.184.216.34/", True),
        ("file:///etc/passwd", False),
        ("ftp://public.example/", False),
        ("https://inside.example/", False),
        ("https://both.example/", False),
        ("https://unknown.example/", False),
        ("http://127.0.0.1/", False),
        ("http://169.254.169.254/latest/meta-data", False),
        ("http://[::1]/", False),
        ("http://[::ffff:10.0.0.1]/", False),
        ("http://[2002:0a00:0001::1]/", False),
        ("https://me:secret@public.example/", False),
        ("http://public.example:port/", False),
        ("cat.png", False),
    ],
)
def test_what_is_public(names, url, is_safe):
    assert is_safe_public_http_url(url) is is_safe


def test_what_is_not_public_is_not_opened(names):
    with pytest.raises(ValueError, match=r"http://127.0.0.1/x' is no public"):
        safe_url_open("http://127.0.0.1/x")


@pytest.fixture
def server(monkeypatch):
    """A server here; the first question for a name's address says it is public, so that it is reached."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/on" else 200)
            self.send_header("Location", "http://10.0.0.7/secret")
            self.end_headers()
            self.wfile.write(b"cat")

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    checked = safe_url.public_addresses
    monkeypatch.setattr(
        safe_url, "public_addresses", lambda host, port: ["127.0.0.1"] if host == "here" else checked(host, port)
    )
    yield f"http://here:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_public_address_is_read(server):
    with safe_url_open(urllib.request.Request(f"{server}/cat.png"), timeout=5) as response:
        assert response.read() == b"cat"


def test_where_it_leads_on_to_is_checked(server):
    with pytest.raises(urllib.error.URLError, match="leads on to 'http://10.0.0.7/secret'"):
        safe_url_open(f"{server}/on", timeout=5)


def test_a_name_that_answers_otherwise_the_second_time_is_not_reached(monkeypatch):
    answers = iter(["93.184.216.34", "127.0.0.1"])
    monkeypatch.setattr(
        safe_url.socket, "getaddrinfo", lambda host, port, **options: [(0, 0, 0, "", (next(answers), port))]
    )
    with pytest.raises(urllib.error.URLError, match="127.0.0.1, which isn't public"):
        safe_url_open("http://rebound.example/")
