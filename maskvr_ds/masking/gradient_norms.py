"""Targets of the mask proposal network: s_i = ‖∂ℓ_i/∂h_i‖, read during the training step's own backward pass.

B sequences, K predictions per sequence, D hidden. h_i: the hidden state that enters the prediction head at a predicted
position; ℓ_i: its loss. The norm of the gradient at the last layer's output bounds the norm of the full gradient up to
a factor common to all samples (Katharopoulos & Fleuret 2018, arXiv 1803.00942, eq. 16–20).

The head processes each position independently, so the differentiated loss L = Σ f_i ℓ_i has exactly
∂L/∂h_i = f_i · ∂ℓ_i/∂h_i. f_i is the importance weight times the loss normalisation, DeepSpeed's division by the
accumulation steps and the fp16 loss scale; it is ∂L/∂ℓ_i, which the same backward pass computes. Hence

    s_i = ‖∂L/∂h_i‖ / |∂L/∂ℓ_i|,

independent of the individual factors. The hooks are on two tensors of the forward pass, not on modules or parameters:
activation checkpointing and ZeRO 3 do not affect them. No collectives.
"""

import torch


class GradientNorms:
    """Records s of each forward and backward pass.

    Set `watch` as MaskedLanguageModel.observer; `take` returns the norms after one or more backward passes.
    """

    def __init__(self) -> None:
        self._norms: list[torch.Tensor] = []

    def watch(self, hidden: torch.Tensor, losses: torch.Tensor) -> None:
        """hidden: h [B, K, D], any float dtype; losses: ℓ, float32 [B, K], computed from it. Both require gradients."""
        factors: list[torch.Tensor] = []

        def read(gradient: torch.Tensor) -> None:
            factor = factors.pop().abs()
            # Accumulate in fp32 whatever the model's dtype.
            norms = torch.linalg.vector_norm(gradient.detach(), dim=-1, dtype=torch.float32)
            self._norms.append(torch.where(factor > 0, norms / factor, 0.0))

        losses.register_hook(lambda gradient: factors.append(gradient.detach()))
        hidden.register_hook(read)

    def clear(self) -> None:
        """Forget s of earlier backward passes."""
        self._norms.clear()

    def take(self) -> torch.Tensor:
        """Return and clear s of all backward passes since the last call, in their order: float32 [B, K] with the rows
        of all of them, 0 in unused slots (weight 0).

        In fp16, non-finite if gradients overflowed.
        """
        norms, self._norms = self._norms, []
        assert norms, "no backward pass since the last call, or the model's observer is not set"
        return norms[0] if len(norms) == 1 else torch.cat(norms)
