"""Would the exactness suite notice a wrong block? With one in the hand-off, outputs must change.

Of 30 hand-offs, or with `--whole` of 100.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from engine.vllm_host.engine import VllmEngine
from protos.enginecore import encode_manifest, hand_off_after_first_token, resume_from
from tests.contract.engine_contract import Driver, driven, make_prompt, make_request, new_id
from tests.live.vllm_engines import make_vllm

pytestmark = pytest.mark.slow

PROMPT_LENGTHS_TOKENS = [128, 160, 256, 300, 511, 700, 1023, 1100, 1440, 1500]
ROUNDS = 3
ROUNDS_WHOLE = 10
OUTPUT_TOKENS = 24


class SpoilingEngine(VllmEngine):
    connector_module = "tests.live.wrong_block"
    connector_class = "WrongBlockConnector"


async def hand_over(source: Driver, target: Driver, prompt: list[int], suffix: str) -> list[int]:
    request = make_request(new_id(), prompt, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    hand_off_after_first_token(request)
    handed = await source.run(request)
    assert handed.kv_transfer_params is not None
    resumed = make_request(new_id() + suffix, prompt, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    resumed.cache_salt = resumed.request_id  # fetch every block, whatever is cached
    resume_from(resumed, handed.tokens, encode_manifest(handed.kv_transfer_params))
    return [*handed.tokens, *(await target.run(resumed)).tokens]


async def test_a_wrong_block_changes_the_output(tiny_model: Path, whole: bool) -> None:
    dice = random.Random(7)
    async with (
        driven(lambda: make_vllm(tiny_model, "source")) as source,
        driven(lambda: make_vllm(tiny_model, "target", engine=SpoilingEngine)) as target,
        asyncio.timeout(240),
    ):
        await hand_over(source, target, make_prompt(300), "")  # the first donor
        changed = total = 0
        for length in PROMPT_LENGTHS_TOKENS * (ROUNDS_WHOLE if whole else ROUNDS):
            prompt = make_prompt(length)
            # A last block that holds a few tokens only is no whole block to be wrong.
            block = dice.randrange((length + 96) // 128)
            right = await hand_over(source, target, prompt, "")
            assert (
                right
                == (await source.generate(prompt, max_tokens=OUTPUT_TOKENS, ignore_eos=True)).tokens
            )
            # The donor is another prompt's block.
            await hand_over(source, target, make_prompt(200), "")
            wrong = await hand_over(source, target, prompt, f"-wrong-{block}")
            total += 1
            changed += wrong != right
    print(f"\n{changed} of {total} outputs changed with one wrong block")
    assert changed >= 0.95 * total
