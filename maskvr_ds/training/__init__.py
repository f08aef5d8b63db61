"""What the training loop uses: set-up, step, resume, evaluation, checkpoints."""
