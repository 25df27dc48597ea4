"""`python -m agents.evaluation`, from a run's folder to the page."""

import ast
import base64
import html.parser
import json
import re
import runpy
import sys
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.logger import configure

import diffusion_gym  # noqa: F401
from agents import RLOO, Checkpoints, ContextFreeSchedule, DenoisingPolicy, LoRA, Rollouts
from agents.evaluation.charts import COLOURS, gains_chart, trade_chart
from agents.evaluation.command import main
from agents.evaluation.curves import read_curves
from agents.evaluation.measures import Samples
from agents.evaluation.runs import policy_folder
from agents.evaluation.study import Comparison, findings
from agents.logs.reports import environment_settings
from agents.runs.saving import STATE_FILE
from diffusion_gym.envs.denoising import DenoisingVectorEnv
from diffusion_gym.rewards import CallableReward, make_reward
from diffusion_gym.samplers import DDIM

PAIRS = Rollouts(group_size=2, same_noise=True)


class Reader(html.parser.HTMLParser):
    """Collects a page's links and text, and checks that its tags match."""

    VOID = ("meta", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.text = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


@pytest.fixture(scope="module")
def run(emoji, tmp_path_factory):
    """A run of the embedded model with a log and a callback's evaluations in it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, num_steps=2, model=emoji, reward="brightness",
                       prompts="emoji_objects", autoreset_mode="DISABLED")  # fmt: skip
    policy = DenoisingPolicy(emoji, adaptation=LoRA(), seed=0)
    learner = RLOO(policy, env, rollouts=PAIRS, learning_rate=1e-2, seed=0)
    learner.set_logger(configure(str(folder / "log"), ["tensorboard", "csv"]))
    learner.learn(3 * 4, Checkpoints(folder, every=2))
    learner.logger.close()
    return folder


@pytest.fixture(scope="module")
def written(run):
    """What the command writes for it."""
    main([str(run), "--samples-per-prompt", "2", "--max-prompts", "3", "--num-envs", "6", "--unseen", "emoji_animals"])
    return run / "evaluation"


def test_the_numbers_are_those_of_the_run(written):
    results = json.loads((written / "results.json").read_text())
    assert (results["algorithm"], results["reward"], results["held_out"]) == ("RLOO", "brightness", "emoji_alignment")
    assert (results["num_steps"], results["reward_queries"]) == (2, 6)
    trained, unseen = results["sets"]
    assert [trained["name"], unseen["name"]] == ["emoji_objects", "emoji_animals"]
    assert [trained["trained_on"], unseen["trained_on"]] == [True, False]
    for one in (trained, unseen):
        before, after = (np.array([row[key] for row in one["prompts"]]) for key in ("reward_before", "reward_after"))
        assert before.shape == (3, 2)
        assert one["reward"]["before"] == pytest.approx(before.mean(), abs=1e-6)
        assert one["held_out"]["after"] == pytest.approx(np.mean([row["held_out_after"] for row in one["prompts"]]))
        assert one["reward"]["gain"]["mean"] == pytest.approx((after - before).mean(), abs=1e-6)
        assert one["kl"]["mean"] > 0
        assert one["feature_distance"]["mean"] > 0
    assert trained["carry_over"] is None
    assert len(results["findings"]) == 2


def test_the_page_is_whole_and_needs_nothing_else(written):
    page = Reader((written / "index.html").read_text())
    assert all(link.startswith("data:image/") for link in page.links)
    assert len([link for link in page.links if link.startswith("data:image/png")]) == 2 * 2 * 3
    assert len([link for link in page.links if link.startswith("data:image/svg")]) == 3
    text = " ".join(page.text)
    results = json.loads((written / "results.json").read_text())
    assert all(row["prompt"] in text for one in results["sets"] for row in one["prompts"])
    assert all(sentence in text for sentence in results["findings"])
    assert not re.search(r"https?://(?!www\.w3\.org)", (written / "index.html").read_text())


def test_prompts_are_shown_as_text_and_not_as_markup(run, tmp_path):
    (tmp_path / "evil.txt").write_text('<script>x</script>\n"><img src=x>\n')
    main([str(run), "--unseen", str(tmp_path / "evil.txt"), "--samples-per-prompt", "1", "--max-prompts", "2",
          "--held-out", "none", "--output", str(tmp_path / "out")])  # fmt: skip
    page = Reader((tmp_path / "out" / "index.html").read_text())
    assert "script" not in page.open
    assert "<script>x</script>" in page.text
    assert all(link.startswith("data:") for link in page.links)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["sets"][1]["held_out"] is None


def test_both_logs_say_the_same(run, tmp_path):
    logs = [read_curves(tmp_path)]
    for name in ("events.*", "progress.csv"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (file,) = (run / "log").glob(name)
        (folder / file.name).write_bytes(file.read_bytes())
        logs.append(read_curves(folder))
    nothing, events, table = logs
    assert nothing == {}
    for name in ("rollout/ep_rew_mean", "train/grad_norm"):
        np.testing.assert_array_equal(events[name][0], [2, 4, 6])
        np.testing.assert_allclose(events[name][0], table[name][0])
        np.testing.assert_allclose(events[name][1], table[name][1], rtol=1e-5)


def test_runs_are_found_in_their_folders(run, tmp_path):
    assert policy_folder(run).name == "iteration_00000003"
    assert policy_folder(run / "iteration_00000002") == run / "iteration_00000002"
    (tmp_path / "model").symlink_to(run / "iteration_00000003")
    assert policy_folder(tmp_path) == tmp_path / "model"
    with pytest.raises(FileNotFoundError, match=r"has no saved policy: expected policy\.json"):
        policy_folder(tmp_path.parent)


def test_a_run_says_how_its_environment_was_made(run, emoji):
    state = json.loads((policy_folder(run) / "training_state.json").read_text())
    said = {"reward": "brightness", "num_steps": 2, "num_envs": 2, "prompts": "emoji_objects"}
    assert {name: state["environment"][name] for name in said} == said
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, model=emoji, prompts=["a cat", "a dog"])
    assert environment_settings(env.unwrapped)["prompts"] is None
    assert "prompts" not in environment_settings(gym.make_vec("DenoisingMDP-v0", num_envs=2, model=emoji).unwrapped)
    unnamed = environment_settings(DenoisingVectorEnv(2, model=emoji, reward="brightness", prompts="emoji_objects"))
    assert (unnamed["reward"], unnamed["prompts"]) == (None, None)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("brightness", "brightness"),
        (make_reward("brightness"), None),  # it could have options
        (lambda images, *_: -images.mean((1, 2, 3)), None),
        ({"brightness": 5.0, "compressibility": 1.0}, None),
    ],
)
def test_a_run_says_its_reward_only_if_the_name_makes_it_anew(emoji, reward, said):
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, model=emoji, reward=reward)
    assert environment_settings(env.unwrapped)["reward"] == said


def save_run(folder, model, *, prompts, reward="brightness", policy=None, **arguments):
    """Write a run of a model that is quick to evaluate."""
    env = gym.make_vec("DenoisingMDP-v0", num_envs=2, num_steps=3, model=model, reward=reward, prompts=prompts,
                       autoreset_mode="DISABLED", **arguments)  # fmt: skip
    policy = policy or DenoisingPolicy(model, seed=0)
    learner = RLOO(policy, env, rollouts=PAIRS, learning_rate=1e-2, seed=0)
    learner.learn(1)
    learner.save(folder)


def evaluated(folder, *arguments):
    main([str(folder), "--samples-per-prompt", "2", *arguments])
    return json.loads((folder / "evaluation" / "results.json").read_text())


def listed(file, *prompts):
    file.write_text("\n".join(prompts))
    return str(file)


def test_a_weighted_sum_is_given_as_json(mixture, tmp_path, capsys):
    prompts = listed(tmp_path / "some.txt", "north", "south")
    save_run(tmp_path / "run", mixture, prompts=prompts, reward={"brightness": 5.0, "compressibility": 1.0})
    with pytest.raises(SystemExit, match="does not say its reward: give --reward"):
        evaluated(tmp_path / "run", "--unseen")
    results = evaluated(tmp_path / "run", "--unseen", "--reward", '{"brightness": 5, "compressibility": 1}')
    assert results["reward"] == "5*brightness+1*compressibility"
    with pytest.raises(SystemExit):
        evaluated(tmp_path / "run", "--unseen", "--reward", "{brightness: 5}")
    assert "argument --reward: invalid reward value: '{brightness: 5}'" in capsys.readouterr().err


def test_a_model_that_knows_no_other_prompts_is_judged_on_its_own(mixture, tmp_path, capsys):
    save_run(tmp_path / "run", mixture, prompts=listed(tmp_path / "some.txt", "north", "south"))
    (only,) = evaluated(tmp_path / "run")["sets"]
    assert only["trained_on"]
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run"), "--samples-per-prompt", "0"])
    assert "--samples-per-prompt and --num-envs must be at least 1, got 0 and 32" in capsys.readouterr().err


@pytest.mark.parametrize(("observed", "expected"), [(True, "east"), (None, "east"), (False, "west")])
def test_guidance_moves_away_from_what_it_did_in_the_training(mixture, tmp_path, monkeypatch, observed, expected):
    """From the environment's negative prompt, or the policy's, where that encodes its own."""
    prompts = ("north", "south")
    policy = DenoisingPolicy(mixture, seed=0, guidance_scale=2.0, prompts=prompts, negative_prompt="west")
    save_run(tmp_path / "run", mixture, prompts=listed(tmp_path / "some.txt", *prompts), policy=policy,
             negative_prompt="west" if observed is False else "east", observe_embeds=observed)  # fmt: skip
    made, make_vec = [], gym.make_vec
    monkeypatch.setattr(gym, "make_vec", lambda *args, **kwargs: made.append(kwargs) or make_vec(*args, **kwargs))
    evaluated(tmp_path / "run", "--unseen")
    assert made[0]["negative_prompt"] == expected


def test_prompts_of_the_training_are_in_no_unseen_set(mixture, tmp_path, capsys):
    trained_on = listed(tmp_path / "trained.txt", "north", "south", "east")
    save_run(tmp_path / "run", mixture, prompts=trained_on)
    overlapping = listed(tmp_path / "overlapping.txt", "south", "west", "north", "north-west")
    same = listed(tmp_path / "same.txt", "north", "south", "west")
    results = evaluated(tmp_path / "run", "--max-prompts", "2", "--unseen", overlapping, same)
    trained, unseen = results["sets"]
    assert {row["prompt"] for row in trained["prompts"]} < {"north", "south", "east"}
    assert [row["prompt"] for row in unseen["prompts"]] == ["west", "north-west"]
    assert f"{same} is left out: of its 3 prompts 1 were not trained on" in capsys.readouterr().out


def test_an_interval_over_one_prompt_is_refused_before_anything_is_drawn(mixture, tmp_path, monkeypatch):
    save_run(tmp_path / "run", mixture, prompts=listed(tmp_path / "one.txt", "north"))
    monkeypatch.setattr("agents.evaluation.command.draw_samples", None)
    with pytest.raises(SystemExit, match="at least two of them: got 1 that the run was trained on"):
        evaluated(tmp_path / "run", "--unseen")
    two = listed(tmp_path / "two.txt", "north", "south")
    with pytest.raises(SystemExit, match="and --max-prompts 1"):
        evaluated(tmp_path / "run", "--prompts", two, "--max-prompts", "1")


def test_a_policy_alone_does_not_say_what_it_was_trained_on(mixture, tmp_path):
    """Nor has one without noise a KL divergence."""
    DenoisingPolicy(mixture, seed=0, sampler=DDIM(0.0)).save(tmp_path)
    how = ("--reward", "brightness", "--num-steps", "3", "--unseen")
    with pytest.raises(SystemExit, match="does not say its prompts: give --prompts"):
        evaluated(tmp_path, *how)
    results = evaluated(tmp_path, *how, "--prompts", listed(tmp_path / "some.txt", "north", "south"))
    assert results["sets"][0]["kl"] is None
    Reader((tmp_path / "evaluation" / "index.html").read_text())


def test_charts_show_more_sets_than_there_are_colours():
    rng = np.random.default_rng(0)

    def some():
        rewards, held_out = rng.normal(size=(2, 3, 2))
        features, images = np.ones((3, 2, 1)), np.zeros((3, 2, 1, 1, 3), dtype=np.uint8)
        return Samples(("a", "b", "c"), rewards, held_out, features, None, images)

    comparisons = [Comparison(f"set {k}", k == 0, some(), some()) for k in range(len(COLOURS) + 2)]
    summaries = [one.summary(comparisons[0]) for one in comparisons]
    names = {"reward": "reward", "unit": "", "held_out": "other"}
    for chart in (gains_chart(summaries, **names), trade_chart(comparisons, **names)):
        svg = base64.b64decode(chart.partition(",")[2]).decode()
        found = Counter(re.findall("|".join(COLOURS), svg))
        assert found[COLOURS[0]] == found[COLOURS[1]]
        assert found[COLOURS[0]] > found[COLOURS[2]]


def test_what_a_run_does_not_say_is_asked_for(run, tmp_path, emoji):
    DenoisingPolicy(emoji, adaptation=LoRA()).save(tmp_path)
    with pytest.raises(SystemExit, match="does not say its reward: give --reward"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="does not say its num_steps: give --num-steps"):
        main([str(tmp_path), "--reward", "brightness"])
    environment = {"reward": "brightness", "num_steps": 2, "prompts": None}  # a list, which no log keeps
    (tmp_path / "training_state.json").write_text(json.dumps({"environment": environment}))
    with pytest.raises(SystemExit, match="does not say its prompts: give --prompts"):
        main([str(tmp_path)])
    ContextFreeSchedule([0.5]).save(tmp_path)
    with pytest.raises(SystemExit, match="holds a ContextFreeSchedule: only a DenoisingPolicy"):
        main([str(tmp_path), "--reward", "brightness"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/run"], "no/such/run has no saved policy"),
        (["--reward", "brigtness"], "unknown reward 'brigtness'"),
        (["--held-out", "brigtness"], "unknown reward 'brigtness'"),
        (["--prompts", "simple_animal"], "simple_animal"),
        (["--unseen", "simple_animal"], "simple_animal"),
        (["--device", "nowhere"], "nowhere"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(run, arguments, message):
    with pytest.raises(SystemExit, match=message) as ended:
        main(arguments if arguments[0] == "no/such/run" else [str(run), *arguments])
    assert "\n" not in str(ended.value.code)


def north_is_best(images, prompts, metadata):
    return images.mean((1, 2, 3))


class South(CallableReward):
    def __init__(self):
        super().__init__(north_is_best, "south")


def test_a_reward_is_a_python_function_of_a_module(mixture, tmp_path):
    prompts = listed(tmp_path / "some.txt", "north", "south")
    save_run(tmp_path / "run", mixture, prompts=prompts, reward=north_is_best)
    results = evaluated(tmp_path / "run", "--unseen", "--reward", f"{__name__}:north_is_best",
                        "--held-out", f"{__name__}:South")  # fmt: skip
    assert (results["reward"], results["held_out"]) == ("north_is_best", "south")
    for text, message in ((f"{__name__}:nothing", "unknown name in .*'nothing'"), ("no_module:f", "does not find")):
        with pytest.raises(SystemExit, match=message):
            evaluated(tmp_path / "run", "--reward", text)


@pytest.mark.parametrize("saved", ["'antigravity:geohash'", '{"remote://elsewhere:80": 1.0}'])
def test_what_a_runs_file_names_is_not_imported(mixture, tmp_path, saved):
    save_run(tmp_path / "run", mixture, prompts=listed(tmp_path / "some.txt", "north", "south"), reward="brightness")
    file = tmp_path / "run" / STATE_FILE
    state = json.loads(file.read_text())
    state["environment"]["reward"] = ast.literal_eval(saved)
    file.write_text(json.dumps(state))
    with pytest.raises(SystemExit, match="neither imported nor asked over the network unless you say so"):
        evaluated(tmp_path / "run", "--unseen")
    assert "antigravity" not in sys.modules


def summary(mean, low, high, *, trained_on=False, share=None):
    gain = {"mean": mean, "low": low, "high": high}
    carry_over = None if share is None else {"mean": share, "low": share - 0.1, "high": share + 0.1}
    return {
        "name": "some",
        "trained_on": trained_on,
        "reward": {"gain": gain},
        "carry_over": carry_over,
        "held_out": None,
    }


@pytest.mark.parametrize(
    ("mean", "low", "high", "said"),
    [
        (-0.000251, -0.0004, -0.000102, "fell: −0.000251 (−0.000400 to −0.000102)"),
        (0.3437, 0.31, 0.38, "rose: +0.344 (+0.310 to +0.380)"),
        (21.37, -1.5, 44.2, "did not change for sure: +21.4 (−1.5 to +44.2)"),
        (1234.5, 1100.0, 1400.0, "rose: +1234 (+1100 to +1400)"),
        (0.0, 0.0, 0.0, "did not change for sure: +0.00 (+0.00 to +0.00)"),
    ],
)
def test_findings_have_three_digits_whatever_the_unit(mean, low, high, said):
    (sentence,) = findings([summary(mean, low, high, trained_on=True)], reward="r", unit="", held_out=None)
    assert sentence == f"On some, which were trained on, r {said}."


def test_findings_call_a_fall_a_fall():
    sets = [summary(-0.2, -0.3, -0.1, trained_on=True), summary(-0.1, -0.2, -0.05, share=0.63)]
    sentence = findings(sets, reward="r", unit=" kB", held_out=None)[1]
    assert sentence.endswith(
        "fell: −0.100 (−0.200 to −0.050) kB, 63% of the fall on the training prompts (53% to 73%)."
    )
    sets[0]["reward"]["gain"]["mean"] = 0.2
    assert "63% of the gain on" in findings(sets, reward="r", unit=" kB", held_out=None)[1]


def test_the_command_has_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("agents.evaluation", run_name="__main__")
    assert ended.value.code == 0
    assert "--held-out" in capsys.readouterr().out
