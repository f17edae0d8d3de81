"""GPUs by name, and how long collectives take between them.

Figures of GPUs are those of their makers' data sheets. The cost of a collective is the model by which NCCL chooses its
algorithms (`src/graph/tuning.cc`): a latency for each step of a ring or tree, and bytes at the rate of the slowest
link.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

from llava_ft.errors import UserError

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]

LINK_EFFICIENCY: Final = 0.8
"""Share of a link's nominal rate that large collectives reach. An assumption."""

MEMORY_EFFICIENCY: Final = 0.8
"""Share of the nominal memory bandwidth that an optimizer step reaches. An assumption."""

_MICRO: Final = 1e-6
_RING_START, _RING_LINK, _RING_NETWORK = 8.4 * _MICRO, 3.4 * _MICRO, 9.6 * _MICRO
_TREE_START, _TREE_LINK, _TREE_NETWORK = 4.4 * _MICRO, 1.2 * _MICRO, 8.5 * _MICRO
_TREE_RATE: Final = 0.9 * 0.92
"""Of a ring's: NCCL's factor for trees, and the flags among the data of its protocol LL128."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: Its name here.
        flops: Dense bfloat16 matrix products a second with float32 accumulation, in FLOP/s.
        memory: Bytes; the data sheet's GB are taken as 10^9, the least they can mean.
        memory_bandwidth: Bytes a second.
        link: Bytes a second to the other GPUs of its machine, in each direction.
        network: Bytes a second of its share of its machine's network, in each direction.
        source: Where that is from.
    """

    name: str
    flops: float
    memory: int
    memory_bandwidth: float
    link: float
    network: float
    source: str


GPUS: Final = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 989e12, 141 * 10**9, 4.8e12, 450e9, 50e9, "NVIDIA H200 data sheet, SXM; NDR InfiniBand per GPU"),
        Gpu("H100", 989e12, 80 * 10**9, 3.35e12, 450e9, 50e9, "NVIDIA H100 data sheet, SXM; NDR InfiniBand per GPU"),
        Gpu("A100-80GB", 312e12, 80 * 10**9, 2.039e12, 300e9, 25e9, "NVIDIA A100 data sheet, SXM; HDR InfiniBand"),
        Gpu("RTX-4090", 165.2e12, 24 * 10**9, 1.008e12, 32e9, 1.5625e9, "NVIDIA Ada whitepaper; PCIe 4.0, 100 Gbit/s"),
    )
}
"""By name. The network of an RTX 4090 is that of a machine with 8 of them and one adapter of 100 Gbit/s."""

DEFAULT_GPU: Final = "H100"


def find_gpu(name: str) -> Gpu:
    """Return the GPU of that name; case does not matter.

    Raises:
        UserError: It is not known.
    """
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise UserError(f"--gpu is {name!r}. Known are {', '.join(GPUS)}. Give one of these, or leave it out.")


def gpu_of_device(device_name: str) -> Gpu | None:
    """Return the GPU that a driver's name such as `NVIDIA H100 80GB HBM3` means; None if it is none of `GPUS`."""
    words = device_name.replace("-", " ").lower().split()
    if "pcie" in words or "nvl" in words:
        return None  # other clocks and links than those above
    for gpu in GPUS.values():
        wanted = gpu.name.replace("-", " ").lower().split()
        if all(word in words for word in wanted):
            return gpu
    return None


@dataclass(frozen=True)
class Fabric:
    """How the ranks of a run are connected.

    Attributes:
        gpus_per_node: Ranks of a machine.
        num_nodes: Machines.
        link: Bytes a second from a GPU to the others of its machine, each direction.
        network: Bytes a second of a GPU's share of the network, each direction.
    """

    gpus_per_node: int
    num_nodes: int
    link: float
    network: float

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.gpus_per_node * self.num_nodes

    @property
    def bus_rate(self) -> float:
        """Bytes a second that every rank can send in a ring.

        As many rings as a machine has network adapters run side by side, so what leaves a machine has the sum of them.
        """
        nominal = self.link
        if self.num_nodes > 1:
            outward = self.network * self.gpus_per_node
            nominal = outward if self.gpus_per_node == 1 else min(self.link, outward)
        return nominal * LINK_EFFICIENCY

    def sent_bytes(self, kind: Kind, num_bytes: float) -> float:
        """Bytes that each rank sends for a collective over `num_bytes`, the size of the whole buffer.

        A ring's: (N-1)/N of the buffer to gather or to reduce and scatter it, twice that for an all-reduce.
        """
        rounds = 2 if kind == "all-reduce" else 1
        return rounds * num_bytes * (self.world_size - 1) / self.world_size

    def seconds(self, kind: Kind, num_bytes: float, calls: int) -> float:
        """Time of a collective over `num_bytes` in all, cut into `calls` equal ones.

        An all-reduce takes the faster of ring and tree; the others have rings alone.

        Args:
            kind: Which collective.
            num_bytes: Size of the whole buffer.
            calls: Into how many calls it is cut.
        """
        if self.world_size == 1 or num_bytes == 0:
            return 0.0
        rounds = 2 if kind == "all-reduce" else 1
        inside, between = self.num_nodes * (self.gpus_per_node - 1), self.num_nodes - 1
        transfer = self.sent_bytes(kind, num_bytes) / self.bus_rate
        ring = calls * (_RING_START + rounds * (inside * _RING_LINK + between * _RING_NETWORK)) + transfer
        if kind != "all-reduce":
            return ring
        hops = (self.gpus_per_node - 1) * _TREE_LINK + math.ceil(math.log2(self.num_nodes)) * _TREE_NETWORK
        tree = calls * (_TREE_START + 2 * hops) + transfer / _TREE_RATE
        return min(ring, tree)
