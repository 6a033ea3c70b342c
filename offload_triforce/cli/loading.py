"""How far a saved session is read."""

from __future__ import annotations

from collections.abc import Callable


class Loading:
    """Told how far a saved session is read: when it is first asked, so that it shows among that question's bars.

    Attributes:
        shown: by whom; None while there are no bars.
    """

    def __init__(self) -> None:
        self.shown: Callable[[int, int], None] | None = None

    def __call__(self, done: int, total: int) -> None:
        """So many bytes of so many."""
        if self.shown is not None:
            self.shown(done, total)
