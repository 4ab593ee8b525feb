"""What a router unit is started with: plain values, written to files by whoever starts it.

`UnitSettings` is the anchor's (unit.json), `RouterSettings` the router process's (router.json),
both in the unit's directory, which only its user can enter. The sockets and files in it have
fixed names, given by `UnitPaths`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import Struct

from engine.spec import PoolTimes

KEPT_RECORDS: Final = 10_000
SharePrefixes = Literal["cluster", "tenant"]
"""Who may be served from a prompt's cached state: everybody, or who shows the same API key."""


class UnitPaths:
    """Names of everything in a unit's directory."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.unit_settings = self.directory / "unit.json"
        self.router_settings = self.directory / "router.json"
        self.membership = self.directory / "workers.json"
        self.anchor_socket = self.directory / "anchor.sock"
        self.ticket_socket = self.directory / "tickets.sock"
        self.router_socket = self.directory / "router.sock"
        self.edge_log_socket = self.directory / "edge-log.sock"
        self.edge_socket = self.directory / "edge.sock"
        """The edge's routes for Baton's own processes."""
        self.grpc_socket = self.directory / "grpc.sock"
        """Where the gRPC front tells its anchor, over HTTP, that it lives."""
        self.edge_config = self.directory / "haproxy.cfg"
        self.anchor_state = self.directory / "anchor-state.json"
        """Written by the anchor: pids and start times of itself and what it started."""
        self.anchor_lock = self.directory / "anchor.lock"
        self.logs = self.directory / "logs"

    def front_socket(self, front: int, purpose: str) -> Path:
        """`purpose` is "http", "input" or "output"."""
        return self.directory / f"front-{front}-{purpose}.sock"


class UnitSettings(Struct, frozen=True, kw_only=True):
    """The anchor's: what to start and where it listens."""

    router_id: str
    listen_host: str
    listen_port: int
    model: str
    """Directory or hub id, as the front's tokeniser loads it; `root` in /v1/models."""
    served_model_names: list[str]
    vllm_rs: str | None
    """Path of the fast front's binary; without one the full front serves all paths."""
    haproxy: str
    """Path of the edge's binary."""
    admin_address: str
    """Where the operator API answers, as HAProxy writes addresses: `unix@PATH` or `HOST:PORT`."""
    router_command: list[str]
    """Starts the router process; run in the unit's environment, restarted when it ends."""
    max_model_len_tokens: int
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    max_body_bytes: int = 32 * 1024 * 1024
    max_connections: int = 30_000
    """Of clients at once, where the system allows as many descriptors; further ones get a 503."""
    silent_client_s: float = 30.0
    """A client that must send or take something and does not for this long is given up."""
    stream_keep_alive_s: int = 15
    """A stream that was silent for this long gets a comment event."""
    grpc_host: str = "127.0.0.1"
    grpc_port: int | None = None
    """Where the gRPC front listens; without one there is none."""
    environment: dict[str, str] = {}


class JointSettings(Struct, frozen=True, kw_only=True):
    """What joint placement weighs and starts from."""

    ttft_slo_s: float
    tpot_slo_s: float
    engines: PoolTimes


class RouterSettings(Struct, frozen=True, kw_only=True):
    """The router process's."""

    router_id: str
    link_token: str
    expect_prefill: bool
    """The prefill pool is not empty by configuration: be healthy only with one of each."""
    promised_ttft_s: float | None = None
    promised_tpot_s: float | None = None
    """What every request is promised that does not say otherwise; None: nothing."""
    joint: JointSettings | None
    """None: least predicted work."""
    local_prefill_max_tokens: int
    """For least predicted work: prompts of at most this many tokens are computed on the decode
    worker."""
    served_model_names: list[str]
    index_block_tokens: int
    """What one address in the KV index stands for, as workers make them."""
    share_prefixes: SharePrefixes = "cluster"
    ticket_ttl_s: float = 600.0
    """Longer than any upload may take: a ticket is given before the body is read."""
    worker_reconnect_s: float = 10.0
    """How long a worker whose link broke, but whose process may live, keeps its requests."""
    max_requests: int = 10_000
    """So many under way, further ones are refused with status 429."""
    kept_records: int = KEPT_RECORDS
    """Ended requests whose decisions can still be asked for."""
    record_events: str | None = None
    """Directory in which to record what the core is told and what it answers; None: nowhere."""


def save(path: Path, settings: UnitSettings | RouterSettings) -> None:
    """Write the settings; they hold a secret, so only the user may read them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(settings)))


def load_unit(path: Path) -> UnitSettings:
    """Raises msgspec.ValidationError for a file that this version did not write."""
    return msgspec.json.decode(path.read_bytes(), type=UnitSettings)


def load_router(path: Path) -> RouterSettings:
    """Raises msgspec.ValidationError for a file that this version did not write."""
    return msgspec.json.decode(path.read_bytes(), type=RouterSettings)
