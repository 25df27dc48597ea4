"""Many trials: on this machine's cores, one thread each, or on a cluster that Ray already runs."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from .trial import RUN_FILE, trial_folder

LOG_FILE = "log.txt"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Order:
    """A trial that is wanted.

    Args:
        task: The task's name.
        algorithm: The algorithm's.
        seed: The seed.
    """

    task: str
    algorithm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.algorithm}, seed {self.seed}"

    def place(self, folder: Path) -> Path:
        """Return the trial's folder."""
        return trial_folder(folder, self.task, self.algorithm, self.seed)


def run_all(orders: Sequence[Order], folder: Path, *, processes: int = 1, ray_address: str | None = None) -> list[str]:
    """Run the trials that are not finished; return in words which failed.

    Each is a process of its own with one thread, whose output is in its folder, `log.txt`; one that fails, or is
    killed, stops no other.

    Args:
        orders: The trials.
        folder: The folder of all trials; with Ray one that all its machines see.
        processes: How many at a time.
        ray_address: The address of a Ray cluster, "local" for one of this machine; None: without Ray.
    """
    folder = folder.resolve()
    unfinished = [one for one in orders if not (one.place(folder) / RUN_FILE).exists()]
    failed = []
    with tqdm(total=len(orders), initial=len(orders) - len(unfinished), unit="trial") as bar:
        done = _by_ray(unfinished, folder, ray_address) if ray_address else _by_threads(unfinished, folder, processes)
        for order, error in done:
            bar.update()
            bar.set_postfix_str(str(order))
            if error is not None:
                failed.append(f"{order}: {error}")
    return failed


def attempt(order: Order, folder: Path) -> str | None:
    """Run a trial in a process of its own; return where it failed the last line of its output."""
    place = order.place(folder)
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "agents.benchmark", "trial", order.task, order.algorithm, str(order.seed)]
    with (place / LOG_FILE).open("w", encoding="utf-8") as log:
        code = subprocess.run(
            [*command, "--output", str(folder)], env={**os.environ, **_ONE_THREAD}, stdout=log, stderr=log, check=False
        ).returncode
    if code == 0:
        return None
    lines = (place / LOG_FILE).read_text(encoding="utf-8").strip().splitlines()
    return f"exit status {code}, {lines[-1] if lines else 'without a word'} ({place / LOG_FILE})"


def _by_threads(orders: Sequence[Order], folder: Path, processes: int) -> Iterator[tuple[Order, str | None]]:
    """Yield trials as they end; a thread waits for each."""
    with ThreadPoolExecutor(processes) as pool:
        futures = {pool.submit(attempt, order, folder): order for order in orders}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _by_ray(orders: Sequence[Order], folder: Path, address: str) -> Iterator[tuple[Order, str | None]]:
    """Yield trials as a Ray cluster ends them, each with one of its CPUs."""
    import ray

    ray.init(address=address, log_to_driver=False)
    try:
        remote = ray.remote(num_cpus=1)(attempt)
        waiting = {remote.remote(order, folder): order for order in orders}
        while waiting:
            ready, _ = ray.wait(list(waiting))
            for reference in ready:
                yield waiting.pop(reference), ray.get(reference)
    finally:
        ray.shutdown()
