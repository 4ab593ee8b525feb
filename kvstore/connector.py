"""The KV connector of Baton's vLLM engines: vLLM's NIXL connector, made to verify and to let go.

It adds four things to the pull-mode connector that it builds on:
- the owner tells in the manifest until when it keeps the blocks (their lease), and the reader
  uses what it read only if that lease still ran when the read had completed;
- who computes with other weights is refused, wherever they lie;
- blocks that wait to be fetched are freed at once when nobody will (the client left);
- an idle engine does not report the same figures a thousand times a second.

Loaded by vLLM in the engine process (`kv_connector_module_path`); nothing else imports it.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    NixlConnectorMetadata,
    compute_nixl_compatibility_hash,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.request import RequestStatus

from kvstore.lease import lease_still_held
from kvstore.paced_agent import PacedAgent
from kvstore.pollers import name_new_threads, own_threads

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)


class BatonConnectorMetadata(NixlConnectorMetadata):  # type: ignore[misc]
    """What the scheduler's side tells the worker's side in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.reqs_to_release: set[str] = set()


class BatonSchedulerSide(NixlPullConnectorScheduler):  # type: ignore[misc]
    """Grants leases, and takes them back."""

    def __init__(
        self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._waiting_to_be_fetched: set[str] = set()
        self._to_release: set[str] = set()

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        params = request.kv_transfer_params
        if params and params.get("do_remote_decode") and not _goes_on(request):
            # Stopped at its first token, or aborted: nobody will fetch, so nothing is kept.
            self._reqs_not_processed.add(request.request_id)
            self._reqs_need_save.pop(request.request_id, None)
            return False, None
        keep, manifest = super().request_finished(request, block_ids)
        if keep and manifest is not None:
            self._waiting_to_be_fetched.add(request.request_id)
            manifest["remote_blocks_expiry_time"] = self._reqs_need_send[request.request_id]
        return keep, manifest

    def release(self, request_id: str) -> None:
        """Free the blocks of a finished request that nobody will fetch; unknown ids are ignored."""
        if request_id in self._waiting_to_be_fetched:
            self._to_release.add(request_id)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        super().update_connector_output(connector_output)
        self._waiting_to_be_fetched.difference_update(connector_output.finished_sending or ())

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> BatonConnectorMetadata:
        built = super().build_connector_meta(scheduler_output)
        metadata = BatonConnectorMetadata()
        metadata.__dict__.update(built.__dict__)
        metadata.reqs_to_release, self._to_release = self._to_release, set()
        return metadata


def _goes_on(request: Request) -> bool:
    status = request.status
    return bool(status == RequestStatus.FINISHED_LENGTH_CAPPED)


class BatonWorkerSide(NixlPullConnectorWorker):  # type: ignore[misc]
    """Reads blocks and decides whether what it read may be used."""

    def __init__(
        self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig
    ) -> None:
        before = own_threads()
        super().__init__(vllm_config, engine_id, kv_cache_config)
        if self.paces_progress():
            self.nixl_wrapper = PacedAgent()
        name_new_threads(before)
        self._released: set[str] = set()

    @staticmethod
    def paces_progress() -> bool:
        """Whether NIXL's own progress thread would take cores that the model needs."""
        return bool(current_platform.is_cpu())

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        # What was made has the model's path in it, which says nothing of what lies there.
        self.compat_hash = compute_nixl_compatibility_hash(
            self._named_by_weights(),
            ",".join(sorted({backend.get_name() for backend in self.attn_backends})),
            transfer_mode=self._TRANSFER_MODE,
        )
        self.xfer_handshake_metadata.compatibility_hash = self.compat_hash

    def _named_by_weights(self) -> VllmConfig:
        """The configuration of a model whose name is its weights' digest (`engine.weights`)."""
        config = copy.copy(self.vllm_config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.model = self.kv_transfer_config.kv_connector_extra_config["weights"]
        return config

    def start_load_kv(self, metadata: BatonConnectorMetadata) -> None:
        super().start_load_kv(metadata)
        for request_id in metadata.reqs_to_release:
            # Gone from here means: fetched or lapsed meanwhile, and reported already.
            if self._reqs_to_send.pop(request_id, None) is not None:
                self._reqs_to_process.discard(request_id)
                self._released.add(request_id)

    def get_transfer_results(self) -> KVConnectorTransferResults:
        results = super().get_transfer_results()
        results.finished_sending.update(self._released)
        self._released.clear()
        return results

    def shutdown(self) -> None:
        if isinstance(self.nixl_wrapper, PacedAgent):
            self.nixl_wrapper.stop()
        super().shutdown()

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        done, failed = super()._pop_done_transfers(transfers)
        if transfers is self._recving_transfers:
            failed |= {request_id for request_id in done - failed if self._lapsed(request_id)}
        return done, failed

    def _lapsed(self, request_id: str) -> bool:
        metadata = self._recving_metadata.get(request_id)
        if metadata is None or metadata.remote is None or not any(metadata.local_block_ids):
            return False  # nothing was read
        if lease_still_held(
            time.perf_counter(),
            metadata.remote.blocks_expiry_time,
            self._engine_clock_offset.get(metadata.remote.engine_id),
        ):
            return False
        logger.warning(
            "The lease on the blocks of %s lapsed before they had been read; recomputing.",
            request_id,
        )
        self.xfer_stats.record_kv_expired_req()
        return True


class BatonConnector(NixlPullConnector):  # type: ignore[misc]
    """The facade that vLLM instantiates, once for the scheduler and once for each worker."""

    worker_side: type[BatonWorkerSide] = BatonWorkerSide

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        # The stock facade would build the stock halves, which open sockets and register memory;
        # its base does all that it does besides.
        super(NixlPullConnector, self).__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = BatonSchedulerSide(
                vllm_config, self.engine_id, kv_cache_config
            )
        else:
            self.connector_worker = self.worker_side(vllm_config, self.engine_id, kv_cache_config)

    def release(self, request_id: str) -> None:
        """Free the blocks of a finished request that nobody will fetch."""
        assert self.connector_scheduler is not None
        self.connector_scheduler.release(request_id)
