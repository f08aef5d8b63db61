"""Peak rates of devices, to which the rate of a training is compared."""

import torch

# Dense matrix products in 16 bits with accumulation in fp32, in TFLOP/s, from NVIDIA's data sheets of each GPU, "Tensor
# Core" rows (half of what they give with sparsity), and for RTX from the whitepapers of Ampere GA102 and Ada. The first
# entry that is part of the device's name counts.
_TFLOPS_16_BIT = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A30": 165.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}
# Without bf16.
_FP16_ONLY = ("V100", "T4")


def peak_tflops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak rate in TFLOP/s of matrix products of `dtype`; None if it is not known.

    device_name: as `torch.cuda.get_device_name` says, "NVIDIA A100-SXM4-80GB".
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    words = device_name.replace("-", " ")
    # Not "L4" in "L40".
    found = next((name for name in _TFLOPS_16_BIT if f" {name} " in f" {words} "), None)
    if found is None or (dtype == torch.bfloat16 and found in _FP16_ONLY):
        return None
    return _TFLOPS_16_BIT[found]


def device_peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """`peak_tflops` of this device; None on a CPU."""
    return peak_tflops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
