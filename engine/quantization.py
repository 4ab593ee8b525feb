"""How many bits a checkpoint's weights have, by what its config says. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

PLAIN_BITS: Final = 16
_IN_NAME: Final = re.compile(r"(?:fp|int|w)(\d)", re.IGNORECASE)
"""As in fp8, fbgemm_fp8, int8_per_channel_weight_only, NVFP4, mxfp4, W4A16_AWQ."""


def weight_bits(quantization: Mapping[str, Any]) -> int:
    """By `quantization_config` of config.json: AWQ and GPTQ tell bits, compressed-tensors tells
    those of each group (the most count), bitsandbytes has switches, and others are called by them.
    Raises TypeError, KeyError or ValueError for what none of these writes."""
    for key in ("bits", "w_bit"):
        if (bits := quantization.get(key)) is not None:
            return int(bits)
    if groups := quantization.get("config_groups"):
        return max(int(group["weights"]["num_bits"]) for group in groups.values())
    for bits in (4, 8):
        if quantization.get(f"load_in_{bits}bit"):
            return bits
    name = quantization.get("quant_algo") or quantization.get("quant_method") or ""
    found = _IN_NAME.search(name)
    return int(found[1]) if found else PLAIN_BITS
