"""What tiles take on the link and in host memory, where they are coded without loss: by a fixed rate per number."""

from __future__ import annotations

import math

import torch

from offload_triforce.config import Settings
from offload_triforce.model.outline import ModelLayout
from offload_triforce.scheduler.plan import aligned

# Raw bytes over wire bytes. In bfloat16: sign and mantissa take 8 bits, the offset from a block's largest exponent 3,
# escapes and the blocks' own exponents less than a half: 1.38 to 1.41 measured on SmolLM2 and Qwen2.5-Coder-1.5B. Of
# float16, whose mantissa has 3 bits more and does not shrink, about 14.4 of 16 bits are left. float32 stays raw.
RATES = {torch.bfloat16: 1.40, torch.float16: 1.11}


def coded_bytes(layout: ModelLayout, settings: Settings, raw: int) -> int:
    """Bytes of a coded tile of so many ``raw`` ones; 0: it stays as it is."""
    rate = None if getattr(settings, "wire", "raw") == "raw" else RATES.get(layout.dtype)
    return 0 if rate is None else aligned(math.ceil(raw / rate))
