"""Health figures during training (`monitor.health_every`): one forward pass on the few fixed rows of the probe.

Every rank computes all rows, which under ZeRO 3 gathers the weights as any forward pass does; no other collectives.
Nothing changes in training: no dropout is drawn, no gradient formed, and the attention is the run's again afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from maskvr_ds.analysis.health.probe import forward_signals
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.models import documents
from maskvr_ds.models.compiled import uncompiled
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.telemetry.metrics_file import HEALTH


class HealthMonitor:
    """probe: masked rows on this rank's device. every: steps between measurements."""

    def __init__(self, probe: MaskedBatch, every: int) -> None:
        self._probe, self._every = probe, every

    def due(self, step: int) -> bool:
        """Whether to measure after this step."""
        return step % self._every == 0

    def figures(self, module: MaskedLanguageModel) -> dict[str, float]:
        """Keys of metrics.jsonl: RMS of the first and last layer's output and largest over smallest over the layers;
        largest attention logit; smallest relative entropy of a layer's attention; largest share of dead units in a
        layer. Without attention weights or feed-forward parts, without these. Collective: call on all ranks."""
        training = module.training
        module.eval()
        with _eager(module), uncompiled(module):
            signals = forward_signals(module, self._probe)
        module.train(training)
        activation = signals.activation
        found = {
            "activation_first": activation[0],
            "activation_last": activation[-1],
            "activation_spread": max(activation) / max(min(activation), 1e-30),
        }
        if signals.entropy:
            found["attention_logit"] = max(signals.logit)
            found["attention_entropy"] = min(sum(heads) / len(heads) for heads in signals.entropy)
        if signals.dead:
            found["dead_units"] = max(signals.dead)
        return {HEALTH + key: value for key, value in found.items()}


@contextmanager
def _eager(module: MaskedLanguageModel) -> Iterator[None]:
    """Within: eager attention, whose logits can be seen; within documents if the module's is."""
    before = module.mlm.config._attn_implementation
    module.mlm.set_attn_implementation("eager" if module.separator is None else documents.EAGER)
    try:
        yield
    finally:
        module.mlm.set_attn_implementation(before)
