"""Request bodies of the OpenAI API, and the vLLM extensions, that the server accepts.

null means absent. Fields that the server does not implement are accepted with their neutral value (a penalty of 0, an
empty list of tools), which clients send by default, and refused with any other, so that no option is silently ignored.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from ..errors import InputError
from ..model.sample import Sampling
from ..tokenizer import Tokenizer

MAX_CHOICES = 16  # per call, and stop strings per call
MIN_TEMPERATURE = 1e-5  # below it sampling is greedy: fp32 logits divided by it could overflow

# Fields that are not implemented, with their neutral values.
UNSUPPORTED = {
    "best_of": [1], "frequency_penalty": [0, 0.0], "function_call": ["none", "auto"], "functions": [[]],
    "logit_bias": [{}], "logprobs": [False], "modalities": [["text"]], "presence_penalty": [0, 0.0],
    "response_format": [{"type": "text"}], "suffix": [""], "tool_choice": ["none", "auto"], "tools": [[]],
    "top_logprobs": [0],
}  # fmt: skip
# Fields that do not affect the generated text.
IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip


class StrictModel(BaseModel):
    """Refuses unknown fields; null fields take their default."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, body):
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class StreamOptions(StrictModel):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # OpenAI's padding against traffic analysis; the server adds none


class CompletionBase(StrictModel):
    """Fields of both endpoints."""

    model: StrictStr
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: StrictFloat = 1.0
    top_p: StrictFloat = 1.0
    top_k: StrictInt = 0  # -1 also means all tokens, as in vLLM
    min_p: StrictFloat = 0.0
    repetition_penalty: Annotated[StrictFloat, Field(ge=0.01, le=100)] = 1.0
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MAX_CHOICES)] = []
    stream: StrictBool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: StrictBool = False

    @model_validator(mode="before")
    @classmethod
    def drop_unsupported(cls, body):
        if not isinstance(body, dict):
            return body
        for name, neutral_values in UNSUPPORTED.items():
            value = body.get(name)
            if value is not None and not any(type(value) is type(v) and value == v for v in neutral_values):
                raise InputError(f"{name} {value!r} is not supported: leave {name} out")
        return {k: v for k, v in body.items() if k not in UNSUPPORTED and k not in IGNORED}

    def sampling(self, choice: int) -> Sampling:
        """Sampling parameters of the choice with that index: each choice has its own seed."""
        seed = None if self.seed is None else (self.seed + choice) % (1 << 63)
        t, r = self.temperature, self.repetition_penalty
        if 0 <= t < MIN_TEMPERATURE:
            return Sampling(repetition_penalty=r, seed=seed)
        return Sampling(t, 0 if self.top_k == -1 else self.top_k, self.top_p, self.min_p, r, seed)

    def stop_strings(self) -> list[str]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if "" in stop:
            raise InputError("a stop string is empty")
        return stop


class CompletionRequest(CompletionBase):
    prompt: StrictStr | Annotated[list[StrictStr] | list[StrictInt] | list[list[StrictInt]], Field(min_length=1)]
    echo: StrictBool = False

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of every prompt."""
        is_batch = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return [tokenizer.encode(p) if isinstance(p, str) else p for p in (self.prompt if is_batch else [self.prompt])]

    def max_new_tokens(self) -> tuple[int | None, int | None]:
        """(requested number or None, default number); a default of None is the rest of the model's positions."""
        return self.max_tokens, 16


class ContentPart(StrictModel):
    """A part of a message's content; `ChatMessage.as_template_input` refuses types other than text."""

    model_config = ConfigDict(extra="ignore")

    type: StrictStr
    text: StrictStr = ""


class ChatMessage(StrictModel):
    """A message as clients send it; they return the server's answers with all fields, also the empty ones."""

    role: StrictStr
    content: StrictStr | Annotated[list[ContentPart], Field(min_length=1)]
    name: StrictStr = ""
    tool_call_id: StrictStr = ""  # clients must send it with a tool's result; the template knows results by their order

    @model_validator(mode="before")
    @classmethod
    def drop_empty_fields(cls, body):
        """Empty lists are left out; an answer may come back without content."""
        if not isinstance(body, dict):
            return body
        body = {k: v for k, v in body.items() if k not in ("tool_calls", "annotations") or v}
        return body | {"content": ""} if body.get("role") == "assistant" and body.get("content") is None else body

    def as_template_input(self) -> dict[str, str]:
        """{"role": ..., "content": text} for a chat template."""
        parts = [ContentPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        if others := {p.type for p in parts} - {"text"}:
            raise InputError(f"content of type {min(others)!r} is not supported: the model reads text only")
        role = "system" if self.role == "developer" else self.role  # OpenAI's newer name
        return {"role": role, "content": "".join(p.text for p in parts)}


class ChatCompletionRequest(CompletionBase):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of the rendered conversation, as a list of one."""
        text = tokenizer.apply_chat_template([m.as_template_input() for m in self.messages])
        return [tokenizer.encode(text, special=True)]

    def max_new_tokens(self) -> tuple[int | None, int | None]:
        """(requested number or None, None): the default is the rest of the model's positions."""
        return self.max_completion_tokens or self.max_tokens, None
