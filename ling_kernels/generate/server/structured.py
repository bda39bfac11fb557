"""What a body says about the form of its answer, and the grammar for it: `response_format` of OpenAI's API,
`structured_outputs` of vLLM's, and a forced `tool_choice`."""

import json
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictStr, model_validator

from ...errors import InputError
from ..grammar import Grammar, Grammars
from .body import StrictModel
from .text_parts import CALL, END_CALL, END_THINK, THINK


class JsonSchema(StrictModel):
    name: StrictStr = ""
    description: StrictStr = ""
    strict: StrictBool = True  # the schema is followed in any case
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InputError("response_format: json_schema goes with type json_schema")
        return self


class StructuredOutputs(StrictModel):
    json_: dict[str, Any] | StrictStr | None = Field(None, alias="json")
    regex: StrictStr | None = None
    choice: Annotated[list[StrictStr], Field(fail_fast=True)] | None = None
    grammar: StrictStr | None = None  # in Lark's notation
    json_object: StrictBool = False

    @model_validator(mode="after")
    def check_one(self):
        if sum(getattr(self, name) not in (None, False) for name in self.model_fields_set) != 1:
            raise InputError("structured_outputs has one of json, regex, choice, grammar and json_object")
        return self

    def read(self, grammars: Grammars) -> Grammar | None:
        if self.json_ is not None:
            return grammars.json(parsed(self.json_) if isinstance(self.json_, str) else self.json_)
        if self.regex is not None:
            return grammars.regex(self.regex)
        if self.choice is not None:
            return grammars.choice(self.choice)
        if self.grammar is not None:
            return grammars.lark(self.grammar)
        return grammars.json() if self.json_object else None


class NamedFunction(StrictModel):
    name: StrictStr


class ToolChoice(StrictModel):
    """The function that an answer must call."""

    type: Literal["function"]
    function: NamedFunction


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("the schema is no JSON") from None


@contextmanager
def naming(field: str):
    """Errors begin with the field."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{field}: {error}") from None


def call_grammar(
    grammars: Grammars, functions: Sequence[dict[str, Any]], several: bool, text: Grammar | bool = False
) -> Grammar:
    """Calls of these functions, as Ling writes them: one, or several. Arguments follow the schema of their function.

    text: what may come instead of calls; True: any text, also before them. It is then the model's choice to call, and
    arguments of a function that is not `strict` are any JSON object.
    """
    inner, calls = {}, []
    for i, function in enumerate(functions):
        schema = function.get("parameters") if function.get("strict") or text is False else None
        with naming(f"the parameters of {function['name']:.80}"):
            inner[f"arguments{i}"] = grammars.json(schema or {"type": "object"})
        head = f'\n{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        calls.append(f"{json.dumps(head, ensure_ascii=False)} @arguments{i}")
    begin, end = grammars.token(CALL), grammars.token(END_CALL)
    rest = f'rest: ({" | ".join(calls)}) "}}\\n" {end}'
    more = f'("\\n" {begin} rest)*' if several else ""
    start = f"{begin} rest {more}"
    if isinstance(text, Grammar):
        start, inner["text"] = f"@text | {start}", text
    elif text:
        rest = f"{rest}\nTEXT: /(.|\\n)+/ & ~/(.|\\n)*{CALL}(.|\\n)*/"
        if begin.startswith("<"):  # a control token, before which any text ends
            start = f"TEXT? ({start})?"
        else:
            start, rest = f"TEXT? | before rest {more}", f"{rest}\nbefore[suffix={begin}]: /(.|\\n)*/"
    return grammars.around(f"start: {start}\n{rest}", inner)


def after_thought(grammars: Grammars, grammar: Grammar, opened: bool) -> Grammar:
    """The grammar's text behind a thought: one that the prompt has opened, or one that may come."""
    begin, end = grammars.token(THINK), grammars.token(END_THINK)
    if end.startswith("<"):  # a control token, before which any text ends
        rest, rule = f"TEXT? {end}", "TEXT: /(.|\\n)+/"
    else:
        rest, rule = "rest", f"rest[suffix={end}]: /(.|\\n)*/"
    head, some = ("", "thought") if opened else (f'"\\n"{{0,2}} {begin} ', "thought?")
    lark = f'start: {some} @answer\nthought: {head}{rest} "\\n"{{0,2}}\n{rule}'
    return grammars.around(lark, {"answer": grammar})
