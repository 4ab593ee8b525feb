"""By what a prompt is looked for in prefix caches."""

from __future__ import annotations

from kvstore.content import block_addresses, root_address
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


def test_what_is_refused_or_no_token_has_none() -> None:
    refused = engine_request("a", 300)
    refused.prompt_embeds = b"x"
    assert not admission.read(refused, CACHED_AS).shape.addresses
    for impossible in (-1, 1 << 32):
        request = engine_request("a", 300)
        request.prompt_token_ids = [*range(300), impossible]
        assert not admission.read(request, CACHED_AS).shape.addresses
