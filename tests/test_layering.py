"""Who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("diffusion_gym", "agents") for path in (ROOT / package).rglob("*.py"))

BELOW = {
    "naming": set(),
    "lines": set(),
    "loading": set(),
    "checks": set(),
    "transfer": set(),
    "parts": {"naming"},
    "samplers": {"schedules", "parts", "checks", "transfer"},
    "schedules": set(),
    "grids": {"schedules"},
    "predictions": set(),
    "transitions": {"schedules", "predictions", "samplers", "transfer"},
    "models": {"naming", "checks", "transfer", "loading", "schedules", "predictions", "samplers", "transitions"},
    "sampling": {"samplers", "transitions", "models"},
    "rewards": {"naming", "checks", "loading", "transfer"},
    "prompts": {"naming", "lines"},
    "envs": {
        *("naming", "checks", "transfer", "samplers", "transitions", "schedules", "grids"),
        *("models", "sampling", "rewards", "prompts"),
    },
    "testing": {"transfer", "envs"},
    "__init__": set(),
}
OF_DIFFUSION_GYM = {
    *("naming", "checks", "parts", "transfer", "lines", "schedules", "grids", "predictions", "samplers", "transitions"),
    *("models", "envs.contract"),
}
ROOMS_ABOVE = ("evaluation", "callbacks", "benchmark")
HEAVY = {
    "diffusers": {"diffusion_gym/models", "agents/policies/denoising.py", "agents/updates/averaging.py"},
    "transformers": {
        "diffusion_gym/models",
        "diffusion_gym/loading.py",
        "diffusion_gym/rewards/emoji_alignment.py",
        "diffusion_gym/rewards/model_based.py",
        "diffusion_gym/rewards/image_preparation.py",
        "diffusion_gym/rewards/aesthetic.py",
        "diffusion_gym/rewards/clip.py",
        "diffusion_gym/rewards/hps_v2.py",
        "diffusion_gym/rewards/image_reward.py",
        "diffusion_gym/rewards/llava.py",
        "diffusion_gym/rewards/bertscore.py",
    },
    "peft": {"diffusion_gym/models", "agents/policies"},
    "accelerate": {"agents/updates/distributed.py"},
    "fastapi": {"diffusion_gym/rewards/server.py"},
    "starlette": {"diffusion_gym/rewards/server.py"},
    "uvicorn": {"diffusion_gym/rewards/server.py"},
    "stable_baselines3": {
        "agents/training",
        "agents/runs/checkpoints.py",
        "agents/callbacks",
        "agents/logs",
        "agents/rloo.py",
        "agents/adapters",
    },
}


def imported(path):
    """Return the absolute names of the modules that a file imports, wherever the import stands."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    name = str(path.relative_to(ROOT))
    room = path.relative_to(ROOT).with_suffix("").parts[1]
    for module in imported(path):
        top, *rest = module.split(".")
        if name.startswith("diffusion_gym"):
            assert top != "agents", f"{name} imports {module}"
            if top == "diffusion_gym" and rest and rest[0] in BELOW and rest[0] != room:
                assert rest[0] in BELOW[room], f"{name} imports {module}"
        elif (
            top == "diffusion_gym"
            and rest
            and rest[0] in BELOW
            and not room.startswith(("evaluation", "callbacks", "benchmark"))
        ):
            assert {rest[0], ".".join(rest[:2])} & OF_DIFFUSION_GYM, f"{name} imports {module}"
        assert "adapters" not in rest or "adapters" in name, f"{name} imports {module}"
        if top in HEAVY:
            assert any(name.startswith(allowed) for allowed in HEAVY[top]), f"{name} imports {module}"


def test_every_room_of_the_package_has_its_rule():
    rooms = {
        path.relative_to(ROOT / "diffusion_gym").parts[0].removesuffix(".py")
        for path in FILES
        if "agents" not in path.parts
    }
    assert rooms == set(BELOW)
