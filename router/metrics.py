"""What the router measures, and its Prometheus text together with every worker's figures.

Recording imports nothing: it runs from the first request on. The text is made when asked for.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from router.core.events import End, Ended, Fault
from router.core.outbox import Counts
from router.core.router import RouterCore

TTFT_BOUNDS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
DURATION_BOUNDS_S: Final = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0,
)  # fmt: skip
TOKEN_BOUNDS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)  # fmt: skip
RATIO_BOUNDS: Final = (
    0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0,
)  # fmt: skip

_SAMPLE_NAME = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?$")
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')


class Histogram:
    """Counts by upper bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float | None) -> None:
        """Count one, if there is one."""
        if value is not None:
            self._counts[bisect_left(self._bounds, value)] += 1
            self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, how many are at most that), as Prometheus wants them."""
        labels = [*map(str, self._bounds), "+Inf"]
        total, answer = 0, []
        for label, count in zip(labels, self._counts, strict=True):
            total += count
            answer.append((label, float(total)))
        return answer


class LinkBytes:
    """Bytes that went over each link of the requests' path, by the link's name.

    Of what its messages hold: without what TCP, HTTP/2 and ZMQ add.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        """Towards the engines."""
        self.responses: Counter[str] = Counter()
        """Towards the clients."""


class Measured:
    """Of all requests that ended."""

    def __init__(self) -> None:
        self.ends: Counter[End] = Counter()
        self.faults: Counter[Fault] = Counter()
        self.output_tokens = 0
        self.time_to_first_token = Histogram(TTFT_BOUNDS_S)
        self.duration = Histogram(DURATION_BOUNDS_S)
        self.time_per_output_token = Histogram(TOKEN_BOUNDS_S)
        self.ttft_to_predicted = Histogram(RATIO_BOUNDS)
        self.tpot_to_predicted = Histogram(RATIO_BOUNDS)

    def observe(self, ended: Ended) -> None:
        """Count a request."""
        self.ends[ended.end] += 1
        if ended.fault is not None:
            self.faults[ended.fault] += 1
        self.output_tokens += ended.output_tokens
        self.time_to_first_token.observe(ended.time_to_first_token_s)
        self.time_per_output_token.observe(ended.time_per_output_token_s)
        self.ttft_to_predicted.observe(ended.ttft_to_predicted)
        self.tpot_to_predicted.observe(ended.tpot_to_predicted)
        if ended.end is End.COMPLETE:
            self.duration.observe(ended.duration_s)


def exposition(
    core: RouterCore,
    measured: Measured,
    worker_values: Mapping[str, Mapping[str, float]],
    model_name: str,
    unread_edge_lines: int,
    link_bytes: LinkBytes,
) -> bytes:
    """All figures in Prometheus' text format."""
    from prometheus_client import CollectorRegistry, generate_latest

    class Collector:
        def collect(self) -> list[Any]:
            own = _own_families(core, measured, model_name, unread_edge_lines)
            return [*own, _link_family(link_bytes), *_worker_families(core, worker_values)]

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return generate_latest(registry)


