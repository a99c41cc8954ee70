"""Fields that say what an output is to look like: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

import json

from epd.errors import BadRequest, Unsupported
from epd.gateway.guide import Guide
from epd.http.fields import MAX_DEPTH, Fields, is_deeper, shown

_KINDS = ("json", "regex", "choice")
_ANY_OBJECT = '{"type": "object"}'


def parse_guide(fields: Fields, *, ignore_eos: bool) -> Guide | None:
    """Takes both fields; None where the output is free. Raises BadRequest and Unsupported, which name the field."""
    found = [guide for guide in (_response_format(fields), _structured_outputs(fields)) if guide is not None]
    if len(found) > 1:
        raise BadRequest("response_format and structured_outputs both say what the output is to look like", param=found[1].param)
    if found and ignore_eos:
        raise BadRequest("an output that has a form ends with it: ignore_eos must be false", param="ignore_eos")
    return found[0] if found else None


def _response_format(fields: Fields) -> Guide | None:
    value = fields.take("response_format")
    if value is None:
        return None
    form = Fields(value, "response_format")
    form_type = form.string("type", choices=("text", "json_object", "json_schema"))
    guide = None
    if form_type == "json_object":
        guide = Guide("schema", _ANY_OBJECT, "response_format")
    elif form_type == "json_schema":
        guide = _json_schema(
            Fields(form.require("json_schema", what="an object with a name and a schema"), form.path("json_schema"))
        )
    elif form_type is None:
        form.require("type", what='"text", "json_object" or "json_schema"')
    form.refuse_rest({})
    return guide


def _json_schema(fields: Fields) -> Guide:
    """Names and descriptions are for people; what is asked for is followed strictly, also where it need not be."""
    for name in ("name", "description"):
        fields.string(name)
    fields.boolean("strict", False)
    schema = fields.require("schema", what="a JSON schema")
    fields.refuse_rest({})
    return _schema(schema, fields.path("schema"))


def _structured_outputs(fields: Fields) -> Guide | None:
    value = fields.take("structured_outputs")
    if value is None:
        return None
    inner = Fields(value, "structured_outputs")
    given = {name: found for name in _KINDS if (found := inner.take(name)) is not None}
    inner.refuse_rest({})
    if len(given) != 1:
        raise BadRequest(f"structured_outputs must have one of {', '.join(_KINDS)}", param="structured_outputs")
    ((name, found),) = given.items()
    path = inner.path(name)
    if name == "json":
        return _schema(_parsed(found, path) if isinstance(found, str) else found, path)
    if name == "regex":
        if not isinstance(found, str) or not found:
            raise inner.wrong(name, "a regular expression", found)
        return Guide("regex", found, path)
    if not isinstance(found, list) or not found or not all(isinstance(each, str) and each for each in found):
        raise inner.wrong(name, "a non-empty array of non-empty strings", found)
    return Guide("choice", json.dumps(found), path)


def _schema(value: object, path: str) -> Guide:
    if not isinstance(value, dict):
        raise Unsupported(f"{path} must be an object, not {shown(value)}", param=path)
    if is_deeper(value, MAX_DEPTH):
        raise BadRequest(f"{path} is nested more than {MAX_DEPTH} levels deep", param=path)
    return Guide("schema", json.dumps(value), path)


def _parsed(text: str, path: str) -> object:
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRequest(f"{path} is nested too deeply", param=path) from None
    except ValueError as error:
        raise BadRequest(f"{path} is no JSON: {error}", param=path) from error
