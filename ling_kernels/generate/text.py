"""Incremental text of a generated sequence: complete characters only, cut at stop strings."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..errors import InputError
from ..tokenizer import TextStream, Tokenizer
from .engine import Engine
from .logprobs import TokenLogprob


def stream_text(
    tokens: Iterable[int], tokenizer: Tokenizer, stop: str | Sequence[str] = (), prompt: Sequence[int] = ()
) -> Iterator[str]:
    """Yield the text of each token ("" if it is held back), then the rest; ends before the first string of `stop`.

    prompt: the ids before the tokens. Raises InputError for a stop that is no string or strings.
    """
    text = StoppedText(tokenizer, stop_strings(stop), prompt)
    for token in tokens:
        yield text.add(token)
        if text.found:
            break
    yield text.end()


def keep(tokens: Iterable[int], into: list[int]) -> Iterator[int]:
    """Yield the tokens, and append them to a list."""
    for token in tokens:
        into.append(token)
        yield token


def repeats(tokens: Sequence[int]) -> bool:
    """Whether the text ends with the same part of up to 32 tokens four times, or with a shorter one for 16 tokens."""
    for n in range(1, 33):
        times = max(4, -(-16 // n))
        if len(tokens) >= n * times and [*tokens[-n * times :]] == [*tokens[-n:]] * times:
            return True
    return False


class Text(NamedTuple):
    """A generated text: up to a stop string, whose tokens are among its tokens."""

    text: str
    tokens: list[int]
    finish_reason: str  # stop, length, timeout or cancelled
    logprobs: list[TokenLogprob]  # of the tokens, where wanted


def generate_texts(
    engine: Engine, tokenizer: Tokenizer, prompts: Iterable[str | Sequence[int]],
    stop: str | Sequence[str] = (), **options
) -> list[Text]:  # fmt: skip
    """Texts that continue the prompts, with the options of Engine.finish: also `n`, and `sampling` for each prompt.

    stop: a string or strings that end a text, which is without them. Raises InputError as Engine.submit.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts is {prompts!r:.80}; it must be a list of texts")
    stop = stop_strings(stop)
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    found = []
    with engine.submitted(ids, **options) as requests:
        for request in requests:
            text, pieces, count = StoppedText(tokenizer, stop, request.prompt), [], 0
            for token in engine.follow(request):
                count += 1
                pieces.append(text.add(token))
                if text.found:
                    engine.cancel(request)
                    break
            reason = "stop" if text.found else request.finished
            logprobs = request.logprobs[:count]
            found.append(Text("".join(pieces) + text.end(), request.new_tokens[:count], reason, logprobs))
    return found


def stop_strings(stop: str | Sequence[str]) -> list[str]:
    """A caller's strings that end a text, as a list. Raises InputError for anything else and for an empty string."""
    strings = [stop] if isinstance(stop, str) else [*stop] if isinstance(stop, Iterable) else [stop]
    if odd := [string for string in strings if not (isinstance(string, str) and string)]:
        raise InputError(f"stop has {odd[0]!r:.80}; it must be a text of at least one character, or a list of them")
    return strings


class StoppedText:
    """Detokenizer with stop strings: `add` a token, get the text that can be shown; found: a stop string occurred."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], prompt: Sequence[int] = ()):
        self.detokenizer, self.stop = TextStream(tokenizer, prompt), StopStrings(stop)

    @property
    def found(self) -> bool:
        return self.stop.found

    def add(self, token: int) -> str:
        return self.stop.add(self.detokenizer.add(token))

    def end(self) -> str:
        """The text that was held back."""
        return self.stop.add(self.detokenizer.end()) + self.stop.end()


class StopStrings:
    """Pass text through up to the first string of `stop`; hold back an end that may be the start of one. Raises
    InputError for an empty string."""

    def __init__(self, stop: Sequence[str]):
        if not all(stop):
            raise InputError("stop has an empty string")
        self.stop, self.found, self.held_back = [Search(s) for s in stop], False, ""

    def add(self, text: str) -> str:
        if self.found:
            return ""
        ends = [(search.add(text), search) for search in self.stop]
        starts = [end - len(search.string) for end, search in ends if end is not None]  # in text, or before it
        before, text = len(self.held_back), self.held_back + text
        if starts:
            self.found, self.held_back = True, ""
            return text[: before + min(starts)]
        safe = len(text) - max((search.matched for search in self.stop), default=0)
        self.held_back = text[safe:]
        return text[:safe]

    def end(self) -> str:
        held_back, self.held_back = self.held_back, ""
        return held_back


class Search:
    """Looks for a string in a text that comes in pieces, by the algorithm of Knuth, Morris and Pratt (1977): its
    work is linear in the text, also where much of the string matches again and again.

    matched: characters of the longest beginning of the string, but not all of it, that the text so far ends with.
    """

    def __init__(self, string: str):
        self.string, self.matched = string, 0
        # By n: the length of the longest beginning of string[:n], but not all of it, that it ends with. For as many as
        # matched so far, as a string may be much longer than the text.
        self.borders = [0, 0]

    def add(self, text: str) -> int | None:
        """The end of the string's first occurrence, as an index of this piece; None if it has none so far."""
        for i, character in enumerate(text):
            self.matched = self.after(self.matched, character)
            if self.matched == len(self.string):
                return i + 1
            if self.matched == len(self.borders):
                self.borders.append(self.after(self.borders[-1], character))
        return None

    def after(self, matched: int, character: str) -> int:
        """What matches after one more character."""
        while matched and self.string[matched] != character:
            matched = self.borders[matched]
        return matched + (self.string[matched] == character)
