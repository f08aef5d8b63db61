"""Settings that DeepSpeed forbids or silently ignores on a CPU, with its own errors; the trainer refuses them first."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.distributed.ranks import run_ranks

# Forbidden by DeepSpeed: case → (settings, optimizer: DeepSpeed's Adam or ours, DeepSpeed's error).
FORBIDDEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "fp16 on this CPU": (
        {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}},
        "adam",
        "ValueError: Type fp16 is not supported on your device.",
    ),
    "fp16 and bf16": (
        {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}, "bf16": {"enabled": True}},
        "adam",
        "AssertionError: bfloat16 and fp16 modes cannot be simultaneously enabled",
    ),
    "fp32 gradients at stage 0 in bf16": (
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        "adam",
        "NotImplementedError: unsupported mix of model_dtype=torch.bfloat16 and grad_accum_dtype=torch.float32",
    ),
    "a part of the optimizer offloaded": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "adam",
        "AssertionError: Hybrid Optimizer Only Supports DeepSpeedCPUAdam",
    ),
    "LAMB offloaded by force": (
        {
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "zero_force_ds_cpu_optimizer": True,
        },
        "lamb",
        "ZeRORuntimeException: You are using ZeRO-Offload with a client provided optimizer",
    ),
}
# Accepted and ignored by DeepSpeed, refused by the trainer: case → (settings, our error).
IGNORED = {
    "fp16 at stage 0": (
        {"fp16": {"enabled": True}},
        "fp16 at ZeRO stage 0: DeepSpeed 0.19 does not scale the loss there",
    ),
    "offload at stage 0": (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        "offload_optimizer needs ZeRO stage 1, 2 or 3",
    ),
}


def what_deepspeed_says(folder: Path) -> dict[str, list[str]]:
    """On a rank: case → [DeepSpeed's error, ours]; for IGNORED the first is what DeepSpeed did instead."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from maskvr_ds import lamb
    from maskvr_ds.config.deepspeed import read_deepspeed_config
    from maskvr_ds.engine.ds_config import check_device
    from maskvr_ds.runtime import distributed

    distributed.initialize()

    def initialize(settings: dict[str, Any], optimizer: str) -> Any:
        model = torch.nn.Linear(4, 4)
        own = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}} if optimizer == "adam" else {}
        config = {"train_batch_size": 1, "zero_allow_untested_optimizer": True, **own, **settings}
        client = None if own else lamb.Lamb(model.parameters())
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), optimizer=client, config=config)[
            0
        ]

    def error_of(action: Any) -> str:
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    def refusal(settings: dict[str, Any]) -> None:
        path = folder / "ds.json"
        path.write_text(json.dumps(settings))
        check_device(read_deepspeed_config(path))

    said = {}
    for fp16 in (False, True):
        # Whether this CPU has fp16 products must not matter.
        get_accelerator().is_fp16_supported = lambda fp16=fp16: fp16
        for what, (settings, optimizer, _) in FORBIDDEN.items():
            if (what != "fp16 on this CPU") == fp16:
                said[what] = [
                    error_of(lambda settings=settings, optimizer=optimizer: initialize(settings, optimizer)),
                    error_of(lambda settings=settings: refusal(settings)),
                ]
    engine = initialize(IGNORED["fp16 at stage 0"][0], "adam")
    engine.backward(engine(torch.ones(1, 4, dtype=torch.float16)).float().sum())
    gradient = engine.module.bias.grad.tolist()
    said["fp16 at stage 0"] = [str(gradient), error_of(lambda: refusal(IGNORED["fp16 at stage 0"][0]))]
    engine = initialize(IGNORED["offload at stage 0"][0], "adam")
    said["offload at stage 0"] = [
        type(engine.optimizer).__name__,
        error_of(lambda: refusal(IGNORED["offload at stage 0"][0])),
    ]
    return said


def test_settings_that_deepspeed_forbids_or_ignores_are_refused(tmp_path: Path) -> None:
    (said,) = run_ranks(what_deepspeed_says, 1, tmp_path)
    for what, (_, _, error) in FORBIDDEN.items():
        assert said[what][0].startswith(error), what
    device = said["fp16 on this CPU"][1]
    assert device.startswith("ConfigError: fp16 is enabled, but DeepSpeed's accelerator on this machine, 'cpu', does")
    assert "Type fp16 is not supported on your device" in device
    assert said["fp16 and bf16"][1].endswith("both fp16 and bf16 are enabled; choose one")
    assert "grad_accum_dtype" in said["fp32 gradients at stage 0 in bf16"][1]
    assert "offload_optimizer.ratio below 1" in said["a part of the optimizer offloaded"][1]
    # The trainer never sets zero_force_ds_cpu_optimizer: see complete_deepspeed_config.
    assert said["LAMB offloaded by force"][1] == "none"
    assert said["fp16 at stage 0"][0] == "[1.0, 1.0, 1.0, 1.0]", "gradients of a loss that was not scaled"
    assert said["offload at stage 0"][0] == "AdamW", "not offloaded"
    for what, (_, error) in IGNORED.items():
        assert error in said[what][1]
