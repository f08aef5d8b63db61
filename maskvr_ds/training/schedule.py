"""Learning-rate schedules, functions of the step alone: a resumed run needs no scheduler state.

η(s) is the rate of update s = 0, 1, 2, … of a schedule of T steps with W warm-up steps and peak η* = optimizer.lr:

    warm-up, s < W       η = η₀ + (η* − η₀) · ((s + 1) / W)^q          η₀ initial_lr, q warmup_power
    stable, W ≤ s < S    η = η*                                        S = T − cooldown; without cooldown S = W
    decay                η = η₁ + (η* − η₁) · f(t)                     η₁ final_lr, from s = T
        t = (s − S) / (T − S), or s / T if decay_from is "start"
        f(t) = (1 − t)^p (polynomial, p power), 1 − t (linear), (1 + cos πt) / 2 (cosine), 1 − √t (1-sqrt)
    exponential          η = η₁ + (η* − η₁) · r^((s − W) / D)          r decay_rate, D decay_steps
    constant             η = η*

Linear warm-up and polynomial decay: Devlin et al. 2018; You et al. 2019, arXiv 1904.00962, §4. Cosine: Loshchilov and
Hutter 2016, arXiv 1608.03983, one half period. Warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395; with 1 − √t:
Hägele et al. 2024, arXiv 2405.18392, and ModernBERT, Warner et al. 2024, arXiv 2412.13663. The rate of a step before S
does not depend on T or on the length of the cooldown: a decay can branch off any checkpoint of the stable part.

Differences from transformers' get_*_schedule_with_warmup and get_wsd_schedule: their warm-up is s / W, so that their
first update has rate 0; ours is one update ahead. From s = W on they are equal.

Differences from NVIDIA's (NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT/schedulers.py,
PolyWarmUpScheduler), which is polynomial with q = 1, p = 0.5 and decay_from "start": it counts updates from 1,
x = (s + 1) / T. The warm-up, η* x / share while x < share, is equal to ours up to the rounding of W = share · T: 1
update in 7,038. The decay is (1 − x)^p: our update s has the rate of their update s − 1, and their last update has
rate 0 and changes nothing. At the end of the warm-up both drop from η* to (1 − share)^p η*.

Differences from bing_bert's "EE" (deepspeedai/DeepSpeedExamples, training/bing_bert/deepspeed_train.py,
update_learning_rate: warmup_exp_decay_exp + lr_offset), which is exponential with q = 2: its warm-up is (s / W)^q, so
its first update has rate η₀; ours is one update ahead. The decay is equal. Its lr_offset o is added throughout: set
initial_lr = final_lr = o, and optimizer.lr = its learning rate + o.
"""

import math

from maskvr_ds.config import ScheduleConfig


def learning_rate(step: int, schedule: ScheduleConfig, *, peak: float, total_steps: int) -> float:
    """η of the 0-based update `step` of a schedule of `total_steps` steps that rises to `peak`.

    The first update of a warm-up from 0 has rate peak / W^q, so that no update is wasted on a rate of 0.
    """
    warmup = schedule.warmup(total_steps)
    if step < warmup:
        risen = ((step + 1) / warmup) ** schedule.warmup_power
        return schedule.initial_lr + (peak - schedule.initial_lr) * risen
    if schedule.decay == "exponential":
        assert schedule.decay_rate is not None
        assert schedule.decay_steps is not None
        left = schedule.decay_rate ** ((step - warmup) / schedule.decay_steps)
    elif schedule.decay == "constant":
        left = 1.0
    elif step >= total_steps:
        left = 0.0
    else:
        start = schedule.decay_start(total_steps)
        left = _left(max(0, step - start) / (total_steps - start), schedule)
    return schedule.final_lr + (peak - schedule.final_lr) * left


def _left(t: float, schedule: ScheduleConfig) -> float:
    """f(t), from 1 at t = 0 to 0 at t = 1."""
    if schedule.decay == "cosine":
        return (1 + math.cos(math.pi * t)) / 2
    if schedule.decay == "1-sqrt":
        return 1 - math.sqrt(t)
    return (1 - t) ** schedule.power
