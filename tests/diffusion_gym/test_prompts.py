import csv
import json
import re
import sys
from pathlib import Path

import datasets
import pytest
import torch

from diffusion_gym.prompts import PromptSet, make_prompts, prompts_from_dataset, with_article
from diffusion_gym.prompts.sets import ACTIVITIES, NAMED, PAPER_ACTIVITIES, animals_activities


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


def test_every_named_set_has_its_size():
    sizes = {name: len(make_prompts(name)) for name in NAMED}
    assert sizes == {
        "simple_animals": 45, "imagenet_animals": 398, "animals_activities": 135, "animals_activities_paper": 135,
        "counting": 154, "unseen_animals": 38, "unseen_objects": 50, "unseen_activities": 270,
        "emoji_animals": 32, "emoji_objects": 32, "emoji_backgrounds": 540,
    }  # fmt: skip


def test_animals_do_the_three_activities_in_either_spelling():
    prompts = make_prompts("animals_activities")
    assert prompts.texts[:3] == ("a cat washing the dishes", "a cat riding a bike", "a cat playing chess")
    assert "an ant playing chess" in prompts.texts
    assert set(prompts) == {
        f"{animal} {activity}" for animal in make_prompts("simple_animals") for activity in ACTIVITIES
    }
    assert animals_activities(PAPER_ACTIVITIES).texts[0] == "a cat washing dishes"
    assert make_prompts("animals_activities_paper") == animals_activities(PAPER_ACTIVITIES)


def test_counting_asks_how_many_and_what():
    prompts = make_prompts("counting")
    metadata = dict(zip(prompts, prompts.metadata, strict=True))
    asked = {
        "two cats": "cat",
        "eight wolves": "wolf",
        "six fish": "fish",
        "three foxes": "fox",
        "seven sheep": "sheep",
    }
    for text, noun in asked.items():
        number, plural = text.split()
        questions = [f"How many {plural} are there in this image?", "What animal is in this image?"]
        assert metadata[text] == {"questions": questions, "answers": [number, noun]}
    animals = {with_article(entry["answers"][1]) for entry in prompts.metadata}
    assert len(animals) == 22
    assert animals < set(make_prompts("simple_animals"))
    assert {entry["answers"][0] for entry in prompts.metadata} == {
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
    }


@pytest.mark.parametrize("name", ["unseen_animals", "unseen_objects", "emoji_animals", "emoji_objects"])
def test_unseen_prompts_are_not_among_those_trained_on(name):
    assert not set(make_prompts(name)) & set(make_prompts("simple_animals"))


def test_unseen_activities_are_those_of_the_same_animals():
    seen, unseen = make_prompts("animals_activities"), make_prompts("unseen_activities")
    assert not set(seen) & set(unseen)
    for prompts in (unseen, make_prompts("emoji_backgrounds")):
        assert {" ".join(text.split()[:2]) for text in prompts} == set(make_prompts("simple_animals"))
    assert "an ant on an orange background" in set(make_prompts("emoji_backgrounds"))


def test_the_embedded_model_knows_the_words_of_its_sets(emoji):
    """Each noun of its sets is a few of its tokenizer's pieces: a word that it never saw falls into letters."""
    vocabulary = json.loads((emoji.path / "tokenizer" / "vocab.json").read_text())
    words = {
        word for name in ("emoji_animals", "emoji_objects") for text in make_prompts(name) for word in text.split()
    }
    assert [word for word in sorted(words) if f"{word}</w>" not in vocabulary] == []


def test_tables_have_a_column_of_prompts_and_metadata(tmp_path):
    (tmp_path / "drawbench.csv").write_text('Prompts,Category\n"A red car, parked",Colors\na cat,Animals\n')
    prompts = make_prompts(tmp_path / "drawbench.csv")
    assert prompts.texts == ("A red car, parked", "a cat")
    assert prompts.metadata == ({"Category": "Colors"}, {"Category": "Animals"})
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\na cat\tAnimals\na dog\tAnimals\na cat\tTwice\n")
    with pytest.warns(UserWarning, match=r"parti.tsv: 1 prompts are repetitions.*; 1 of them have other metadata"):
        prompts = make_prompts(tmp_path / "parti.tsv")
    assert (prompts.texts, prompts.weights) == (("a cat", "a dog"), (2, 1))
    assert prompts.metadata[0] == {"Category": "Animals"}


