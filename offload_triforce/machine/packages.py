"""Whether a package that is only needed for some things serves, where it is installed at all."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata

# The first release with a product of 4-bit weights and several tokens in one kernel (``gemm_4bit``). Older ones write
# the weights out in 16 bits in every step of more than one token, which all steps of this runtime are.
BITSANDBYTES = (0, 50)
UPDATE = "pip install -U bitsandbytes"

# The first release of transformers whose MtpModel reads the MTP heads of the checkpoints that we know.
MTP_HEADS = (5, 24)


def reads_mtp_heads() -> bool:
    """Whether the transformers that is installed is said to. Without importing it."""
    return _release("transformers") >= MTP_HEADS


def _release(package: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", metadata.version(package))[:2]))


def what_bitsandbytes_lacks() -> str | None:
    """What is wrong with the bitsandbytes that is installed, and what to do; None if it serves."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "which is not installed; pip install 'offload-triforce[bnb]'"
    if _release("bitsandbytes") < BITSANDBYTES:
        found = metadata.version("bitsandbytes")
        return (
            f"whose 4-bit product serves several tokens at once: {found}, which is installed, writes all weights out "
            f"in 16 bits in each step; {UPDATE}"
        )
    return None
