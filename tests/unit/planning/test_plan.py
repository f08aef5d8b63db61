"""Arithmetic of `maskvr plan` against sums of their own, and its invariants."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskvr_ds.config import ConfigError, ModelConfig, RunConfig, deepspeed_config_path
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.planning.communication import collectives, seconds
from maskvr_ds.planning.corpora import Corpus
from maskvr_ds.planning.hardware import GPUS, LINKS, USABLE, Cluster, link_bytes
from maskvr_ds.planning.memory import Pass, activations, memory
from maskvr_ds.planning.plan import Plan, make_plan
from maskvr_ds.planning.sizes import encoder_sizes
from maskvr_ds.planning.step_time import Calibration, mask_launches, pass_seconds, step_time, update_bytes
from maskvr_ds.planning.zero import Zero, zero_settings

LARGE = encoder_sizes(ModelConfig(preset="bert-large"), 30_522)
P = LARGE.total
NAMES = [f"zero{stage}_{precision}" for stage in range(4) for precision in ("fp32", "bf16", "fp16")]
NAMES.remove("zero0_fp16")


def zero(name: str) -> Zero:
    return zero_settings(read_deepspeed_config(deepspeed_config_path(name)))


def run_config(**sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "output_dir": "run",
        "deepspeed": "zero1_bf16",
        "data": {"path": "corpus"},
        "model": {"preset": "bert-large"},
        "batch": {"global_size": 65_536, "micro_size": 256},
        "training": {"steps": 1000},
        **sections,
    }
    return RunConfig.model_validate(values)


def planned(config: RunConfig, nodes: int = 4, link: str | None = "1x400G", gpu: str = "h100") -> Plan:
    cluster = Cluster(nodes, 8, GPUS[gpu], None if link is None else link_bytes(link))
    return make_plan(config, [Corpus(128, 30_522)], cluster, Calibration())


# Memory


@pytest.mark.parametrize("ranks", [1, 8, 64])
@pytest.mark.parametrize("name", NAMES)
def test_states_of_the_optimizer(name: str, ranks: int) -> None:
    """Rajbhandari et al. 2020 (arXiv 1910.02054), figure 1: K = 12 with fp32 masters and two moments; in fp32 at
    stage 0 the weights are their own masters."""
    found = memory(LARGE, zero(name), Pass(128, 19, 64, 1), ranks=ranks, fused=True)
    stage, element = int(name[4]), 4 if name.endswith("fp32") else 2
    assert found.optimizer == pytest.approx((8 if name == "zero0_fp32" else 12) * P / (ranks if stage else 1))
    assert found.weights == pytest.approx(element * P / (ranks if stage == 3 else 1))


def test_sums_of_gradients_are_complete_on_every_rank_at_stage_1_in_bf16() -> None:
    """BF16_Optimizer: 4 P for the sums; the first gradient of the backward pass is the decoder's, V × D in bf16."""
    found = memory(LARGE, zero("zero1_bf16"), Pass(128, 19, 64, 1), ranks=64, fused=True)
    assert found.gradients == 4 * P + 2 * 30_522 * 1024
    again = memory(LARGE, zero("zero1_bf16"), Pass(128, 19, 64, 2), ranks=64, fused=True)
    # The gradients of the first pass, zeroed; 2^25 elements of fp32 to widen those of the second.
    assert again.total - found.total == 2 * P + 4 * 2**25


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    micro=st.integers(1, 512),
    more=st.integers(1, 512),
    ranks=st.integers(1, 512),
    accumulation=st.integers(1, 8),
    again=st.booleans(),
)
def test_memory_grows_with_the_micro_batch_and_not_with_ranks(
    name: str, micro: int, more: int, ranks: int, accumulation: int, again: bool
) -> None:
    work = Pass(128, 19, micro, accumulation, again)
    found = memory(LARGE, zero(name), work, ranks=ranks, fused=False)
    assert all(value >= 0 for value in vars(found).values())
    assert found.total <= memory(LARGE, zero(name), replace(work, micro=micro + more), ranks=ranks, fused=False).total
    # A single rank makes no copies for a reduction, and may need less than two.
    sharing = memory(LARGE, zero(name), work, ranks=max(2, ranks), fused=False)
    assert sharing.total >= memory(LARGE, zero(name), work, ranks=max(2, ranks) + 1, fused=False).total
    if micro >= 16:
        without = memory(LARGE, zero(name), replace(work, checkpointing=False), ranks=ranks, fused=False)
        assert found.total <= without.total
    assert memory(LARGE, zero(name), work, ranks=ranks, fused=True).total <= found.total


