"""Consistency distillation, consistency training, and regression on trajectories, the cheapest start of both."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffusion_gym.models.base import Conditioning, DiffusionModel
from diffusion_gym.parts import GIVEN_AGAIN
from diffusion_gym.predictions import broadcast_to

from ..logs.diagnostics import Metrics
from ..runs.learner_saving import restore_learner, saved_keywords
from ..training.learner import Learner
from .data import Latents, Trajectories
from .guidance import FixedGuidance, Guidance
from .metrics import Metric, PseudoHuber, UniformWeight, Weighting
from .solvers import Heun, Predict, Solver
from .targets import Averaged, GrowingAverage, Target
from .times import Discretisation, GrowingLevels, KarrasLevels

Self = TypeVar("Self", bound="ConsistencyLearner")

_SAME = 1e-2  # of α and σ: consistency models' own process ends at ε = 0.002


@dataclass(kw_only=True, eq=False, repr=False)
class ConsistencyLearner(Learner):
    """A learner of a consistency function: its model's prediction of x_0, f.

    The model is a student's folder: a `LatentConsistencyModelPipeline`, which `write_latent_consistency` makes of a
    diffusion model, a `ConsistencyModelPipeline`, or one of `write_consistency_mixture`.

    Args:
        data: What it learns from.
        guidance: The guidance of the teacher's steps, and what the student is told.
        metric: d, the distance that is made small.

    Raises:
        ValueError: the model's prediction is no consistency function, or the data are not of its shape.
    """

    data: Latents | Trajectories = field(metadata=GIVEN_AGAIN)
    guidance: Guidance = FixedGuidance()
    metric: Metric = PseudoHuber()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.boundary_time is None:
            raise ValueError(
                f"the prediction of {self.model.source!r} is no consistency function: write_latent_consistency(folder, "
                "model) makes a student of a diffusion model"
            )
        self.boundary: float = self.model.boundary_time
        if tuple(self.data.latents.shape[-3:]) != self.model.latent_shape:
            raise ValueError(
                f"the data's latents are {tuple(self.data.latents.shape[-3:])}, the model's {self.model.latent_shape}"
            )
        if self.guidance.is_drawn and not self.model.guidance_layers:
            raise ValueError(f"{self.guidance!r} has no effect: {self.model.source!r} is not told the guidance scale")

    @override
    def new_network(self) -> nn.Module:
        network = super().new_network()
        if not self.guidance.is_drawn:
            for name, parameter in network.named_parameters():
                if any(layer in name for layer in self.model.guidance_layers):
                    parameter.requires_grad_(False)  # it would learn to draw well when told one scale alone
        return network

    def function(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, *, scale: float, network: nn.Module | None = None
    ) -> Tensor:
        """Return f(x, t), [B, ...] float32, of the network that is trained, or of another."""
        return self.predict(x, t, conditioning, guidance_scale=scale, network=network).x0

    def conditioned(self, indices: Tensor, model: DiffusionModel | None = None) -> Conditioning:
        """Return the conditioning of the data's prompts at some indices, [B, ...] each."""
        return (model or self.model).encode_prompts([self.data.prompts[index] for index in indices.tolist()])

    def distances(self, x: Tensor, y: Tensor) -> Tensor:
        """Return d(x, y), [B]."""
        return self.metric(x.float(), y.float(), self.model._decode)

    @classmethod
    def load(
        cls: type[Self],
        path: str | Path,
        model: DiffusionModel,
        *,
        data: Latents | Trajectories,
        learning_rate: float | Callable[[float], float] | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
    ) -> Self:
        """Return a saved run; `learn(total - run.num_timesteps, reset_num_timesteps=False)` continues it.

        Args:
            path: What `save` was given, or a folder of checkpoints, of which the newest whole one is taken.
            model: The student that the run began with.
            data: What it learns from.
            learning_rate: None: the saved one. A function cannot be saved and is to be given again.
            tensorboard_log: As in the constructor.
            verbose: As in the constructor.

        Raises:
            FileNotFoundError: there is no saved run.
            ValueError: it is damaged, or one of another learner or of another network.
        """
        keywords = saved_keywords(cls, path, learning_rate)
        run = cls(model, data=data, tensorboard_log=tensorboard_log, verbose=verbose, **keywords)
        restore_learner(run, path)
        return run


