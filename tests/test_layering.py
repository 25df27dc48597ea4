"""Who may import whom, what nobody does, and that every file is tested somewhere."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("diffusion_gym", "agents") for path in (ROOT / package).rglob("*.py"))
AGENTS = [path for path in FILES if path.is_relative_to(ROOT / "agents")]

BELOW = {
    "naming": set(),
    "lines": set(),
    "loading": set(),
    "checks": set(),
    "transfer": set(),
    "precision": set(),
    "parts": {"naming"},
    "samplers": {"schedules", "parts", "checks", "transfer"},
    "schedules": set(),
    "grids": {"checks", "schedules"},
    "predictions": set(),
    "consistency_function": {"schedules", "predictions"},
    "transitions": {"schedules", "predictions", "samplers", "transfer"},
    "models": {
        *("naming", "checks", "transfer", "loading"),
        *("schedules", "predictions", "consistency_function", "samplers", "transitions"),
    },
    "sampling": {"predictions", "samplers", "transitions", "models"},
    "consistency": {
        "checks",
        "parts",
        "predictions",
        "schedules",
        "grids",
        "samplers",
        "transitions",
        "models",
        "sampling",
    },
    "rewards": {"naming", "checks", "loading", "transfer"},
    "prompts": {"naming", "lines"},
    "envs": {
        *("naming", "checks", "transfer", "samplers", "transitions", "schedules", "grids"),
        *("models", "sampling", "rewards", "prompts"),
    },
    "testing": {"transfer", "envs", "models", "predictions", "prompts", "rewards", "samplers", "schedules"},
    "wrappers": {"checks", "transfer", "samplers", "transitions", "schedules", "rewards", "envs"},
    "__init__": set(),
}
OF_DIFFUSION_GYM = {
    *(
        "naming",
        "checks",
        "parts",
        "precision",
        "transfer",
        "lines",
        "schedules",
        "grids",
        "predictions",
        "consistency_function",
        "samplers",
        "transitions",
    ),
    *("models", "envs.contract"),
}
ROOMS_ABOVE = {"evaluation", "callbacks", "benchmark"}  # they judge: they may take rewards and prompts too
OF_ROOMS_ABOVE = OF_DIFFUSION_GYM | {"rewards", "prompts"}
FLOORS = (
    {"policies", "losses", "advantages", "critic"},
    {"experience"},
    {"kl", "steps", "logs", "updates"},
    {"training", "runs"},
    {"consistency"},  # the algorithms: every other file
    {"evaluation"},
    {"callbacks"},
    {"benchmark"},
    {"adapters"},
    {"__init__"},
)
ALGORITHMS = FLOORS[4]
ALGORITHMS |= {path.stem for path in (ROOT / "agents").glob("*.py")} - set().union(*FLOORS)
HEAVY = {
    "diffusers": {
        "diffusion_gym/models",
        "diffusion_gym/testing/model.py",
        "agents/policies/denoising.py",
        "agents/updates/averaging.py",
    },
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
    "peft": {"diffusion_gym/models", "diffusion_gym/testing/model.py", "agents/policies"},
    "accelerate": {"agents/updates/distributed.py"},
    "fastapi": {"diffusion_gym/rewards/server.py"},
    "starlette": {"diffusion_gym/rewards/server.py"},
    "uvicorn": {"diffusion_gym/rewards/server.py"},
    "stable_baselines3": {
        "agents/training",
        "agents/runs/checkpoints.py",
        "agents/callbacks",
        "agents/benchmark/trial.py",
        "agents/logs",
        "agents/adapters/sb3",
    },
    "torchrl": {"agents/adapters/torchrl.py"},
    "tensordict": {"agents/adapters/torchrl.py"},
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


def name_of(path):
    return str(path.relative_to(ROOT))


def room_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[1]


def floor_of(room):
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    name, room = name_of(path), room_of(path)
    for module in imported(path):
        top, *rest = module.split(".")
        if name.startswith("diffusion_gym"):
            assert top != "agents", f"{name} imports {module}"
            if top == "diffusion_gym" and rest and rest[0] in BELOW and rest[0] != room:
                assert rest[0] in BELOW[room], f"{name} imports {module}"
        elif top == "diffusion_gym" and rest and rest[0] in BELOW:
            allowed = OF_ROOMS_ABOVE if room in ROOMS_ABOVE else OF_DIFFUSION_GYM
            assert rest[0] in allowed or rest[:2] == ["envs", "contract"] or rest == ["envs"], (
                f"{name} imports {module}"
            )
        elif top == "agents" and rest and rest[0] != room and rest[0] in set().union(*FLOORS):
            assert floor_of(rest[0]) <= floor_of(room), f"{name} imports {module}"
            assert not {room, rest[0]} <= ALGORITHMS, f"{name} imports {module}"
        assert "adapters" not in rest or "adapters" in name, f"{name} imports {module}"
        if top in HEAVY:
            assert any(name.startswith(allowed) for allowed in HEAVY[top]), f"{name} imports {module}"


@pytest.mark.parametrize(("package", "rooms"), [("diffusion_gym", set(BELOW)), ("agents", set().union(*FLOORS))])
def test_every_room_has_its_rule(package, rooms):
    assert {room_of(path) for path in FILES if path.is_relative_to(ROOT / package)} == rooms


def nodes(path, kind):
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind))


def test_agents_take_an_environment_in_one_place():
    found = {name_of(path) for path in AGENTS for node in nodes(path, ast.Attribute) if node.attr == "unwrapped"}
    assert found == {"agents/experience/environment.py"}


def test_agents_ask_a_policy_and_not_its_class():
    asking = [
        f"{name_of(path)}:{call.lineno}"
        for path in AGENTS
        for call in nodes(path, ast.Call)
        if ast.unparse(call.func) == "isinstance" and "DenoisingPolicy" in ast.unparse(call.args[1])
    ]
    assert [place for place in asking if not place.startswith("agents/policies/denoising.py")] == []


def test_no_keywords_pass_through_agents():
    """A `**name` of a signature may be looked at, such as what is written into a file, but not given on.

    `env_method`, which is Stable-Baselines3's, is for nothing else.
    """
    for path in AGENTS:
        for function in (node for node in nodes(path, ast.FunctionDef) if node.name != "env_method"):
            rest = function.args.kwarg.arg if function.args.kwarg else None
            unpacked = [
                keyword for call in ast.walk(function) if isinstance(call, ast.Call) for keyword in call.keywords
            ]
            passed = {ast.unparse(keyword.value) for keyword in unpacked if keyword.arg is None}
            where = f"{name_of(path)}:{function.lineno}"
            assert rest not in {"options", "kwargs", *passed}, f"{where} has **{rest}: name the keywords"


# Where files are tested that have no test file of their name.
TESTED_IN = {
    "agents/benchmark/charts.py": "agents/benchmark/test_report.py",
    "agents/benchmark/plane.py": "agents/benchmark/test_tasks.py",
    "agents/evaluation": "agents/evaluation/test_command.py",
    "agents/policies/base.py": "agents/policies/test_denoising_policy.py",
    "agents/policies/beta.py": "agents/test_shared_state.py",
    "agents/policies/denoising.py": "agents/policies/test_denoising_policy.py",
    "agents/policies/schedules.py": "agents/policies/test_time_policies.py",
    "agents/runs/learner_saving.py": "agents/training/test_learner.py",
    "agents/policies/time_prediction.py": "agents/policies/test_time_policies.py",
    "diffusion_gym/envs": "diffusion_gym/test_conformance.py",
    "diffusion_gym/models/base.py": "diffusion_gym/test_models.py",
    "diffusion_gym/models/loading.py": "diffusion_gym/test_models.py",
    "diffusion_gym/models/pipeline.py": "diffusion_gym/models/test_families.py",
    "diffusion_gym/models/text_encoders.py": "diffusion_gym/models/test_folders.py",
    "diffusion_gym/models/lora.py": "diffusion_gym/test_lora_files.py",
    "diffusion_gym/models/schedulers.py": "diffusion_gym/test_schedules.py",
    "diffusion_gym/models/stable_diffusion.py": "diffusion_gym/test_models.py",
    "diffusion_gym/models/understood.py": "diffusion_gym/models/test_folders.py",
    "diffusion_gym/models/weights.py": "diffusion_gym/models/test_folders.py",
    "diffusion_gym/prompts": "diffusion_gym/test_prompts.py",
    "diffusion_gym/rewards/base.py": "diffusion_gym/test_rewards.py",
    "diffusion_gym/rewards/bertscore.py": "diffusion_gym/test_prompt_alignment.py",
    "diffusion_gym/rewards/connection.py": "diffusion_gym/test_remote.py",
    "diffusion_gym/rewards/exchange.py": "diffusion_gym/test_vlm_judge.py",
    "diffusion_gym/rewards/jpeg.py": "diffusion_gym/test_rewards.py",
    "diffusion_gym/rewards/llava.py": "diffusion_gym/test_prompt_alignment.py",
    "diffusion_gym/rewards/names.py": "diffusion_gym/test_rewards.py",
    "diffusion_gym/rewards/normalised.py": "diffusion_gym/test_compositions.py",
    "diffusion_gym/rewards/server.py": "diffusion_gym/test_reward_server.py",
    "diffusion_gym/rewards/wire.py": "diffusion_gym/test_remote.py",
    "diffusion_gym/testing": "diffusion_gym/testing/test_vector_env.py",
}


def has_a_test_of_its_name(path):
    package = path.relative_to(ROOT).parts[0]
    return any((ROOT / "tests" / package).rglob(f"test_{path.stem}.py"))


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in ("__init__", "__main__")], ids=name_of)
def test_every_file_of_more_than_60_lines_is_tested_somewhere(path):
    listed = {name_of(path), name_of(path.parent)} & TESTED_IN.keys()
    if len(path.read_text().splitlines()) > 60:
        assert listed or has_a_test_of_its_name(path), f"list where {name_of(path)} is tested, or test it"
    assert name_of(path) not in listed or not has_a_test_of_its_name(path), f"{name_of(path)} has a test of its name"


def test_the_table_of_tests_names_what_is_there():
    for source, test in TESTED_IN.items():
        assert (ROOT / source).exists(), source
        assert (ROOT / "tests" / test).is_file(), test
