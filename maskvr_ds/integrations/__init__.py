"""Parts of this package in the training loops of others: masks in transformers' Trainer (trainer.py)."""
