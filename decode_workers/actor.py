"""The decode pool's actor: made for generating."""

from __future__ import annotations

from engine.actor import EngineActor


class DecodeWorker(EngineActor):
    """Fetches prompts' blocks and generates; also runs whole requests."""