def test_recomputed_layers_trade_memory_for_time() -> None:
    """Layer by layer, from none to all 24, as a number or as true."""
    gpu, numbers = GPUS["h100"], [False, 1, 12, 23, 24]
    works = [Pass(512, 77, 64, 1, number) for number in numbers]
    bytes_kept = [activations(LARGE, 2, work) for work in works]
    times = [pass_seconds(LARGE, gpu, 2, work) for work in works]
    assert bytes_kept == sorted(bytes_kept, reverse=True)
    assert bytes_kept[0] - bytes_kept[2] == pytest.approx(12 * (bytes_kept[0] - bytes_kept[1]))
    assert times == sorted(times)
    assert times[2] - times[0] == pytest.approx((times[4] - times[0]) / 2)
    for last in (True, 100):
        whole = Pass(512, 77, 64, 1, last)
        assert (activations(LARGE, 2, whole), pass_seconds(LARGE, gpu, 2, whole)) == (bytes_kept[4], times[4])


def test_memory_of_a_run_on_an_h100() -> None:
    """docs/results/gpu/train_bert_base.json: 13.295 GiB."""
    base = encoder_sizes(ModelConfig(preset="bert-base"), 30_522)
    found = memory(base, zero("zero1_bf16"), Pass(128, 19, 256, 1), ranks=1, fused=False)
    assert found.total == pytest.approx(13.295 * 2**30, rel=0.03)


# Seconds of a step with uniform masks: docs/results/gpu/train_bert_base.json and masks.json, of a version with 800 more
# launches per step.
H100_STEPS = (256 * 128 / 398_434.67, 0.07436529)


def test_time_of_a_run_on_an_h100() -> None:
    base = encoder_sizes(ModelConfig(preset="bert-base"), 30_522)
    cluster = Cluster(1, 1, GPUS["h100"], None)
    options: dict[str, Any] = {"optimizer": "lamb", "fused": False, "calibration": Calibration()}
    found = step_time(base, zero("zero1_bf16"), Pass(128, 19, 256, 1), cluster, **options)
    for measured in H100_STEPS:
        assert 0.7 < found.total / measured < 1
    # The device computed for 45 of them, by torch's profiler.
    assert found.forward_backward + found.optimizer == pytest.approx(0.045, rel=0.35)


@pytest.mark.parametrize(("name", "fused", "expected"), [("zero1_bf16", True, 52), ("zero1_bf16", False, 130),
                                                         ("zero2_bf16", True, 64)])  # fmt: skip
def test_kernels_that_clip_and_copy_save_memory_traffic(name: str, fused: bool, expected: int) -> None:
    """Only those of BF16_Optimizer; on one of 8 ranks, without what is moved for sums and the reduction."""
    found = {
        ranks: update_bytes(LARGE, zero(name), Pass(128, 19, 8, 1), "lamb", ranks=ranks, fused=fused)
        for ranks in (8, 4)
    }
    assert found[4] - found[8] == pytest.approx(expected * P / 8)


# Communication


def test_bytes_and_seconds_of_bert_large() -> None:
    """fp32 gradients all-reduced, bf16 weights gathered: 2.7 + 0.67 GB less 1/N."""
    found = collectives(LARGE, zero("zero1_bf16"), accumulation=4)
    cluster = Cluster(8, 8, GPUS["h100"], link_bytes("1x400G"))
    expected = 63 / 64 * (2 * 4 + 2) * P
    assert sum(one.wire(64) for one in found) == pytest.approx(expected, rel=1e-4)
    # One bucket of gradients, two gathers, four small ones: 12 µs × log2 64 each.
    assert seconds(found, cluster, passes=0) == pytest.approx(expected / (50e9 * 0.84) + 7 * 6 * 12e-6, rel=1e-3)
    assert seconds(found, cluster, passes=1e9) == seconds(found, cluster, passes=0), "after the backward pass"


