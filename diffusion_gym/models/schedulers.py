"""diffusers' scheduler folders as noise schedules."""

import json
from pathlib import Path

import diffusers

from ..schedules import DiscreteVPSchedule


def discrete_schedule(folder: Path) -> DiscreteVPSchedule:
    """Return the noise process that a diffusers scheduler folder describes.

    Only its numbers are used (betas, spacing, offset, the last ᾱ), completed by the defaults of the scheduler class
    that it names; the class's own stepping is not (Stable Diffusion ships PNDM).

    Raises:
        ValueError: the scheduler is not a discrete variance-preserving one.
    """
    class_name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, class_name).from_pretrained(folder)
    config = scheduler.config
    if "beta_schedule" not in config:
        raise ValueError(f"{folder}: {class_name} does not describe a discrete variance-preserving process")
    return DiscreteVPSchedule(
        scheduler.alphas_cumprod,
        spacing=config.timestep_spacing,
        steps_offset=config.get("steps_offset", 0),
        ends_clean=config.get("set_alpha_to_one", True),
    )
