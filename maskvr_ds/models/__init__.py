"""Encoder, prediction head, loss, FLOPs and pretrained weights."""
