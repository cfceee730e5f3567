"""The process that compares mathematical answers with `math-verify`: one JSON a line, in and out.

It is a process of its own as what a model writes may be a number of more digits than there is
memory for, and arithmetic on it can be stopped in no other way. See `judge.py`.
"""

import json
import resource
import sys

MEMORY_BYTES = 4 * 2**30
SECONDS = 5  # of a step of math-verify, by an alarm, which this process is alone to use


def main() -> None:
    """Answer `{"gold", "answer"}` with `{"right"}` or `{"error"}`, until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    out, sys.stdout = sys.stdout, sys.stderr  # which libraries may print to
    from math_verify import parse, verify

    def parsed(text: str) -> object:
        found = parse(f"${text}$", parsing_timeout=SECONDS)
        return found or parse(text, parsing_timeout=SECONDS)

    for line in sys.stdin:
        asked = json.loads(line)
        try:
            gold, answer = parsed(asked["gold"]), parsed(asked["answer"])
            said: dict[str, bool | str] = {
                "right": bool(verify(gold, answer, timeout_seconds=SECONDS))
            }
        except (Exception, MemoryError) as error:  # of sympy and antlr, on any text
            said = {"error": f"{type(error).__name__}: {error}"[:200]}
        out.write(json.dumps(said) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
