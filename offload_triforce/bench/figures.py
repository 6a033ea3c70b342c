"""Pictures, for those who have matplotlib."""

from __future__ import annotations

from pathlib import Path
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


def save(figure: Figure, path: Path) -> None:
    """Write a picture, all of them in one style."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def check_pictures(path: Path | None) -> None:
    """Where a picture is wanted, refuse before the work starts what would be refused after it.

    Raises:
        InputError: matplotlib is not there, or draws no files of that name.
    """
    if path is None:
        return
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise InputError(f"{path} is no picture's name; let it end in .png, .svg or .pdf")
