"""The multi-token-prediction (MTP) head of a model, run over a cache. ``mtp_files`` finds and loads it.

Such a head was trained with the model to say one token more. From the model's hidden state of token t (after the last
norm) and the embedding of token t + 1 it makes a hidden state of its own, from which the model's output embedding
draws token t + 2; fed on with its own, it drafts further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload_triforce.errors import UnsupportedModelError, first_line
from offload_triforce.kernels.ops import AttentionParams
from offload_triforce.model.adapter import Attachment, View
from offload_triforce.model.embeddings import embed
from offload_triforce.model.outline import LayerShape
from offload_triforce.scheduler.device import to_device

INSTEAD = "draft 'ngram' (look-up in the text)"


class MtpHead:
    """The head of a loaded model.

    Attributes:
        model: whose head it is. module: transformers' own; its weights, and its configuration.
        shape: of its one attention layer. layer_types: as the rotary module may ask for them.
    """

    def __init__(self, model: PreTrainedModel, module: PreTrainedModel) -> None:
        """Try it out.

        Raises:
            UnsupportedModelError: it does not run as the model's own layers do.
        """
        self.model, self.module = model, module
        tell_hidden_states(model)
        view = _Recorder()
        try:
            Attachment(model, module).call(lambda: self.probe([0, 0], [0, 1], view))
        except Exception as error:  # whatever a head that nobody has tried may raise
            raise UnsupportedModelError(
                f"the MTP head of {type(model).__name__} does not run here ({first_line(error)}); {INSTEAD}"
            ) from error
        if len(view.shapes) != 1:
            raise UnsupportedModelError(
                f"the MTP head of {type(model).__name__} does not attend through the transformers attention registry; "
                f"{INSTEAD}"
            )
        (self.shape,) = view.shapes

    @property
    def width(self) -> int:
        """Of a hidden state."""
        return self.module.config.hidden_size

    def step(
        self, tokens: Sequence[int], positions: Sequence[int], hidden: Tensor, view: View
    ) -> tuple[Tensor, Tensor]:
        """One forward step over ``view``: the logits after the last token, [1, V], and its own hidden states.

        Args:
            tokens: T of them. positions: of these, as the view counts them.
            hidden: [T, width], of the token before each: the model's, or this head's own.

        Returns:
            The logits, and [T, width].
        """
        device, rows = self.model.device, embed(self.model, tokens)
        both = to_device(torch.tensor([list(tokens), list(positions)], dtype=torch.long), device)
        if rows is None:
            rows = self.model.get_input_embeddings()(both[0])
        rows, places, layer = rows[None], both[1:], self.module.layers[0]
        typed = [self.module.config.layer_types[0]] if getattr(self.module, "has_per_layer_rope", False) else []
        angles = self.module.rotary_emb(rows, places, *typed)
        # Neither a mask nor a cache of transformers': see ``adapter``. Their keywords differ between releases.
        made = layer(rows, hidden[None].to(rows.dtype), angles, None, places, None, triforce=view)
        if self.module.use_shared_post_norm:
            made = self.module.shared_post_norm(made)
        return self.module._project_to_logits(made[:, -1]), made[0]

    @torch.no_grad()
    def probe(self, tokens: Sequence[int], positions: Sequence[int], view: View) -> None:
        """A step after hidden states that mean nothing."""
        hidden = torch.zeros(len(tokens), self.width, dtype=self.model.dtype, device=self.model.device)
        self.step(tokens, positions, hidden, view)


class _Recorder:
    """A view that notes each layer's shape, and answers zeros."""

    def __init__(self) -> None:
        self.shapes: list[LayerShape] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        self.shapes.append(LayerShape(key.shape[0], key.shape[2], params.window))
        return torch.zeros_like(query)


def tell_hidden_states(model: PreTrainedModel) -> None:
    """Let a model's decoder tell the view of a step its last hidden states. To be called more than once.

    A view that wants to know has a method ``see``. Whoever else runs the model finds it as it was.
    """
    decoder = model.get_decoder()
    if _tell not in decoder._forward_hooks.values():
        decoder.register_forward_hook(_tell, with_kwargs=True)


def _tell(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    see = getattr(kwargs.get("triforce"), "see", None)
    if see is not None:
        see(output[0][0])  # after the last norm: [1, T, width]
