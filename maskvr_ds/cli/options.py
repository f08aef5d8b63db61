"""Options and defaults that several commands share."""

import argparse


def positive_integer(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 1 expected")
    return int(text)


def visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()
