"""Whether the port is free, and if not, who holds it and what to do: before anything starts."""

from __future__ import annotations

import errno
import json
import socket
import urllib.error
import urllib.request
from typing import Any

import psutil

from protos.errors import ConfigError

_ASK_S = 1.0


def target(host: str, port: int) -> str:
    """Where a client on this machine reaches it, as HOST:PORT."""
    host = _reachable(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def url(host: str, port: int) -> str:
    """Where a client on this machine reaches it, by HTTP."""
    return f"http://{target(host, port)}"


def accepts(host: str, port: int) -> bool:
    """Whether somebody listens."""
    try:
        socket.create_connection((_reachable(host), port), _ASK_S).close()
    except OSError:
        return False
    return True


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("", "0.0.0.0", "::") else host


def check_port(host: str, port: int, section: str = "http", flag: str = "--port") -> None:
    """Raises ConfigError, in one line, if the port can't be listened on."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except socket.gaierror:
        raise ConfigError(
            f"{section}.host {host} is not known: give an address such as 127.0.0.1."
        ) from None
    except OSError as error:
        raise ConfigError(_explain(host, port, section, flag, error)) from None


def _explain(host: str, port: int, section: str, flag: str, error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{section}.host {host} is no address of this machine: give one, such as 127.0.0.1."
    if error.errno == errno.EACCES:
        return f"port {port} is for privileged users: choose one above 1023 with {flag}."
    if error.errno != errno.EADDRINUSE:
        return f"can't listen on {host} port {port}: {error.strerror}; choose another with {flag}."
    if is_baton(url(host, port)):
        return (
            f"port {port} on {host} is held by another `baton serve`: stop that one, or start "
            f"this one with another port ({flag} {port + 1000})."
        )
    return (
        f"port {port} on {host} is taken by {_holder(port)}: stop that process, or start this "
        f"one with another port ({flag} {port + 1000})."
    )


def is_baton(address: str) -> bool:
    """Whether a Baton answers there."""
    try:
        return "baton_version" in fetch(f"{address}/cluster", _ASK_S)
    except (OSError, ValueError, TypeError):
        return False


def fetch(address: str, timeout_s: float) -> Any:
    """GET a JSON document. Raises OSError (HTTPError for an error status), ValueError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=timeout_s) as response:
        return json.loads(response.read())


def _holder(port: int) -> str:
    """The process that listens, if this user may know it."""
    try:
        for connection in psutil.net_connections("tcp"):
            local: Any = connection.laddr
            if local and local.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    break
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return "another process"
