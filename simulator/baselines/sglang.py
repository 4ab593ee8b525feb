"""SGLang's gateway with `cache_aware`.

Source: lightseekorg/smg @73da68ca `model_gateway/src/policies`, `crates/kv_index`; sgl-project/
sglang @b93974f1 `sgl-model-gateway/src/policies`. Thresholds are those of the command line (64,
1.5, 0.3), not those of the inner struct.

Sees: requests in flight, counted in the gateway, and a tree of the prompts that it routed.

If `max n - min n > 64` and `max n > 1.5 * min n`: fewest in flight. Else, if the matched share of
the prompt exceeds 0.3: who was last sent the deepest matched node; otherwise fewest in flight. The
prompt is always inserted. Equals: in flight, then processed, then the order of the workers. Every
60 s each worker's least recently used leaves are cut to 2^26 characters.

With a prefill pool each pool has a policy and a tree of its own, always remote. The documentation
suggests power of two for decode: knob `decode_power_of_two`.

Ignores: the prompt's size in loads, what engines cache and evict, deadlines, transfers.

Deviations: the tree is of blocks, not of characters, 4 of which are taken for a token. If the last
worker can't be used any more, the fewest in flight is (upstream: the first healthy one). A request
counts at its prefill worker until its first token. Power of two compares requests in flight, not
engines' token loads, which the gateway may also know.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import ClassVar, Final

from protos.ids import WorkerId
from router.core.candidates import Candidate
from router.core.events import Role
from router.core.workers import Worker
from simulator.baselines.policy import Ask, Choice, Part, PeerPolicy, two_random
from simulator.baselines.sent_prefixes import CHARACTERS_PER_TOKEN, SentPrefixes
from simulator.baselines.setup import Setup

KNOBS: Final = {
    "balance_abs_threshold": 64.0,
    "balance_rel_threshold": 1.5,
    "cache_threshold": 0.3,
    "tree_tokens": float(2**26 // CHARACTERS_PER_TOKEN),
    "eviction_interval_s": 60.0,
    "decode_power_of_two": 0.0,
}


class _Tree:
    """Sent prefixes, and in which order each worker used them."""

    def __init__(self) -> None:
        self.sent = SentPrefixes()
        self.cut_s = 0.0
        self._used: defaultdict[WorkerId, OrderedDict[bytes, None]] = defaultdict(OrderedDict)

    def send(self, worker: WorkerId, addresses: Sequence[bytes]) -> None:
        self.sent.send(worker, addresses)
        used = self._used[worker]
        for address in reversed(addresses):
            used[address] = None
            used.move_to_end(address)

    def cut(self, limit_blocks: int) -> None:
        for worker, used in self._used.items():
            while len(used) > limit_blocks:
                address, _ = used.popitem(last=False)
                self.sent.forget(worker, address)


class SglangCacheAware(PeerPolicy):
    """The deepest match unless load is out of balance."""

    compared: ClassVar = ("requests", "matched_share", "processed")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        knobs = setup.read(KNOBS)
        self._abs_threshold = knobs["balance_abs_threshold"]
        self._rel_threshold = knobs["balance_rel_threshold"]
        self._cache_threshold = knobs["cache_threshold"]
        self._tree_tokens = knobs["tree_tokens"]
        self._eviction_interval_s = knobs["eviction_interval_s"]
        self._decode_power_of_two = bool(knobs["decode_power_of_two"])
        self._trees: defaultdict[Role, _Tree] = defaultdict(_Tree)
        self._processed: defaultdict[WorkerId, int] = defaultdict(int)

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        if part is Part.DECODE and self._decode_power_of_two:
            return self._power_of_two(workers, part)
        tree = self._tree(ask, workers)
        requests = [self.counts.in_flight(worker.id) for worker in workers]
        affine, share = self._affine(ask, tree, requests)
        role, processed = part.role, self._processed
        candidates = []
        for worker, count in zip(workers, requests, strict=True):
            # Below all counts of requests.
            cost, matched = (-share, share) if worker.id == affine else (count, 0.0)
            numbers = (count, matched, processed[worker.id])
            candidates.append(Candidate(worker.id, role, cost, numbers))
        chosen = min(candidates, key=lambda each: (each.cost, each.numbers[2])).worker
        processed[chosen] += 1
        tree.send(chosen, ask.shape.addresses)
        return Choice(chosen, candidates)

    def _affine(
        self, ask: Ask, tree: _Tree, requests: Sequence[int]
    ) -> tuple[WorkerId | None, float]:
        """The worker that a balanced gateway sends the prompt to, and the share that matched."""
        most, fewest = max(requests), min(requests)
        if most - fewest > self._abs_threshold and most > self._rel_threshold * fewest:
            return None, 0.0
        depth, last = tree.sent.deepest(ask.shape.addresses)
        share = ask.tokens(depth) / ask.shape.prompt_tokens if depth else 0.0
        return (last, share) if share > self._cache_threshold else (None, 0.0)

    def _tree(self, ask: Ask, workers: Sequence[Worker]) -> _Tree:
        tree = self._trees[workers[0].role]
        if ask.now_s - tree.cut_s >= self._eviction_interval_s:
            tree.cut_s = ask.now_s
            tree.cut(int(self._tree_tokens // ask.view.block_tokens))
        return tree

    def _power_of_two(self, workers: Sequence[Worker], part: Part) -> Choice:
        candidates = []
        for worker in two_random(workers, self._rng):
            requests = self.counts.in_flight(worker.id)
            numbers = (requests, 0.0, self._processed[worker.id])
            candidates.append(Candidate(worker.id, part.role, requests, numbers))
        chosen = min(candidates, key=lambda each: each.cost).worker
        self._processed[chosen] += 1
        return Choice(chosen, candidates)
