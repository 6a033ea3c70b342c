"""Answers of a given shape: JSON by a schema, or the call of a tool, by llguidance's grammars.

A grammar's state is kept for each path of the tree (``speculation.grammar``), so that draft tokens keep to it too, and
the answer is the one that plain constrained decoding gives.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from offload_triforce.server.call_grammars import NAME, CallGrammar, schema_text
from offload_triforce.server.errors import invalid, quote
from offload_triforce.speculation.grammar import GrammarProcessor

_FORMAT = "response_format"
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
        return self._processor(f"start: %json {schema_text(schema, _FORMAT)}", _FORMAT)

    def of_calls(
        self, tools: Sequence[dict[str, Any]], template: str, reads: Callable[[str, dict[str, Any]], bool]
    ) -> GrammarProcessor:
        """The grammar of one call of one of some tools, as a model with this chat template writes it.

        ``reads``: whether a text would be taken for a call, where there were such a tool.

        Raises:
            ApiError: its way to write calls is not known here, or a tool's parameters are no schema.
        """
        calls = CallGrammar(template, self._mark)
        text = calls.of([tool["function"] for tool in tools])
        if not reads(calls.example, {"type": "function", "function": {"name": NAME, "parameters": {}}}):
            message = "this model writes calls in a way that cannot be forced here; let tool_choice be 'auto'"
            raise invalid(message, "tool_choice")
        return self._processor(text, "tools")

    def _mark(self, text: str) -> str:
        """How a grammar spells a mark: by its id, where it is a special token."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        number = next((number for number, token in added.items() if token.special and token.content == text), None)
        return json.dumps(text) if number is None else f"<[{number}]>"

    def _processor(self, grammar: str, param: str) -> GrammarProcessor:
        if importlib.util.find_spec("llguidance") is None:
            raise invalid("this needs the package llguidance on the server; pip install llguidance", param)
        import llguidance

        matcher = llguidance.LLMatcher(self._tokens(), grammar, log_level=0)
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
