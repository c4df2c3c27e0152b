"""The form of outputs that a request asks for, as a grammar: JSON, a schema, a regex, a choice."""

import json

from ..errors import RequestError
from ..inference.constraints import Grammar, GrammarKind
from .forms import Schema
from .protocol import ChatRequest, CompletionRequest

FORMS: tuple[GrammarKind, ...] = ("json", "regex", "choice", "grammar")
ANY_OBJECT: Schema = {"type": "object"}


def requested_grammar(body: CompletionRequest | ChatRequest) -> Grammar | None:
    """Return the grammar of the outputs; None for any text. A request has one at most.

    Raises RequestError for a schema that is nested too deeply.
    """
    form, structured = body.response_format, body.structured_outputs
    if form is not None and form.type == "json_object":
        return _json_grammar(ANY_OBJECT, "response_format")
    if form is not None and form.json_schema is not None:
        return _json_grammar(form.json_schema.json_schema, "response_format.json_schema.schema")
    if structured is not None and structured.json_object:
        return _json_grammar(ANY_OBJECT, "structured_outputs.json_object")
    for kind in FORMS:
        value, field = getattr(body, f"guided_{kind}"), f"guided_{kind}"
        if structured is not None:
            value, field = structured.forms[kind], f"structured_outputs.{kind}"
        if value is not None and kind == "json":
            return _json_grammar(value, field)
        if value is not None:
            return Grammar(kind, value if isinstance(value, str) else json.dumps(value), field)
    return None


def _json_grammar(schema: Schema | str, field: str) -> Grammar:
    try:
        return Grammar("json", schema if isinstance(schema, str) else json.dumps(schema), field)
    except RecursionError as error:
        raise RequestError(f"{field}: it is nested too deeply.", field) from error
