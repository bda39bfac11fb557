"""What a call of OpenAI's API may ask of the server.

null is as good as absent. A field that asks for nothing (a penalty of 0, an empty list of tools) is taken, since
clients send such; one that asks for what is not done here is refused, so that nothing is silently left undone.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from ..errors import InputError
from ..tokenizer import Tokenizer
from .sample import Sampling

CHOICES = 16  # of one call, at most
COLDEST = 1e-5  # a temperature below is 0: logits divided by it need not be numbers

# Not done here, and the values that do not ask for it.
UNDONE = {
    "best_of": [1], "frequency_penalty": [0, 0.0], "function_call": ["none", "auto"], "functions": [[]],
    "logit_bias": [{}], "logprobs": [False], "modalities": [["text"]], "presence_penalty": [0, 0.0],
    "response_format": [{"type": "text"}], "suffix": [""], "tool_choice": ["none", "auto"], "tools": [[]],
    "top_logprobs": [0],
}  # fmt: skip
# What OpenAI's own service does with these no text shows.
NO_MATTER = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip


class Given(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given):
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class StreamOptions(Given):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # padding against who listens in: there is none


class Asked(Given):
    """What both endpoints take."""

    model: StrictStr
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: StrictFloat = 1.0
    top_p: StrictFloat = 1.0
    top_k: StrictInt = 0  # as in vLLM, -1 keeps all too
    min_p: StrictFloat = 0.0
    repetition_penalty: Annotated[StrictFloat, Field(ge=0.01, le=100)] = 1.0
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=CHOICES)] = 1
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=CHOICES)] = []
    stream: StrictBool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: StrictBool = False

    @model_validator(mode="before")
    @classmethod
    def without_what_asks_nothing(cls, given):
        if not isinstance(given, dict):
            return given
        for name, harmless in UNDONE.items():
            value = given.get(name)
            if value is not None and not any(type(value) is type(h) and value == h for h in harmless):
                raise InputError(f"{name} {value!r}: that is not done here, leave {name} out")
        return {k: v for k, v in given.items() if k not in UNDONE and k not in NO_MATTER}

    def sampling(self, choice: int) -> Sampling:
        seed = None if self.seed is None else (self.seed + choice) % (1 << 63)
        t, r = self.temperature, self.repetition_penalty
        if 0 <= t < COLDEST:
            return Sampling(repetition_penalty=r, seed=seed)
        return Sampling(t, 0 if self.top_k == -1 else self.top_k, self.top_p, self.min_p, r, seed)

    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if "" in stops:
            raise InputError("a stop string is empty")
        return stops


class Completion(Asked):
    prompt: StrictStr | Annotated[list[StrictStr] | list[StrictInt] | list[list[StrictInt]], Field(min_length=1)]
    echo: StrictBool = False

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        given = self.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        return [tokenizer.encode(p) if isinstance(p, str) else p for p in (given if several else [given])]

    def length(self) -> tuple[int | None, int | None]:
        """Tokens that were asked for, and how many there are where nothing was said; None: what there is room for."""
        return self.max_tokens, 16


class TextPart(Given):
    """Or another, which `Message.plain` refuses."""

    model_config = ConfigDict(extra="ignore")

    type: StrictStr
    text: StrictStr = ""


class Message(Given):
    """Clients give an answer back as they got it, with the fields in which there was nothing, and names."""

    role: StrictStr
    content: StrictStr | Annotated[list[TextPart], Field(min_length=1)]
    name: StrictStr = ""

    @model_validator(mode="before")
    @classmethod
    def without_empty_lists(cls, given):
        empty = ("tool_calls", "annotations")
        return {k: v for k, v in given.items() if k not in empty or v} if isinstance(given, dict) else given

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        if others := {p.type for p in parts} - {"text"}:
            raise InputError(f"content of type {min(others)!r}: the model reads text alone")
        role = "system" if self.role == "developer" else self.role  # OpenAI's newer word
        return {"role": role, "content": "".join(p.text for p in parts)}


class Chat(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        text = tokenizer.apply_chat_template([m.plain() for m in self.messages])
        return [tokenizer.encode(text, special=True)]

    def length(self) -> tuple[int | None, int | None]:
        return self.max_completion_tokens or self.max_tokens, None
