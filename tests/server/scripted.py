"""A model that says what it is told to: after each piece of its script comes the next, by weights that say so.

The engine is the real one. What the script says depends on the end of the prompt, which the chat template sets: a
model that was told of tools thinks and calls one; with the tool's answer it says what it found; without tools it says
that it has none; and where the template has opened the reasoning, it goes on with that.
"""

from __future__ import annotations

import itertools

import torch
from tokenizers import AddedToken

from offload_triforce import TriForce
from tests.byte_tokenizer import byte_tokenizer
from tests.server.conftest import SMALL
from tests.tiny import build

THOUGHT, INTRODUCTION = "I should look it up.", "Let me see."
CALL = {"city": "Oslo", "days": 2}
FOUND, ALONE = "It rains in Oslo.", "I cannot look."
SUM, RESULT = "Two and two.", "Four."
SCRIPTS = [
    (
        "[agent]",
        f"<think>\n{THOUGHT}",
        f"\n</think>\n\n{INTRODUCTION}\n",
        "<tool_call>\n",
        '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}',
        "\n</tool_call>",
        "</s>",
    ),
    ("[found]", FOUND, "</s>"),
    ("[alone]", "<think>\n\n</think>\n\n", ALONE, "</s>"),
    ("[opened]<think>\n", SUM, "</think>", f"\n\n{RESULT}", "</s>"),
]
TEMPLATE = (
    "{% if tools %}[tools] {% for tool in tools %}{{ tool.function.name }} {% endfor %}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '[opened]<think>\n' if enable_thinking else '[alone]' if not tools "
    "else '[found]' if messages[-1].role == 'tool' else '[agent]' }}{% endif %}"
)
SURE = 3.0  # of the next piece: the logits are this times the root of the hidden size


def scripted_engine(**settings) -> TriForce:
    """An engine over a Llama without attention to speak of: its head maps each token of the script to the next."""
    tokenizer = byte_tokenizer()
    pieces = [piece for script in SCRIPTS for piece in script if piece != "</s>"]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    tokenizer.chat_template = TEMPLATE
    size = len(tokenizer)
    hidden = -(-size // 6) * 6  # six heads
    model = build("Llama", vocab_size=size, hidden_size=hidden, eos_token_id=2, tie_word_embeddings=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(size, hidden))
        head = model.get_output_embeddings().weight.zero_()
        for script in SCRIPTS:
            ids = tokenizer.convert_tokens_to_ids(list(script))
            for token, following in itertools.pairwise(ids):
                head[following, token] = SURE
    return TriForce(model, tokenizer, **{**SMALL, **settings})
