"""What a front's request must be, and what the router makes of it before an engine sees it.

Pure. Whatever a client put into engine-internal fields is overwritten or refused here, whichever
front it came through.
"""

from __future__ import annotations

from typing import NamedTuple

from kvstore.content import block_addresses, root_address, tenant_salt
from protos.enginecore import DEFAULT_MAX_TOKENS, EngineRequest, encode, strip_internal_arguments
from router.core.events import Demand, Shape


class CachedAs(NamedTuple):
    """What names the contents of prefix caches, besides a request's own tokens and salt."""

    weights: str
    """Digest of those that are served."""
    block_tokens: int
    """What one address stands for."""


def read(request: EngineRequest, cached_as: CachedAs, tenant: str | None = None) -> Demand:
    """Take a front's request over: it is changed, and then as engines will get it.

    `tenant` is given where tenants share no cached prefixes. Its salt goes to the engine too, so
    neither its prefix cache nor our index knows another's prompts.
    """
    removed = take_over(request)
    if tenant is not None:
        request.cache_salt = tenant_salt(tenant, request.cache_salt or "")
    refusal = _refusal(request)
    addresses = _addresses(request, cached_as) if refusal is None else []
    shape = _shape(request, addresses)
    return Demand(shape, encode(request), refusal, tuple(removed))


def _refusal(request: EngineRequest) -> str | None:
    if request.pooling_params is not None or request.sampling_params is None:
        return "Only generation is served, not embeddings or other pooling."
    if request.mm_features:
        return "Images, audio and video are not served."
    if request.prompt_embeds is not None:
        return "Prompts are served as tokens, not as embeddings."
    if request.lora_request is not None:
        return "Adapters are not served."
    if not request.prompt_token_ids:
        return "The prompt is empty."
    return None


def too_long(shape: Shape, max_model_len_tokens: int | None) -> str | None:
    """Why no worker can hold it. An output that does not fit is cut by the engine, as in vLLM."""
    if max_model_len_tokens is None or shape.prompt_tokens < max_model_len_tokens:
        return None
    return (
        f"The prompt has {shape.prompt_tokens} tokens, which leaves no room for output in the "
        f"context of {max_model_len_tokens}."
    )


def take_over(request: EngineRequest) -> list[str]:
    """Overwrite what is the router's to say; returns the names of arguments that were removed."""
    request.priority = 0
    request.data_parallel_rank = None
    request.kv_hints = None
    request.client_index = 0
    request.current_wave = 0
    request.abort_immediately = False
    request.resumable = False
    return strip_internal_arguments(request)


def _addresses(request: EngineRequest, cached_as: CachedAs) -> list[bytes]:
    """Of the prompt's whole blocks. Adapters, which would be named by them too, are refused."""
    weights, block_tokens = cached_as
    root = root_address(weights, "", request.cache_salt or "", block_tokens)
    try:
        return block_addresses(root, request.prompt_token_ids or (), block_tokens)
    except OverflowError:
        return []  # An id that no model has; the worker refuses it and says so.


def _shape(request: EngineRequest, addresses: list[bytes]) -> Shape:
    params = request.sampling_params or {}
    return Shape(
        prompt_tokens=len(request.prompt_token_ids or ()),
        max_tokens=params.get("max_tokens", DEFAULT_MAX_TOKENS),
        prompt_logprobs=params.get("prompt_logprobs") is not None,
        addresses=addresses,
    )
