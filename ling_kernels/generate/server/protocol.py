"""Request bodies of the OpenAI API, and the vLLM extensions, that the server accepts.

null means absent. Fields that the server does not implement are accepted with their neutral value (a penalty of 0, no
schema), which clients send by default, and refused with any other, so that no option is silently ignored.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from ...errors import InputError
from ...model.sample import Sampling
from ...tokenizer import Tokenizer
from ..grammar import Grammar, Grammars
from ..logprobs import MOST
from .body import StrictModel, shown
from .structured import ResponseFormat, StructuredOutputs, ToolChoice, call_grammar, naming

MAX_CHOICES = 16  # per call
MAX_PROMPTS = 128  # per call: LangChain sends 20, lm-eval what its batch size says
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 1000  # an end of the text that may begin one is held back
MAX_BIASES = 1024  # of logit_bias, for every choice
MAX_MESSAGES, MAX_PARTS, MAX_TOOLS = 4096, 1024, 512  # of a chat, a message's content; calls in a message too
MIN_TEMPERATURE = 1e-5  # below it sampling is greedy: fp32 logits divided by it could overflow

# Fields that are not implemented, with their neutral values.
UNSUPPORTED: dict[str, list] = {
    "best_of": [1], "function_call": ["none", "auto"], "functions": [[]], "modalities": [["text"]],
    "suffix": [""],
}  # fmt: skip
# Fields that do not affect the generated text.
IGNORED = {
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # generation_config.json may have them


Texts = Annotated[list[StrictStr], Field(fail_fast=True)]
Ids = Annotated[list[StrictInt], Field(fail_fast=True)]


def wrong_bias_alone(biases: Any) -> Any:
    """The first entry that is no number, if there is one: a dict has no FailFast."""
    wrong = ((k, v) for k, v in biases.items() if type(v) not in (int, float)) if isinstance(biases, dict) else ()
    return next(({k: v} for k, v in wrong), biases)


def few_prompts(prompt: Any) -> Any:
    """Checked before any of them is."""
    if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
        raise InputError(f"it has {len(prompt)} texts; it may have at most {MAX_PROMPTS}")
    return prompt


class StreamOptions(StrictModel):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False  # vLLM's: the counts so far in every event
    include_obfuscation: StrictBool = False  # OpenAI's padding against traffic analysis; the server adds none


class CompletionBase(StrictModel):
    """Fields of both endpoints."""

    model: StrictStr
    temperature: StrictFloat = 1.0
    top_p: StrictFloat = 1.0
    top_k: StrictInt = 0  # -1 also means all tokens, as in vLLM
    min_p: StrictFloat = 0.0
    repetition_penalty: Annotated[StrictFloat, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[StrictFloat, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[StrictFloat, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[StrictStr, StrictFloat], Field(max_length=MAX_BIASES), BeforeValidator(wrong_bias_alone)
    ] = {}
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: StrictStr | Texts = []
    stop_token_ids: Annotated[list[StrictInt], Field(max_length=256, fail_fast=True)] = []
    stream: StrictBool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: StrictBool = False
    min_tokens: Annotated[StrictInt, Field(ge=0)] = 0
    skip_special_tokens: StrictBool = False
    response_format: ResponseFormat = ResponseFormat(type="text")
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[StrictInt, Field(ge=-(1 << 31), lt=1 << 31)] = 0  # vLLM's: the smallest is next

    @model_validator(mode="before")
    @classmethod
    def drop_unsupported(cls, body):
        if not isinstance(body, dict):
            return body
        for name, neutral_values in UNSUPPORTED.items():
            value = body.get(name)
            if value is not None and not any(type(value) is type(v) and value == v for v in neutral_values):
                raise InputError(f"{name} {shown(value)} is not supported: leave {name} out")
        return {k: v for k, v in body.items() if k not in UNSUPPORTED and k not in IGNORED}

    def sampling(self, choice: int, defaults: dict) -> Sampling:
        """Sampling parameters of the choice with that index: each choice has its own seed. defaults: of SAMPLING,
        for fields that the body leaves out."""
        given = {k: defaults.get(k, getattr(self, k)) if k not in self.model_fields_set else getattr(self, k)
                 for k in SAMPLING}  # fmt: skip
        others: dict[str, Any] = dict(
            seed=None if self.seed is None else (self.seed + choice) % (1 << 63),
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty, logit_bias=self.biases(),
        )  # fmt: skip
        if 0 <= given["temperature"] < MIN_TEMPERATURE:
            given = {"repetition_penalty": given["repetition_penalty"]}
        elif given["top_k"] == -1:
            given["top_k"] = 0
        return Sampling(**given, **others)

    def biases(self) -> dict[int, float]:
        """logit_bias by token id."""
        if odd := [name for name in self.logit_bias if not (name.isascii() and name.isdecimal() and len(name) < 10)]:
            raise InputError(f"logit_bias has {shown(odd[0])}, which is no token id")
        return {int(name): bias for name, bias in self.logit_bias.items()}

    @property
    def structured(self) -> bool:
        return self.response_format.type != "text" or self.structured_outputs is not None

    def grammar(self, grammars: Callable[[], Grammars]) -> Grammar:
        """The grammar of a structured answer. Raises InputError that names the field."""
        kind, schema = self.response_format.type, self.response_format.json_schema
        if kind != "text" and self.structured_outputs is not None:
            raise InputError("response_format and structured_outputs: give one of them")
        field = "structured_outputs" if kind == "text" else "response_format"
        if self.ignore_eos or self.min_tokens:
            raise InputError(f"{field} says where an answer ends: leave ignore_eos and min_tokens out")
        with naming(field):
            if self.structured_outputs is not None:
                return self.structured_outputs.read(grammars())
            return grammars().json(None if schema is None else schema.schema_)

    def stop_strings(self) -> list[str]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stop) > MAX_STOP_STRINGS:
            raise InputError(f"stop has {len(stop)} strings; it may have at most {MAX_STOP_STRINGS}")
        if "" in stop:
            raise InputError("stop has an empty string")
        if max(map(len, stop), default=0) > MAX_STOP_CHARACTERS:
            raise InputError(f"stop has a string of more than {MAX_STOP_CHARACTERS} characters")
        return stop


class CompletionRequest(CompletionBase):
    prompt: Annotated[
        StrictStr | Annotated[Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)], Field(min_length=1)],
        BeforeValidator(few_prompts),
    ]
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    echo: StrictBool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST)] | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of every prompt."""
        is_batch = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return [tokenizer.encode(p) if isinstance(p, str) else p for p in (self.prompt if is_batch else [self.prompt])]

    def max_new_tokens(self) -> tuple[int | None, int | None]:
        """(requested number or None, default number); a default of None is the rest of the model's positions. A
        request for the log-probabilities of its prompt alone still generates a token, which is not shown."""
        return None if self.max_tokens is None else max(1, self.max_tokens), 16

    @property
    def shows_answer(self) -> bool:
        return self.max_tokens != 0

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None


