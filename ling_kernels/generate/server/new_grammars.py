"""The grammar of a body's answer. New ones may take seconds: they are read one at a time, for the clients in turn."""

import functools
from collections.abc import Callable

from ...errors import InputError
from ...tokenizer import Tokenizer
from ..grammar import Grammar, Grammars
from .protocol import Body, ChatCompletionRequest
from .service import Service
from .structured import after_thought
from .text_parts import opens_thought


class BodyGrammars(Grammars):
    """The server's grammars as one body sees them: it lists new ones, of which it has the text alone."""

    def __init__(self, grammars: Grammars):
        vars(self).update(vars(grammars))  # with the same cache
        self.new: dict[str, None] = {}  # their sources, in order
        self.found: dict[str, Grammar | InputError] = {}  # stays here when the cache forgets it

    def compiled(self, source: str) -> Grammar:
        found = self.found.get(source) or self.known(source)
        if isinstance(found, InputError):
            raise found
        if found is None:
            self.new[source] = None
            return Grammar(source, None, self.end, self.tokens.vocab_size)
        self.found[source] = found
        return found


async def grammar_of(service: Service, body: Body, prompts: list[list[int]], client: str) -> Grammar:
    """The grammar of a structured answer. Those in it that are new are read first, each in a turn of the client's."""
    grammars = functools.cache(lambda: BodyGrammars(service.grammars()))
    form = functools.partial(structure, grammars, service.tokenizer, body, prompts)
    grammar, own = await service.texts.call(client, form), grammars()
    if not own.new:
        return grammar
    for source in own.new:
        try:
            compiled = service.grammars().compiled
            own.found[source] = await service.new_grammars.call(client, compiled, source, key=source)
        except InputError as error:  # raised below, where the body's field is known
            own.found[source] = error
            break
    return await service.texts.call(client, form)


def structure(grammars: Callable[[], Grammars], tokenizer: Tokenizer, body: Body, prompts: list[list[int]]) -> Grammar:
    """The form of an answer, in a chat behind a thought that the prompt has opened, or the body allows."""
    grammar = body.grammar(grammars)
    if isinstance(body, ChatCompletionRequest):
        opened = opens_thought(tokenizer, prompts[0])
        thinking = body.chat_template_kwargs.enable_thinking
        if opened or (body.free_text if thinking is None else thinking):
            return after_thought(grammars(), grammar, opened)
    return grammar
