"""What a model does beside its attention while a few tokens run through it: its layers, and the masks it would build.

The prefill takes a model's decoder layers out of its hands and runs them one by one, and no mask is built while
decoding. Both are right for nearly every decoder; here is where it is found out whether they are for this one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from offload_triforce.model.adapter import ATTENTION_NAME
from offload_triforce.model.layers import layers_of

PROBE_NAME = "offload_triforce_probe"
PROBE_TOKENS = 4  # that run through a model while it is watched

# transformers' (batch, head, query, key) -> may the query see the key?
MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]


class LayerWatch:
    """Looks on while a model runs its layers, and says what a prefill layer by layer would do otherwise.

    What other threads do with the same model is none of its business.

    Attributes:
        problem: the first thing that does not fit, as the end of a sentence that begins with the model; or None.
        inputs: all tensors that the first layer was given.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.problem: str | None = None
        self.inputs: list[Tensor] = []
        self._layers, self._next = layers, 0
        self._thread = threading.get_ident()
        self._states: Tensor | None = None  # what the newest layer gave back

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look on for as long as the context lasts."""
        hooks = []
        for index, layer in enumerate(self._layers):
            hooks.append(layer.register_forward_pre_hook(self._before(index), with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._after))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if self._next < len(self._layers):
            self._object("does not run all of its decoder layers for a text")

    @property
    def current(self) -> int:
        """The number of the layer that runs."""
        return self._next - 1

    def _before(self, index: int) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != self._thread:
                return
            states = args[0] if args else None
            if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[:2] != (1, PROBE_TOKENS):
                self._object("does not hand its decoder layers hidden states of [1, tokens, width]")
            elif index != self._next:
                self._object("does not run its decoder layers once each, one after the other")
            elif self._states is not None and not _is_same(states, self._states):
                self._object("changes the hidden states between its decoder layers")
            if index == 0 and not self.inputs:
                self.inputs = list(_tensors((args, kwargs)))
            self._next += 1

        return look

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if not isinstance(output, Tensor) or not args or output.shape != args[0].shape:
            self._object("has decoder layers that give back something else than hidden states")
        self._states = output

    def _object(self, problem: str) -> None:
        self.problem = self.problem or problem


def _is_same(one: Tensor, other: Any) -> bool:
    """The same tensor, or a view of all of it: some models cut the tokens off that need no logits."""
    if not isinstance(other, Tensor):
        return False
    whole = one.shape == other.shape and one.stride() == other.stride()
    return one is other or (whole and one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


class _Enough(Exception):
    """The first layer has been reached."""


def decoder_inputs(model: PreTrainedModel, rows: Tensor | None = None, whole: bool = False) -> list[Tensor]:
    """All tensors that the first layer is given when the decoder alone reads the probe's tokens, 0, 1, 2, 3.

    Our attention must be attached.

    Args:
        rows: the tokens' embeddings [T, width], to be read in their place. whole: through the whole model.
    """
    decoder, found, thread = model.get_decoder(), [], threading.get_ident()

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != thread:
            return
        found.extend(_tensors((args, kwargs)))
        raise _Enough

    hook = layers_of(decoder)[0].register_forward_pre_hook(stop, with_kwargs=True)
    positions = torch.arange(PROBE_TOKENS, device=model.device)[None]
    given = {"input_ids": positions} if rows is None else {"inputs_embeds": rows[None]}
    try:
        (model if whole else decoder)(**given, position_ids=positions, use_cache=False)
    except _Enough:
        pass
    finally:
        hook.remove()
    return found


_asked: ContextVar[list[MaskFunction] | None] = ContextVar("masks asked for", default=None)


@contextmanager
def masks_asked_for() -> Iterator[list[MaskFunction]]:
    """The rules of the masks that models which run under ``PROBE_NAME`` would build while the context lasts."""
    masks: list[MaskFunction] = []
    token = _asked.set(masks)
    try:
        yield masks
    finally:
        _asked.reset(token)


def _build_no_mask(*_: Any, mask_function: MaskFunction, **__: Any) -> None:
    """What transformers calls for a mask."""
    asked = _asked.get()
    if asked is not None:
        asked.append(mask_function)


AttentionInterface.register(PROBE_NAME, AttentionInterface()[ATTENTION_NAME])
AttentionMaskInterface.register(PROBE_NAME, _build_no_mask)


def window_of(mask: MaskFunction, windows: Collection[int | None]) -> int | None:
    """Which of the windows a mask has (None: it is causal without one), found out by asking it.

    Raises:
        ValueError: it has none of them, or does not work by position alone.
    """
    end = 2 * max([window or 0 for window in windows] + [64])
    try:
        try:
            return _first_window(mask, windows, torch.arange(end + 8), (0, 1, 3, end // 2 + 1, end))
        except IndexError:  # a rule that looks at the tokens themselves, such as those of images: there are only these
            return _first_window(mask, windows, torch.arange(PROBE_TOKENS), range(PROBE_TOKENS))
    except Exception as error:  # it is the model's own, and may ask for anything
        raise ValueError("a mask that is neither causal nor one of a sliding window") from error


def _first_window(
    mask: MaskFunction, windows: Collection[int | None], keys: Tensor, queries: Iterable[int]
) -> int | None:
    for window in sorted(windows, key=lambda window: window or 0):
        if all(_sees(mask, query, keys, window) for query in queries):
            return window
    raise ValueError("none of the windows")


def _sees(mask: MaskFunction, query: int, keys: Tensor, window: int | None) -> bool:
    first = 0 if window is None else query - window + 1
    zero = torch.zeros((), dtype=torch.long)
    seen = torch.as_tensor(mask(zero, zero, torch.full_like(keys, query), keys)).bool().cpu()
    return torch.equal(seen.expand(keys.shape), (keys <= query) & (keys >= first))
