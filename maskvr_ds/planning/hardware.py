"""Presets of GPUs and links. Loads no torch.

Sources, NVIDIA's data sheets: A100 (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf, SXM4), H100
(nvidia.com/data-center/h100, SXM5), H200 (nvidia.com/data-center/h200, SXM5): dense rates, without sparsity.
"""

import math
from dataclasses import dataclass, replace

from maskvr_ds.config import ConfigError


@dataclass(frozen=True)
class Gpu:
    """A GPU, and how much of its data sheet is reached.

    memory: bytes. half, single: rate of dense matrix products in FLOP/s, in bf16 or fp16, and in fp32 without TF32.
    bandwidth: of its memory, bytes/s. nvlink: bytes/s between the GPUs of a node, per direction. power: watts.
    half_share, single_share: of these rates, what large square matrix products reach.
    """

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float
    nvlink: float
    power: float
    half_share: float = 0.8
    single_share: float = 0.8

    def product_rate(self, element: int) -> float:
        """FLOP/s of large matrix products for elements of 2 or 4 bytes."""
        return self.half * self.half_share if element == 2 else self.single * self.single_share


GPUS = {
    "a100-40": Gpu("A100-SXM4 40 GB", 40e9, 312e12, 19.5e12, 1555e9, 300e9, 400),
    "a100-80": Gpu("A100-SXM4 80 GB", 80e9, 312e12, 19.5e12, 2039e9, 300e9, 400),
    # 790 of 989 TFLOP/s: docs/results/gpu/train_bert_base.json.
    "h100": Gpu("H100-SXM5 80 GB", 80e9, 989e12, 67e12, 3350e9, 450e9, 700),
    "h200": Gpu("H200-SXM5 141 GB", 141e9, 989e12, 67e12, 4800e9, 450e9, 700),
}
# Share of a link's rate that collectives reach: 380 of 450 GB/s within a node, 42 of 50 between nodes.
LINK_SHARE = 0.84
# Gbit/s per node and direction.
LINKS = {"8x400G": 3200.0, "1x400G": 400.0, "100GbE": 100.0}
# Share of the memory that is planned with: the rest is taken by CUDA, NCCL and fragmentation.
USABLE = 0.92
MAX_GBIT = 1e6


@dataclass(frozen=True)
class Cluster:
    """nodes × gpus_per_node GPUs. link: bytes/s that a node sends to others, per direction; None: unknown."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    link: float | None

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def of_ranks(self, ranks: int) -> "Cluster":
        """A cluster of as many GPUs, in nodes of the same kind (the last one may be partly used)."""
        per_node = min(ranks, self.gpus_per_node)
        return replace(self, nodes=math.ceil(ranks / per_node), gpus_per_node=per_node)

    def bus(self) -> float:
        """Bytes/s of a ring over all GPUs: that of its slowest link. The GPUs of a node share the node's link."""
        inside = self.gpu.nvlink * LINK_SHARE
        if self.nodes == 1:
            return inside
        if self.link is None:
            raise ConfigError(
                f"{self.nodes} nodes: --link is required, the bandwidth between them; --nodes 1 needs none"
            )
        return min(inside, self.link * LINK_SHARE)


def link_bytes(text: str) -> float:
    """Bytes/s of a preset of LINKS, or of a number of Gbit/s per node. Raises ConfigError."""
    known = f"{', '.join(LINKS)}, or a number of Gbit/s per node above 0 and at most {MAX_GBIT:,.0f}"
    try:
        gbit = LINKS[text] if text in LINKS else float(text) if text.isascii() else math.nan
    except ValueError:
        gbit = math.nan
    if not 0 < gbit <= MAX_GBIT:
        raise ConfigError(f"--link {text[:60]}: expected {known}")
    return gbit * 1e9 / 8
