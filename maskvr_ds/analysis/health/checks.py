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
        "losses far above the median of the `fewest` steps before, by the noise of `window` steps",
        {"deviations": 6.0, "relative": 0.05, "window": 100, "fewest": 20},
        "modified z-score (Iglewicz & Hoaglin 1993) at 6 instead of 3.5, for thousands of steps; the deviation "
        "is that of differences of neighbours, without the trend",
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
        "held-out loss behind [MASK] at the end, against the unigram entropy of the held-out text",
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

_OF_CHECKPOINTS = (
    Check(
        "activations over depth",
        "largest over smallest RMS of the layers' outputs",
        {"factor": 100.0},
        "N layers of unit variance added to the residual stream give √N: 10 at depth 100 (He et al. 2016)",
        "lower model.initializer_range, or choose an architecture with LayerNorm at the end of each layer",
    ),
    Check(
        "gradients over depth",
        "largest over smallest RMS of the loss' gradient at the layers' outputs",
        {"factor": 100.0},
        "post-LayerNorm halves the squared gradient per sublayer at worst (Xiong et al. 2020); 100 is 2^13",
        "more schedule.warmup_steps, a lower optimizer.lr, or a pre-LayerNorm architecture",
    ),
    Check(
        "layer Jacobians",
        "root mean square singular value of the layers' Jacobians, smallest and largest",
        {"low": 0.25, "high": 4.0},
        "dynamical isometry is 1 (Pennington et al. 2017); 4 per layer is 4^12 over twelve",
        "as for gradients over depth; compare initializers by `maskvr health --at-init CONFIG`",
    ),
    Check(
        "update to weight",
        "median over matrices of the last update's norm over that of the weights",
        {"high": 0.1, "low": 1e-7},
        "as for the relative step size; below 1e-7 an update is lost in fp32",
        "lower, or raise, optimizer.lr; at the end of a decay to 0 a small value is expected",
    ),
    Check(
        "attention logits",
        "largest absolute logit of the attention",
        {"largest": 100.0},
        "exp(100) is beyond fp32; growth to thousands preceded divergence in Dehghani et al. 2023 (section 3.1)",
        "lower optimizer.lr, raise weight decay, or choose an architecture that normalises queries and keys",
    ),
    Check(
        "attention entropy",
        "smallest mean entropy of a layer's attention, relative to uniform attention",
        {"smallest": 0.05},
        "entropy collapse goes with divergence (Zhai et al. 2023)",
        "as for attention logits; a longer warm-up",
    ),
    Check(
        "dead units",
        "largest share, over layers, of feed-forward units that are silent at all positions",
        {"share": 0.5},
        "half of a layer's width is not used; GELU, ReLU and gated units saturate in no other way",
        "lower optimizer.lr at the start, or another model.hidden_act; measure on more --rows first",
    ),
    Check(
        "normalisation gains",
        "largest gain of LayerNorm or RMSNorm, and smallest RMS of one's gains",
        {"largest": 20.0, "smallest": 0.01},
        "gains start at 1; outlier features grow through them (Kovaleva et al. 2021)",
        "expect errors in bf16 and in quantisation; lower optimizer.lr",
    ),
    Check(
        "embedding rows",
        "rows of tokens in the corpus with a norm far below the median",
        {"share_of_median": 0.01},
        "a row that is never updated keeps its initial norm: one without a norm was zeroed or is masked from updates",
        "compare the tokenizer with the table: padding ids, added tokens, weights of another vocabulary",
    ),
    Check(
        "stable rank",
        "smallest ‖W‖_F² / σ_max² over the matrices with at least 16 rows and columns",
        {"smallest": 1.05},
        "one direction carries the matrix (Sanyal et al. 2020)",
        "lower optimizer.lr or raise weight decay; look at which layer it is",
    ),
    Check(
        "sharpness",
        "largest Hessian eigenvalue λ_max of the loss on the rows, and lr · λ_max",
        {},
        "gradient descent is unstable above 2; adaptive optimizers have no such bound for the plain Hessian (Cohen et "
        "al. 2022), so that the figure is for comparison",
        "",
    ),
    Check(
        "gradient noise",
        "global batch over the gradient noise scale",
        {"factor": 20.0},
        "beyond the noise scale larger batches save hardly any steps (McCandlish et al. 2018)",
        "lower batch.global_size, or raise optimizer.lr if the large batch is wanted for speed",
    ),
)

CHECKS: dict[str, Check] = {check.name: check for check in (*_OF_RECORDS, *_OF_CHECKPOINTS)}
