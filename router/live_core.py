"""The core as a live router makes it: from plain values, so that a replay makes the same one."""

from __future__ import annotations

from random import Random

from msgspec import Struct

from router.core.costs import Slo
from router.core.joint import JointPlacement
from router.core.moves import CoreSettings
from router.core.placement import LeastPredictedWork, Placement, TieBreak
from router.core.router import RouterCore
from router.settings import JointSettings


class Origin(Struct, frozen=True):
    """All that a core starts from."""

    settings: CoreSettings
    joint: JointSettings | None
    """None: least predicted work."""
    tie_break_seed: int


def make_core(origin: Origin) -> RouterCore:
    """Two that are made of the same say the same, whatever they are told."""
    tie_break = Random(origin.tie_break_seed).randrange
    return RouterCore(origin.settings, _placement(origin.joint, tie_break))


def _placement(joint: JointSettings | None, tie_break: TieBreak) -> Placement:
    if joint is None:
        return LeastPredictedWork(tie_break)
    slo = Slo(joint.ttft_slo_s, joint.tpot_slo_s)
    return JointPlacement(tie_break, joint.engines, slo)
