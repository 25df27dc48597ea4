import pytest

from diffusion_gym.prompts import PromptSet, make_prompts, with_article


@pytest.mark.parametrize(
    "text",
    ["a cat", "an ant", "an elephant", "a unicorn", "a unicycle", "a uniform", "an uninvited guest", "an umbrella",
     "a European robin", "a ewe", "a one-eyed cat", "an onion", "an hourglass", "an heir", "a horse", "a useful tool",
     "a ukulele", "an Urchin", "a utensil"],
)  # fmt: skip
def test_article_follows_the_sound(text):
    noun = text.split(" ", 1)[1]
    assert with_article(noun) == text


def test_simple_animals_are_the_45_of_the_paper_with_their_articles():
    prompts = make_prompts("simple_animals")
    assert len(prompts) == 45
    assert (prompts[0], prompts[20], prompts[44]) == ("a cat", "an ant", "a kangaroo")


def test_imagenet_animals_are_the_398_classes_in_their_order():
    prompts = make_prompts("imagenet_animals")
    assert len(prompts) == 398
    assert prompts[0] == "tench, Tinca tinca"
    assert prompts[151] == "Chihuahua"
    assert prompts[397] == "puffer, pufferfish, blowfish, globefish"


def test_files_and_lists(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n")
    assert make_prompts(tmp_path / "p.txt").texts == ("a cat", "a dog")
    assert make_prompts(str(tmp_path / "p.txt")).texts == ("a cat", "a dog")
    (tmp_path / "p.jsonl").write_text('{"prompt": "2 cats", "n": 2}\n{"prompt": "a dog"}\n')
    prompts = make_prompts(tmp_path / "p.jsonl")
    assert prompts.texts == ("2 cats", "a dog")
    assert prompts.metadata == ({"n": 2}, {})
    assert make_prompts(["x", "y"]).texts == ("x", "y")
    assert make_prompts(prompts) is prompts


@pytest.mark.parametrize("line", ['["a cat"]', '{"text": "a cat"}', '{"prompt": 3}'])
def test_wrong_lines_are_named_with_their_number(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "ok"}\n' + line)
    with pytest.raises(ValueError, match=r"line 2: expected a JSON object with a string .prompt."):
        make_prompts(file)


def test_wrong_sets_are_refused():
    with pytest.raises(ValueError, match=r"unknown prompt set .*'simple_animal'.* Did you mean 'simple_animals'\?"):
        make_prompts("simple_animal")
    with pytest.raises(ValueError, match="a name, a file or a sequence of strings"):
        make_prompts([1, 2])
    with pytest.raises(ValueError, match="1 metadata entries for 2 prompts"):
        PromptSet(("a", "b"), ({},))