def test_tables_without_prompts_are_refused(tmp_path):
    (tmp_path / "p.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"no column is named one of .*'prompt'.* there are \['a', 'b'\]"):
        make_prompts(tmp_path / "p.csv")
    (tmp_path / "p.csv").write_text("prompt,b\na cat, red,2\n")
    with pytest.raises(ValueError, match="line 2: more cells than columns; a text with a comma needs quotes"):
        make_prompts(tmp_path / "p.csv")


@pytest.mark.filterwarnings("default")
def test_datasets_are_read_by_the_real_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "some_prompts"
    folder.mkdir()
    rows = [{"Prompt": "a cat", "number": 1}, {"Prompt": "a dog", "number": 2}]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "test.jsonl").write_text(json.dumps({"Prompt": "a fox", "number": 3}))
    prompts = make_prompts(f"datasets:{folder}")
    assert prompts.texts == ("a cat", "a dog")
    assert prompts.metadata == ({"number": 1}, {"number": 2})
    assert make_prompts(f"datasets:{folder}:test").texts == ("a fox",)
    with pytest.raises(ValueError, match="has no column 'caption'"):
        prompts_from_dataset(str(folder), column="caption")


def test_a_dataset_without_its_package_names_the_line_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "diffusion-gym\[datasets\]"'):
        make_prompts("datasets:owner/name")


def test_prompts_are_drawn_as_their_weights_say():
    prompts = make_prompts({"a cat": 3, "a dog": 0, "a fox": 1})
    generator = torch.Generator().manual_seed(0)
    drawn = [prompts.draw(generator) for _ in range(2000)]
    assert drawn.count(1) == 0
    assert drawn.count(0) / 2000 == pytest.approx(0.75, abs=0.03)
    alike = make_prompts(["a cat", "a dog"])
    assert sum(alike.draw(generator) for _ in range(2000)) / 2000 == pytest.approx(0.5, abs=0.035)


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, "x")])
def test_wrong_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        PromptSet(("a", "b"), weights=weights)


def test_files_and_lists(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n")
    assert make_prompts(tmp_path / "p.txt").texts == ("a cat", "a dog")
    assert make_prompts(str(tmp_path / "p.txt")).texts == ("a cat", "a dog")
    (tmp_path / "p.jsonl").write_text('{"prompt": "2 cats", "n": 2}\n{"prompt": "a dog"}\n')
    prompts = make_prompts(tmp_path / "p.jsonl")
    assert prompts.texts == ("2 cats", "a dog")
    assert prompts.metadata == ({"n": 2}, {})
    assert prompts.metadata_of(["a dog", "2 cats", "a fox", "2 cats"]) == [{}, {"n": 2}, {}, {"n": 2}]
    (tmp_path / "windows.txt").write_bytes("\ufeffa cat\r\na \u2028dog\r\n".encode())
    assert make_prompts(tmp_path / "windows.txt").texts == ("a cat", "a \u2028dog")
    assert make_prompts(["x", "y"]).texts == ("x", "y")
    assert make_prompts(prompts) is prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", b'["a", "b"]', r"unknown suffix .* '.json': allowed are '.csv', .* Did you mean '.jsonl'\?"),
        ("p", b"a cat", "unknown suffix of a prompt file ''"),
        ("p.txt", b"\n", "needs at least one prompt"),
        ("p.jsonl", b"", "needs at least one prompt"),
        ("p.csv", b"prompt\n", "needs at least one prompt"),
        ("p.csv", b"", "no column is named"),
        ("p.tsv", "prompt\na caf\xe9".encode("latin-1"), "'utf-8' codec can't decode"),
        ("p.txt", "a cat".encode("utf-16"), "'utf-8' codec can't decode"),
    ],
)
def test_files_that_are_no_prompts_are_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    for given in (file, str(file)):
        with pytest.raises(ValueError, match=f"{file}: .*{message}"):
            make_prompts(given)


@pytest.mark.parametrize("file", ["pr/zz.csv", Path("pr/zz.csv"), Path("zz"), "zz.TXT"])
def test_files_that_are_not_there_are_named(file):
    with pytest.raises(ValueError, match=f"there is no file '{file}'"):
        make_prompts(file)


@pytest.mark.parametrize("line", ['["a cat"]', '{"text": "a cat"}', '{"prompt": 3}', '{"prompt": "a', "{}"])
def test_wrong_lines_are_named_with_their_number(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "ok"}\n' + line)
    with pytest.raises(
        ValueError, match=r"line 2: (expected a JSON object|there is no 'prompt'|a prompt must be a str)"
    ):
        make_prompts(file)


