"""The reference: one plain vLLM engine, no part of Baton. Run as a process of its own.

Reads a JSON list of `{"prompt": [token ids], "sampling": {...}}` from standard input and writes a
JSON list of `{"token_ids", "text", "logprobs"}`: one request at a time, as each were alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster.engine_defaults import tiny_model_dtype


def plain_outputs(model: Path, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What plain vLLM makes of each request."""
    answer = subprocess.run(
        [sys.executable, "-m", "tests.live.plain_vllm", str(model)],
        input=json.dumps(requests).encode(),
        stdout=subprocess.PIPE,
        check=True,
        env={
            **os.environ,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        },
        timeout=600,
    )
    outputs: list[dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])
    return outputs


def main() -> None:
    requests = json.load(sys.stdin)
    import torch
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    # Else the kernel answers the first AMX instruction, where a CPU has them, with SIGILL: nothing
    # in this process asks it for their registers before vLLM's attention uses them.
    torch.cpu._init_amx()
    llm = LLM(
        sys.argv[1],
        dtype=tiny_model_dtype(),
        enforce_eager=True,
        max_model_len=8192,
        kv_cache_memory_bytes=256 << 20,
        disable_log_stats=True,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )
    outputs = []
    for request in requests:
        sampling = dict(request["sampling"])
        if (schema := sampling.pop("json_schema", None)) is not None:
            sampling["structured_outputs"] = StructuredOutputsParams(json=schema)
        if (bias := sampling.get("logit_bias")) is not None:
            sampling["logit_bias"] = {int(token): value for token, value in bias.items()}
        params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        prompt = {"prompt_token_ids": request["prompt"]}
        (result,) = llm.generate(prompt, params, use_tqdm=False)
        (completion,) = result.outputs
        outputs.append(
            {
                "token_ids": list(completion.token_ids),
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "logprobs": [
                    {str(token): entry.logprob for token, entry in position.items()}
                    for position in completion.logprobs or ()
                ],
            }
        )
    print(json.dumps(outputs))


if __name__ == "__main__":
    main()
