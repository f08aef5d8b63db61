"""Encoders, prediction heads, losses, pretrained weights."""
