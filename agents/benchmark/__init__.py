"""The benchmark: tasks that any algorithm can be run on, its score, and the report of many runs.

`python -m agents.benchmark run --task emoji-quick --algorithm my_module:MyAlgorithm`; see docs/benchmark.md.
"""

from .entrants import ENTRANTS, Entrant, find_entrant
from .tasks import PROTOCOL, TASKS, Task
from .trial import Budget, run_trial

__all__ = ["ENTRANTS", "PROTOCOL", "TASKS", "Budget", "Entrant", "Task", "find_entrant", "run_trial"]
