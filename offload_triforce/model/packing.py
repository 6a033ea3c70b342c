"""Whether weights can be packed here as asked for: by words alone, before anything is fetched or read."""

from __future__ import annotations

from offload_triforce.errors import InputError
from offload_triforce.machine.packages import BITSANDBYTES, what_bitsandbytes_lacks
from offload_triforce.model.counts import check_head_quantization, check_quantization


def check_packing(quantize: str | None, quantize_head: str | None = None) -> None:
    """Refuse quantisations that nobody knows, and those for which bitsandbytes is missing or too old.

    Raises:
        InputError: what to install.
    """
    check_quantization(quantize)
    check_head_quantization(quantize_head)
    if quantize is not None and (lacking := what_bitsandbytes_lacks()) is not None:
        release = ".".join(map(str, BITSANDBYTES))
        raise InputError(f"--quantize {quantize} needs bitsandbytes {release} or newer, {lacking}")
