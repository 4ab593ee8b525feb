"""The live cluster: real vLLM, Ray, NIXL, HAProxy and fronts; started once for the suite."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.live.cluster_process import HANDED_OVER, BatonServe
from tests.live.plain_server import plain_server

CONFIG: dict[str, Any] = {
    # Every request is handed over, whatever its length.
    "router": HANDED_OVER,
    "model": {"tool_call_parser": "hermes"},
}
MODEL = "tiny"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failure, what the clusters that run have logged: they remove it when they end."""
    report = yield
    if report.failed:
        clusters = [each for each in BatonServe.started if each.process.poll() is None]
        report.sections += [(f"logs of {each.url}", each.last_words()) for each in clusters]
    return report


@pytest.fixture(scope="session")
def cluster(tiny_model: object) -> Iterator[BatonServe]:
    """One prefill and one decode worker."""
    serve = BatonServe.start(dict(CONFIG))
    try:
        took_s = serve.until_healthy()
        print(f"\nhealthy after {took_s:.1f} s")
        serve.until_complete()
        yield serve
    finally:
        serve.interrupt()


@pytest.fixture(scope="session")
def client(cluster: BatonServe) -> OpenAI:
    return OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def plain_url(tiny_model: Path) -> Iterator[str]:
    """vLLM's own API server with the same model."""
    with plain_server(tiny_model, MODEL) as url:
        yield url


@pytest.fixture(scope="module")
def slow_pair() -> Iterator[BatonServe]:
    """Two decode workers whose steps are so slow that a stream takes seconds."""
    serve = BatonServe.start(
        {
            "engine": "simulated",
            "decode": {"replicas": 2},
            "router": HANDED_OVER,
            "simulated": {"step_base_s": 0.05},
        }
    )
    try:
        serve.until_healthy()
        yield serve
    finally:
        serve.interrupt()
