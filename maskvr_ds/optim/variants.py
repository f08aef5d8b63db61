"""How implementations of LAMB differ, as a table of switches. Loads no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """What LAMB (arXiv:1904.00962, Algorithm 2) leaves open, or is done otherwise.

    bias_correction: "moments": in m̂ and v̂. "rate": none in u, but η becomes η √(1 − β₂ᵗ) / (1 − β₁ᵗ), so that the
        ratio sees the uncorrected u. "none".
    adapt_undecayed: whether tensors with λ = 0 (biases, LayerNorms) are scaled by their trust ratio, or by 1.
    min_ratio, max_ratio: bounds of the trust ratio, where it is defined.
    max_grad_norm: the gradients are first scaled to a joint L2 norm of at most this; 0: left alone.

    Raises:
        ValueError: bounds that exclude each other; a negative norm.
    """

    bias_correction: Literal["moments", "rate", "none"] = "moments"
    adapt_undecayed: bool = True
    min_ratio: float = 0.0
    max_ratio: float = float("inf")
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_ratio <= self.max_ratio:
            raise ValueError(f"min_ratio {self.min_ratio:g}, max_ratio {self.max_ratio:g}: 0 ≤ min ≤ max expected")
        if self.max_grad_norm < 0:
            raise ValueError(f"max_grad_norm {self.max_grad_norm:g}: must be at least 0 (0: left alone)")


# What is carried from one phase of training to the next is not theirs but that of the script around them: a run's
# configuration says it (phases.NAME.start), the recipes as these scripts do.
VARIANTS: dict[str, Variant] = {
    # arXiv:1904.00962, Algorithm 2.
    "paper": Variant(),
    # NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT/lamb_amp_opt/csrc/multi_tensor_lamb.cu, and
    # NVIDIA/apex, apex/optimizers/fused_lamb.py, with the default use_nvlamb=False.
    "nvidia": Variant(adapt_undecayed=False, max_grad_norm=1.0),
    # deepspeed/ops/lamb/fused_lamb.py (defaults) and csrc/lamb/fused_lamb_cuda_kernel.cu. bing_bert, the script that it
    # was written for, sets bias_correction to false and max_coeff to 0.3.
    "deepspeed": Variant(bias_correction="rate", min_ratio=0.01, max_ratio=10.0),
}
