"""A model that nobody has tried is tried before it is used: some tokens, here and through transformers' own attention.

What a model tells its attention function is looked at while it is probed (``model/layout.py``). That cannot show what
a model does only with the attention that it was written with: a bias that its own function adds, a scale that it reads
off the module. So a text with a tree behind it goes through everything that decodes (the prefill layer by layer,
caches, kernels, a pass over the tree), and each of the tree's paths through the model as it is, with its own eager
attention. The logits must be the same, apart from rounding.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from offload_triforce.config import Settings
from offload_triforce.errors import TriForceError, UnsupportedModelError, first_line
from offload_triforce.model.adapter import Attachment, attached
from offload_triforce.model.layers import layers_of
from offload_triforce.model.layout import ModelLayout, probe
from offload_triforce.model.tested import is_tested
from offload_triforce.model.weights import packing_of
from offload_triforce.runtime.runtime import Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.scheduler.device import on
from offload_triforce.speculation.tree import Node

PROMPT = 44
PARENTS = (*range(8), 3, *range(9, 14), 0, *range(15, 19))  # of 19 draft tokens behind the root: three paths
TOKENS = PROMPT + 1 + len(PARENTS)

# How far two exact ways may be apart at one token: the difference of their logits over the logits' own spread (root
# mean squares both). fp32 rounds to 6e-8, and tiny random models, which amplify it most, came out below 2e-5.
EXACT = 1e-3
# In 16 bits, or with packed weights, rounding is no small matter: it is measured, by disturbing what goes into each
# layer as one rounding would. What was tried came out below the disturbance: SmolLM2-135M in bf16 0.08 of 0.12, in
# fp16 0.008 of 0.013, with nf4 0.07 of 0.13. Logits that have nothing to do with each other are 1.4 apart.
TIMES, LEAST, MOST = 2.0, 0.03, 0.4
# The worst quarter of the tokens does not count there: rounding may choose other experts for them.
QUANTILE = 0.75

_SETTINGS = Settings(
    context=2 * TOKENS,
    budget=TOKENS,
    chunk=4,
    sink=4,
    recent=16,
    tile=16,
    gamma=8,
    draft_tokens=len(PARENTS),
    prefill_chunk=17,
    resident=0.0,
    prefill_resident=0.0,
    graphs=False,
)

_checked: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def accept(model: PreTrainedModel, check: bool = True) -> ModelLayout:
    """The layout of a model that this runtime decodes exactly.

    Args:
        check: a model that is not of a tested family.

    Raises:
        UnsupportedModelError: what is the matter with it.
    """
    layout = probe(model)
    if check:
        check_untested(model, layout)
    return layout


def check_untested(model: PreTrainedModel, layout: ModelLayout) -> None:
    """Check a model that is not of a tested family, once. It costs four forwards of some tokens, or seven.

    Raises:
        UnsupportedModelError: it does not say here what it says in transformers.
    """
    if model in _checked or is_tested(model):
        return
    name, tokens = type(model).__name__, _ordinary_tokens(model.config, layout.vocabulary)
    try:
        with torch.no_grad():
            own, ours = _own_logits(model, tokens), _our_logits(model, layout, tokens)
            off, allowed = difference(own, ours, 1.0), EXACT
            if not _is_exact(model):
                noise = difference(own, _own_logits(model, tokens, disturbed=True), QUANTILE)
                off, allowed = difference(own, ours, QUANTILE), min(max(TIMES * noise, LEAST), MOST)
    except (TriForceError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # the model's code is anybody's
        raise UnsupportedModelError(
            f"{name} could not be checked against transformers' own attention ({first_line(error)}); {_WAY_OUT}"
        ) from error
    if not off <= allowed:  # also if it is not a number
        raise UnsupportedModelError(
            f"{name} is of no family that was tried ({model.config.model_type}), and on {TOKENS} tokens its logits "
            f"differ here from those of transformers' own attention by {off:.2g} of their spread, where rounding makes "
            f"{allowed:.2g} at most; {_WAY_OUT}"
        )
    _checked.add(model)


_WAY_OUT = "--no-check (check=False) runs it without the promise that the text is the model's own"


def difference(own: Tensor, ours: Tensor, quantile: float) -> float:
    """How far two sets of logits [T, V] are apart, as ``EXACT`` has it, at the token that has this place among them."""
    own, ours = own.double(), ours.double()
    spread = (own - own.mean(dim=-1, keepdim=True)).square().mean(dim=-1).sqrt()
    return float(((own - ours).square().mean(dim=-1).sqrt() / spread).quantile(quantile))


def _is_exact(model: PreTrainedModel) -> bool:
    """fp32 throughout. Products of packed weights may round anew with the number of tokens, and round their inputs."""
    packed = getattr(model, "hf_quantizer", None) is not None or any(packing_of(model))
    return model.dtype == torch.float32 and not packed


@contextmanager
def _disturbing(model: PreTrainedModel) -> Iterator[None]:
    """Whatever goes into a decoder layer in this thread is off by about one rounding to 16 bits."""
    thread, step = threading.get_ident(), torch.finfo(model.dtype if model.dtype.itemsize == 2 else torch.bfloat16).eps
    generator = torch.Generator().manual_seed(0)

    def disturb(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != thread:
            return None
        states = args[0]
        noise = torch.randn(states.shape, generator=generator).to(states.device, torch.float32)
        return (states * (1 + step / 2 * noise)).to(states.dtype), *args[1:]

    hooks = [layer.register_forward_pre_hook(disturb) for layer in layers_of(model.get_decoder())]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _ordinary_tokens(config: PreTrainedConfig, vocabulary: int) -> list[int]:
    """``TOKENS`` tokens from all over the vocabulary, without those that mean something to the model itself."""
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    drawn = torch.randint(vocabulary, (64 * TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    ordinary = [token for token in drawn if token not in special]
    return ordinary[:TOKENS]


def _nodes(tokens: Sequence[int]) -> list[Node]:
    nodes = [Node(tokens[0], None)]
    for token, parent in zip(tokens[1:], PARENTS, strict=True):
        nodes.append(Node(token, nodes[parent]))
    return nodes


def _our_logits(model: PreTrainedModel, layout: ModelLayout, tokens: Sequence[int]) -> Tensor:
    """Of the tree's nodes [T, V], by a prefill and a pass."""
    with on(layout.device), torch.inference_mode(False):
        runtime = Runtime(model, layout, _SETTINGS, _SETTINGS.context)
    with _closing(runtime, layout), attached(model), on(layout.device):
        Session(runtime).begin(torch.tensor(tokens[:PROMPT]))
        return runtime.target("never").score(_nodes(tokens[PROMPT:]))


@contextmanager
def _closing(runtime: Runtime, layout: ModelLayout) -> Iterator[None]:
    try:
        yield
    finally:
        runtime.close()
        if layout.device.type == "cuda":
            torch.cuda.empty_cache()  # so that what was freed counts as free


def _own_logits(model: PreTrainedModel, tokens: Sequence[int], disturbed: bool = False) -> Tensor:
    """The same by reading each path from the beginning, through the model as its authors have it."""
    nodes = _nodes(tokens[PROMPT:])
    number = {id(node): index for index, node in enumerate(nodes)}
    inner = {id(node.parent) for node in nodes}
    found: dict[int, Tensor] = {}

    def read() -> None:
        for leaf in (node for node in nodes if id(node) not in inner):
            path = leaf.path()
            ids = torch.tensor([[*tokens[:PROMPT], *(node.token for node in path)]], device=model.device)
            # No positions: the model numbers the tokens itself, some along three axes.
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = model(**given, use_cache=False).logits[0, PROMPT:]
            found.update((number[id(node)], row) for node, row in zip(path, logits, strict=True))

    with _disturbing(model) if disturbed else nullcontext():
        Attachment(model, name="eager").call(read)
    return torch.stack([found[index] for index in range(len(nodes))])
