"""Packed weights: what they take."""


def bytes_taken(model):
    """Of all weights, and of what packed ones need to be unpacked again."""
    taken = 0
    for weight in model.parameters():
        state, scale = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
        taken += weight.nbytes + (0 if state is None else state.absmax.nbytes) + (0 if scale is None else scale.nbytes)
    return taken
