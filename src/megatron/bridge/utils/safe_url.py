# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Opening addresses that came with data: only public ones, so that data can't reach into the network it is read in."""

import http.client
import ipaddress
import socket
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

__all__ = ["is_safe_public_http_url", "safe_url_open"]

_PORTS = {"http": 80, "https": 443}


def is_safe_public_http_url(url: str) -> bool:
    """Whether `url` is http or https, names no user, and its host has public addresses only.

    Asks the name service; a host that it doesn't know isn't safe.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return False
    if parts.scheme not in _PORTS or not host or parts.username is not None or parts.password is not None:
        return False
    try:
        public_addresses(host, port or _PORTS[parts.scheme])
    except OSError:
        return False
    return True


def safe_url_open(url: str | urllib.request.Request, timeout: float = 30.0) -> Any:
    """Open a public address as `urllib.request.urlopen` does; where it leads on to is checked alike.

    The addresses that are checked are those that are connected to, so a name that answers otherwise the second time
    gains nothing. Proxies of the environment aren't used.

    Args:
        url: http or https.
        timeout: Seconds to wait for the server.

    Raises:
        ValueError: It isn't public, or neither http nor https.
        urllib.error.URLError: The server can't be reached, or leads on to what isn't public.
    """
    request = url if isinstance(url, urllib.request.Request) else urllib.request.Request(url)
    if not is_safe_public_http_url(request.full_url):
        raise ValueError(f"{request.full_url!r} is no public http or https address: fetch it yourself if it is wanted")
    opener = urllib.request.OpenerDirector()
    for handler in (
        _PublicHandler(),
        _PublicRedirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener.open(request, timeout=timeout)


def public_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host.

    Raises:
        OSError: It has none, or one that isn't public: of this machine, of a private network, or reserved.
    """
    found = dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
        if not (address.is_global and inner.is_global) or address.is_multicast:
            raise OSError(f"{host} has the address {text}, which isn't public")
    if not found:
        raise OSError(f"{host} has no address")
    return list(found)


def _connect(connection: http.client.HTTPConnection) -> socket.socket:
    """A connection to one of the addresses that were checked, in turn."""
    error: OSError | None = None
    for address in public_addresses(connection.host, connection.port):
        try:
            return socket.create_connection((address, connection.port), connection.timeout)
        except OSError as raised:
            error = raised
    assert error is not None
    raise error


class _PublicConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect(self)


class _PublicTLSConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        self.sock = self._context.wrap_socket(_connect(self), server_hostname=self.host)  # type: ignore[attr-defined]


class _PublicHandler(urllib.request.AbstractHTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_PublicConnection, request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_PublicTLSConnection, request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


class _PublicRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if not is_safe_public_http_url(newurl):
            raise urllib.error.URLError(f"{req.full_url} leads on to {newurl!r}, which is no public http address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
