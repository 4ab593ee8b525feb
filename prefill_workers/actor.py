"""The prefill pool's actor: made for prompts."""

from __future__ import annotations

from engine.actor import EngineActor


class PrefillWorker(EngineActor):
    """Computes prompts, makes their first token and keeps the blocks until they are fetched."""