def _own_families(
    core: RouterCore, measured: Measured, model_name: str, unread_edge_lines: int
) -> list[Any]:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    ends = CounterMetricFamily("baton_requests", "Requests by how they ended.", labels=["end"])
    for end in End:
        ends.add_metric([end], measured.ends[end])
    faults = CounterMetricFamily(
        "baton_failed_requests", "Requests that failed, by why.", labels=["fault"]
    )
    for fault in Fault:
        faults.add_metric([fault], measured.faults[fault])
    counts, index = core.moves.counts, core.moves.index
    decisions = CounterMetricFamily(
        "baton_decisions", "Placements by their reason.", labels=["reason"]
    )
    for reason, count in counts.decisions.items():
        decisions.add_metric([reason], count)
    tokens = CounterMetricFamily(
        "baton_output_tokens", "Tokens of ended requests.", value=measured.output_tokens
    )
    plain = [
        CounterMetricFamily(f"baton_{name}", text, value=value)
        for name, text, value in _plain_counters(counts, index.left_out, unread_edge_lines)
    ]
    up = GaugeMetricFamily("baton_worker_up", "Whether it can be used.", labels=["worker", "role"])
    for worker in core.pool:
        up.add_metric([worker.id, worker.role], float(worker.usable))
    indexed = GaugeMetricFamily(
        "baton_kv_index_blocks", "Blocks of its prefix cache in the KV index.", labels=["worker"]
    )
    for worker in core.pool:
        indexed.add_metric([worker.id], index.blocks_of(worker.id))
    entries = GaugeMetricFamily(
        "baton_kv_index_entries", "Distinct blocks in the KV index.", value=index.entries
    )
    states: Counter[str] = Counter(request.state for request in core.moves.requests.values())
    under_way = GaugeMetricFamily(
        "baton_requests_under_way", "Requests by state.", labels=["state"]
    )
    for state, count in states.items():
        under_way.add_metric([state], count)
    families: list[Any] = [
        ends, faults, decisions, tokens, *plain, up, indexed, entries, under_way,
    ]  # fmt: skip
    for name, text, histogram in (
        ("time_to_first_token", "From the router's sight of it.", measured.time_to_first_token),
        ("e2e_request_latency", "Of complete requests.", measured.duration),
        ("request_time_per_output_token", "Mean per request.", measured.time_per_output_token),
    ):
        family = HistogramMetricFamily(f"vllm:{name}_seconds", text, labels=["model_name"])
        family.add_metric([model_name], histogram.cumulative(), histogram.sum)
        families.append(family)
    for name, ratios in (
        ("time_to_first_token", measured.ttft_to_predicted),
        ("time_per_output_token", measured.tpot_to_predicted),
    ):
        text = "Measured over predicted by the placement, of requests that ended."
        family = HistogramMetricFamily(f"baton_{name}_to_predicted_ratio", text)
        family.add_metric([], ratios.cumulative(), ratios.sum)
        families.append(family)
    return families


def _link_family(link_bytes: LinkBytes) -> Any:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(
        "baton_link_bytes", "Bytes on the requests' path.", labels=["link", "direction"]
    )
    for direction in ("requests", "responses"):
        for link, count in getattr(link_bytes, direction).items():
            family.add_metric([link, direction], count)
    return family


def _plain_counters(
    counts: Counts, index_left_out: int, unread_edge_lines: int
) -> list[tuple[str, str, int]]:
    return [
        ("handoffs", "Prompts handed from one worker to another.", counts.handoffs),
        ("resubmissions", "Attempts that replaced a lost one.", counts.resubmissions),
        ("fenced_outputs", "Outputs of superseded attempts, dropped.", counts.fenced_outputs),
        ("repeated_outputs", "Outputs known already, dropped.", counts.repeated_outputs),
        ("resends", "Times a worker was asked to send again.", counts.resends),
        ("orphans", "Attempts that workers held and nobody wanted.", counts.orphans),
        ("recovered_requests", "Taken over from a former router.", counts.recovered),
        ("kv_index_snapshots", "Prefix caches told of as a whole.", counts.cache_snapshots),
        ("kv_index_changes", "Changes of prefix caches, applied.", counts.cache_changes),
        ("kv_index_gaps", "Changes that were missed, so all was asked for.", counts.cache_gaps),
        ("kv_index_left_out", "Blocks that the KV index had no room for.", index_left_out),
        ("tickets", "Tickets given to the edge.", counts.tickets),
        ("refused_tickets", "Tickets refused to the edge.", counts.refused_tickets),
        ("unread_edge_lines", "Log lines of the edge without a ticket.", unread_edge_lines),
    ]


def _worker_families(
    core: RouterCore, worker_values: Mapping[str, Mapping[str, float]]
) -> list[Any]:
    """Each worker's figures under their own names, with worker and role added to the labels."""
    from prometheus_client.core import Metric

    families: dict[str, Any] = {}
    for worker in core.pool:
        for name, value in worker_values.get(worker.id, {}).items():
            match = _SAMPLE_NAME.match(name)
            if match is None:
                continue
            base, labels = match.group(1), dict(_LABEL.findall(match.group(2) or ""))
            kind = "counter" if base.endswith("_total") else "gauge"
            family = families.get(base)
            if family is None:
                text = "A figure of the engines."
                family = families[base] = Metric(base.removesuffix("_total"), text, kind)
            family.add_sample(base, {**labels, "worker": worker.id, "role": worker.role}, value)
    return list(families.values())
