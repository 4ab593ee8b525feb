"""How long real vLLM engines take on this machine: `python -m benchmarks.engine_steps`.

Two engines on the tiny model, as `baton serve` starts them, without a router: prompts alone by
length; steps that decode, by requests and context; fetches of a prompt's state from one engine by
the other. Each point is a median. Costs of the simulated engine's model are fitted to them, by
least squares of relative errors. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.report import machine
from benchmarks.steps_fit import Measured, profile_of, report
from cluster import config, engine_defaults
from cluster.model import tiny_directory
from engine.spec import WorkerSpec
from engine.tiny_model import build
from engine.vllm_host.engine import VllmEngine
from protos.enginecore import (
    EngineOutput,
    EngineRequest,
    decode_ready,
    encode_manifest,
    hand_off_after_first_token,
    resume_from,
)
from protos.ids import WorkerId

PROMPTS: Final = (32, 128, 256, 512, 1024, 2048)
"""Tokens."""
DECODES: Final = ((1, 256), (1, 1024), (1, 4096), (4, 256), (4, 1024), (8, 512), (16, 256))
"""Requests and the context of each."""
FETCHES: Final = (128, 512, 1024, 2048)
REPEATS: Final = 7
_DECODE_STEPS: Final = 256
"""While an engine steps, requests come in only one after the other."""
_DECODE_REPEATS: Final = 2
_VOCABULARY: Final = range(300, 2000)


class Bench:
    """Two engines, the second of which fetches from the first."""

    def __init__(self, first: VllmEngine, second: VllmEngine, rng: random.Random) -> None:
        self._first = first
        self._second = second
        self._rng = rng
        self._made = 0

    def request(self, prompt: list[int], max_tokens: int) -> EngineRequest:
        """A greedy one, as a front sends it."""
        self._made += 1
        params = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
        name = f"request {self._made}"
        return EngineRequest(name, prompt, None, params, None, 0.0, None, None, None)

    def prompt(self, tokens: int) -> list[int]:
        """One that no cache has."""
        return self._rng.choices(_VOCABULARY, k=tokens)

    async def prompt_s(self, tokens: int) -> float:
        """To its first token, alone."""
        began_s = time.perf_counter()
        self._first.add(self.request(self.prompt(tokens), 1))
        await _outputs(self._first)
        return time.perf_counter() - began_s

    async def decode_s(self, requests: int, context_tokens: int) -> float:
        """Between two tokens of a request, on average while all decode; half of the outputs are on
        top of the prompts. An engine may do them in two batches that take turns."""
        prompt_tokens = context_tokens - _DECODE_STEPS // 2
        for _ in range(requests):
            self._first.add(self.request(self.prompt(prompt_tokens), _DECODE_STEPS))
        begun: set[str] = set()
        all_begun_s = end_s = 0.0
        tokens = ended = 0
        while ended < requests:
            outputs = await _outputs(self._first)
            if len(begun) == requests and not ended:
                end_s = time.perf_counter()
                tokens += len(outputs)
            elif len(begun) < requests:
                begun.update(output.request_id for output in outputs)
                all_begun_s = time.perf_counter()
            ended += sum(output.finish_reason is not None for output in outputs)
        if not tokens:
            raise RuntimeError(f"{requests} requests never decoded together")
        return (end_s - all_begun_s) * requests / tokens

    async def fetch_s(self, tokens: int) -> float:
        """From the first engine's first token to the second engine's next one."""
        prompt = self.prompt(tokens)
        given = self.request(prompt, _DECODE_STEPS)
        hand_off_after_first_token(given)
        self._first.add(given)
        (output,) = await _outputs(self._first)
        assert output.kv_transfer_params is not None
        resumed = self.request(prompt, 2)
        resume_from(resumed, list(output.new_token_ids), encode_manifest(output.kv_transfer_params))
        began_s = time.perf_counter()
        self._second.add(resumed)
        await _outputs(self._second)
        return time.perf_counter() - began_s


async def _outputs(engine: VllmEngine) -> list[EngineOutput]:
    """Of the next step that has some."""
    while True:
        step = await engine.step()
        if step.outputs:
            return list(step.outputs)


async def measure(repeats: int = REPEATS) -> Measured:
    """With engines of its own."""
    model = build(tiny_directory())
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as directory:
        engines = [_engine(model, name, directory) for name in ("first", "second")]
        try:
            info, _ = await asyncio.gather(*(engine.start() for engine in engines))
            bench = Bench(engines[0], engines[1], random.Random(1))
            await _warm_up(bench)
            alone = {n: [await bench.prompt_s(n) for _ in range(repeats)] for n in PROMPTS}
            steps = {d: [await bench.decode_s(*d) for _ in range(_DECODE_REPEATS)] for d in DECODES}
            fetches = {n: [await bench.fetch_s(n) for _ in range(repeats)] for n in FETCHES}
        finally:
            await asyncio.gather(*(engine.stop() for engine in engines))
    step_s, ready = statistics.median(steps[1, 1024]), decode_ready(info.ready_payload)
    return Measured(
        {tokens: statistics.median(each) for tokens, each in alone.items()},
        {work: statistics.median(each) for work, each in steps.items()},
        {tokens: statistics.median(each) - step_s for tokens, each in fetches.items()},
        info.block_size_tokens,
        info.kv_blocks_total * info.block_size_tokens,
        ready.max_num_batched_tokens, ready.max_num_seqs, info.max_model_len_tokens,
    )  # fmt: skip


async def _warm_up(bench: Bench) -> None:
    """The first fetch shakes hands."""
    await bench.prompt_s(PROMPTS[-1])
    await bench.fetch_s(FETCHES[-1])
    await bench.decode_s(*DECODES[-1])


def _engine(model: Path, name: str, directory: str) -> VllmEngine:
    defaults = config.load(None, {}, {})
    return VllmEngine(
        WorkerSpec(
            worker_id=WorkerId(name),
            role="decode",
            engine="vllm",
            model=str(model),
            run_directory=f"{directory}/{name}",
            link_token="",
            engine_args=engine_defaults.arguments(defaults, "decode"),
            environment=engine_defaults.environment(defaults, "decode"),
        )
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.parse_args()
    measured = asyncio.run(measure())
    print(f"{machine()}\n\n{report(measured, profile_of(measured))}")


if __name__ == "__main__":
    main()
