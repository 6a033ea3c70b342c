"""The seam to transformers' recurrent layers: a gated delta rule behind a short convolution.

The modelling modules of such families call two functions of theirs by name, and hand down to them what the model was
called with. So the names are given, once, to functions of ours: they go on to the model's own, but where our keyword
arrives, the view that it holds is asked instead. No model code is copied.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offload_triforce.errors import UnsupportedModelError
from offload_triforce.kernels.ops import Convolution, DeltaTokens
from offload_triforce.machine.packages import too_old_fla

# The text decoders whose recurrent layers work like this, by model type.
FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")

CONVOLUTION, RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
_ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}
_changing = threading.Lock()


class _Here(threading.local):
    """What this thread's newest convolution said about its layer."""

    channels = 0


_here = _Here()


# The model's own way to convolve [n, C] -> [n, C], as if nothing came before.
OwnConvolution = Callable[[Tensor], Tensor]
# Its own delta rule for the tokens that were asked about, one after the other: from a state [Hv, Dk, Dv], or None at
# the beginning of a text, to the outputs [T, Hv, Dv] and the next state.
OwnRule = Callable[["Tensor | None"], tuple[Tensor, Tensor]]


class RecurrentView(Protocol):
    """The same as ``adapter.View`` for recurrent layers: each asks for its convolution, and then for its delta rule.

    The layers do not say which they are. They come in order, so a view counts them.
    """

    def convolve(self, convolution: Convolution, own: OwnConvolution) -> Tensor:
        """The outputs [T, C] of the next layer's convolution."""

    def recur(self, tokens: DeltaTokens, own: OwnRule) -> Tensor:
        """The outputs [T, Hv, Dv] of that layer's delta rule."""


def redirect(layer: nn.Module) -> None:
    """Let a decoder layer's recurrent part ask the view that a model is run over. To be called more than once.

    Raises:
        UnsupportedModelError: its modelling module does not call these two functions.
    """
    for part in layer.modules():
        module = sys.modules[type(part).__module__]
        if hasattr(part, "conv1d") and not all(hasattr(module, name) for name in (CONVOLUTION, RULE)):
            raise UnsupportedModelError(f"{type(part).__name__} computes its recurrent state in a way of its own")
        if hasattr(part, "conv1d"):
            _redirect_module(module)


def _redirect_module(module: ModuleType) -> None:
    with _changing:
        for name, ask in ((CONVOLUTION, _ask_for_convolution), (RULE, _ask_for_rule)):
            own = getattr(module, name)
            if not getattr(own, "of_offload_triforce", False):
                setattr(module, name, _dispatcher(own, ask))


def _dispatcher(own: Callable[..., Any], ask: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def ours(*args: Any, triforce: RecurrentView | None = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if triforce is None else ask(own, triforce, *args, **kwargs)

    ours.of_offload_triforce = True
    return ours


def serves(tokens: Tensor) -> bool:
    """Whether installed kernels serve a layer of these: on CUDA in 16 bits. In float32 they round products to TF32."""
    return tokens.is_cuda and tokens.dtype in (torch.bfloat16, torch.float16)


def _own_for(tokens: Tensor, own: Callable[..., Any], right: bool = True) -> Callable[..., Any]:
    """The model's own function, with an installed kernel in its place only where that serves, and is ``right``."""
    return own if right and serves(tokens) else inspect.unwrap(own)


def _ask_for_convolution(
    own: Callable[..., Any],
    view: RecurrentView,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> Tensor:
    _refuse_parts(others)
    if activation not in _ACTIVATIONS:
        raise UnsupportedModelError(f"a convolution with the activation {activation!r} is not supported")

    def whole(inputs: Tensor) -> Tensor:
        return _own_for(inputs, own)(inputs.T[None], weight, bias, activation=activation)[0].T

    _here.channels = hidden_states.shape[1]
    convolution = Convolution(hidden_states[0].T, weight, bias, _ACTIVATIONS[activation])
    return view.convolve(convolution, whole).T[None]


def _ask_for_rule(
    own: Callable[..., Any],
    view: RecurrentView,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    _refuse_parts(others)
    if initial_state is not None or not use_qk_l2norm_in_kernel:
        raise UnsupportedModelError("a delta rule over keys that are not normalised is not supported")

    def whole(state: Tensor | None) -> tuple[Tensor, Tensor]:
        start = None if state is None else state[None]
        output, end = _own_for(value, own, right=too_old_fla() is None)(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=start,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        return output[0], end[0]

    repeats = key.shape[2] // _key_heads(key, value)
    tokens = DeltaTokens(query[0, :, ::repeats], key[0, :, ::repeats], value[0], g[0], beta[0])
    return view.recur(tokens, whole)[None], None


def _key_heads(key: Tensor, value: Tensor) -> int:
    """How many there really are: older releases repeat them for each value head. The convolution has had all channels
    of queries, keys and values.
    """
    return (_here.channels - value.shape[2] * value.shape[3]) // (2 * key.shape[3])


def _refuse_parts(others: dict[str, Any]) -> None:
    if any(others.get(name) is not None for name in ("cu_seqlens", "cu_seq_lens_q", "seq_idx")):
        raise UnsupportedModelError("recurrent layers over parts of the text (packed sequences) are not supported")
