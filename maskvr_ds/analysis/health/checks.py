"""Table of the checks: question, thresholds with their source, what to try. Loads no torch.

The thresholds were fixed before the first run was judged by them. They separate "worth a look" from "as expected"; none
of them proves that a run is lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "finding", "not judged"]


@dataclass(frozen=True)
class Check:
    """name: in tables and JSON. asks: what is judged, one line. thresholds: by name. source: of the thresholds, or
    their reason. advice: what to try after a finding."""

    name: str
    asks: str
    thresholds: Mapping[str, float]
    source: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """The answer of one check.

    text: what was seen, or why it was not judged. steps: optimizer steps concerned, in order. values: figures for JSON.
    """

    check: str
    status: Status
    text: str
    steps: tuple[int, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        """JSON types, with thresholds and advice."""
        check = CHECKS[self.check]
        return {
            "check": self.check,
            "status": self.status,
            "text": self.text,
            "steps": list(self.steps),
            "values": dict(self.values),
            "thresholds": dict(check.thresholds),
            "source": check.source,
            "try": check.advice if self.status == "finding" else None,
        }


_OF_RECORDS = (
    Check(
        "loss is finite",
        "NaN or infinite training losses",
        {"steps": 0},
        "an update from such a loss destroys the weights",
        "resume from a checkpoint before the step with a lower optimizer.lr; keep divergence.enabled",
    ),
    Check(
        "loss at the start",
        "training loss of the first steps, against ln V of a uniform prediction over the vocabulary",
        {"above_ln_vocabulary": 1.0, "first_steps": 5},
        "small random weights predict almost uniformly (Glorot & Bengio 2010; He et al. 2015)",
        "lower model.initializer_range; `maskvr health --at-init CONFIG` shows the signal by layer",
    ),
    Check(
        "relative step size",
        "peak size of an update relative to the weights: lr for LAMB, lr ÷ initializer_range for AdamW",
        {"maximum": 0.1},
        "published runs lie between 0.0005 and 0.03 (You et al. 2020, table 6); at 0.1 ten steps replace a tensor",
        "lower optimizer.lr",
    ),
    Check(
        "loss spikes",
        "losses far above those of the steps before",
        {"deviations": 6.0, "relative": 0.05, "window": 100, "fewest": 20},
        "modified z-score (Iglewicz & Hoaglin 1993) at 6 instead of 3.5, for thousands of steps",
        "look at the batches of these steps (rows follow from data_digest and seed); if the loss does not recover, "
        "resume from before with a lower optimizer.lr or other batches (Chowdhery et al. 2022, section 5.1)",
    ),
    Check(
        "loss level",
        "loss at the end above its lowest level",
        {"relative": 0.1, "standard_errors": 5.0, "window": 20, "window_share": 0.05},
        "a tenth of the loss is more than schedules and noise account for",
        "resume from the checkpoint of the lowest level with a lower optimizer.lr or more schedule.warmup_steps",
    ),
    Check(
        "context is used",
        "held-out loss at the end, against the unigram entropy of the held-out text",
        {"below_entropy": 0.05, "fewest_steps": 200},
        "the unigram entropy is the lowest loss without using context",
        "if the run is not just short: more schedule.warmup_steps, a lower or higher optimizer.lr, fewer layers; "
        "post-LayerNorm models that are deep need warm-up (Xiong et al. 2020)",
    ),
    Check(
        "gradient norm trend",
        "growth, in powers of ten, of the gradient norm over the second half of a phase; and vanishing",
        {"decades": 1.0, "vanished": 1e-4, "fewest_steps": 100},
        "norms of healthy runs fall, or grow by less than a factor 3 (Zhang et al. 2022, OPT, figure 2)",
        "growth precedes divergence: lower optimizer.lr or increase weight decay; a norm near 0: "
        "`maskvr health RUN --at CHECKPOINT` shows where the gradient vanishes",
    ),
    Check(
        "gradient norm spikes",
        "gradient norms far above the median of the steps before",
        {"factor": 20.0, "window": 100, "fewest": 20},
        "a fifth of divergence.norm_factor, at which an update is skipped",
        "look at the batches; lower optimizer.gradient_clipping, or the second of optimizer.betas",
    ),
    Check(
        "trust ratios at a bound",
        "share of tensors whose trust ratio is at min_ratio or max_ratio, in the second half",
        {"share": 0.1},
        "at a bound, LAMB is Adam with another learning rate for these tensors (You et al. 2020, section 3)",
        "widen optimizer.min_ratio and max_ratio, or choose optimizer.variant paper, which has no bounds",
    ),
    Check(
        "updates held back",
        "updates skipped by the divergence guard, and rollbacks",
        {"share": 0.01, "rollbacks": 0},
        "the guard's default tolerates 2 in 100 steps before a rollback; half of it over a run is no accident",
        "lower optimizer.lr or add warm-up; if the skipped steps are few and neighbours, look at their batches",
    ),
    Check(
        "fp16 loss scale",
        "updates skipped for overflows after the first steps, and the scale's minimum",
        {"share": 0.02, "first_steps": 100, "minimum": 1.0},
        "a dynamic scale overflows about once per loss_scale_window, 0.1% (Micikevicius et al. 2018)",
        "use a bf16 file as deepspeed; otherwise lower optimizer.lr, and look for large activations with --at",
    ),
    Check(
        "throughput dips",
        "consecutive steps below half of the median speed",
        {"share_of_median": 0.5, "fewest_steps": 5, "seconds": 30.0},
        "single slow steps are checkpoints' and file systems'; half a minute below half speed is a machine's",
        "look at the ranks' logs and hosts of these minutes: other jobs, storage, clock throttling, network",
    ),
)

CHECKS: dict[str, Check] = {check.name: check for check in _OF_RECORDS}
