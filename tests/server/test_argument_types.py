"""Arguments that models write as plain text get the types of a tool's schema."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.server.argument_types import properties_of, typed
from offload_triforce.server.tool_formats import Call, read_calls


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "007", "007"),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "string"}, "null", "null"),
        ({"type": "integer"}, "12", 12),
        ({"type": "integer"}, " 12\n", 12),
        ({"type": "integer"}, "12.0", 12),
        ({"type": "integer"}, "12.5", "12.5"),
        ({"type": "integer"}, "a dozen", "a dozen"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "number"}, "1.5e3", 1500.0),
        ({"type": "number"}, "3", 3),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, "no", "no"),
        ({"type": "array", "items": {"type": "string"}}, '["1", 2]', ["1", 2]),
        ({"type": "array"}, "[1", "[1"),
        ({"type": "array"}, "[1e999]", "[1e999]"),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({"type": "object"}, "[1]", "[1]"),
        ({"type": "null"}, "None", None),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["integer", "string"]}, "5", 5),
        ({"type": ["integer", "string"]}, "five", "five"),
        ({"type": "integer", "nullable": True}, "null", None),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, "2", 2),
        ({"oneOf": [{"type": "string"}, {"type": "array"}]}, "[]", []),
        ({"$ref": "#/$defs/City"}, "12", "12"),
        ({"$ref": "#/$defs/Days"}, "12", 12),
        ({"$ref": "#/$defs/Round"}, "12", 12),
        ({"$ref": "#/nowhere/at/all"}, "12", 12),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"enum": ["1", 1]}, "1", "1"),
        ({"const": True}, "true", True),
        ({"type": "string", "enum": ["1"]}, "1", "1"),
        ({}, "12", 12),
        ({}, "twelve", "twelve"),
        (True, "[1]", [1]),
        ({"type": 3, "anyOf": 7, "enum": "x"}, "12", 12),
    ],
    ids=str,
)
def test_types(schema, text, value):
    defs = {"City": {"type": "string"}, "Days": {"type": "integer"}, "Round": {"anyOf": [{"$ref": "#/$defs/Round"}]}}
    found = typed(text, "x", {"type": "object", "properties": {"x": schema}, "$defs": defs})
    assert found == value
    assert type(found) is type(value)


def test_properties_may_be_referred_to():
    parameters = {"$ref": "#/$defs/All", "$defs": {"All": {"properties": {"x": {"type": "string"}}}}}
    assert properties_of(parameters) == {"x": {"type": "string"}}
    assert typed("1", "x", parameters) == "1"


def test_a_schema_that_refers_to_itself_in_many_ways_ends():
    tangle = {"anyOf": [{"$ref": "#/$defs/T"}] * 50}
    assert typed("1", "x", {"properties": {"x": tangle}, "$defs": {"T": tangle}}) == 1


def tool(**properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


TOOLS = [tool(zip={"type": "string"}, days={"type": "integer"})]


@pytest.mark.parametrize(
    "text",
    [
        "<function=f>\n<parameter=zip>\n00144\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>",
        "<function=f><parameter=zip>00144</parameter><parameter=days>2</parameter></function>",
        "<function=f>\n<parameter=zip>\n00144\n<parameter=days>\n2\n</function>",
        "f\n<arg_key>zip</arg_key>\n<arg_value>00144</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>",
        "f<arg_key>zip</arg_key><arg_value>00144</arg_value><arg_key>days</arg_key><arg_value>2</arg_value>",
    ],
    ids=range(5),
)
def test_formats_that_write_plain_text(text):
    assert read_calls(text, TOOLS) == [Call("f", {"zip": "00144", "days": 2})]


def test_without_arguments():
    assert read_calls("<function=f>\n</function>", TOOLS) == [Call("f", {})]
    assert read_calls("f", TOOLS) == [Call("f", {})]
    assert read_calls("g", TOOLS) == []


MARKS = ["<parameter=days>", "</function>", "<function=f>", "\n", "{", "1", "é", " ", "<arg_key>", "x"]


@given(st.lists(st.sampled_from(MARKS)).map("".join))
def test_a_text_is_its_own_whatever_it_holds(text):
    written = f"<function=f>\n<parameter=zip>\n{text}\n</parameter>\n<parameter=days>\n1\n</parameter>\n</function>"
    assert read_calls(written + "\n" + written, TOOLS) == [Call("f", {"zip": text, "days": 1})] * 2


@given(st.text(), st.recursive(st.none() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)))
def test_what_comes_out_is_json(text, schema):
    value = typed(text, "x", {"properties": {"x": schema}})
    assert json.loads(json.dumps(value, allow_nan=False)) == value


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_no_json_has_make_no_call(number):
    assert read_calls(f'{{"name": "f", "arguments": {{"x": {number}}}}}') == []
