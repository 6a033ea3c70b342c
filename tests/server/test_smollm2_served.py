"""The real model, served: a chat of two turns, by the client that people use."""

from __future__ import annotations

import openai
import pytest

from offload_triforce import TriForce
from tests.server.conftest import serving

pytestmark = pytest.mark.xdist_group("smollm2")


def test_a_chat_of_two_turns(smollm2):
    turns = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    with TriForce(*smollm2, budget=600) as engine:
        ids = engine.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        expected = engine.generate(ids, do_sample=False, max_new_tokens=24)
        with (
            serving(engine, names=("smollm2",)) as (address, _),
            openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        ):

            def ask(messages):
                how = {"model": "smollm2", "temperature": 0, "max_tokens": 24}
                return client.chat.completions.create(messages=messages, **how)

            first = ask(turns)
            answer = first.choices[0].message.content
            assert answer == expected.text
            assert "Paris" in answer
            assert first.choices[0].finish_reason == "stop"
            second = ask(
                [*turns, {"role": "assistant", "content": answer}, {"role": "user", "content": "And of Italy?"}]
            )
            held = first.usage.prompt_tokens + first.usage.completion_tokens - 2
            assert second.usage.prompt_tokens_details.cached_tokens >= held
            assert "Rome" in second.choices[0].message.content
