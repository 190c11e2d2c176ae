"""What GPUs can do, by their makers' data sheets; a plan is on paper, and these are its numbers.

Memory is the sheet's gigabytes as 10^9 bytes, of which every driver shows at least as many.
"""

from typing import NamedTuple

GB = 1e9


class GPU(NamedTuple):
    """A device and how it is wired."""

    memory: float  # bytes
    bf16: float  # operations a second of dense matrix products, summed in float32
    float32: float  # the same of float32, without TF32
    bandwidth: float  # bytes a second of its memory
    link: float  # bytes a second, each way, to the other GPUs of its node
    network: float  # bytes a second, each way, from its node to others
    nvlink: bool  # or PCI Express
    source: str  # the data sheet of the chip, and of the node it is sold in


_PCIE4 = 32 * GB  # 16 lanes, each way
_ASSUMED = 25 * GB  # such nodes have no usual network; one card of 200 Gb/s

GPUS = {
    "l4-24gb": GPU(24 * GB, 121e12, 30.3e12, 300 * GB, _PCIE4, _ASSUMED, False, "NVIDIA L4"),
    "rtx4090-24gb": GPU(24 * GB, 165.2e12, 82.6e12, 1008 * GB, _PCIE4, _ASSUMED, False, "NVIDIA Ada white paper"),
    "a100-40gb": GPU(40 * GB, 312e12, 19.5e12, 1555 * GB, 300 * GB, 200 * GB, True, "NVIDIA DGX A100"),
    "l40s-48gb": GPU(48 * GB, 362e12, 91.6e12, 864 * GB, _PCIE4, _ASSUMED, False, "NVIDIA L40S"),
    "a100-80gb": GPU(80 * GB, 312e12, 19.5e12, 2039 * GB, 300 * GB, 200 * GB, True, "NVIDIA DGX A100"),
    "h100-80gb": GPU(80 * GB, 989e12, 67e12, 3350 * GB, 450 * GB, 400 * GB, True, "NVIDIA DGX H100"),
    "h200-141gb": GPU(141 * GB, 989e12, 67e12, 4800 * GB, 450 * GB, 400 * GB, True, "NVIDIA DGX H200"),
    # Of the chip's 192 GB a B200 in a DGX or HGX node offers 180.
    "b200-180gb": GPU(180 * GB, 2250e12, 75e12, 8000 * GB, 900 * GB, 400 * GB, True, "NVIDIA DGX B200"),
}
