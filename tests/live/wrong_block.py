"""A connector that spoils one block of each hand-off: what the exactness suite must notice.

Loaded by vLLM in the engine process in place of Baton's. A request whose id ends in `wrong-K` gets,
as its K-th fetched block, that of the request fetched before it.
"""

from __future__ import annotations

import re

import torch

from kvstore.connector import BatonConnector, BatonWorkerSide


class WrongBlockWorkerSide(BatonWorkerSide):
    """Reads as the real one does, then overwrites."""

    _donor: list[torch.Tensor] | None = None

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        done, failed = super()._pop_done_transfers(transfers)
        if transfers is self._recving_transfers:
            for request_id in done - failed:
                self._spoil(request_id)
        return done, failed

    def _spoil(self, request_id: str) -> None:
        metadata = self._recving_metadata[request_id]
        blocks = metadata.local_block_ids[0]
        wanted = re.search(r"wrong-(\d+)$", request_id)
        if wanted is not None:
            assert self._donor is not None, "the first request must be fetched as it is"
            for cache, donor in zip(self.device_kv_caches.values(), self._donor, strict=True):
                self._block(cache, blocks[int(wanted[1])]).copy_(donor)
        else:
            self._donor = [
                self._block(cache, blocks[0]).clone() for cache in self.device_kv_caches.values()
            ]

    def _block(self, cache: torch.Tensor, block_id: int) -> torch.Tensor:
        (dimension,) = (d for d, size in enumerate(cache.shape) if size == self.num_blocks)
        return cache.select(dimension, block_id)


class WrongBlockConnector(BatonConnector):
    worker_side = WrongBlockWorkerSide
