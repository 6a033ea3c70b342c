"""Token ids of two texts, compared."""

from __future__ import annotations

from torch import Tensor


def common_prefix(one: Tensor, other: Tensor) -> int:
    """How many ids both begin with. (n,) and (m,)."""
    most = min(len(one), len(other))
    differ = (one[:most] != other[:most]).nonzero()
    return int(differ[0]) if len(differ) else most
