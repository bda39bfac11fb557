"""OpenAI's objects for log-probabilities, of both endpoints, and vLLM's for those of a chat's prompt."""

from ...tokenizer import Tokenizer
from ..logprobs import TokenLogprob
from ..request import Request

FIELDS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class CompletionLogprobs:
    """{tokens, token_logprobs, top_logprobs, text_offset} of /v1/completions. Offsets go on from call to call."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.offset = tokenizer, 0

    def prompt(self, request: Request) -> dict:
        """Of an echoed prompt, whose first token has none."""
        first = self.tokenizer.decode(request.prompt[:1])
        found = {"tokens": [first], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [self.offset]}
        self.offset += len(first)
        return self.joined([found, self.add(request.prompt_logprobs)])

    def add(self, entries: list[TokenLogprob]) -> dict:
        found: dict[str, list] = {name: [] for name in FIELDS}
        for entry in entries:
            text = self.tokenizer.decode([entry.token])
            tops: dict[str, float] = {}
            for token, logprob in [*entry.top, (entry.token, entry.logprob)]:
                tops.setdefault(self.tokenizer.decode([token]), logprob)  # broken characters may look alike
            for name, value in zip(FIELDS, (text, entry.logprob, tops, self.offset), strict=True):
                found[name].append(value)
            self.offset += len(text)
        return found

    @staticmethod
    def joined(parts: list[dict | None]) -> dict:
        return {name: [value for part in parts if part for value in part[name]] for name in FIELDS}


class ChatLogprobs:
    """{content: [{token, logprob, bytes, top_logprobs}]} of /v1/chat/completions."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def add(self, entries: list[TokenLogprob]) -> dict | None:
        """None where there are no tokens."""
        content = [
            self.token(entry.token, entry.logprob) | {"top_logprobs": [self.token(*top) for top in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None} if content else None

    def token(self, token: int, logprob: float) -> dict:
        text = self.tokenizer.decode([token])
        data = None if "\ufffd" in text else [*text.encode()]  # of a part of a character they are not known
        return {"token": text, "logprob": logprob, "bytes": data}


def prompt_logprobs(tokenizer: Tokenizer, request: Request) -> list[dict[str, dict] | None]:
    """vLLM's prompt_logprobs of /v1/chat/completions: for each token of the prompt {id: {logprob, rank, decoded_token}}
    of it and of the likeliest. The first has none; a token that is not among the likeliest has no rank."""
    found: list[dict[str, dict] | None] = [None]
    for entry in request.prompt_logprobs:
        ranks = {token: rank for rank, (token, _) in enumerate(entry.top, 1)}
        logprobs = {entry.token: entry.logprob, **dict(entry.top)}
        found.append({
            str(token): {"logprob": logprob, "rank": ranks.get(token), "decoded_token": tokenizer.decode([token])}
            for token, logprob in logprobs.items()
        })  # fmt: skip
    return found
