"""Requests drawn from the schemas of all paths, by schemathesis where it is installed: none of them makes a 500.

pip install schemathesis && python -m pytest -m slow tests/server/test_schema_fuzz.py
"""

from __future__ import annotations

import os

import httpx
import pytest

from offload_triforce.server.about import TextBody, TokenBody
from offload_triforce.server.chat import ChatRequest
from offload_triforce.server.completions import CompletionRequest
from offload_triforce.server.messages import MessagesRequest

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis, which the project does not depend on")

BODIES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": MessagesRequest,
    "/tokenize": TextBody,
    "/detokenize": TokenBody,
}
# Such as get past the first look at them, most of the time.
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["user", "assistant", "system", "tool", "developer", "king"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]},
        "tool_calls": {"type": "array"},
        "tool_call_id": {},
        "reasoning_content": {},
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}
MESSAGES = {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": 4}
EXAMPLES = int(os.environ.get("TRIFORCE_FUZZ_EXAMPLES", "100"))  # for each path


def described():
    """The paths as OpenAPI has them. The server itself reads bodies by hand, within limits of size and time."""
    parts, paths = {}, {}
    for path, kind in BODIES.items():
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        parts |= schema.pop("$defs", {})
        schema["additionalProperties"] = False  # names that nobody knows are refused at once, and hide the rest
        if "messages" in schema["properties"]:
            schema["properties"]["messages"] = MESSAGES
        parts[kind.__name__] = schema
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        answers = {"default": {"description": "JSON, or events"}}
        paths[path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": answers}}
    about = {"title": "offload-triforce", "version": "1"}
    return {"openapi": "3.1.0", "info": about, "paths": paths, "components": {"schemas": parts}}


@pytest.mark.slow
def test_no_request_that_a_schema_allows_makes_a_500(served):
    from hypothesis import HealthCheck, given, settings

    address, service = served
    statuses = {}
    with httpx.Client(base_url=address, timeout=120) as http:
        for operation in schemathesis.openapi.from_dict(described()).get_all_operations():

            @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(operation.ok().as_strategy())
            def one(case):
                body = case.body
                if isinstance(body, dict) and case.path.startswith("/v1/"):
                    body = {**body, "max_tokens": 2}  # what comes before the answer is looked at, not its length
                    body.pop("max_completion_tokens", None)
                answer = http.post(case.path, json=body)
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                assert answer.status_code in (200, 400, 404), answer.text
                assert answer.status_code == 200 or answer.json()["error"]["message"]

            one()
    print("statuses:", statuses)
    assert sum(statuses.values()) >= EXAMPLES
    assert not service.line.busy
