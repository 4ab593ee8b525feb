"""Content addresses: equal for equal prefixes, and for nothing else."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.content import ADDRESS_BYTES, block_addresses, root_address, tenant_salt

ROOT = root_address("model", "", "", 4)
tokens = st.lists(st.integers(0, 3), max_size=20)


@given(tokens, tokens)
def test_addresses_are_equal_as_far_as_prompts_are(left: list[int], right: list[int]) -> None:
    alike = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right))])  # noqa: B905
    pairs = zip(block_addresses(ROOT, left, 4), block_addresses(ROOT, right, 4), strict=False)
    equal = [a == b for a, b in pairs]
    whole = min(len(left), len(right)) // 4
    assert equal == [number < alike // 4 for number in range(whole)]


@given(tokens)
def test_only_whole_blocks_have_one(token_ids: list[int]) -> None:
    addresses = block_addresses(ROOT, token_ids, 4)
    assert len(addresses) == len(token_ids) // 4
    assert {len(address) for address in addresses} <= {ADDRESS_BYTES}


def test_all_that_the_kv_depends_on_changes_the_address() -> None:
    roots = [
        root_address(*named, size)
        for named in (
            ("m", "", ""),
            ("n", "", ""),
            ("m", "a", ""),
            ("m", "", "a"),
            # The same letters in other places.
            ("ma", "", ""),
            ("", "m", "a"),
            ("", "ma", ""),
        )
        for size in (4, 8)
    ]
    assert len(set(roots)) == len(roots)
    firsts = {block_addresses(root, [1, 2, 3, 4, 5, 6, 7, 8], 4)[0] for root in roots}
    assert len(firsts) == len(roots)


@given(*[st.text(max_size=3)] * 4)
def test_no_tenant_can_make_anothers_salt(one: str, ones: str, other: str, others: str) -> None:
    same = tenant_salt(one, ones) == tenant_salt(other, others)
    assert same == ((one, ones) == (other, others))


def test_knowing_a_tenants_salt_does_not_help() -> None:
    assert tenant_salt("other", tenant_salt("one", "")) != tenant_salt("one", "")


def test_an_id_that_is_none_is_refused() -> None:
    with pytest.raises(OverflowError):
        block_addresses(ROOT, [1, 2, 3, 2**32], 4)
    with pytest.raises(OverflowError):
        block_addresses(ROOT, [1, 2, 3, -1], 4)


def test_addresses_stay_what_they_are() -> None:
    """Stores keep them: a change makes all that is stored unreachable."""
    (address,) = block_addresses(root_address("llama", "lora", "tenant", 4), [1, 2, 3, 70000], 4)
    assert address.hex() == ("088df1231d3cf80cab8d9b7c6f3572a31298e40720e4e96e883189a577f202fc")
