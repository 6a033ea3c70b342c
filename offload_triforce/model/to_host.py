"""Moving a loaded model's input embeddings to host memory, where it reads the same then as it did before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload_triforce.errors import InputError
from offload_triforce.model.adapter import attached
from offload_triforce.model.embeddings import HostEmbedding, host_table, own_embedding
from offload_triforce.model.layers import layers_of
from offload_triforce.model.watch import PROBE_TOKENS, decoder_inputs


def place_embeddings(model: PreTrainedModel, where: str | None) -> None:
    """Move them if that is asked for: ``where`` is host. They may be there already.

    Raises:
        InputError: they cannot be in host memory.
    """
    problem = move_embeddings(model) if where == "host" else None
    if problem is not None:
        raise InputError(
            f"the input embeddings of {type(model).__name__} {problem}; leave embeddings out, or take 'device'"
        )


def move_embeddings(model: PreTrainedModel) -> str | None:
    """Move them, unless something speaks against it: that is returned, as the end of a sentence. They may be in host
    memory already while the rest of the model is on its device.

    Whether the first layer gets bit for bit what it got is tried on a few tokens, through the decoder and through the
    whole model: some scale in the embedding, or give token ids to their layers.
    """
    if host_table(model) is not None:
        return None
    own = own_embedding(model)
    if own is None:
        return "are the output embeddings too, or no plain table"
    device = next(layers_of(model.get_decoder()).parameters()).device
    # The probe's tokens alone: the table may wait in host memory already, and be too large for the device.
    few = nn.Embedding.from_pretrained(own.weight[:PROBE_TOKENS].to(device))
    same = False
    try:
        with attached(model), torch.no_grad():
            model.set_input_embeddings(few)
            expected = decoder_inputs(model)
            model.set_input_embeddings(HostEmbedding(own.weight))
            same = _reads_the_same(model, expected)
    except Exception:  # whatever a model says that takes token ids alone
        same = False
    finally:
        if not same:
            model.set_input_embeddings(own)
    return None if same else "cannot be looked up outside of the model, which does more with its token ids"


def _reads_the_same(model: PreTrainedModel, expected: list[Tensor]) -> bool:
    table = host_table(model)
    if table is None:
        return False
    rows = table.rows(range(PROBE_TOKENS)).to(model.device)
    found = [decoder_inputs(model, rows), decoder_inputs(model, rows, whole=True)]
    return all(len(one) == len(expected) and all(map(torch.equal, one, expected)) for one in found)
