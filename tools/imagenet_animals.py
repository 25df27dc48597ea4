"""Write the `imagenet_animals` prompt set: the 398 animal classes of ImageNet-1k (indices 0 to 397).

The names are those of WordNet as timm ships them (`pip install timm==1.0.22`), one class a line, synonyms joined by
", ": the form that the DDPO code bases use as prompts.

    pip install --no-deps timm==1.0.22
    python tools/imagenet_animals.py
"""

from importlib.resources import files
from pathlib import Path

NUM_ANIMALS = 398
OUTPUT = Path(__file__).parents[1] / "diffusion_gym" / "prompts" / "data" / "imagenet_animals.txt"


def main() -> None:
    info = files("timm") / "data" / "_info"
    lemmas = dict(line.split("\t", 1) for line in (info / "imagenet_synset_to_lemma.txt").read_text().splitlines())
    synsets = (info / "imagenet_synsets.txt").read_text().split()
    OUTPUT.write_text("".join(f"{lemmas[synset]}\n" for synset in synsets[:NUM_ANIMALS]))


if __name__ == "__main__":
    main()
