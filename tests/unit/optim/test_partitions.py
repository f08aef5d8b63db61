"""`bind` on stub engines: its errors; fragments of stage 3. tests/distributed/test_lamb.py tests it on real engines."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from maskvr_ds.lamb import Lamb, bind
from maskvr_ds.optim import partitions


def engine_stub(optimizer: Any, **facts: Any) -> Any:
    offload = {"device": "none", "ratio": 1.0, "super_offload": False} | facts.pop("offload", {})
    usual = {"stage": 0, "fp16": False, "zenflow": False, "mp": 1, "pipeline": False, "clipping": 0.0, "moe": False}
    facts = usual | {"scaler": None, "offload_param": None, "zero": {}} | facts
    zero = {"zero_hpz_partition_size": 1, "zero_quantized_weights": False} | facts["zero"]
    return SimpleNamespace(
        _config=SimpleNamespace(zero_config=SimpleNamespace(**zero)),
        has_moe_layers=facts["moe"],
        torch_autocast_z0_gradscaler=facts["scaler"],
        zero_offload_param=lambda: facts["offload_param"],
        basic_optimizer=optimizer,
        optimizer=optimizer,
        zero_optimization_stage=lambda: facts["stage"],
        zero_offload_optimizer=lambda: SimpleNamespace(**offload),
        fp16_enabled=lambda: facts["fp16"],
        gradient_clipping=lambda: facts["clipping"],
        zenflow=facts["zenflow"],
        mp_world_size=facts["mp"],
        pipeline_parallelism=facts["pipeline"],
    )


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"stage": 4}, "ZeRO stage 4"),
        ({"fp16": True}, "fp16 without ZeRO"),
        ({"offload": {"device": "cpu"}}, "optimizer offload without ZeRO"),
        ({"stage": 3, "offload": {"device": "nvme"}}, "optimizer offload to nvme"),
        ({"stage": 3, "offload": {"device": "cpu", "ratio": 0.5}}, r"partial optimizer offload \(ratio 0.5\)"),
        ({"stage": 3, "offload": {"device": "cpu", "super_offload": True}}, "SuperOffload"),
        ({"stage": 3, "offload_param": SimpleNamespace(device="nvme")}, "parameter offload"),
        ({"scaler": object()}, "torch_autocast in fp16"),
        ({"stage": 3, "zero": {"zero_hpz_partition_size": 8}}, "hpZ"),
        ({"stage": 3, "zero": {"zero_quantized_weights": True}}, "quantized weights"),
        ({"moe": True}, "mixture of experts"),
        ({"zenflow": True}, "ZenFlow"),
        ({"mp": 2}, "model parallelism"),
        ({"pipeline": True}, "pipeline parallelism"),
    ],
)
def test_unsupported_engine_is_an_error(facts: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}.*supported: data parallelism"):
        bind(engine_stub(Lamb([nn.Parameter(torch.ones(1))]), **facts))


@pytest.mark.parametrize("clipping", [0.0, 0.5])
def test_clipping_must_match_the_variant(clipping: float) -> None:
    optimizer = Lamb([nn.Parameter(torch.ones(1))], variant="nvidia")
    with pytest.raises(ValueError, match=f"gradient_clipping = {clipping}.*at most 1.0"):
        bind(engine_stub(optimizer, clipping=clipping))


def test_bind_without_zero_skips_frozen_tensors() -> None:
    frozen, trained = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = Lamb([frozen, trained], lr=0.1)
    engine = engine_stub(optimizer)
    engine.param_names = {frozen: "frozen", trained: "trained"}
    bind(engine)
    bind(engine)  # again, to no effect
    trained.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.tensor_names == ["trained"]
    torch.testing.assert_close(trained.data, torch.full((3,), 0.9))
    assert torch.equal(frozen.data, torch.ones(2))


def test_bind_of_another_optimizer_is_an_error() -> None:
    with pytest.raises(ValueError, match="AdamW"):
        bind(engine_stub(torch.optim.AdamW([nn.Parameter(torch.ones(1))])))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 3))
def test_fragments_of_stage_3_are_every_element_once(sizes: list[int], ranks: int, groups: int) -> None:
    """Over all ranks; the padding of a tensor's last shares belongs to no fragment."""
    tensors = [torch.empty(0) for _ in sizes]
    for tensor, size in zip(tensors, sizes, strict=True):
        share = -(-size // ranks)
        vars(tensor).update(ds_numel=size, partition_numel=lambda share=share: share, ds_process_group=None)
    parts = [tensors[first::groups] for first in range(groups) if tensors[first::groups]]
    seen: dict[int, list[int]] = {number: [] for number in range(len(sizes))}
    for rank in range(ranks):
        flats = [torch.empty(sum(t.partition_numel() for t in part)) for part in parts]  # type: ignore[attr-defined]
        optimizer = SimpleNamespace(fp32_partitioned_groups_flat=flats, fp16_groups=parts)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(partitions.dist, "get_rank", lambda group, rank=rank: rank)
            found = partitions._stage3_partitions(optimizer, tensors)
        for flat, partition in found.items():
            places = [i for f in partition.fragments for i in range(f.partition_start, f.partition_start + f.length)]
            assert places == sorted(set(places)), "in order, not overlapping"
            assert all(place < flat.numel() for place in places)
            for f in partition.fragments:
                seen[f.tensor] += range(f.tensor_start, f.tensor_start + f.length)
    assert seen == {number: list(range(size)) for number, size in enumerate(sizes)}
