"""Where a decoder keeps its layers: nearly all call them ``layers``, those that are like GPT-2 ``h`` or ``blocks``."""

from __future__ import annotations

from torch import nn

NAMES = ("layers", "h", "blocks")


def find_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """The list of a decoder's layers; None if it keeps them otherwise."""
    found = (getattr(decoder, name, None) for name in NAMES)
    return next((layers for layers in found if isinstance(layers, nn.ModuleList)), None)


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The same of a decoder that has been probed: it has one."""
    layers = find_layers(decoder)
    if layers is None:
        raise AttributeError(f"{type(decoder).__name__} keeps no list of decoder layers")
    return layers
