"""What a process of `RewardProcesses` runs: a line of JSON with arguments in, a line of JSON with the reward out.

The first line has the parent's module path, the module, the function, and whether it rewards a group at once. Started
by its file name, so that nothing but the reward function's module is imported.
"""

import importlib
import json
import os
import sys
from functools import reduce
from typing import Any


def main() -> None:
    # The function may read and print: its stdin is empty, and what it prints goes to stderr.
    calls, results = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def answer(**fields) -> None:
        results.write(json.dumps(fields) + "\n")
        results.flush()

    sys.path[:], module, name, of_group = json.loads(calls.readline())
    try:
        function: Any = reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:
        return answer(failure=described(error))
    answer(ready=True)
    for line in calls:
        try:
            arguments = json.loads(line)
            value = function(*arguments)
            answer(value=rewards_of(value, len(arguments[0])) if of_group else float(value))
        except Exception as error:
            answer(failure=described(error))


def rewards_of(given: Any, responses: int) -> list[float]:
    values = [float(value) for value in given]
    if len(values) != responses:
        raise ValueError(f"{len(values)} rewards for {responses} responses")
    return values


def described(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of its own __str__
        return type(error).__name__


if __name__ == "__main__":
    main()