def test_stage_2_reduces_in_every_micro_batch() -> None:
    by_accumulation = [collectives(LARGE, zero("zero2_bf16"), accumulation)[0].wire(8) for accumulation in (1, 4)]
    assert by_accumulation == [2 * 7 / 8 * 2 * P, 4 * 2 * 7 / 8 * 2 * P]


@pytest.mark.parametrize(("text", "gbit"), [("8x400G", 3200), ("1x400G", 400), ("100GbE", 100), ("25", 25)])
def test_links(text: str, gbit: float) -> None:
    assert link_bytes(text) == gbit * 1e9 / 8
    assert all(link_bytes(name) > 0 for name in LINKS)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e9", "fast", "", "٣", "9" * 5000])
def test_a_link_without_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--link.*number of Gbit/s per node above 0"):
        link_bytes(text)


def test_an_overlapped_reduction_takes_at_least_the_rest() -> None:
    found = collectives(LARGE, zero("zero2_bf16"), accumulation=1)
    cluster = Cluster(4, 8, GPUS["h100"], link_bytes("100GbE"))
    alone = seconds(found, cluster, passes=0)
    assert 0 < seconds(found, cluster, passes=1e9) < seconds(found, cluster, passes=0.1) < alone


# Time


def test_an_upper_bound_of_speed() -> None:
    """No step is faster than its model FLOPs at the data sheet's rate."""
    for name in GPUS:
        cluster = Cluster(1, 8, GPUS[name], None)
        work = Pass(128, 19, 256, 32)
        options: dict[str, Any] = {"optimizer": "lamb", "fused": True, "calibration": Calibration()}
        found = step_time(LARGE, zero("zero1_bf16"), work, cluster, **options)
        assert found.total > 32 * 256 * LARGE.flops(128, 19) / GPUS[name].half
        slower = step_time(LARGE, zero("zero1_bf16"), work, cluster, **{**options, "calibration": Calibration(2, 2)})
        assert slower.forward_backward == 2 * found.forward_backward
        assert slower.reduction == found.reduction


@pytest.mark.parametrize("again", [False, True])
def test_documents_in_a_row_cost_what_they_cost_in_rows_of_their_own(again: bool) -> None:
    """Four documents of 128 tokens per row of 512: as many FLOPs and seconds as four rows of 128."""
    gpu, pairs = GPUS["h100"], 4 * 128**2
    rows = pass_seconds(LARGE, gpu, 2, Pass(512, 76, 8, 1, again))
    packed = pass_seconds(LARGE, gpu, 2, Pass(512, 76, 8, 1, again, pairs))
    assert packed == pytest.approx(pass_seconds(LARGE, gpu, 2, Pass(128, 19, 32, 1, again)))
    assert packed < rows
    assert LARGE.flops(512, 76, pairs) == 4 * LARGE.flops(128, 19)


def test_documents_are_skipped_in_half_precision_only() -> None:
    """In fp32 pairs of different documents are masked: model FLOPs fall, the time does not."""
    for name in ("zero1_bf16", "zero1_fp32"):
        plans = []
        for attention, pairs in (("rows", None), ("documents", 4 * 128**2), ("documents", None)):
            data = {"path": "corpus", "attention": attention}
            config = run_config(deepspeed=name, data=data, batch={"global_size": 4096, "micro_size": 32})
            corpus = Corpus(512, 30_522, pairs=pairs)
            cluster = Cluster(4, 8, GPUS["h100"], link_bytes("1x400G"))
            plans.append(make_plan(config, [corpus], cluster, Calibration()).phases[0])
        rows, documents, unknown = plans
        assert unknown.step == rows.step
        assert (rows.pairs_share, documents.pairs_share, unknown.pairs_share) == (1, 0.25, None)
        assert documents.memory == rows.memory
        flops = [plan.model_tflops * plan.step.total for plan in (documents, rows)]
        expected = LARGE.flops(512, rows.predictions, 4 * 128**2) / LARGE.flops(512, rows.predictions)
        assert flops[0] / flops[1] == pytest.approx(expected)
        if name.endswith("fp32"):
            assert (documents.computed_share, documents.step) == (1, rows.step)
        else:
            assert documents.computed_share == 0.25
            assert documents.step.forward_backward < 0.95 * rows.step.forward_backward


