"""A small hybrid with an MTP head, trained for some minutes on text that every machine has: Python's own library.

No hybrid model is small enough to travel with the project, and a random one has nothing to say. So one is trained where
it is needed: a byte-level tokenizer, a decoder of recurrent and full-attention layers, and with it the head, which also
learns to go on from what it makes itself. All of it is saved as a checkpoint has it, and loaded as one.
"""

from __future__ import annotations

import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from offload_triforce.model.mtp_files import new_head

# Modules that are not trained on: what is read and gone on with.
HELD_OUT = ("argparse.py", "inspect.py")
END = "<|end|>"
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "mtp_num_hidden_layers": 1,
}
# Of a step's tokens: many short pieces, and now and then a long one, since texts will be long.
SHAPES = ((4, 256), (4, 256), (2, 512), (1, 1024))
LEARNING_RATE, WARM_UP, LEAST_SHARE = 4e-3, 0.05, 0.05
UNROLLED = 2  # steps of the head: after the model's hidden states, and after its own
TRAINING = "training.json"

Say = Callable[[str], None]
# From a model's names of a head to those of a checkpoint.
_NAMES = {"eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "post_norm": "norm"}


def library_files() -> list[Path]:
    """Python's standard library, the modules that lie at its root, in order."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def held_out_text() -> str:
    """What is not trained on, in one piece."""
    files = {path.name: path for path in library_files()}
    return "\n\n".join(files[name].read_text(encoding="utf-8") for name in HELD_OUT)


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte pairs, merged by how often they are met."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


class Schedule:
    """How far the training is, by the clock or by a number of steps, and the learning rate that goes with it."""

    def __init__(self, seconds: float, steps: int | None) -> None:
        self._began, self._seconds, self._most, self.steps = time.monotonic(), seconds, steps, 0

    @property
    def share(self) -> float:
        """0 at the beginning, 1 at the end."""
        if self._most is not None:
            return min(1.0, self.steps / self._most)
        return min(1.0, (time.monotonic() - self._began) / self._seconds)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the rate and make a step: up, then down along half a cosine."""
        share = self.share
        down = LEAST_SHARE + (1 - LEAST_SHARE) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (share + 1e-3) / WARM_UP) * down
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.steps += 1


def batches(tokens: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Pieces of a text at random, ids [B, T]; for ever."""
    while True:
        for rows, length in SHAPES:
            length = min(length, len(tokens) - 1)
            starts = torch.randint(len(tokens) - length, (rows,), generator=generator).tolist()
            yield torch.stack([tokens[start : start + length] for start in starts])


def train(
    folder: Path, minutes: float, say: Say, steps: int | None = None, files: int | None = None, **sizes: Any
) -> dict[str, Any]:
    """Train a model and its head, and save them to a folder. ``steps``: so many, instead of by the clock.

    ``files``: of the library, no more. ``sizes``: other ones of the model.

    Returns:
        What it took: kept beside the model, too.
    """
    paths = [path for path in library_files() if path.name not in HELD_OUT][:files]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    config = Qwen3_5TextConfig(**{**SIZES, **sizes})
    say("making a tokenizer")
    tokenizer = make_tokenizer(texts, config.vocab_size)
    tokens = torch.tensor(tokenizer("\n\n".join(texts)).input_ids)
    torch.manual_seed(0)
    model, generator = Qwen3_5ForCausalLM(config), torch.Generator().manual_seed(0)
    head = new_head(model)
    learned = _learn(model, head, batches(tokens, generator), Schedule(60 * minutes, steps), say)
    _save(folder, model, head, tokenizer)
    took = {
        "minutes": minutes,
        "python": sys.version.split()[0],
        "tokens_of_text": len(tokens),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "parameters_of_the_head": sum(weight.numel() for weight in head.layers.parameters()),
        **learned,
    }
    (folder / TRAINING).write_text(json.dumps(took, indent=1))
    return took


def _learn(
    model: Qwen3_5ForCausalLM, head: nn.Module, source: Iterator[Tensor], schedule: Schedule, say: Say
) -> dict[str, Any]:
    """Model and head together, as such models are trained; the head's mistakes do not reach into the model's layers."""
    weights = [*model.parameters(), *head.layers.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    seen, means = 0, [math.inf] * (1 + UNROLLED)
    model.train()
    while schedule.share < 1:
        ids = next(source)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        losses = [_loss(model, hidden, ids, 1), *_head_losses(model, head, hidden.detach(), ids)]
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        schedule.step(optimizer)
        seen += ids.numel()
        means = [_mean(before, now.item()) for before, now in zip(means, losses, strict=True)]
        if schedule.steps % 20 == 0:
            told = ", ".join(f"{mean:.2f}" for mean in means)
            say(f"{schedule.share:.0%} of the training: {seen:,} tokens; nats per token, model and head: {told}")
    model.eval()
    return {
        "steps": schedule.steps,
        "tokens": seen,
        "nats_per_token": means[0],
        "nats_per_token_of_the_head": means[1:],
    }


def _head_losses(model: Qwen3_5ForCausalLM, head: nn.Module, hidden: Tensor, ids: Tensor) -> list[Tensor]:
    """One token ahead of the model, and more: after each step the head reads its own hidden states."""
    losses = []
    for ahead in range(1, UNROLLED + 1):
        read = ids[:, ahead:]
        places = torch.arange(ahead, ids.shape[1])[None]
        hidden = head.forward_layer(0, hidden[:, : read.shape[1]], places, None, input_ids=read)
        losses.append(_loss(model, hidden, ids, 1 + ahead))
    return losses


def _loss(model: Qwen3_5ForCausalLM, hidden: Tensor, ids: Tensor, ahead: int) -> Tensor:
    """Of the tokens that lie so far ahead of the first hidden state."""
    wanted = ids[:, ahead:]
    return nn.functional.cross_entropy(model.lm_head(hidden[:, : wanted.shape[1]]).flatten(0, 1), wanted.flatten())


def _mean(before: float, now: float) -> float:
    """A running one."""
    return now if math.isinf(before) else 0.95 * before + 0.05 * now


def _save(folder: Path, model: Qwen3_5ForCausalLM, head: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in head.layers.state_dict().items():
        layer, _, rest = name.partition(".")
        part, _, what = rest.partition(".")
        own = f"layers.{layer}.{what}" if part == "mtp_block" else f"{_NAMES[part]}.{what}"
        weights[f"mtp.{own}"] = weight.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
