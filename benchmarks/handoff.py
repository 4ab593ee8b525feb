"""What a hand-off costs between two engines: `python -m benchmarks.handoff`.

Two vLLM engines on this machine with the tiny model; for each prompt length, interleaved: the
prefill leg (prompt and first token), the decode leg (from the manifest to the second token), and
the same two tokens by one engine alone. Also each idle engine's CPU. Prints a Markdown table.
`--nixl-thread` measures the same with NIXL's own progress thread (docs/adr/0003).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence

import psutil

from cluster.model import tiny_directory
from engine.tiny_model import build
from engine.vllm_host.engine import VllmEngine
from protos.enginecore import encode_manifest, hand_off_after_first_token, resume_from
from tests.contract.engine_contract import Driver, driven, make_prompt, make_request, new_id
from tests.live.vllm_engines import make_vllm

PROMPT_TOKENS = (16, 128, 512, 1024, 2000)
IDLE_S = 3.0
WARM_UP_ROUNDS = 3


class StockAgentEngine(VllmEngine):
    connector_module = "benchmarks.stock_agent"
    connector_class = "StockAgentConnector"


async def one_round(source: Driver, target: Driver, tokens: int) -> tuple[float, float, float]:
    """Seconds of the prefill leg, the decode leg and one engine alone."""
    prompt = make_prompt(tokens)
    handed_request = make_request(new_id(), prompt, max_tokens=2, ignore_eos=True)
    hand_off_after_first_token(handed_request)
    began_s = time.perf_counter()
    handed = await source.run(handed_request)
    handed_s = time.perf_counter()
    assert handed.kv_transfer_params is not None
    resumed = make_request(new_id(), prompt, max_tokens=2, ignore_eos=True)
    resume_from(resumed, handed.tokens, encode_manifest(handed.kv_transfer_params))
    await target.run(resumed)
    resumed_s = time.perf_counter()
    await source.generate(make_prompt(tokens), max_tokens=2, ignore_eos=True)
    return handed_s - began_s, resumed_s - handed_s, time.perf_counter() - resumed_s


async def idle_cores(drivers: Sequence[Driver]) -> list[float]:
    """CPU seconds per second of each engine process while nothing is asked of it."""
    processes = []
    for driver in drivers:
        assert isinstance(driver.engine, VllmEngine)
        processes.append(psutil.Process(driver.engine.pid))
    before = [sum(process.cpu_times()[:2]) for process in processes]
    await asyncio.sleep(IDLE_S)
    after = [sum(process.cpu_times()[:2]) for process in processes]
    return [(b - a) / IDLE_S for a, b in zip(before, after, strict=True)]


def cell(values_s: Sequence[float]) -> str:
    """Median and 90th percentile in milliseconds."""
    p90_s = statistics.quantiles(values_s, n=10)[-1]
    return f"{statistics.median(values_s) * 1e3:.1f} ({p90_s * 1e3:.1f})"


async def run(rounds: int, engine: type[VllmEngine]) -> None:
    model = build(tiny_directory())
    async with (
        driven(lambda: make_vllm(model, "source", engine=engine)) as source,
        driven(lambda: make_vllm(model, "target", engine=engine)) as target,
    ):
        for _ in range(WARM_UP_ROUNDS):
            await one_round(source, target, PROMPT_TOKENS[0])
        idle = await idle_cores((source, target))
        print(f"idle engines: {idle[0]:.3f} and {idle[1]:.3f} cores\n")
        print("| prompt tokens | prefill leg, ms | decode leg, ms | one engine alone, ms |")
        print("|---|---|---|---|")
        by_length: dict[int, list[tuple[float, float, float]]] = {n: [] for n in PROMPT_TOKENS}
        for _ in range(rounds):
            for tokens in PROMPT_TOKENS:
                by_length[tokens].append(await one_round(source, target, tokens))
        for tokens, samples in by_length.items():
            cells = " | ".join(cell(column) for column in zip(*samples, strict=True))
            print(f"| {tokens} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--nixl-thread", action="store_true")
    arguments = parser.parse_args()
    engine = StockAgentEngine if arguments.nixl_thread else VllmEngine
    asyncio.run(run(arguments.rounds, engine))


if __name__ == "__main__":
    main()
