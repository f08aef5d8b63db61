"""Judging of trained encoders: held-out figures of any model folder."""
