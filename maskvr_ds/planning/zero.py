"""What DeepSpeed does with a DeepSpeed configuration: precision, partitions, buffers, collectives. Loads no torch.

Describes DeepSpeed 0.19.8 with the replacements of engine/streamline.py and engine/one_rank.py. P parameters, N ranks,
e bytes per element of the model (4 in fp32, else 2), c bytes per communicated gradient, a bytes per accumulated
gradient.
"""

from dataclasses import dataclass
from typing import Any

from maskvr_ds.config import ConfigError
from maskvr_ds.config.base import shown
from maskvr_ds.config.deepspeed import enabled, offload_device, zero_stage

# DeepSpeed's defaults for keys that a file may lack.
_BUCKET, _LIVE = 500_000_000, 1_000_000_000
_BYTES = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "bf16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Zero:
    """ZeRO as configured.

    element, accumulated, communicated: e, a, c. bucket: elements that are reduced at a time. overlap: whether
    reductions run during the backward pass. to_owner: stage 2 reduces to the owner of a partition, not to all ranks.
    flat_gradients: DeepSpeed uses its BF16_Optimizer, in which all gradients accumulate in one fp32 buffer on every
    rank. live: elements of gathered parameters that stage 3 keeps at most. offload: master weights and moments are in
    the host's memory.
    """

    stage: int
    element: int
    accumulated: int
    communicated: int
    bucket: int
    overlap: bool
    to_owner: bool
    live: int
    offload: bool
    flat_gradients: bool

    @property
    def buckets(self) -> int:
        """Buffers of `bucket` elements that exist at once."""
        return 2 if self.overlap and self.stage == 2 else 1

    def holds_gradients(self, ranks: int) -> bool:
        """Whether gradients lie in the optimizer's flat buffers from the start: one rank, stages 1 and 2, all fp32."""
        whole = {self.element, self.accumulated, self.communicated} == {4}
        return ranks == 1 and self.stage in (1, 2) and whole and not self.offload

    def flattens(self, ranks: int) -> bool:
        """Whether gradients are copied to flat buffers before the update, and from them."""
        alone = ranks == 1 and (self.stage == 0 or self.flat_gradients or self.holds_gradients(ranks))
        return self.stage < 3 and not alone


def zero_settings(config: dict[str, Any]) -> Zero:
    """From the content of a DeepSpeed configuration, as `read_deepspeed_config` returns it.

    Raises ConfigError for a dtype or size that is none.
    """
    zero = config.get("zero_optimization", {})
    stage = zero_stage(config)
    element = 2 if enabled(config, "bf16") or enabled(config, "fp16") else 4
    accumulated = _bytes(config.get("data_types", {}), "grad_accum_dtype", element)
    return Zero(
        stage=stage,
        element=element,
        accumulated=accumulated,
        communicated=_bytes(config, "communication_data_type", element),
        bucket=_elements(zero, "reduce_bucket_size", _BUCKET),
        # DeepSpeed's default is true at stage 3 only.
        overlap=bool(zero.get("overlap_comm", stage == 3)) and stage > 1,
        to_owner=not zero.get("use_multi_rank_bucket_allreduce", True),
        live=_elements(zero, "stage3_max_live_parameters", _LIVE),
        offload=offload_device(config) != "none",
        flat_gradients=stage == 1 and enabled(config, "bf16") and accumulated == 4,
    )


def _bytes(section: dict[str, Any], key: str, default: int) -> int:
    """Bytes of an element of the dtype that `key` names; `default` if it names none."""
    if (name := section.get(key)) is None:
        return default
    if not isinstance(name, str) or name not in _BYTES:
        raise ConfigError(f"{key} is {shown(name)}; expected one of {', '.join(_BYTES)}")
    return _BYTES[name]


def _elements(section: dict[str, Any], key: str, default: int) -> int:
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
        raise ConfigError(f"zero_optimization.{key} is {shown(value)}; a number of elements of at least 1 expected")
    return int(value)