def test_late_mask_tokens_shorten_the_rows_of_the_layers_below() -> None:
    """24 layers, the lower half with 88 of 126 tokens and 2 special ones: FLOPs, seconds and activations of theirs."""
    options = {"rate": 0.3, "mask_probability": 1, "random_probability": 0}
    plans = [planned(run_config(masking={**options, "late_layer": n})).phases[0] for n in (0, 12)]
    flops = [plan.model_tflops * plan.step.total for plan in plans]
    half = [LARGE.flops(length, 0) / 2 for length in (128, 128 - 38)]
    head = LARGE.flops(128, 38) - LARGE.flops(128, 0)
    assert flops[1] / flops[0] == pytest.approx((half[0] + half[1] + head) / (2 * half[0] + head), rel=1e-9)
    assert plans[1].step.forward_backward < 0.9 * plans[0].step.forward_backward
    assert plans[1].configured_memory.activations < 0.9 * plans[0].configured_memory.activations


def test_a_late_layer_beyond_the_layers_is_refused() -> None:
    options = {"mask_probability": 1, "random_probability": 0, "late_layer": 24}
    with pytest.raises(ConfigError, match=r"late_layer 24: \[MASK\] must enter before the last of 24 layers"):
        planned(run_config(masking=options, model={"preset": "roberta-large"}))


def test_launches_of_masks_by_strategy() -> None:
    """Conditional Poisson sampling adds three kernels; MAPNet proposes, observes and learns."""
    exact = {"strategy": "frequency", "frequency": {"sampler": "conditional_poisson"}}
    found = [mask_launches(run_config(masking=m).masking) for m in ({}, {"strategy": "frequency"}, exact)]
    assert found == [91, 138, 141]
    assert mask_launches(run_config(masking={"strategy": "mapnet"}).masking) > 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"communication_data_type": "fp8"}, "communication_data_type is fp8; expected one of fp32"),
        ({"data_types": {"grad_accum_dtype": []}}, "grad_accum_dtype"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, "reduce_bucket_size is auto"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 0}}, "reduce_bucket_size is 0"),
    ],
)
def test_settings_of_deepspeed_that_are_none_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zero_settings(content)


# Plans


def test_figures_of_a_plan_agree_with_each_other() -> None:
    plan = planned(run_config())
    (phase,) = plan.phases
    assert phase.micro * phase.accumulation * 32 == 65_536
    assert phase.memory.total <= plan.usable_memory == GPUS["h100"].memory * USABLE
    assert phase.tokens_per_second * phase.step.total == pytest.approx(65_536 * 128)
    assert phase.days * 86_400 == pytest.approx(1000 * phase.step.total)
    assert plan.kilowatt_hours == pytest.approx(plan.days * 24 * 32 * 0.7)
    flops = 65_536 * LARGE.flops(128, 19) / 32 / phase.step.total
    assert phase.model_tflops * 1e12 == pytest.approx(flops)
    assert phase.of_peak == pytest.approx(flops / 989e12)
    assert plan.dump()["phases"][0]["scales"][2]["step_seconds"] == pytest.approx(phase.step.total), "32 GPUs"


