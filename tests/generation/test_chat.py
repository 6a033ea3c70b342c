"""Messages as prompts: through the model's own template, or refused in one sentence."""

import pytest
import torch

from offload_triforce import InputError, TriForce
from offload_triforce.generation.chat import chat_ids, has_chat_format, is_chat
from offload_triforce.generation.prompt import build_prompt
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny import tiny_model

TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('a chat cannot begin with a tool') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if loud %}!{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "hi"}


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text(tokenizer, messages, **variables):
    return tokenizer.decode(chat_ids(tokenizer, messages, **variables))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], "[user]hi</s>[assistant]"),
        ([{"role": "system", "content": "Be short."}, USER], "[system]Be short.</s>[user]hi</s>[assistant]"),
        ([USER, {"role": "assistant", "content": "Well"}], "[user]hi</s>[assistant]Well"),
        (
            [{**USER, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "[user]a\nb</s>[assistant]",
        ),
        ([{**USER, "content": ""}], "[user]</s>[assistant]"),
        ((USER,), "[user]hi</s>[assistant]"),
    ],
)
def test_format(tokenizer, messages, expected):
    """Special tokens are tokens, and none is added that the template does not say."""
    assert text(tokenizer, messages) == expected
    assert tokenizer.eos_token_id in chat_ids(tokenizer, [USER])


def test_variables_of_the_template(tokenizer):
    assert text(tokenizer, [USER], loud=True) == "[user]hi</s>![assistant]"


def test_messages_of_tools_need_no_text(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert text(tokenizer, [USER, call, {"role": "tool", "content": "3"}]).endswith("[tool]3</s>[assistant]")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([USER, "hi"], "message 2 must have a role and a content, not be 'hi'"),
        ([{"content": "hi"}], "the role of message 1 must be a text such as 'user', not None"),
        ([{"role": 3, "content": "hi"}], "the role of message 1 must be a text such as 'user', not 3"),
        ([{"role": "user"}], "the content of message 1 must be a text, not None"),
        ([{"role": "user", "content": 7}], "the content of message 1 must be a text, not 7"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 1 has a part that is no text"),
        ([{"role": "tool", "content": "3"}], "chat template refuses these messages: a chat cannot begin with a tool"),
    ],
)
def test_refused(tokenizer, messages, words):
    with pytest.raises(InputError) as error:
        chat_ids(tokenizer, messages)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_that_is_broken(tokenizer):
    tokenizer.chat_template = "{{ messages[0].role + 1 }}"
    with pytest.raises(InputError, match=r"chat template refuses these messages: .*concatenate"):
        chat_ids(tokenizer, [USER])


def test_without_template_or_tokenizer():
    assert not has_chat_format(byte_tokenizer())
    with pytest.raises(InputError, match="this tokenizer has no chat template; give the prompt as text"):
        chat_ids(byte_tokenizer(), [USER])
    with pytest.raises(InputError, match="messages need a tokenizer with a chat template"):
        chat_ids(None, [USER])


@pytest.mark.parametrize("prompt", ["hi", [1, 2], [], [[1, 2]], torch.tensor([1]), None, USER])
def test_other_prompts_are_no_chat(prompt):
    assert not is_chat(prompt)


def test_generate(tokenizer):
    """The same prompt as by the template; and the command line's door makes the same of a question."""
    with TriForce(tiny_model(vocab_size=259), tokenizer, draft="none") as engine:
        result = engine.generate([USER], max_new_tokens=2, do_sample=False)
        assert engine.tokenizer.decode(result.prompt_ids) == "[user]hi</s>[assistant]"
        assert result.prompt_ids == build_prompt(tokenizer, None, "hi")
        with pytest.raises(InputError, match="message 2 must have"):
            engine.generate([USER, 5])
    with pytest.raises(InputError, match="messages need a tokenizer"):
        TriForce(tiny_model()).generate([USER])


@pytest.mark.xdist_group("smollm2")
def test_real_template(smollm2):
    """As transformers puts it together, by its two steps."""
    _, tokenizer = smollm2
    messages = [{"role": "system", "content": "Be short."}, USER]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat_ids(tokenizer, messages) == tokenizer(rendered, add_special_tokens=False).input_ids
    assert rendered.endswith("<|im_start|>assistant\n")
