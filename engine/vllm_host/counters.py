"""From what a step of vLLM's engine tells to counters under vLLM's metric names: pure."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from protos.enginecore import EngineOutputs, PrefillStats

_FINISH_REASONS: Final = ("stop", "length", "abort", "error", "repetition")

# Of `NixlKVConnectorStats.to_dict()`: lists with an entry per transfer or event.
_TRANSFER_SUMS: Final = {
    "bytes_transferred": "vllm:nixl_bytes_transferred_sum",
    "transfer_duration": "vllm:nixl_xfer_time_seconds_sum",
    "post_duration": "vllm:nixl_post_time_seconds_sum",
    "num_descriptors": "vllm:nixl_num_descriptors_sum",
}
_EVENTS: Final = {
    "bytes_transferred": "vllm:nixl_bytes_transferred_count",
    "num_failed_transfers": "vllm:nixl_num_failed_transfers_total",
    "num_failed_notifications": "vllm:nixl_num_failed_notifications_total",
    "num_failed_handshakes": "vllm:nixl_num_failed_handshakes_total",
    "num_kv_expired_reqs": "vllm:nixl_num_kv_expired_reqs_total",
    "num_notifications_after_expiry": "vllm:nixl_num_notifications_after_expiry_total",
}


def step_counters(outputs: EngineOutputs) -> dict[str, float]:
    """What this step adds to each counter."""
    counted: Counter[str] = Counter()
    for output in outputs.outputs:
        counted["vllm:generation_tokens_total"] += len(output.new_token_ids)
        if output.prefill_stats is not None:
            _count_prompt(counted, output.prefill_stats)
        if output.finish_reason is not None:
            reason = _FINISH_REASONS[output.finish_reason]
            counted[f'vllm:request_success_total{{finished_reason="{reason}"}}'] += 1
    stats = outputs.scheduler_stats
    if stats is not None:
        _count_prefix_cache(counted, stats)
        _count_transfers(counted, stats.get("kv_connector_stats") or {})
    return {name: float(value) for name, value in counted.items() if value}


def _count_prompt(counted: Counter[str], stats: PrefillStats) -> None:
    counted["vllm:prompt_tokens_total"] += stats.num_prompt_tokens
    for source, tokens in (
        ("local_compute", stats.num_computed_tokens),
        ("local_cache_hit", stats.num_local_cached_tokens),
        ("external_kv_transfer", stats.num_external_cached_tokens),
    ):
        counted[f'vllm:prompt_tokens_by_source_total{{source="{source}"}}'] += tokens


def _count_prefix_cache(counted: Counter[str], stats: dict[str, Any]) -> None:
    for field, prefix in (
        ("prefix_cache_stats", "vllm:prefix_cache"),
        ("connector_prefix_cache_stats", "vllm:external_prefix_cache"),
    ):
        cache = stats.get(field) or {}
        counted[f"{prefix}_queries_total"] += cache.get("queries", 0)
        counted[f"{prefix}_hits_total"] += cache.get("hits", 0)
        counted["vllm:num_preemptions_total"] += cache.get("preempted_requests", 0)


def _count_transfers(counted: Counter[str], stats: dict[str, Any]) -> None:
    for field, name in _TRANSFER_SUMS.items():
        # A Counter holds whatever adds up; durations are fractions of a second.
        counted[name] += sum(stats.get(field, ()))
    for field, name in _EVENTS.items():
        counted[name] += len(stats.get(field, ()))