def test_the_next_larger_micro_batch_does_not_fit() -> None:
    config = run_config()
    (phase,) = planned(config).phases
    work = Pass(128, 19, 2 * phase.micro, 65_536 // 32 // (2 * phase.micro))
    assert memory(LARGE, zero("zero1_bf16"), work, ranks=32, fused=False).total > GPUS["h100"].memory * USABLE


@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_bf16", "zero3_bf16"])
def test_efficiency_falls_with_gpus_and_with_slower_links(name: str) -> None:
    tables = []
    for link in ("8x400G", "1x400G", "100GbE"):
        (phase,) = planned(run_config(deepspeed=name), link=link).phases
        efficiencies = [scale.efficiency for scale in phase.scales if scale]
        assert len(efficiencies) == 7
        assert efficiencies == sorted(efficiencies, reverse=True)
        assert efficiencies[0] <= 1.02
        tables.append(efficiencies)
    assert all(a >= b >= c for a, b, c in zip(*tables, strict=True))


def test_numbers_of_gpus_that_cannot_share_the_batch_have_no_row() -> None:
    (phase,) = planned(run_config(batch={"global_size": 96, "micro_size": 3}), nodes=1).phases
    assert [scale is not None for scale in phase.scales] == [True, True, True, False, False, False, False]
    (phase,) = planned(run_config(), nodes=1, link=None).phases
    assert [scale is not None for scale in phase.scales] == [True] + 6 * [False], "no link: one node only"


def test_phases_add_up() -> None:
    start = {"moments": "keep", "step_counter": "keep", "schedule": "restart"}
    phases = [
        {"name": "short", "data": {"path": "a"}, "training": {"steps": 10}},
        {"name": "long", "data": {"path": "b"}, "training": {"steps": 5}, "start": start},
    ]
    values = run_config().model_dump(mode="json", exclude={"training", "data", "phases", "masking"})
    config = RunConfig.model_validate({**values, "phases": phases})
    corpora = [Corpus(128, 30_522), Corpus(512, 30_522)]
    plan = make_plan(config, corpora, Cluster(1, 8, GPUS["a100-80"], None), Calibration())
    assert [phase.sequence_length for phase in plan.phases] == [128, 512]
    assert plan.days == sum(phase.days for phase in plan.phases)
    assert plan.phases[1].micro < plan.phases[0].micro


def test_the_largest_rate_of_a_schedule_counts() -> None:
    (phase,) = planned(run_config(masking={"rate": 0.3, "final_rate": 0.15})).phases
    (other,) = planned(run_config(masking={"rate": 0.15, "final_rate": 0.3})).phases
    assert phase.predictions == other.predictions == round(0.3 * 126)


def test_lengths_in_tokens_and_epochs() -> None:
    (phase,) = planned(run_config(training={"tokens": 65_536 * 128 * 7 + 1})).phases
    assert phase.steps == 8
    with pytest.raises(ConfigError, match=r"training.epochs 2: needs the corpora"):
        planned(run_config(training={"epochs": 2}))


def test_nodes_without_a_link_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 nodes: --link is required"):
        planned(run_config(), link=None)


def test_gpus_that_cannot_share_the_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_size 65536 is not a multiple of 24 GPUs; set it to 65520 or 65544"):
        planned(run_config(), nodes=3)


HUGE = {"num_hidden_layers": 48, "hidden_size": 8192, "num_attention_heads": 64}


def test_a_model_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no ZeRO stage fits, even with activation checkpointing \([\d.,]+ GB\)"):
        planned(run_config(model=HUGE), nodes=1, gpu="a100-40")


def test_a_model_that_fits_at_another_stage_is_refused_with_the_remedy() -> None:
    model = {**HUGE, "hidden_size": 4096, "num_hidden_layers": 32}
    with pytest.raises(ConfigError, match=r"it fits with ZeRO stage 2$"):
        planned(run_config(model=model), nodes=8, gpu="a100-80")


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 60),
    heads=st.integers(1, 64),
    size=st.integers(1, 4096),
    nodes=st.sampled_from([1, 2, 16]),
    name=st.sampled_from(NAMES),
    gpu=st.sampled_from(list(GPUS)),
)
def test_every_plan_is_finite_or_refused(layers: int, heads: int, size: int, nodes: int, name: str, gpu: str) -> None:
    model = {"num_hidden_layers": layers, "hidden_size": 64 * heads, "num_attention_heads": heads}
    config = run_config(model=model, deepspeed=name, batch={"global_size": size, "micro_size": 1})
    try:
        plan = planned(config, nodes=nodes, gpu=gpu)
    except ConfigError:
        return
    (phase,) = plan.phases
    assert all(0 < value < math.inf for value in (phase.step.total, phase.days, plan.kilowatt_hours, phase.of_peak))
    assert phase.of_peak < 1
