"""Table of LAMB variants: switches by which implementations differ. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

Correction = Literal["moments", "rate", "none"]


@dataclass(frozen=True)
class Variant:
    """Switches for what LAMB (arXiv:1904.00962, Algorithm 2) leaves open or implementations change.

    bias_correction: "moments": in m̂ and v̂. "rate": none in u, but η becomes η √(1 − β₂ᵗ) / (1 − β₁ᵗ), so that the
        ratio sees the uncorrected u. "none".
    adapt_undecayed: whether tensors with λ = 0 (biases, LayerNorms) are scaled by their trust ratio, or by 1.
    min_ratio, max_ratio: bounds of the trust ratio, if it is defined.
    max_grad_norm: maximum global L2 norm, to which gradients are scaled first; 0: no scaling.

    Raises:
        ValueError: for an unknown bias_correction, if 0 ≤ min_ratio ≤ max_ratio does not hold, or max_grad_norm is
            negative.
    """

    bias_correction: Correction = "moments"
    adapt_undecayed: bool = True
    min_ratio: float = 0.0
    max_ratio: float = float("inf")
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_ratio <= self.max_ratio:
            raise ValueError(f"min_ratio {self.min_ratio:g}, max_ratio {self.max_ratio:g}: expected 0 ≤ min ≤ max")
        if self.bias_correction not in (known := get_args(Correction)):
            raise ValueError(f"bias_correction {self.bias_correction!r}: must be one of {', '.join(known)}")
        if not self.max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm {self.max_grad_norm:g}: must be at least 0 (0: no scaling)")


# State carried from one training phase to the next is not part of a variant but of the script that uses it: set
# phases.NAME.start in the run's configuration; the recipes follow the original scripts.
VARIANTS: dict[str, Variant] = {
    # arXiv:1904.00962, Algorithm 2.
    "paper": Variant(),
    # NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT/lamb_amp_opt/csrc/multi_tensor_lamb.cu, and
    # NVIDIA/apex, apex/optimizers/fused_lamb.py, with the default use_nvlamb=False.
    "nvidia": Variant(adapt_undecayed=False, max_grad_norm=1.0),
    # deepspeed/ops/lamb/fused_lamb.py (defaults) and csrc/lamb/fused_lamb_cuda_kernel.cu. bing_bert, the script it was
    # written for, sets bias_correction to false and max_coeff to 0.3.
    "deepspeed": Variant(bias_correction="rate", min_ratio=0.01, max_ratio=10.0),
}
