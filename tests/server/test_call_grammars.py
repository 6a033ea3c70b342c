"""Calls that are enforced, in every way in which models write them; what a grammar lets through is read back."""

from __future__ import annotations

import json
from functools import partial

import pytest

from offload_triforce import TriForce
from offload_triforce.server.chat import ChatRequest
from offload_triforce.server.conversation import _reads, prepare
from offload_triforce.server.errors import ApiError
from offload_triforce.server.options import ServerOptions
from offload_triforce.server.replies import MarkParser, ToolCall
from offload_triforce.server.service import Service
from tests.byte_tokenizer import byte_tokenizer
from tests.server.conftest import SMALL, TEMPLATE
from tests.tiny import build

pytest.importorskip("llguidance")

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"$ref": "#/$defs/Days"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city", "days"],
    "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 9}},
}


def tool(name="weather", parameters=PARAMETERS):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def xml(open="<tool_call>", close="</tool_call>", name="weather", **arguments):
    parts = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"{open}\n<function={name}>\n{parts}</function>\n{close}"


def glm(between="\n", name="weather", **arguments):
    pairs = [
        f"<arg_key>{key}</arg_key>{between}<arg_value>{value}</arg_value>{between}" for key, value in arguments.items()
    ]
    return f"<tool_call>{name}{between}{''.join(pairs)}</tool_call>"


def dumped(argument, name="weather", **arguments):
    return json.dumps({"name": name, argument: arguments})


# By what a template holds: how a call is written.
STYLES = {
    "<tool_call>\n<function=": xml,
    "<seed:tool_call>\n<function=": partial(xml, "<seed:tool_call>", "</seed:tool_call>"),
    "<tool_call>{name}\n<arg_key>": glm,
    "<tool_call><arg_key>": partial(glm, ""),
    "<tool_call>": lambda **more: f"<tool_call>\n{dumped('arguments', **more)}\n</tool_call>",
    "[TOOL_CALLS]": lambda **more: f"[TOOL_CALLS][{dumped('arguments', **more)}]",
    "[TOOL_CALLS][ARGS]": lambda name="weather", **more: f"[TOOL_CALLS]{name}[ARGS]{json.dumps(more)}",
    "[TOOL_CALLS][CALL_ID][ARGS]": lambda name="weather", **more: (
        f"[TOOL_CALLS]{name}[CALL_ID]a1b2c3d4e[ARGS]{json.dumps(more)}"
    ),
    "": lambda **more: dumped("parameters", **more),
}
PLAIN = [template for template in STYLES if "<function=" in template or "<arg_key>" in template]


def service(template, special=()):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = TEMPLATE.replace("tool_call", "call") + "{# " + template.replace("{name}", "") + " #}"
    model = build("Llama", vocab_size=len(tokenizer), eos_token_id=2)
    return Service(TriForce(model, tokenizer, **SMALL), ServerOptions(("tiny",)))


def grammar(served, *tools):
    template = str(served.tokenizer.chat_template)
    return served.grammars.of_calls(tools, template, partial(_reads, served))._matcher


def lets(matcher, served, text):
    ids = served.tokenizer.encode(text, add_special_tokens=False)
    if matcher.validate_tokens(ids) < len(ids):
        return False
    twin = matcher.deep_copy()
    return twin.consume_tokens(ids) and twin.is_accepting()


@pytest.mark.parametrize("special", [False, True], ids=["spelled", "tokens"])
@pytest.mark.parametrize("template", STYLES)
def test_what_may_be_called_and_how(template, special):
    marks = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "</arg_value>", "<arg_key>"]
    served, write = service(template, marks if special else ()), STYLES[template]
    matcher = grammar(served, tool(), tool("clock", {"type": "object", "properties": {}}))
    good = [
        {"city": "Rome", "days": 2},
        {"city": "Ro\nme<", "unit": "F", "days": 9, "tags": '["a"]'},
        {"name": "clock"},
    ]
    for arguments in good:
        if template not in PLAIN and "tags" in arguments:
            arguments = {**arguments, "tags": ["a"]}
        assert lets(matcher, served, write(**arguments)), arguments
    for arguments in (
        {"city": "Rome"},
        {"days": 2},
        {"city": "Rome", "days": 10},
        {"city": "Rome", "days": "many"},
        {"city": "Rome", "unit": "K", "days": 2},
        {"name": "other"},
    ):
        assert not lets(matcher, served, write(**arguments)), arguments
    assert not lets(matcher, served, "Rome")
    assert not lets(matcher, served, write(**good[0]) + " and so on")


@pytest.mark.parametrize("template", STYLES)
def test_what_it_lets_through_is_read_back(template):
    write, tools = STYLES[template], [tool()]
    parser = MarkParser("", tools)
    tags = '["a"]' if template in PLAIN else ["a"]
    parts = [*parser.feed(write(city="007", unit="F", days=9, tags=tags)), *parser.finish()]
    (call,) = [part for part in parts if isinstance(part, ToolCall)]
    assert json.loads(call.arguments) == {"city": "007", "unit": "F", "days": 9, "tags": ["a"]}


FEW = {"type": "object", "properties": {"x": {"type": "string", "enum": ["01", "02"]}}, "required": ["x"]}


def test_a_model_is_held_to_it_with_drafts_and_without():
    served, tools = service(PLAIN[0]), [tool("f", FEW)]
    user = {"role": "user", "content": "x"}
    asked = ChatRequest(messages=[user], tools=tools, tool_choice="required", temperature=1.0, seed=3)
    answers = []
    for gamma in (0, 4):
        with TriForce(served.engine.model, served.tokenizer, **{**SMALL, "gamma": gamma}) as engine:
            question = prepare(served, asked.conversation(), asked, 120, None)
            stream = engine.run(question.request, question.seed)
            answers.append("".join(stream))
            assert gamma == 0 or stream.stats.target_only == ()
    assert answers[0] == answers[1]
    parser = MarkParser("", tools)
    (call,) = [part for part in [*parser.feed(answers[0]), *parser.finish()] if isinstance(part, ToolCall)]
    assert json.loads(call.arguments)["x"] in ("01", "02")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"properties": {"a b": {"type": "string"}}}, "'a b' cannot stand in a call"),
        ({"properties": {}, "required": ["x"]}, "requires 'x', which is not among its properties"),
        ({"properties": {"x": {"type": "integer", "minimum": "a"}}}, "the schema cannot be kept to"),
        ({"properties": {f"p{number}": {} for number in range(3000)}}, "2,000 at most"),
    ],
    ids=range(4),
)
def test_refusals(parameters, said):
    with pytest.raises(ApiError, match=said):
        grammar(service(PLAIN[0]), tool(parameters=parameters))


def test_a_way_that_nobody_knows_is_refused():
    """The model's own template of answers reads calls in a way that no grammar here writes."""
    served = service("")
    calls = {"open": "<|call|>", "close": "<|end|>", "content": "json", "repeats": True}
    fields = {"content": {}, "tool_calls": calls}
    served.tokenizer.response_template = {"start_anchor": "[assistant]", "fields": fields}
    if not hasattr(served.tokenizer, "get_response_parser"):
        pytest.skip("this release of transformers has no response templates")
    with pytest.raises(ApiError, match="in a way that cannot be forced here; let tool_choice be 'auto'"):
        grammar(served, tool())
