"""Evaluation of trained encoders: masked tokens of a corpus, and downstream tasks after fine-tuning."""
