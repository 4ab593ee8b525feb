"""What is closed: listening sockets, Ray, and what the request path may not load."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.live.cluster_process import BatonServe

REFUSED_WITHIN_S = 90
HEAVY = {"vllm": "/vllm/", "torch": "/libtorch", "ray": "/ray/_raylet"}
"""Part of the path of a file that a process has mapped once it has imported the package."""

_DRIVER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("let in", len(ray.nodes()))
"""
_IMPORTS = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


# Sockets


def open_sockets(process: psutil.Process) -> list[Any]:
    """TCP sockets that listen, and UDP sockets that are bound."""
    return [
        connection
        for connection in process.net_connections("inet")
        if connection.laddr
        and (connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM)
    ]


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback


def test_nothing_listens_beyond_loopback(cluster: BatonServe) -> None:
    listeners: dict[str, list[Any]] = {}
    for process in cluster.processes():
        try:
            words = process.cmdline()
            found = open_sockets(process)
        except psutil.NoSuchProcess:
            continue
        for connection in found:
            assert is_loopback(connection.laddr.ip), (words, connection)
            listeners.setdefault(" ".join(words), []).append(connection)
    # The edge, every worker's links and every engine's side channel have been seen.
    ports = {connection.laddr.port for found in listeners.values() for connection in found}
    assert cluster.port in ports
    for worker in cluster.workers():
        assert int(worker["address"].rpartition(":")[2]) in ports
        engine = psutil.Process(worker["engine_pid"])
        assert open_sockets(engine), "no side channel for KV blocks was found"


def test_the_sockets_of_the_request_plane_are_the_users_alone(cluster: BatonServe) -> None:
    found = re.search(r"logs in (\S+)", cluster.log)
    assert found is not None
    directory = Path(found[1])
    sockets = [path for path in directory.rglob("*") if path.is_socket()]
    assert {"router.sock", "admin.sock"} <= {path.name for path in sockets}
    # Nobody else gets into the directory above them all.
    for parent in (directory, directory.parent):
        status = parent.stat()
        assert status.st_uid == os.getuid()
        assert status.st_mode & 0o077 == 0


# Ray


def gcs_address(cluster: BatonServe) -> str:
    """Where Ray's control service listens, as its node manager was told."""
    for process in cluster.processes():
        for word in process.cmdline():
            if found := re.fullmatch(r"--gcs-address=(\S+)", word):
                return found[1]
    raise AssertionError("no process of the instance knows the address of Ray's control service")


def drive(cluster: BatonServe, **token: str) -> subprocess.Popen[str]:
    """Try to use the instance's Ray as a driver."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", _DRIVER, gcs_address(cluster)],
        env={**clean, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **token},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ray_lets_no_stranger_in(cluster: BatonServe) -> None:
    # Side by side: Ray's drivers try for 20 s.
    strangers = [
        drive(cluster),
        drive(cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64),
    ]
    for stranger in strangers:
        output, errors = stranger.communicate(timeout=REFUSED_WITHIN_S)
        assert stranger.returncode != 0
        assert "let in" not in output
        assert "token" in errors.lower()


def test_ray_lets_its_own_drivers_in(cluster: BatonServe) -> None:
    """Else the test above would pass against any closed port."""
    (pid,) = [worker["pid"] for worker in cluster.workers("decode")]
    environment = psutil.Process(pid).environ()
    ours = drive(cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=environment["RAY_AUTH_TOKEN"])
    output, errors = ours.communicate(timeout=REFUSED_WITHIN_S)
    assert output.startswith("let in"), errors


# What is loaded


def heavy_packages(pid: int) -> set[str]:
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {package for package, part in HEAVY.items() if part in maps}


def test_router_and_anchor_have_loaded_neither_vllm_torch_nor_ray(cluster: BatonServe) -> None:
    (router,) = cluster.get("/cluster/routers")["routers"]
    cluster.metrics()  # Has the router import what it imports late.
    for pid in (router["pid"], router["anchor"]):
        assert heavy_packages(pid) == set()
    # The look at the maps finds them where they are.
    (worker,) = cluster.workers("decode")
    assert "ray" in heavy_packages(worker["pid"])
    assert heavy_packages(worker["engine_pid"]) >= {"torch", "vllm"}


def test_importing_router_and_anchor_imports_neither_vllm_torch_nor_ray() -> None:
    names = ["router.process", "router.http_api", "router.metrics", "router.unit.anchor.process"]
    loaded = subprocess.run(
        [sys.executable, "-c", _IMPORTS, *names],
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    packages = set(json.loads(loaded.stdout))
    assert {"router", "protos"} <= packages
    assert not packages & {"vllm", "torch", "ray", "transformers"}
