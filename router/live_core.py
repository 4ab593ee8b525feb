"""The core as a live router makes it: from plain values, so that a replay makes the same one."""

from __future__ import annotations

from random import Random

from msgspec import Struct

from protos.errors import BatonError
from router.core.moves import CoreSettings
from router.core.placement import POLICIES
from router.core.router import RouterCore


class Origin(Struct, frozen=True):
    """All that a core starts from."""

    settings: CoreSettings
    policy: str
    tie_break_seed: int


def make_core(origin: Origin) -> RouterCore:
    """Raises BatonError for a policy that there is not."""
    make_policy = POLICIES.get(origin.policy)
    if make_policy is None:
        raise BatonError(
            f"this version of Baton has no placement policy {origin.policy}, only "
            f"{', '.join(sorted(POLICIES))}."
        )
    return RouterCore(origin.settings, make_policy(Random(origin.tie_break_seed).randrange))
