"""Sentences of a response, for losses with a ratio for each sentence (LPO): they end at pauses of the text."""

from collections.abc import Sequence

from ..tokenizer import TextStream, Tokenizer

PAUSES = frozenset(".!?;:\n。！？；：…")  # LPO splits at pause punctuation (arXiv 2510.22115, 4.3); this set is ours


def sentence_lengths(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Numbers of tokens of the sentences of one response, in order; they add up to len(ids).

    A sentence ends with the token that completes a pause mark, whatever else is in it, and with the tokens after it
    that bring no letter or digit: further marks, quotes, brackets and spaces. Special tokens have no text.
    """
    special = {*tokenizer.control_tokens.values()}
    stream, lengths, current, unread, ended = TextStream(tokenizer), [], 0, 0, False
    for token in ids:
        text = "" if token in special else stream.add(token)
        if ended and any(c.isalnum() for c in text):
            lengths.append(current - unread)  # tokens whose character was not complete begin the new sentence
            current, ended = unread, False
        current, unread = current + 1, 0 if text else unread + 1
        ended = ended or bool(PAUSES & {*text})
    return [*lengths, current] if current else lengths
