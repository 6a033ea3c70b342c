"""Pictures, for those who have matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_triforce.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty picture; sizes in inches.

    Raises:
        InputError: matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install 'offload-triforce[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
