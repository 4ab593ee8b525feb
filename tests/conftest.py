"""What several suites share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import settings

# Taken out, since `baton serve` reads variables of such names as its configuration.
SHARED = Path(os.environ.pop("BATON_SHARED", "../shared"))

# How long an example takes says more about the machine's load than about what is tested.
settings.register_profile("baton", deadline=None)
settings.load_profile("baton")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `pytest tests`."""
    parser.addoption(
        "--whole", action="store_true", help="also what long proofs leave out: an hour more"
    )


@pytest.fixture(scope="session")
def whole(pytestconfig: pytest.Config) -> bool:
    """Long proofs are wanted whole, not the part of them that each change must pass."""
    return bool(pytestconfig.getoption("--whole"))


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The tiny model's directory, built if need be."""
    from cluster.model import tiny_directory
    from engine.tiny_model import build

    return build(tiny_directory())


@pytest.fixture(scope="session")
def shared() -> Path:
    """Traces and tables that are not part of the project; a user's clone goes without."""
    if not SHARED.is_dir():
        lack(f"{SHARED} is absent; set BATON_SHARED to a directory with traces/ and perf/")
    return SHARED


@pytest.fixture(scope="session")
def curl() -> str:
    """The command's path."""
    found = shutil.which("curl")
    if found is None:
        lack("curl is not installed")
    return found


def lack(reason: str) -> NoReturn:
    """Skip what a user's machine may lack; where everything must run, that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
