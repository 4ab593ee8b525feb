"""Baton's connector with NIXL's own progress thread: what `handoff --nixl-thread` measures."""

from __future__ import annotations

from kvstore.connector import BatonConnector, BatonWorkerSide


class StockAgentWorkerSide(BatonWorkerSide):
    """Keeps the agent that vLLM makes."""

    @staticmethod
    def paces_progress() -> bool:
        return False


class StockAgentConnector(BatonConnector):
    worker_side = StockAgentWorkerSide
