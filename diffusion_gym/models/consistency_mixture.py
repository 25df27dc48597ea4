"""A consistency function of a Gaussian mixture: a small network to be distilled from the mixture, or trained."""

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from typing_extensions import override

from ..consistency_function import ve_scalings
from ..predictions import broadcast_to
from ..samplers import Consistency
from ..schedules import KarrasSchedule
from .base import Conditioning, outside_inference_mode
from .mixture import Mixture, MixtureModel
from .schedulers import variance_exploding_consistency

_FREQUENCIES = 4


class ConsistencyNetwork(Mixture):
    """F of f(x, t) = c_skip·x + c_out·F(c_in·x, ln t/4): hidden layers with SiLU, told sines and cosines of ln t/4.

    Args:
        means: [K, d] the components' means.
        stds: [K] their standard deviations.
        weights: [K] their weights.
        width: The hidden layers' width.
        depth: Their number, at least 2.
    """

    @register_to_config
    def __init__(
        self,
        means: Sequence[Sequence[float]],
        stds: Sequence[float],
        weights: Sequence[float],
        width: int = 64,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self._set_components(means, stds, weights)
        components, dimension = self.centres.shape
        sizes = [dimension + 1 + 2 * _FREQUENCIES + components, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.last = nn.Linear(width, dimension)

    def forward(self, x: Tensor, log_sigma: Tensor, present: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Return F [B, d], the first and the last hidden layer [B, width] each, and the time's embedding [B, 8].

        Args:
            x: [B, d] c_in·x.
            log_sigma: [B] ln t.
            present: [B, K] 1 for the components that the prompt names, else 0.
        """
        level = log_sigma[:, None] / 4
        angles = level * 2.0 ** torch.arange(_FREQUENCIES, device=x.device)
        embedding = torch.cat([angles.sin(), angles.cos()], -1)
        inputs = torch.cat([x, level, embedding, present], -1).to(self.last.weight.dtype)
        layers = []
        for layer in self.hidden:
            inputs = nn.functional.silu(layer(inputs))
            layers.append(inputs)
        return self.last(inputs), (layers[0], layers[-1]), embedding


class ConsistencyMixtureModel(MixtureModel):
    """A consistency function of a mixture, in the variance-exploding form: a folder of `write_consistency_mixture`."""

    network = ConsistencyNetwork
    lora_targets = ("last",)
    default_sampler = Consistency()

    def _examine_scheduler(self, folder: Path, predicted: str) -> None:
        self.schedule, self._sigma_data, _ = variance_exploding_consistency(folder)
        self.prediction_type = "sample"
        self.boundary_time = self.schedule.clean
        self.time_embedding_size = 2 * _FREQUENCIES

    @override
    def to_x0_and_epsilon(self, model_output: Tensor, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        c_skip, c_out, _ = ve_scalings(t, sigma_data=self._sigma_data, sigma_min=self.schedule.clean)
        consistent = broadcast_to(c_skip, latents) * latents + broadcast_to(c_out, latents) * model_output
        sigma = self.schedule.sigma(t)
        sigma = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
        return consistent, (latents - consistent) / broadcast_to(sigma, latents)

    def _model_features(
        self, network: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, _, c_in = ve_scalings(t, sigma_data=self._sigma_data)
        x = latents.flatten(1) * c_in[:, None]
        output, hidden, embedding = network(x, t.log(), conditioning["prompt_embeds"][:, 0])
        return output.reshape(latents.shape), torch.cat(hidden, 1)[:, :, None, None], embedding


def write_consistency_mixture(
    folder: str | os.PathLike[str],
    mixture: MixtureModel,
    *,
    width: int = 64,
    depth: int = 3,
    sigma_data: float | None = None,
    seed: int = 0,
) -> Path:
    """Write a folder of a consistency function of a mixture, with random weights; return the folder.

    Args:
        folder: The folder to write to.
        mixture: The mixture; if its process is Karras', it can be the teacher.
        width: The hidden layers' width.
        depth: Their number.
        sigma_data: σ_d; None: the mixture's standard deviation along one axis.
        seed: The seed of the weights.
    """
    folder, denoiser = Path(folder), mixture.denoiser
    config: dict[str, Any] = {name: denoiser.config[name] for name in ("means", "stds", "weights")}
    if sigma_data is None:
        weights = denoiser.log_weights.softmax(0)
        mean = weights @ denoiser.centres
        spread = (denoiser.centres - mean).square().mean(1) + denoiser.variances
        sigma_data = float((weights @ spread).sqrt())
    with torch.random.fork_rng(devices=[]), outside_inference_mode():
        torch.manual_seed(seed)
        ConsistencyNetwork(**config, width=width, depth=depth).save_pretrained(folder / mixture.denoiser_folder)
    process = mixture.schedule if isinstance(mixture.schedule, KarrasSchedule) else KarrasSchedule()
    CMStochasticIterativeScheduler(
        sigma_min=process.sigma_min,
        sigma_max=process.sigma_max,
        rho=process.rho,
        sigma_data=sigma_data,
        clip_denoised=False,
    ).save_pretrained(folder / "scheduler")
    index = {"_class_name": "ConsistencyMixturePipeline", "names": list(mixture.names)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder
