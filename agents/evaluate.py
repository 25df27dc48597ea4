"""The command `python -m agents.evaluate RUN`; as an attribute of `agents`, `evaluate` is the function.

Importing this file would put a module in that function's place, so it refuses to be imported.
"""

if __name__ != "__main__":
    raise ImportError("agents.evaluate is a command, python -m agents.evaluate; import evaluate from agents")

from agents.evaluation.command import main

main()
