"""Learning rate as a function of the step: linear warm-up, then polynomial decay (Devlin et al. 2018; You et al.
2019, arXiv 1904.00962, §4). A function of the step alone, so a resumed run needs no scheduler state."""


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, power: float = 1.0, final: float = 0.0
) -> float:
    """The rate of update number `step` (0-based).

    Step s of the warm-up uses peak · (s + 1) / warmup_steps, so that no update is wasted on a rate of 0; then
    final + (peak − final) · (1 − t)^power with t the share of the remaining steps already done; `final` from
    total_steps on.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= total_steps:
        return final
    return final + (peak - final) * (1 - (step - warmup_steps) / (total_steps - warmup_steps)) ** power