def as_source(kind, column, texts, folder):
    """Return the same prompts as a source of another kind."""
    file = folder / f"prompts{kind}"
    rows = [{column: text, "n": "7"} for text in texts]
    if kind == ".txt":
        file.write_text("\n".join(texts))
    elif kind == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif kind in (".csv", ".tsv"):
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, [column, "n"], delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "dataset":
        (folder / "data").mkdir()
        (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return f"datasets:{folder / 'data'}"
    else:
        return texts
    return file


@pytest.mark.filterwarnings("default:.*:ResourceWarning")
@pytest.mark.parametrize("column", ["prompt", "Text", "caption"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".tsv", "dataset", "list"])
def test_every_source_of_prompts_is_treated_alike(kind, column, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = ["a fox ", "# a comment", "a bear", " a fox", "#1 of cats"]
    source = as_source(kind, column, texts, tmp_path)
    with pytest.warns(UserWarning, match="prompt") as caught:
        prompts = make_prompts(source)
    said = [str(one.message).partition(": ")[2] for one in caught if one.category is UserWarning]
    assert re.match(r"1 blank prompts or comments .* are left out, the first is (line [23]|row 2|prompt 2);", said[0])
    assert said[1:] == ["1 prompts are repetitions: a prompt is drawn as often as it stands there"]
    assert (prompts.texts, prompts.weights) == (("a fox", "a bear", "#1 of cats"), (2, 1, 1))
    assert prompts.metadata[0] == ({} if kind in (".txt", "list") else {"n": "7"})


@pytest.mark.filterwarnings("ignore:.* blank prompts")
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", "list"])
@pytest.mark.parametrize("blank", ["", "  ", None])
def test_blank_prompts_are_left_out_whatever_the_source(kind, blank, tmp_path):
    assert make_prompts(as_source(kind, "prompt", ["a fox", blank], tmp_path)).texts == ("a fox",)


def test_what_a_file_says_of_a_prompt_and_nothing_follows_is_said(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a fox", "negative_prompt": "grey"}\n{"prompt": "a bear", "weight": 2}'
    )
    with pytest.warns(UserWarning, match="goes to the reward") as caught:
        assert make_prompts(tmp_path / "p.jsonl").metadata[0] == {"negative_prompt": "grey"}
    assert [str(one.message).partition(": ")[2] for one in caught] == [
        "'negative_prompt' goes to the reward as metadata and changes no image: "
        'give one for all to the environment, negative_prompt="…"',
        "'weight' goes to the reward as metadata and changes no image: give {prompt: weight} as the prompts",
    ]


def test_weights_of_a_repeated_prompt_add_up():
    with pytest.warns(UserWarning, match="prompts: 1 prompts are repetitions"):
        assert make_prompts({"a fox": 1, "a fox ": 2, "a bear": 0.5}).weights == (3, 0.5)
    assert make_prompts({"a fox": 1, "a bear": 1}).weights == (1, 1)


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a \\ud83d fox"}')
    for make in (lambda: make_prompts(tmp_path / "p.jsonl"), lambda: PromptSet(("a \ud83d fox",))):
        with pytest.raises(
            ValueError, match=r"must be Unicode text, got 'a \\ud83d fox', which has half of a surrogate"
        ):
            make()
    for make in (lambda: PromptSet(("a", 3)), lambda: make_prompts(["a", 3]), lambda: make_prompts(["a", b"a fox"])):
        with pytest.raises(ValueError, match=r"a prompt must be a string, got (3|b'a fox')"):
            make()
    with pytest.raises(ValueError, match="got one text, 'a fox': put it in a list"):
        PromptSet("a fox")
    assert PromptSet(["a", "b"]) == PromptSet(("a", "b"))


def test_drawing_does_not_build_the_weights_anew(monkeypatch):
    prompts = make_prompts({"a": 1, "b": 3})
    generator = torch.Generator().manual_seed(0)
    first = [prompts.draw(generator) for _ in range(20)]
    monkeypatch.setattr(torch, "tensor", None)
    generator.manual_seed(0)
    assert [prompts.draw(generator) for _ in range(20)] == first


@pytest.mark.filterwarnings("default")
def test_pictures_of_a_dataset_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    image = {"bytes": b"no picture at all: it must not even be decoded", "path": None}
    features = datasets.Features({
        "text": datasets.Value("string"),
        "image": datasets.Image(),
        "n": datasets.Value("int64"),
        "nested": {"blob": datasets.Value("binary")},
    })  # fmt: skip
    table = datasets.Dataset.from_dict(
        {"text": ["a fox"], "image": [image], "n": [3], "nested": [{"blob": b""}]}, features=features
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: table)
    assert make_prompts("datasets:some/thing").metadata == ({"n": 3},)


def test_wrong_sets_are_refused():
    with pytest.raises(ValueError, match=r"unknown prompt set .*'simple_animal'.* Did you mean 'simple_animals'\?"):
        make_prompts("simple_animal")
    with pytest.raises(ValueError, match=r"unknown prompt set .* stands in a list: \['a fox'\]"):
        make_prompts("a fox")
    with pytest.raises(ValueError, match=r'"datasets:ID" or .*, got \'datasets:\''):
        make_prompts("datasets:")
    with pytest.raises(ValueError, match="a name, a file or a sequence of strings"):
        make_prompts(3)
    with pytest.raises(ValueError, match="1 metadata entries for 2 prompts"):
        PromptSet(("a", "b"), ({},))
