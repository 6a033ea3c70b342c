"""What the host issues for each layer and each tile, and about how long each piece of it takes.

The numbers of pieces are counts: ``tests/planner/test_host_work.py`` counts them again, of models in bfloat16 with
everything but our kernels' own launches run by torch, and fails where they leave these by more than ``SLACK``. Launches
of our kernels per tile are those of ``tests/kernels/test_launch.py``. The times are orders of magnitude, not yet
measured on a card.
"""

from __future__ import annotations

from offload_triforce.cache.sizes import RecurrentShape
from offload_triforce.model.outline import ModelShape

# Operations of a layer that attends, in a step of the retrieval level: all that is no view, and three launches of our
# own. Norms and rotary embeddings are most of them: Qwen3 norms queries and keys too, and Qwen3.5 has a gate as well.
PLAIN, NORMED, GATED = 43, 59, 72
# Of a layer with a recurrent state, in either level: three launches of our own, and the rest of torch's.
RECURRENT = 56
# What a pass adds to each layer that is streamed, where chunks are chosen anew: held chunks are scored again, and the
# tail's are looked at. Where they are not, nothing is added.
CHOOSING = 13
# Operations that a count may differ by, between releases of transformers.
SLACK = 3

# Per tile: our kernels' launches; and where it is fetched, a copy, three events that are recorded and two that are
# waited for; and one more launch where it is coded.
LAUNCHES_PLAIN, LAUNCHES_CHOOSING = 1, 3
COPYING, DECODING = 6, 1

# Seconds: of an operation that the host issues through torch, of one in a captured graph (the device's time between
# two), and of a bound launch, a copy or an event, which go nearly straight to the driver.
OPERATION, REPLAYED, CALL = 8e-6, 1.5e-6, 4e-6

_ATTENTION = {"qwen3_5": GATED, "qwen3_next": GATED, "qwen3": NORMED}


def attention_operations(model_type: str) -> int:
    """Of one layer of such models; of a family that nobody has counted, as many as of Llama."""
    return next((number for start, number in _ATTENTION.items() if model_type.startswith(start)), PLAIN)


def step_operations(model: ModelShape) -> int:
    """Operations of all layers in a step."""
    attending = attention_operations(getattr(model.config.get_text_config(), "model_type", ""))
    return sum(RECURRENT if isinstance(layer, RecurrentShape) else attending for layer in model.layout.layers)


def tile_seconds(choosing: bool, coded: bool) -> tuple[float, float]:
    """The host's time for one tile of a pass: for its kernels, with chunks chosen anew or not, and for fetching it."""
    return (LAUNCHES_CHOOSING if choosing else LAUNCHES_PLAIN) * CALL, (COPYING + coded * DECODING) * CALL
