"""How long real vLLM engines take on this machine: `python -m benchmarks.engine_steps`.

On the tiny model, through `baton serve`, where they share the machine with all that stands in
requests' path, and with another engine where prompts are handed over: prompts alone, by length,
each after a pause; steps that decode, by requests and context; fetches of a prompt's state by
another engine; prompts while that decodes. Each point is a median. Costs of the simulated engine's
model are fitted to them, by least squares of relative errors. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from benchmarks.fidelity_runs import PAUSE_S
from benchmarks.open_loop import play
from benchmarks.report import machine
from benchmarks.serving import Serving, serving
from benchmarks.steps_fit import Measured, report
from benchmarks.timeline import moments
from simulator.traces import BLOCK_TOKENS, TracedRequest

PROMPTS: Final = (32, 128, 256, 512, 1024, 2048)
"""Tokens."""
DECODES: Final = ((1, 256), (1, 1024), (1, 4096), (2, 512), (4, 256), (4, 1024), (8, 512))
"""Requests and the context of each."""
FETCHES: Final = (128, 512, 1024, 2048)
BESIDE: Final = (512, 1024)
"""Of prompts that are computed while the other engine decodes."""
REPEATS: Final = 15
_OTHER: Final = len(DECODES)
"""The number of the load that is decoded beside prompts."""
_DECODE_STEPS: Final = 256
_DECODE_REPEATS: Final = 3
_BESIDE_S: Final = 0.1
"""That a prompt beside another request takes at most, with four tokens of output."""
_WARM_UP: Final = 8
_WARM_UP_TOKENS: Final = 1000
ENGINE_ARGS: Final = {
    "block_size": 128, "num_gpu_blocks_override": 4096, "max_model_len": 8192,
    "max_num_seqs": 128, "max_num_batched_tokens": 2048,
}  # fmt: skip


def configuration(prefill: int) -> dict[str, Any]:
    """Of a `baton serve` that can be measured, with so many prefill workers and one decode worker.
    With a prefill worker, every request is handed over."""
    return {
        "engine": "vllm",
        "engine_args": ENGINE_ARGS,
        "prefill": {"replicas": prefill},
        "decode": {"replicas": 1},
        "router": {"policy": "least_predicted_work", "local_prefill_max_tokens": 0},
    }


def measure(baton: Serving, link_s: float, repeats: int = REPEATS, salt: int = 0) -> Measured:
    """Of an instance with such a configuration: what an engine takes depends on what stands beside
    it. `link_s`: from router to engine, one way, which is not the engine's. `salt`: another for
    each measurement of one instance, which has the others' prompts cached."""

    def median_s(what: str, tokens: int, begin: str, end: str) -> float:
        times = moments(
            baton, repeats, tokens, output_tokens=4, pause_s=PAUSE_S, salt=f"{salt} {what}"
        )
        return statistics.median(each[end] - each[begin] for each in times)

    def prompt_s(what: str, tokens: int) -> float:
        return median_s(what, tokens, "arrived", "first_token") - 2 * link_s

    # The first fetch shakes hands.
    moments(baton, _WARM_UP, _WARM_UP_TOKENS, output_tokens=4, salt=f"{salt}")
    prompts = {tokens: prompt_s("alone", tokens) for tokens in PROMPTS}
    decodes = {each: _decode_s(baton.port, *each, salt) for each in DECODES}
    fetches: dict[int, float] = {}
    beside: dict[int, float] = {}
    if len(baton.groups["workers"]) > 1:
        step_s = 2 * link_s + decodes[1, 1024]
        fetches = {
            tokens: median_s("fetched", tokens, "handed_off", "resumed") - step_s
            for tokens in FETCHES
        }
        # As if nothing slowed its steps down: it lasts for longer than all prompts beside it.
        lasts_s = (_WARM_UP + len(BESIDE) * repeats) * (PAUSE_S + _BESIDE_S)
        steps = math.ceil(lasts_s / decodes[1, 256])
        with ThreadPoolExecutor(1) as thread:
            other = [TracedRequest(0.0, BLOCK_TOKENS, steps, ())]
            decoding = thread.submit(play, baton.port, other, _salt(salt, _OTHER))
            # By the end of these it decodes.
            moments(baton, _WARM_UP, BLOCK_TOKENS, 4, PAUSE_S, salt=f"{salt} before")
            beside = {tokens: prompt_s("beside", tokens) for tokens in BESIDE}
            ended = decoding.done()
            decoding.result()
        if ended:
            raise RuntimeError("the other engine did not decode for as long as prompts took")
    return Measured(
        prompts, decodes, fetches, beside, ENGINE_ARGS["block_size"],
        ENGINE_ARGS["block_size"] * ENGINE_ARGS["num_gpu_blocks_override"],
        ENGINE_ARGS["max_num_batched_tokens"], ENGINE_ARGS["max_num_seqs"],
        ENGINE_ARGS["max_model_len"],
    )  # fmt: skip


def _decode_s(port: int, requests: int, context_tokens: int, salt: int) -> float:
    """Between two tokens of a request while so many decode; half of the outputs are on top of the
    prompts, which are one prompt, computed before."""
    tokens = context_tokens - _DECODE_STEPS // 2
    blocks = tuple(range(-(-tokens // BLOCK_TOKENS)))
    found = []
    for repeat in range(_DECODE_REPEATS):
        own_salt = _salt(salt, DECODES.index((requests, context_tokens)), repeat)
        play(port, [TracedRequest(0.0, tokens, 1, blocks)], own_salt)
        served = play(
            port, [TracedRequest(0.0, tokens, _DECODE_STEPS, blocks)] * requests, own_salt
        )
        found += [each.tpot_s for each in served if each.tpot_s is not None]
    return statistics.median(found)


def _salt(measurement: int, load: int, repeat: int = 0) -> int:
    """Its own for each load, and none that a comparison's own requests have."""
    return 1 + repeat + _DECODE_REPEATS * (load + (_OTHER + 1) * measurement)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--link-ms", type=float, default=1.2, help="from router to engine, which is taken off"
    )
    link_s = parser.parse_args().link_ms / 1e3
    print(machine())
    for prefill in (0, 1):
        with serving(configuration(prefill)) as baton:
            measured = measure(baton, link_s)
        print(f"\n{prefill} prefill and 1 decode worker\n\n{report(measured)}")


if __name__ == "__main__":
    main()
