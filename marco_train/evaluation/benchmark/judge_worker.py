"""The process that judges answers: mathematical ones by `math-verify`, others by pattern or schema.

One JSON a line, in and out. It is a process of its own as what a model writes may be a number of
more digits than there is memory for, or a text that a pattern is at for ever, and neither can be
stopped in any other way. See `judge.py`.
"""

import json
import re
import resource
import sys

MEMORY_BYTES = 4 * 2**30
SECONDS = 5  # of a step of math-verify, by an alarm, which this process is alone to use


def main() -> None:
    """Answer `{"by", "gold", "answer"}` with `{"right"}` or `{"error"}`, until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    out, sys.stdout = sys.stdout, sys.stderr  # which libraries may print to
    judges = {"math": is_equal, "regex": is_found, "json_schema": satisfies}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            right = judges[asked["by"]](asked["gold"], asked["answer"])
            said: dict[str, bool | str] = {"right": right}
        except (Exception, MemoryError) as error:  # of sympy and antlr, on any text
            said = {"error": f"{type(error).__name__}: {error}"[:200]}
        out.write(json.dumps(said) + "\n")
        out.flush()


def is_equal(gold: str, answer: str) -> bool:
    """Whether two mathematical answers are equal."""
    from math_verify import parse, verify

    def parsed(text: str) -> object:
        found = parse(f"${text}$", parsing_timeout=SECONDS)
        return found or parse(text, parsing_timeout=SECONDS)

    return bool(verify(parsed(gold), parsed(answer), timeout_seconds=SECONDS))


def is_found(gold: str, answer: str) -> bool:
    """Whether a pattern is found in an answer."""
    return re.search(gold, answer) is not None


def satisfies(gold: str, answer: str) -> bool:
    """Whether an answer is JSON that satisfies a schema, which reaches no other file or site."""
    from jsonschema import Draft202012Validator
    from referencing import Registry

    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return bool(Draft202012Validator(json.loads(gold), registry=Registry()).is_valid(value))


if __name__ == "__main__":
    main()
