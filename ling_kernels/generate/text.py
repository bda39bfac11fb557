"""The text of a generation as it comes: characters whole, and stop strings cut off."""

from collections.abc import Iterable, Iterator, Sequence

from ..tokenizer import TextStream, Tokenizer


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """The text of tokens as they come: a piece per token ("" where held back), then the rest; cut at a `stop`."""
    text = CutText(tokenizer, stop)
    for token in tokens:
        yield text.add(token)
        if text.found:
            break
    yield text.end()


class CutText:
    """What may be shown of a text after each of its tokens, and at its end; found: one of `stop` has ended it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self.text, self.cut = TextStream(tokenizer), StopStrings(stop)

    @property
    def found(self) -> bool:
        return self.cut.found

    def add(self, token: int) -> str:
        return self.cut.add(self.text.add(token))

    def end(self) -> str:
        return self.cut.add(self.text.end()) + self.cut.end()


class StopStrings:
    """Gives text back as it is added, up to the first of `stop`; holds back an end that may be the start of one."""

    def __init__(self, stop: Sequence[str]):
        self.stop, self.found, self.held = stop, False, ""

    def add(self, text: str) -> str:
        if self.found:
            return ""
        text = self.held + text
        places = [place for place in map(text.find, self.stop) if place >= 0]
        if places:
            self.found, self.held = True, ""
            return text[: min(places)]
        beginnings = (n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n]))
        sure = len(text) - max(beginnings, default=0)
        self.held = text[sure:]
        return text[:sure]

    def end(self) -> str:
        held, self.held = self.held, ""
        return held
