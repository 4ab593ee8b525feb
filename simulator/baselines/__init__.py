"""The peers' routing policies, for a fair comparison on one simulated cluster.

One module per system; each says what the peer's policy sees, its formula, where that was read, what
it ignores, and where this one deviates. All are `router.core.placement.Placement`s, so the router
core runs them as it runs Baton's own, on any mix of pools: without prefill workers every request is
placed as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from router.core.placement import Placement
from simulator.baselines.aibrix import AibrixPd, AibrixPrefix
from simulator.baselines.dynamo import DynamoConditional, DynamoKv
from simulator.baselines.llmd import LlmdBuiltin, LlmdGuide
from simulator.baselines.llumnix import Llumnix
from simulator.baselines.mooncake import Mooncake, MooncakeRejecting
from simulator.baselines.ray_serve import RayPrefix
from simulator.baselines.setup import Setup
from simulator.baselines.sglang import SglangCacheAware
from simulator.baselines.simple import LeastLoaded, PowerOfTwo, RandomWorker, RoundRobin

__all__ = ["BASELINES", "Setup"]

BASELINES: Final[dict[str, Callable[[Setup], Placement]]] = {
    "random": RandomWorker,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "ray_prefix": RayPrefix,
    "sglang_cache_aware": SglangCacheAware,
    "dynamo_kv": DynamoKv,
    "dynamo_conditional": DynamoConditional,
    "llmd_builtin": LlmdBuiltin,
    "llmd_guide": LlmdGuide,
    "mooncake": Mooncake,
    "mooncake_rejecting": MooncakeRejecting,
    "aibrix_prefix": AibrixPrefix,
    "aibrix_pd": AibrixPd,
    "llumnix": Llumnix,
}
"""By the name that a comparison calls them."""
