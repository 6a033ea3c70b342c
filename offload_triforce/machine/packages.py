"""Whether a package that is only needed for some things serves, where it is installed at all."""

from __future__ import annotations

import functools
import importlib.util
import re
from importlib import metadata

# The first release with a product of 4-bit weights and several tokens in one kernel (``gemm_4bit``). Older ones write
# the weights out in 16 bits in every step of more than one token, which all steps of this runtime are.
BITSANDBYTES = (0, 50)
UPDATE = "pip install -U bitsandbytes"

# The first release of transformers whose MtpModel reads the MTP heads of the checkpoints that we know.
MTP_HEADS = (5, 24)
# The first release of flash-linear-attention's kernels in which several value heads may share a key head. Older ones
# count the key heads alone and do not look at the others; newer transformers no longer repeat the keys for them.
FLA = (0, 5)


def reads_mtp_heads() -> bool:
    """Whether the transformers that is installed is said to. Without importing it."""
    return _release(metadata.version("transformers")) >= MTP_HEADS


@functools.cache
def too_old_fla() -> str | None:
    """The version of flash-linear-attention's kernels (fla-core) that is installed, if it is too old to be right."""
    try:
        found = metadata.version("fla-core")
    except metadata.PackageNotFoundError:
        return None
    return found if _release(found) < FLA else None


def _release(version: str) -> tuple[int, ...]:
    """Its first two numbers."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def what_bitsandbytes_lacks() -> str | None:
    """What is wrong with the bitsandbytes that is installed, and what to do; None if it serves."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "which is not installed; pip install 'offload-triforce[bnb]'"
    found = metadata.version("bitsandbytes")
    if _release(found) < BITSANDBYTES:
        return (
            f"whose 4-bit product serves several tokens at once: {found}, which is installed, writes all weights out "
            f"in 16 bits in each step; {UPDATE}"
        )
    return None
