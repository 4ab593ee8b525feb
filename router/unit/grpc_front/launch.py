"""How the gRPC front is started, for the anchor, which must not load what the front loads."""

from __future__ import annotations

import os
import sys

from router.settings import UnitPaths, UnitSettings
from router.unit.children import Command


def command(settings: UnitSettings, paths: UnitPaths) -> Command:
    """Run it if `settings.grpc_port` is set. It listens itself and reaches the edge by its name."""
    return Command(
        [sys.executable, "-m", "router.unit.grpc_front.process", str(paths.directory)],
        {**os.environ, **settings.environment},
    )
