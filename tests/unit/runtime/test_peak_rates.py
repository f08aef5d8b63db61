"""Peak rates by the names that the driver gives to devices."""

import pytest
import torch

from maskvr_ds.runtime.peak_rates import device_peak_tflops, peak_tflops


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA A10", None),
        ("", None),
    ],
)
def test_bf16(name: str, expected: float | None) -> None:
    assert peak_tflops(name, torch.bfloat16) == expected
    assert peak_tflops(name, torch.float32) is None


def test_devices_without_bf16_have_fp16_and_a_cpu_is_not_known() -> None:
    assert peak_tflops("Tesla V100-SXM2-32GB", torch.float16) == 125.0
    assert device_peak_tflops(torch.device("cpu"), torch.float16) is None
