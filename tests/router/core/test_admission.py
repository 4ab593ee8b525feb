"""By what a prompt is looked for in prefix caches."""

from __future__ import annotations

import itertools

from kvstore.content import block_addresses, root_address
from protos.enginecore import decode_request
from router.core import admission
from tests.router.core.driving import CACHED_AS, engine_request


def addresses(salt: str | None = None, prompt_tokens: int = 300) -> list[bytes]:
    request = engine_request("a", prompt_tokens)
    request.cache_salt = salt
    return list(admission.read(request, CACHED_AS).shape.addresses)


def test_addresses_are_those_of_the_prompts_whole_blocks() -> None:
    root = root_address("m", "", "", 128)
    assert addresses() == block_addresses(root, range(300), 128)
    assert len(addresses()) == 2
    assert addresses(prompt_tokens=127) == []


def test_a_salt_changes_all_of_them_and_an_empty_one_none() -> None:
    assert addresses("") == addresses()
    assert not {*addresses("tenant")} & {*addresses()}


def test_what_is_a_tenants_own_has_its_salt_for_engine_and_index_alike() -> None:
    seen = []
    for tenant, salt in itertools.product((None, "", "one", "other"), ("", "mine")):
        request = engine_request("a", 300)
        request.cache_salt = salt or None
        demand = admission.read(request, CACHED_AS, tenant)
        engines = decode_request(demand.payload).cache_salt or ""
        root = root_address("m", "", engines, 128)
        assert demand.shape.addresses == block_addresses(root, range(300), 128)
        assert (engines == salt) == (tenant is None)
        seen.append(engines)
    assert len({*seen}) == len(seen)


def test_what_is_refused_or_no_token_has_none() -> None:
    refused = engine_request("a", 300)
    refused.prompt_embeds = b"x"
    assert not admission.read(refused, CACHED_AS).shape.addresses
    for impossible in (-1, 1 << 32):
        request = engine_request("a", 300)
        request.prompt_token_ids = [*range(300), impossible]
        assert not admission.read(request, CACHED_AS).shape.addresses
