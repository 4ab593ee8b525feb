"""vLLM's workers, taught to resume: a request that starts with output tokens starts in their state.

vLLM's V1 model runner (always used on CPUs) starts every request with no output and a fresh random
generator; its V2 runner (GPUs) takes the tokens from the scheduler and draws noise from (seed,
position), so it needs nothing here. Loaded by vLLM in the engine process (`worker_cls`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform

from protos.enginecore import resumed_output_token_ids

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as _PlatformWorker


class SeededGenerator(torch.Generator):  # type: ignore[misc]
    """A CPU request's random generator, whose state follows from how much it has drawn.

    The CPU sampler draws one seed a step (`TopKTopPSampler.forward_cpu`), one step makes one token.
    """

    def __new__(cls, seed: int, output_token_ids: list[int]) -> SeededGenerator:
        generator: SeededGenerator = super().__new__(cls, device="cpu")
        return generator

    def __init__(self, seed: int, output_token_ids: list[int]) -> None:
        self._seed = seed
        self._output_token_ids = output_token_ids
        self.rewind()

    def rewind(self) -> None:
        """Set the state that follows the tokens so far."""
        self.manual_seed(self._seed)
        for _ in self._output_token_ids:
            torch.randint(0, 2**31, (1,), generator=self)

    # The model runner takes back the draw of a step whose token it discards (a chunk of a prompt)
    # by an offset that only CUDA generators have; on a CPU that would end the engine.

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        self.rewind()


class ResumedRequests(dict[str, "CachedRequestState"]):
    """The model runner's requests; each enters with the output that it was submitted with."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size

    def __setitem__(self, request_id: str, state: CachedRequestState) -> None:
        params = state.sampling_params
        tokens = resumed_output_token_ids(params.extra_args if params is not None else None)
        if tokens and not state.output_token_ids:
            state.output_token_ids.extend(tokens)
        if state.generator is not None:
            assert params is not None
            if state.generator.device.type == "cpu":
                state.generator = SeededGenerator(params.seed, state.output_token_ids)
            else:
                self._advance(state.generator, len(state.output_token_ids))
        super().__setitem__(request_id, state)

    def _advance(self, generator: torch.Generator, drawn_tokens: int) -> None:
        # As `random_sample` in vLLM's topk_topp_sampler: a row of noise for each token.
        noise = torch.empty(self._vocab_size, device=generator.device)
        for _ in range(drawn_tokens):
            noise.exponential_(generator=generator)


class ResumingWorker(_PlatformWorker):  # type: ignore[misc]
    """vLLM's worker for this platform, with a model runner that resumes."""

    def init_device(self) -> None:
        super().init_device()
        if not self.use_v2_model_runner:
            vocab_size = self.model_config.get_vocab_size()
            self.model_runner.requests = ResumedRequests(vocab_size)
