"""Moving cached keys to other positions, for caches whose positions are those inside the cache."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.errors import UnsupportedModelError
from offload_triforce.kernels.ops import Convolution, DeltaTokens
from offload_triforce.model.adapter import Attachment, run
from offload_triforce.model.recurrent import OwnConvolution, OwnRule

if TYPE_CHECKING:
    from offload_triforce.model.mtp import MtpHead


class KeyTurner:
    """Turns keys of a model back by a number of positions.

    Rotary embedding (arXiv 2104.09864) multiplies the key at position p by a rotation R(p), and R(-e) R(p) =
    R(p - e). The angles come from the model's own rotary module. Whether the model really works this way is
    found out by running one token through it at two positions.
    """

    def __init__(self, model: PreTrainedModel, head: MtpHead | None = None) -> None:
        """Try it out. ``head``: of this model, whose own layer's keys are to be turned.

        Raises:
            UnsupportedModelError: the model places its keys in another way.
        """
        self.model, self._head = model, head
        self.rotary = getattr(model.get_decoder(), "rotary_emb", None)
        self.types: list[str | None] = []  # of the layers that attend
        self._once = False  # GPT-OSS tells each angle once, others once for either half of a key
        if self.rotary is None or not self._turns():
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be a draft: it gives its keys positions in a way that a streaming "
                "cache cannot follow; take another model, or draft 'ngram'"
            )

    def turn(self, keys: Tensor, back: int) -> Tensor:
        """Keys [layers, K, n, D] as they would be ``back`` positions earlier, computed in float32."""
        angles = {kind: self._angles(keys[0].float(), back, kind) for kind in set(self.types)}
        return torch.stack([self._turn(key.float(), *angles[kind]) for key, kind in zip(keys, self.types, strict=True)])

    def _angles(self, key: Tensor, back: int, kind: str | None) -> tuple[Tensor, Tensor]:
        position = torch.full((1, 1), back, device=key.device)  # not from the host's memory: nobody waits for it
        if hasattr(self.rotary, "mrope_section"):  # along three axes, which in a text agree
            position = position.expand(3, 1, 1)
        cos, sin = self.rotary(key[None], position, *([] if kind is None else [kind]))
        length = torch.sqrt(cos**2 + sin**2)  # YaRN and longrope scale the keys here, which must not happen twice
        cos, sin = cos / length, sin / length
        return (torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)) if self._once else (cos, sin)

    def _turn(self, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = key[..., : cos.shape[-1]], key[..., cos.shape[-1] :]  # some models turn a part only
        half = turned.shape[-1] // 2
        swapped = torch.cat([turned[..., half:], -turned[..., :half]], dim=-1)
        return torch.cat([turned * cos + swapped * sin, rest], dim=-1)

    @torch.no_grad()
    def _turns(self) -> bool:
        """A single token sees only itself, so its keys at two positions differ by the rotation alone."""
        head, keys = self._head, []
        attachment = Attachment(self.model, None if head is None else head.module)
        config = (self.model if head is None else head.module).config.get_text_config()
        typed = "layer_type" in inspect.signature(self.rotary.forward).parameters
        for position in (0, 7):
            view = _KeyRecorder()
            run_at = partial(run, self.model, keep=1) if head is None else head.probe
            attachment.call(partial(run_at, [0], [position], view=view))
            self.types = [config.layer_types[i] if typed else None for i in sorted(view.keys)]
            keys.append(torch.stack([view.keys[i] for i in sorted(view.keys)]).float())
        errors = {once: self._error(once, keys) for once in (False, True)}
        self._once = errors[True] < errors[False]
        return errors[self._once] <= 0.05 * float(keys[0].abs().max())

    def _error(self, once: bool, keys: list[Tensor]) -> float:
        """By how much the keys at position 7, turned back, miss those at 0."""
        self._once = once
        try:
            return float((self.turn(keys[1], 7) - keys[0]).abs().max())
        except (RuntimeError, TypeError, ValueError):
            return math.inf


class _KeyRecorder:
    """A view that keeps each layer's keys; a single token attends to itself alone, and begins every state."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        self.keys[layer] = key
        return value.repeat_interleave(query.shape[0] // key.shape[0], dim=0)

    def convolve(self, convolution: Convolution, own: OwnConvolution) -> Tensor:
        return own(convolution.inputs)

    def recur(self, _: DeltaTokens, own: OwnRule) -> Tensor:
        return own(None)[0]
