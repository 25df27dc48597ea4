"""The command `python -m agents.benchmark`: run trials, compare them, write the report."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .entrants import ENTRANTS, find_entrant
from .report import leaderboard, write_report
from .runner import Order, run_all
from .score import read_trials
from .tasks import TASKS, find_task
from .trial import run_trial

_OUTPUT = Path("runs/benchmark")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    command = argparse.ArgumentParser(
        prog="python -m agents.benchmark",
        description="Run algorithms on tasks at the same number of reward queries, and compare what they gain while "
        "nothing else is lost.",
    )
    commands = command.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run trials; those that are finished are not run again")
    run.add_argument("--task", nargs="+", default=["emoji-quick"], choices=tuple(TASKS), help="the tasks (emoji-quick)")
    run.add_argument(
        "--algorithm",
        nargs="+",
        default=list(ENTRANTS),
        help=f"{', '.join(ENTRANTS)} (all of these if not given), or anyone's: package.module:ClassOrFunction",
    )
    run.add_argument("--seeds", nargs="+", type=int, help="the seeds of the trainings; the task's if not given")
    run.add_argument("--processes", type=int, default=1, help="trials at a time, one thread each (1)")
    run.add_argument("--ray", metavar="ADDRESS", help='run on a Ray cluster instead; "local" is one of this machine')
    run.add_argument("--output", type=Path, default=_OUTPUT, help=f"the folder of all trials ({_OUTPUT})")
    for name, text in (("compare", "print the leaderboards"), ("report", "write report.html and print where")):
        reader = commands.add_parser(name, help=text)
        reader.add_argument("folders", nargs="*", type=Path, default=[_OUTPUT], help=f"folders of trials ({_OUTPUT})")
        if name == "report":
            reader.add_argument("--output", type=Path, help="the file; report.html in the first folder if not given")
    trial = commands.add_parser("trial", help="run one trial in this process")
    trial.add_argument("task", choices=tuple(TASKS))
    trial.add_argument("algorithm")
    trial.add_argument("seed", type=int)
    trial.add_argument("--output", type=Path, default=_OUTPUT)
    commands.add_parser("tasks", help="list the tasks")
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the arguments say; None: those of the command line."""
    args = parser().parse_args(arguments)
    if args.command == "tasks":
        for task in TASKS.values():
            print(f"{task.name}: {task.about} {task.reward_queries:,} queries, {len(task.seeds)} seeds")
    elif args.command == "trial":
        print(run_trial(args.task, args.algorithm, args.seed, args.output))
    elif args.command == "run":
        for algorithm in args.algorithm:
            find_entrant(algorithm)  # says at once what does not exist
        orders = [
            Order(task, algorithm, seed)
            for task in args.task
            for algorithm in args.algorithm
            for seed in (find_task(task).seeds if args.seeds is None else args.seeds)
        ]
        failed = run_all(orders, args.output, processes=args.processes, ray_address=args.ray)
        print(leaderboard(read_trials([args.output])))
        if failed:
            raise SystemExit("\n".join(["these trials failed:", *failed]))
    else:
        trials = read_trials(args.folders)
        if not trials:
            raise SystemExit(f"there is no finished trial in {', '.join(map(str, args.folders))}")
        print(leaderboard(trials))
        if args.command == "report":
            file = args.output or args.folders[0] / "report.html"
            file.write_text(write_report(trials), encoding="utf-8")
            print(file)
