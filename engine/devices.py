"""What models run on, by data sheets. Pure.

Operations and bandwidths are those of NVIDIA's data sheets, dense where these tell both, to three
digits. Links are what a GPU has for itself in NVIDIA's own machines: a port of InfiniBand (HDR in
DGX A100, NDR in DGX H100, H200 and B200); cards that share a port count at their PCIe 4.0 x16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_HDR_BYTES_S: Final = 25e9
_NDR_BYTES_S: Final = 50e9
_PCIE_BYTES_S: Final = 32e9


@dataclass(frozen=True, slots=True)
class Device:
    """What engines compute with, read from, and write to each other by."""

    operations_s: float
    """Dense, bfloat16."""
    memory_bytes_s: float
    link_bytes_s: float
    step_overhead_s: float = 0.0
    """What a step takes beside its work."""


H100: Final = Device(989e12, 3.35e12, _NDR_BYTES_S)
GPUS: Final = {
    "B200": Device(2250e12, 8.0e12, _NDR_BYTES_S),
    "H200": Device(989e12, 4.8e12, _NDR_BYTES_S),
    "H100": H100,
    "A100": Device(312e12, 2.04e12, _HDR_BYTES_S),
    "L40S": Device(362e12, 0.864e12, _PCIE_BYTES_S),
    "L4": Device(121e12, 0.3e12, _PCIE_BYTES_S),
    "A10": Device(125e12, 0.6e12, _PCIE_BYTES_S),
    "A10G": Device(70e12, 0.6e12, _PCIE_BYTES_S),
}
"""By Ray's names, which are those of NVIDIA's driver without the variant: SXM is meant where there
are several, and of A100s those with 80 GB."""
CPU: Final = Device(
    operations_s=100e9, memory_bytes_s=10e9, link_bytes_s=1e9, step_overhead_s=0.005
)
"""A guess at a few cores, beside others; PyTorch's calls are most of a small model's step."""
