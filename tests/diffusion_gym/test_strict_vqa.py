import pytest
import torch

from diffusion_gym.prompts import make_prompts
from diffusion_gym.rewards.llava import Llava
from diffusion_gym.rewards.names import reward_class
from diffusion_gym.rewards.strict_vqa import StrictVQA
from tests.tiny_language import make_tiny_llava

QUESTIONS = ["How many dog in this image?", "what is in this image?", "what is the bear playing?"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return str(make_tiny_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def responses(llava, images):
    """What the model says to each question, image by image."""
    network = Llava.load(llava, max_new_tokens=12).float().eval()
    return [[network.answer(image[None], [question])[0] for question in QUESTIONS] for image in images]


def test_the_score_is_the_share_of_answers_that_occur_in_the_responses(llava, images, responses):
    """Also where prompts have different numbers of questions, and are more than a batch."""
    metadata = [
        {"questions": QUESTIONS, "answers": [responses[0][0][1:7], "no such words", responses[0][2]]},
        {"questions": QUESTIONS[:1], "answers": [responses[1][0].split()[-1]]},
        {"questions": QUESTIONS[1:], "answers": [responses[2][1].upper(), "no such words"]},
    ]
    assert StrictVQA(llava=llava, dtype=torch.float16).load().model.dtype == torch.float16
    reward = StrictVQA(llava=llava, max_new_tokens=12, dtype=torch.float32, batch_size=2)
    values = reward(images, ["a", "b", "c"], metadata).values
    torch.testing.assert_close(values, torch.tensor([2 / 3, 1.0, 0.0]))
    assert (reward.name, reward.unit, reward.range) == ("strict_vqa", "1", (0, 1))


def test_the_questions_of_a_prompt_file_reach_the_reward(llava, images, responses, tmp_path):
    file = tmp_path / "counting.jsonl"
    file.write_text(f'{{"prompt": "two dogs", "questions": ["{QUESTIONS[0]}"], "answers": ["{responses[0][0]}"]}}\n')
    prompts = make_prompts(file)
    reward = StrictVQA(llava=llava, max_new_tokens=12, dtype=torch.float32)
    assert reward(images[:1], prompts.texts, prompts.metadata).values.tolist() == [1]


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        [{}],
        [{"questions": ["a?"]}],
        [{"questions": [], "answers": []}],
        [{"questions": ["a?"], "answers": ["b", "c"]}],
        [{"questions": "a?", "answers": "b?"}],
        [{"questions": ["a?"], "answers": [2]}],
    ],
)
def test_a_prompt_without_questions_and_answers_is_named(metadata, llava, images):
    reward = StrictVQA(llava=llava, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"strict_vqa needs the metadata .* of every prompt, .* of 'two dogs' it got \{"
    ):
        reward(images[:1], ["two dogs"], metadata)


def test_by_name_it_is_the_papers():
    assert reward_class("strict_vqa") is StrictVQA
