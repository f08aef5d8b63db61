"""Components of the training loop: set-up, step, resume, evaluation, checkpoints."""