class ContentPart(StrictModel):
    """A part of a message's content; `ChatMessage.as_template_input` refuses types other than text."""

    model_config = ConfigDict(extra="ignore")

    type: StrictStr
    text: StrictStr = ""


class FunctionCall(StrictModel):
    name: Annotated[StrictStr, Field(min_length=1)]
    arguments: StrictStr | dict[str, Any]


class ToolCall(StrictModel):
    function: FunctionCall
    id: StrictStr = ""
    type: Literal["function"] = "function"
    index: StrictInt = 0


class FunctionTool(StrictModel):
    """A function that the model may call; everything in it is shown to the model."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: dict[str, Any]

    @model_validator(mode="after")
    def check_name(self):
        if not (isinstance(self.function.get("name"), str) and self.function["name"]):
            raise InputError("a tool's function has no name")
        if not isinstance(self.strict, bool):
            raise InputError(f"strict of the function {self.function['name']:.80} is neither true nor false")
        return self

    @property
    def strict(self) -> bool:
        """Whether the arguments of its calls must follow the schema of its parameters."""
        return self.function.get("strict") or False


class ChatMessage(StrictModel):
    """A message as clients send it; they return the server's answers with all fields, also the empty ones."""

    role: StrictStr
    content: StrictStr | Annotated[list[ContentPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    name: StrictStr = ""
    tool_call_id: StrictStr = ""  # clients must send it with a tool's result; the template knows results by their order
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    reasoning_content: StrictStr = ""

    @model_validator(mode="before")
    @classmethod
    def drop_empty_fields(cls, body):
        """Empty lists are left out; an answer may come back without content."""
        if not isinstance(body, dict):
            return body
        body = {k: v for k, v in body.items() if k != "annotations" or v}
        return body | {"content": ""} if body.get("role") == "assistant" and body.get("content") is None else body

    def as_template_input(self) -> dict[str, Any]:
        """{"role": ..., "content": text} for a chat template, with tool calls and thoughts where there are any."""
        parts = [ContentPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        if others := {p.type for p in parts} - {"text"}:
            raise InputError(f"content of type {min(others)!r} is not supported: the model reads text only")
        if (self.tool_calls or self.reasoning_content) and self.role != "assistant":
            raise InputError("messages: tool_calls and reasoning_content are of role assistant alone")
        role = "system" if self.role == "developer" else self.role  # OpenAI's newer name
        message: dict[str, Any] = {"role": role, "content": "".join(p.text for p in parts)}
        if self.tool_calls:
            message["tool_calls"] = [template_call(call) for call in self.tool_calls]
        return message | ({"reasoning_content": self.reasoning_content} if self.reasoning_content else {})


def template_call(call: ToolCall) -> dict[str, Any]:
    """A call whose arguments are an object, as templates write them; clients send them as JSON text."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise InputError(f"messages: the arguments of the call of {call.function.name} are no JSON object")
    return dict(type="function", function=dict(name=call.function.name, arguments=arguments))


Messages = Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class TemplateOptions(StrictModel):
    """vLLM's chat_template_kwargs, of which there is one."""

    enable_thinking: StrictBool | None = None  # whether an answer begins with a thought; None: as the template has it


class ChatPrompt(StrictModel):
    """A conversation, and what its prompt depends on besides."""

    messages: Messages = []
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    continue_final_message: StrictBool = False  # vLLM's: the answer goes on with the last message
    add_generation_prompt: StrictBool = True
    chat_template_kwargs: TemplateOptions = TemplateOptions()

    def rendered(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids of the rendered conversation."""
        messages = [m.as_template_input() for m in self.messages]
        tools = [tool.model_dump() for tool in self.tools] if self.parses_calls else None
        thinking = self.chat_template_kwargs.enable_thinking
        if not self.continue_final_message:
            text = tokenizer.apply_chat_template(messages, self.add_generation_prompt, tools, thinking)
            return tokenizer.encode(text, special=True)
        last = messages.pop()
        if not messages or last.keys() != {"role", "content"} or last["role"] != "assistant":
            raise InputError(
                "continue_final_message needs a last message of role assistant, with content alone, after another one"
            )
        text = tokenizer.apply_chat_template(messages, True, tools, thinking)
        return tokenizer.encode(text, special=True) + tokenizer.encode(last["content"])

    @property
    def parses_calls(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"


class ChatCompletionRequest(CompletionBase, ChatPrompt):
    messages: Annotated[Messages, Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST)] = 0
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST)] | None = None  # vLLM's
    parallel_tool_calls: StrictBool = True  # else at most one call
    echo: Literal[False] = False
    shows_answer: Literal[True] = True

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of the rendered conversation, as a list of one."""
        return [self.rendered(tokenizer)]

    @property
    def must_call(self) -> bool:
        return self.tool_choice not in ("none", "auto")

    @property
    def structured(self) -> bool:
        return super().structured or self.must_call or self.strict_calls

    @property
    def free_text(self) -> bool:
        """Whether the grammar lets any text come, and says what calls look like."""
        return not (super().structured or self.must_call)

    @property
    def strict_calls(self) -> bool:
        return self.parses_calls and any(tool.strict for tool in self.tools)

    def grammar(self, grammars: Callable[[], Grammars]) -> Grammar:
        """Of a text that has the form of response_format or structured_outputs, of calls, or of either."""
        choice, text = self.tool_choice, super().grammar(grammars) if super().structured else None
        if text is not None and not (self.parses_calls or self.must_call):
            return text
        field = "tool_choice" if self.must_call else "tools"
        if self.ignore_eos or self.min_tokens:
            raise InputError(f"{field} says where an answer ends: leave ignore_eos and min_tokens out")
        functions = [tool.function for tool in self.tools]
        if isinstance(choice, ToolChoice):
            functions = [f for f in functions if f["name"] == choice.function.name]
        if not functions:
            raise InputError("tool_choice: tools has no such function")
        several = self.parallel_tool_calls and not isinstance(choice, ToolChoice)
        with naming(field):
            return call_grammar(grammars(), functions, several, False if self.must_call else text or True)

    def max_new_tokens(self) -> tuple[int | None, int | None]:
        """(requested number or None, None): the default is the rest of the model's positions."""
        return self.max_completion_tokens or self.max_tokens, None

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs needs logprobs true")
        return self.top_logprobs if self.logprobs else None

    @property
    def num_prompt_logprobs(self) -> int | None:
        if self.prompt_logprobs is not None and self.stream:
            raise InputError("prompt_logprobs come with a whole answer: leave stream out")
        return self.prompt_logprobs


Body = CompletionRequest | ChatCompletionRequest


class TokenizeRequest(ChatPrompt):
    """A prompt, or a conversation as the chat endpoint takes it."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    add_special_tokens: StrictBool = True  # false: the prompt spells its control tokens out, as a rendered chat does

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        if (self.prompt is None) == (not self.messages):
            raise InputError("give either prompt or messages")
        if self.prompt is None:
            return self.rendered(tokenizer)
        if given := self.model_fields_set & ChatPrompt.model_fields.keys() - {"messages"}:
            raise InputError(f"{min(given)} belongs to messages: leave it out beside a prompt")
        return tokenizer.encode(self.prompt, special=not self.add_special_tokens)


class DetokenizeRequest(StrictModel):
    model: StrictStr | None = None
    tokens: Ids

    def text(self, tokenizer: Tokenizer, vocabulary: int) -> str:
        if unknown := [t for t in self.tokens if not 0 <= t < vocabulary]:
            raise InputError(f"tokens: {shown(unknown[0])} is outside the vocabulary of {vocabulary}")
        return tokenizer.decode(self.tokens)
