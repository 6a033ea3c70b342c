"""Input embeddings that stay in host memory: a step reads a few rows of a table that takes gigabytes of the device.

Which tokens a step reads is known on the host, so their rows are gathered there and go up with its other inputs. A
table that is the output's as well (tied) is read as a whole in each step, and stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload_triforce.scheduler.device import to_device


class HostEmbedding(nn.Module):
    """Stands in for a model's ``nn.Embedding``. Not a parameter: a model is where its parameters are.

    Attributes:
        weight: the table [V, width], in host memory.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach().to("cpu")

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Width."""
        return self.weight.shape[1]

    @torch.no_grad()
    def rows(self, tokens: Sequence[int] | Tensor, out: Tensor | None = None) -> Tensor:
        """The rows of T tokens, [T, width], in host memory; put into ``out``, if there is one."""
        ids = torch.as_tensor(tokens, dtype=torch.long, device="cpu")
        return torch.index_select(self.weight, 0, ids, out=out)

    def forward(self, ids: Tensor) -> Tensor:
        """What the embedding would return. For others who run the model: the host has to wait for ids on a device."""
        return to_device(self.rows(ids.reshape(-1)), ids.device).view(*ids.shape, -1)


def host_table(model: PreTrainedModel) -> HostEmbedding | None:
    """A model's input embeddings, where they are in host memory."""
    table = model.get_input_embeddings()
    return table if isinstance(table, HostEmbedding) else None


def embed(model: PreTrainedModel, tokens: Sequence[int] | Tensor) -> Tensor | None:
    """The embeddings of T tokens on the model's device, [T, width]; None where the model looks them up by itself."""
    table = host_table(model)
    return None if table is None else to_device(table.rows(tokens), model.device)


def own_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """Input embeddings that could be in host memory as well: a plain table, which is not the output's too."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = type(table) is nn.Embedding and table.max_norm is None and "forward" not in vars(table)  # no hook in it
    return table if plain and head is not None and getattr(head, "weight", None) is not table.weight else None
