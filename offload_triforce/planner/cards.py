"""Well-known cards: how much memory, how fast, behind which link.

Figures as their maker publishes them, to the best of our knowledge: none was looked up card by card, so check what you
base a purchase on. Memory is in MiB as nvidia-smi reports it. TFLOPS are dense, 16-bit inputs with 32-bit sums, which
GeForce cards compute at half rate.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from offload_triforce.errors import InputError

# GB/s that pinned copies get out of 16 lanes, by PCIe generation: about 80 % of the raw 15.8, 31.5 and 63. The figure
# of generation 4 follows from TriForce's own baseline (arXiv 2404.11912, two RTX 4090, 12 of 32 layers on the cards):
# 21.3 GB per card in 840 ms.
LINK_GBPS = {3: 12.5, 4: 25.0, 5: 50.0}
# Of what nvidia-smi reports, CUDA gives out a little less: 23.65 of 23.99 GiB on a RTX 4090.
USABLE = 0.985


def slot_gbps(generation: int, lanes: int) -> float:
    """Assumed bandwidth of a PCIe slot, each way, in GB/s. ``generation``: of LINK_GBPS."""
    return LINK_GBPS[generation] * lanes / 16


@dataclass(frozen=True)
class Card:
    """One card. ``lanes``: of its own connector; a laptop's is taken to be wired with 8."""

    name: str
    mib: int
    memory_gbps: float
    tflops: float
    generation: int
    lanes: int = 16

    @property
    def memory_bytes(self) -> int:
        """Bytes that programs can take."""
        return int(self.mib * 2**20 * USABLE)

    @property
    def link_gbps(self) -> float:
        """Assumed bandwidth of the link, each way, with the card in a slot that is as good as the card."""
        return slot_gbps(self.generation, self.lanes)


CARDS = (
    Card("RTX 3060 12GB", 12288, 360, 25.5, 4),
    Card("RTX 3090", 24576, 936, 71, 4),
    Card("RTX 3090 Ti", 24564, 1008, 80, 4),
    Card("RTX 4060 Ti 16GB", 16380, 288, 44, 4, lanes=8),
    Card("RTX 4070 Ti Super", 16376, 672, 88, 4),
    Card("RTX 4080", 16376, 717, 97.5, 4),
    Card("RTX 4090", 24564, 1008, 165.2, 4),
    Card("RTX 5070 Ti", 16303, 896, 88, 5),
    Card("RTX 5080", 16303, 960, 112.6, 5),
    Card("RTX 5090", 32607, 1792, 209.5, 5),
    Card("RTX 3080 Laptop", 16384, 448, 42, 4, lanes=8),
    Card("RTX 4090 Laptop", 16376, 576, 79, 4, lanes=8),
    Card("RTX 5090 Laptop", 24463, 896, 63, 5, lanes=8),
    Card("RTX A4000", 16376, 448, 76.7, 4),
    Card("RTX A5000", 24564, 768, 111.1, 4),
    Card("RTX A6000", 49140, 768, 154.8, 4),
    Card("RTX 4000 Ada", 20475, 360, 81.9, 4),
    Card("RTX 6000 Ada", 49140, 960, 182.1, 4),
    Card("L4", 23034, 300, 121, 4),
    Card("L40S", 46068, 864, 183, 4),
    Card("A100 40GB", 40960, 1555, 312, 4),
    Card("A100 80GB", 81920, 1935, 312, 4),
    Card("H100 PCIe", 81559, 2000, 756, 5),
    Card("H100 SXM", 81559, 3350, 989, 5),
    Card("H200", 143771, 4800, 989, 5),
)


def find_card(name: str) -> Card:
    """The card of that name; NVIDIA, GeForce, spaces and capitals do not matter.

    Raises:
        InputError: the nearest names.
    """
    wanted = _plain(name)
    plain = {_plain(card.name): card for card in CARDS}
    if wanted in plain:
        return plain[wanted]
    begun = [card for key, card in plain.items() if key.startswith(wanted)] if wanted else []
    if len(begun) == 1:
        return begun[0]
    near = [card.name for card in begun] or [plain[k].name for k in difflib.get_close_matches(wanted, plain, 3, 0.5)]
    hint = f"nearest are {', '.join(near)}" if near else f"known are {', '.join(card.name for card in CARDS)}"
    raise InputError(f"unknown card {name!r}; {hint}; or describe it with --vram 24GB --link 25GB/s --hbm 1000GB/s")


def _plain(name: str) -> str:
    """What is left of a name: 4090laptop of 'NVIDIA GeForce RTX 4090 Laptop GPU'."""
    kept = re.sub(r"nvidia|geforce|quadro|rtx|generation|gpu|tensor core|-?sxm4?-?|-?pcie-?", " ", name.lower())
    special = "sxm" if re.search(r"h100.*(sxm|hbm3)", name.lower()) else "pcie" if "h100" in name.lower() else ""
    kept = re.sub(r"[^a-z0-9]", "", kept.replace("hbm3", ""))
    return re.sub(r"(h100)\d*gb$", r"\1", kept) + special
