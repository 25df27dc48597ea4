"""How tests start two processes, as a user would."""

import socket
import sys

OPTIONS = {"num_processes": 2, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}


def launcher(*kind):
    """Return the command before a script's path: `accelerate launch`, by default `--multi_gpu`, at a free port."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    options = [
        word for name, value in {**OPTIONS, "main_process_port": port}.items() for word in (f"--{name}", str(value))
    ]
    return [sys.executable, "-m", "accelerate.commands.launch", *(kind or ["--multi_gpu"]), *options]
