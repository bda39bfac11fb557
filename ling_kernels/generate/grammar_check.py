"""Read a grammar. Run as a file it is a process that tries the grammars of strangers, which may end it: a few bytes can
need hours or all of a stack, as `"multipleOf": 999983` and 4,000 rules one inside the other do.

Each line of standard input is JSON: [tokenizer, vocabulary, end token], then grammars; each answer is a line of JSON:
what is wrong with the grammar, or an empty text. It imports llguidance alone, so that it starts soon.
"""

import json
import resource
import signal
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_SECONDS = 3.0
MEMORY = 8 << 30  # bytes
STACK = 2 << 20  # bytes; other threads have 8 MiB, so that what passes here passes there


def read_grammar(tokens: LLTokenizer, source: str) -> tuple[Any, str]:
    """(matcher, what is wrong or ""). The first mask can take longer than all others: copies of the matcher have it."""
    matcher = LLMatcher(tokens, source, log_level=0, limits=LLParserLimits(verbose_errors=False))
    some = not matcher.is_error() and any(matcher.compute_bitmask())
    return matcher, matcher.get_error() or ("" if some else "no text fits it")


def answer() -> None:
    text, vocabulary, end = json.loads(sys.stdin.readline())
    tokens = LLTokenizer(text, n_vocab=vocabulary, eos_token=end)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # ends the process, also in the midst of llguidance
        fault = read_grammar(tokens, json.loads(line))[1]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(fault), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, for the server; it ends with its input
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