@dataclass(kw_only=True, eq=False, repr=False)
class TrajectoryRegression(ConsistencyLearner):
    """f is regressed on the ends of a teacher's trajectories: no images, no target, a sixth of distillation's passes.

        L = E_{i} d(f_θ(x_{t_i}, t_i), x_end)

    On the embedded model it is the cheapest start for distillation: see docs/consistency.md.

    Args:
        data: The trajectories. Times at which the process has more noise than the student's are left out.
    """

    data: Trajectories = field(metadata=GIVEN_AGAIN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.data, Trajectories):
            raise TypeError(
                f"data must be Trajectories, such as Trajectories.draw(teacher, prompts); got {self.data!r}"
            )
        times = self.data.times
        self._steps = ((times <= self.model.schedule.max_time) & (times > self.boundary)).nonzero()[:, 0]

    @override
    def losses(self, rows: range, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        part = slice(rows.start, rows.stop)
        index = torch.randint(0, len(self.data), (self.batch_size,), generator=generator)[part]
        step = self._steps[torch.randint(0, len(self._steps), (self.batch_size,), generator=generator)[part]]
        scale = self.guidance.scale(generator)
        device = self.model.device
        x = self.data.latents[index, step].to(device, torch.float32)
        end = self.data.latents[index, -1].to(device, torch.float32)
        t = self.data.times[step].to(device, torch.float32)
        return self.distances(self.function(x, t, self.conditioned(index), scale=scale), end), {}


@dataclass(frozen=True, eq=False)
class Step:
    """What a batch has besides x_0, z and times: the data's indices [B], and its guidance scale."""

    indices: Tensor
    scale: float


@dataclass(kw_only=True, eq=False, repr=False)
class PairedTimes(ConsistencyLearner):
    """What distillation and training share: f at x_t is to be what the target says at x_s, a little nearer to x_0.

        L(θ) = E λ·d(f_θ(x_t, t), f_θ⁻(x_s, s)),  x_t = α_t·x_0 + σ_t·z

    Args:
        data: Clean latents and their prompts.
        discretisation: The pairs of times t and s.
        target: θ⁻.
        weighting: λ.
    """

    data: Latents = field(metadata=GIVEN_AGAIN)
    discretisation: Discretisation = KarrasLevels()
    target: Target = Averaged()
    weighting: Weighting = UniformWeight()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.data, Latents):
            raise TypeError(
                f"data must be Latents, such as Trajectories.draw(teacher, prompts).ends; got {self.data!r}"
            )
        self.target_network = self.network if self.target.is_itself else self.new_network().requires_grad_(False)

    @abstractmethod
    def earlier(self, x: Tensor, t: Tensor, s: Tensor, *, clean: Tensor, noise: Tensor, step: Step) -> Tensor:
        """Return x_s, [B, ...], of x_t = α_t·x_0 + σ_t·z.

        Args:
            x: [B, ...] x_t.
            t: [B].
            s: [B].
            clean: [B, ...] x_0.
            noise: [B, ...] z.
            step: What else the batch has.
        """

    def start(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t, [B, ...]."""
        return self.noised(clean, t, noise)

    def noised(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return α_t·x_0 + σ_t·z, [B, ...]."""
        schedule = self.model.schedule
        return broadcast_to(schedule.alpha(t), clean) * clean + broadcast_to(schedule.sigma(t), clean) * noise

    @override
    def losses(self, rows: range, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        part, device = slice(rows.start, rows.stop), self.model.device
        index = torch.randint(0, len(self.data), (self.batch_size,), generator=generator)[part]
        noise = torch.randn(self.batch_size, *self.model.latent_shape, generator=generator)[part].to(device)
        pairs = self.discretisation.pairs(
            self.model.schedule, self.boundary, progress=self.progress, count=self.batch_size, generator=generator
        )
        t, s = (times[part].to(device) for times in pairs)
        step = Step(index, self.guidance.scale(generator))
        clean = self.data.latents[index].to(device, torch.float32)
        conditioning = self.conditioned(index)
        x_t = self.start(clean, t, noise)
        with torch.no_grad():
            x_s = self.earlier(x_t, t, s, clean=clean, noise=noise, step=step)
            goal = self.function(x_s, s, conditioning, scale=step.scale, network=self.target_network)
        distances = self.distances(self.function(x_t, t, conditioning, scale=step.scale), goal)
        ratio = self.model.schedule.noise_ratio
        weights = self.weighting(ratio(t), ratio(s))
        metrics = {} if self.target.is_itself else {"target_decay": torch.tensor(self._decay)}
        return weights * distances, {"distance": distances.detach().mean(), **metrics}

    @property
    def _decay(self) -> float:
        return self.target.decay(self.discretisation.num_intervals(self.progress))

    @override
    @torch.no_grad()
    def after_update(self) -> None:
        if not self.target.is_itself:
            weights = [parameter.detach() for parameter in self.trained_of(self.network)]
            torch._foreach_lerp_(self._target_weights(), weights, 1 - self._decay)

    def _target_weights(self) -> list[Tensor]:
        """Return the target's weights in the places of those that are trained."""
        trained = {name for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        return [parameter for name, parameter in self.target_network.named_parameters() if name in trained]

    @override
    def networks(self) -> Mapping[str, nn.Module]:
        return {} if self.target.is_itself else {"target": self.target_network}


@dataclass(kw_only=True, eq=False, repr=False)
class ConsistencyDistillation(PairedTimes):
    """Consistency distillation: x_s is a teacher's step of the probability-flow ODE from x_t.

    At the noisiest time x_t is pure noise, as samplers start: f is self-consistent from any point, not only from those
    of the data.

    The minimiser is the solver's chain of steps to the boundary, so its error is the solver's: of the first order in
    the length of steps with Euler's, of the second with Heun's (theorem 1).

    Source: Song et al., 2023, algorithm 2, https://arxiv.org/abs/2303.01469; Luo et al., 2023, algorithm 1 (LCM),
    https://arxiv.org/abs/2310.04378.

    Args:
        teacher: The diffusion model whose steps are made; of the student's process.
        solver: How it makes them.

    Raises:
        ValueError: the teacher's process is not the student's.
    """

    teacher: DiffusionModel = field(metadata=GIVEN_AGAIN)
    solver: Solver = Heun()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.teacher, DiffusionModel):
            raise TypeError(f"teacher must be a DiffusionModel, such as load_model('emoji'); got {self.teacher!r}")
        times = torch.linspace(self.boundary, self.model.schedule.max_time, 9, dtype=torch.float64)
        for level in ("alpha", "sigma"):
            student, teacher = (getattr(model.schedule, level)(times) for model in (self.model, self.teacher))
            if not torch.allclose(student, teacher, rtol=0, atol=_SAME):
                raise ValueError(
                    f"the student and the teacher are of two processes: at t = {times.tolist()} their {level} is "
                    f"{student.tolist()} and {teacher.tolist()}"
                )
        self.teacher.use_training_attention(self.teacher.denoiser, bf16=self.is_bf16)

    @override
    def start(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        schedule = self.model.schedule
        is_first = broadcast_to(t == schedule.max_time, clean)
        return torch.where(is_first, schedule.initial_std * noise, self.noised(clean, t, noise))

    @override
    def earlier(self, x: Tensor, t: Tensor, s: Tensor, *, clean: Tensor, noise: Tensor, step: Step) -> Tensor:
        return self.solver.step(self._teacher_of(step), x, t, s, self.teacher.schedule)

    def _teacher_of(self, step: Step) -> Predict:
        conditioning = self.conditioned(step.indices, self.teacher)

        def predict(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            prediction = self.predict(x, t, conditioning, guidance_scale=step.scale, model=self.teacher)
            return prediction.x0, prediction.epsilon

        return predict

    @override
    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | Path,
        model: DiffusionModel,
        *,
        data: Latents,
        teacher: DiffusionModel,
        learning_rate: float | Callable[[float], float] | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
    ) -> "ConsistencyDistillation":
        """Return a saved run; the arguments are those of `ConsistencyLearner.load`, and the teacher."""
        keywords = saved_keywords(cls, path, learning_rate)
        run = cls(model, data=data, teacher=teacher, tensorboard_log=tensorboard_log, verbose=verbose, **keywords)
        restore_learner(run, path)
        return run


@dataclass(kw_only=True, eq=False, repr=False)
class ConsistencyTraining(PairedTimes):
    """Consistency training: x_s is x_0 with less of the same noise, and there is no teacher.

        x_t = α_t·x_0 + σ_t·z,  x_s = α_s·x_0 + σ_s·z

    The defaults are those of the paper; `improved` (iCT) and `easy` (ECT) need fewer images.

    Source: Song et al., 2023, algorithm 3, https://arxiv.org/abs/2303.01469.
    """

    guidance: Guidance = FixedGuidance(1.0)
    discretisation: Discretisation = GrowingLevels()
    target: Target = GrowingAverage()

    @override
    def earlier(self, x: Tensor, t: Tensor, s: Tensor, *, clean: Tensor, noise: Tensor, step: Step) -> Tensor:
        return self.noised(clean, s, noise)
