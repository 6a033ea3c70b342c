"""Answers of a given shape: JSON by a schema, or the call of a tool, by llguidance's grammars.

A grammar's state is kept for each path of the tree (``speculation.grammar``), so that draft tokens keep to it too, and
the answer is the one that plain constrained decoding gives.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from offload_triforce.server.errors import ApiError, invalid, quote
from offload_triforce.speculation.grammar import GrammarProcessor

# Models write JSON with and without spaces and lines; but one that has lost its way must not go on with them for ever.
WHITE_SPACE = {"whitespace_pattern": r"[ \n\t]{0,16}"}
FORMATS = ("text", "json_object", "json_schema")


class Grammars:
    """Grammars over one model's tokens. The table of all tokens is made when it is first needed, and kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]) -> None:
        """``vocabulary``: logits of the model. ``ends``: tokens that end a text."""
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self._table: Any = None
        self._making = threading.Lock()

    def of_format(self, wanted: dict[str, Any] | None) -> GrammarProcessor | None:
        """The grammar of a ``response_format``; None for any text.

        Raises:
            ApiError: it is none, or one that cannot be kept to.
        """
        kind = "text" if wanted is None else wanted.get("type")
        if kind not in FORMATS:
            raise invalid(f"response_format.type must be one of {', '.join(FORMATS)}, not {quote(kind)}", _FORMAT)
        if wanted is None or kind == "text":
            return None
        schema: Any = {"type": "object"}
        if kind == "json_schema":
            about = wanted.get("json_schema")
            schema = about.get("schema") if isinstance(about, dict) else None
            if not isinstance(schema, dict):
                raise invalid("response_format.json_schema.schema is missing: a JSON schema", _FORMAT)
        return self._processor(_json(schema, _FORMAT), _FORMAT)

    def of_calls(self, tools: Sequence[dict[str, Any]], template: str) -> GrammarProcessor:
        """The grammar of one call of one of some tools, as a model with this chat template writes it.

        Raises:
            ApiError: its way to write calls is not known here, or a tool's parameters are no schema.
        """
        if "<function=" in template or "[TOOL_CALLS]" in template:
            message = "this model writes calls in a way that cannot be forced here; let tool_choice be 'auto'"
            raise invalid(message, "tool_choice")
        marked = "<tool_call>" in template
        argument = "arguments" if marked else "parameters"
        schema = _json({"anyOf": [_call_schema(tool["function"], argument) for tool in tools]}, "tools")
        if not marked:
            return self._processor(schema, "tools")
        ways = (
            ("<tool_call>", "</tool_call>"),
            ('"<tool_call>"', '"</tool_call>"'),
        )  # as tokens of their own, or spelled
        failure: ApiError | None = None
        for start, end in ways:
            try:
                return self._processor(f'start: {start} "\\n" call "\\n" {end}\ncall: %json {schema}', "tools")
            except ApiError as error:
                failure = error
        raise failure or AssertionError

    def _processor(self, grammar: str, param: str) -> GrammarProcessor:
        if importlib.util.find_spec("llguidance") is None:
            raise invalid("this needs the package llguidance on the server; pip install llguidance", param)
        import llguidance

        text = grammar if grammar.startswith("start:") else f"start: %json {grammar}"
        matcher = llguidance.LLMatcher(self._tokens(), text, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0][:300]
            raise invalid(f"{param}: the schema cannot be kept to: {reason}", param)
        return GrammarProcessor(matcher, self._vocabulary)

    def _tokens(self) -> Any:
        import llguidance.hf

        with self._making:
            if self._table is None:
                try:
                    ends = self._ends or None
                    self._table = llguidance.hf.from_tokenizer(self._tokenizer, self._vocabulary, ends)
                except Exception as error:
                    message = f"this model's tokenizer does not serve for grammars: {' '.join(str(error).split())}"
                    raise invalid(message) from error
            return self._table


class AfterReasoning(LogitsProcessor):
    """A grammar that begins where the model has ended its reasoning."""

    def __init__(self, grammar: GrammarProcessor, close: int) -> None:
        """``close``: the token that ends the reasoning."""
        self._grammar, self._close, self._begun = grammar, close, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids [1, n] and scores [1, V] -> scores [1, V]."""
        self._begun = self._begun or int(input_ids[0, -1]) == self._close
        return self._grammar(input_ids, scores) if self._begun else scores

    def fork(self) -> AfterReasoning:
        """A copy in the same state."""
        twin = copy.copy(self)
        twin._grammar = self._grammar.fork()
        return twin


_FORMAT = "response_format"


def _json(schema: dict[str, Any], param: str) -> str:
    try:
        return json.dumps({**schema, "x-guidance": WHITE_SPACE}, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{param}: the schema is not JSON: {error}", param) from None


def _call_schema(function: dict[str, Any], argument: str) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, argument: parameters},
        "required": ["name", argument],
        "additionalProperties": False,
    }
