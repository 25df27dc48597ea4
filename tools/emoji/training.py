"""What the training stages share: the schedule by images seen, checkpoints, resuming, EMA, TensorBoard."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter

from agents.runs.files import existing_folder, load_optimizer, replaced_folder, save_optimizer
from diffusion_gym.precision import has_fast_bf16

logger = logging.getLogger(__name__)


def autocast() -> torch.autocast:
    """Return the arithmetic of all training and drawing here: bfloat16, or float32 where the processor emulates it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16())


class TrainingRun:
    """Trains a network for a number of images: AdamW, warm-up and cosine, clipped gradients, EMA, checkpoints.

    Every checkpoint is written whole or not at all; a run that finds one goes on from it. Batches are functions of
    (seed, step, process), so nothing but the weights, the optimizer and the step has to be kept.

    Under `torchrun` every process draws its share of a step's images and the gradients are averaged; the first process
    writes and logs.

    Args:
        network: What is trained; all parts in one module, with the same weights in every process.
        folder: Of the run: `checkpoint/` and `tensorboard/`.
        images: How many images to train for.
        batch_size: Images of a step, of all processes together.
        learning_rate: At its peak.
        weight_decay: AdamW's.
        betas: AdamW's.
        warm_up: Steps of linear warm-up.
        ema_decay: Of the exponential moving average of the weights, per step.
    """

    def __init__(
        self,
        network: nn.Module,
        folder: Path,
        *,
        images: int,
        batch_size: int,
        learning_rate: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        warm_up: int = 150,
        ema_decay: float = 0.999,
    ) -> None:
        if batch_size % process_count():
            raise ValueError(f"batch_size {batch_size} must be a multiple of the {process_count()} processes")
        self.network = network
        self.folder = folder
        self.batch_size = batch_size
        self.share = batch_size // process_count()
        self.num_steps = math.ceil(images / batch_size)
        self.step = 0
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )
        self.ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self._parameters = parameters
        self._learning_rate = learning_rate
        self._warm_up = warm_up

    @property
    def images_seen(self) -> int:
        """How many images the network was trained on in this run, from its first step."""
        return self.step * self.batch_size

    def generator(self, seed: int) -> torch.Generator:
        """Return this step's randomness, another one in every process."""
        return torch.Generator().manual_seed((seed * process_count() + process_rank()) * 1_000_003 + self.step)

    def learning_rate(self) -> float:
        """Return this step's learning rate: linear warm-up, then half a cosine down to 2 %."""
        cosine = 0.51 + 0.49 * math.cos(math.pi * min(1.0, self.step / self.num_steps))
        return self._learning_rate * min(1.0, (self.step + 1) / self._warm_up) * cosine

    def update(self, loss: Tensor) -> None:
        """Make one step down the gradient of the loss.

        Raises:
            FloatingPointError: the gradient is not finite; the last checkpoint is from before.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        loss.backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient of step {self.step} is {norm}; start again from {self.folder}")
        self.optimizer.step()
        self.ema.step(self._parameters)
        self.step += 1

    def _average_gradients(self) -> None:
        if process_count() == 1:
            return
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = parameters_to_vector(gradients)
        dist.all_reduce(flat)
        vector_to_parameters(flat / process_count(), gradients)

    def fit(
        self,
        loss: Callable[["TrainingRun"], tuple[Tensor, Mapping[str, Tensor]]],
        *,
        save: Callable[["TrainingRun"], None],
        save_every: int,
        log_every: int = 50,
    ) -> None:
        """Train until all images are seen.

        Args:
            loss: Returns a step's loss and what to log of it.
            save: Called with the averaged weights in the network, at every checkpoint and at the end.
            save_every: Images between two checkpoints.
            log_every: Steps between two lines in the log and in TensorBoard.
        """
        self.resume()
        writer = (
            SummaryWriter(self.folder / "tensorboard", purge_step=self.images_seen) if process_rank() == 0 else None
        )
        start, start_images, saved = time.monotonic(), self.images_seen, self.images_seen // save_every
        sums: dict[str, float] = {}
        summed = 0
        while self.step < self.num_steps:
            value, logged = loss(self)
            self.update(value)
            if writer is None:
                continue
            for name, scalar in logged.items():
                sums[name] = sums.get(name, 0.0) + float(scalar.detach())
            summed += 1
            if summed == log_every or self.step == self.num_steps:
                speed = (self.images_seen - start_images) / (time.monotonic() - start)
                means = {name: total / summed for name, total in sums.items()} | {"images_per_second": speed}
                sums, summed = {}, 0
                for name, mean in means.items():
                    writer.add_scalar(name, mean, self.images_seen)
                logger.info("%d images: %s", self.images_seen, ", ".join(f"{k} {v:.4g}" for k, v in means.items()))
            if self.images_seen // save_every > saved or self.step == self.num_steps:
                saved = self.images_seen // save_every
                self.checkpoint()
                with self.averaged():
                    save(self)
        if writer is not None:
            writer.close()

    def averaged(self) -> "_Averaged":
        """Return a context in which the network has the averaged weights."""
        return _Averaged(self)

    def checkpoint(self) -> None:
        """Write the state, in place of the last one."""
        with replaced_folder(self.folder / "checkpoint") as folder:
            save_file({k: v.contiguous() for k, v in self.network.state_dict().items()}, folder / "network.safetensors")
            save_file(
                {str(k): v.contiguous() for k, v in enumerate(self.ema.shadow_params)}, folder / "ema.safetensors"
            )
            save_optimizer(self.optimizer, folder / "optimizer.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": self.step, "batch_size": self.batch_size}))

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one.

        Raises:
            ValueError: it was made with another batch size, so that images seen would mean something else.
        """
        try:
            folder = existing_folder(self.folder / "checkpoint")
        except FileNotFoundError:
            return
        state = json.loads((folder / "state.json").read_text())
        if state["batch_size"] != self.batch_size:
            raise ValueError(
                f"{folder} has batch size {state['batch_size']}, got {self.batch_size}: use another folder"
            )
        self.network.load_state_dict(load_file(folder / "network.safetensors"))
        shadows = load_file(folder / "ema.safetensors")
        self.ema.shadow_params = [shadows[str(k)] for k in range(len(shadows))]
        load_optimizer(self.optimizer, folder / "optimizer.safetensors")
        self.step = self.ema.optimization_step = state["step"]
        logger.info("going on from %s, %d images", folder, self.images_seen)


def join_processes() -> None:
    """Join the processes that `torchrun` started, if it did."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")


def process_count() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """Return which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


class _Averaged:
    """Puts the averaged weights into the network, and the trained ones back."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._run.ema.store(self._run._parameters)
        self._run.ema.copy_to(self._run._parameters)
        self._run.network.eval()

    def __exit__(self, *_: object) -> None:
        self._run.ema.restore(self._run._parameters)
        self._run.network.train()
