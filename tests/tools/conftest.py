"""A little npm registry on the disk: four packages of drawn icons, so that the tools are tried without a network."""

import base64
import hashlib
import io
import json
import tarfile

import pytest
from PIL import Image, ImageDraw

from tools.emoji.icons import ANIMALS, ANIMALS_AND_NATURE, FACES, FOOD, OBJECTS, build
from tools.emoji.sources import IconSource

LABELS = {
    **{
        {"cat": "cat face", "bee": "honeybee"}.get(animal, animal): (f"1f4{index:02x}", ANIMALS_AND_NATURE)
        for index, animal in enumerate(ANIMALS)
    },
    "red apple": ("1f34e", FOOD),
    "pizza": ("1f355", FOOD),
    "key": ("1f511", OBJECTS),
    "light bulb": ("1f4a1", OBJECTS),
    "flag: Wales": ("1f3f4", OBJECTS),
    "a name of four words": ("1f999", OBJECTS),
    "grinning": ("1f600", FACES),
}
NAMED = [label for label in LABELS if ":" not in label and len(label.split()) <= 3]


def slug(label):
    return {"grinning": "grinning-face"}.get(label, label.replace(" ", "-"))


def body(index, radius):
    red, green, blue = (index * 37) % 200, (index * 91) % 200, (index * 53) % 200
    return f'<circle cx="16" cy="16" r="{radius}" fill="rgb({red},{green},{blue})"/>'


def picture(index):
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).rectangle((8, 16, 56, 48), fill=((index * 37) % 256, 100, 60, 255))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=True)
    return buffer.getvalue()


def iconify(licence, radius, *, characters):
    files = {
        "icons.json": json.dumps(
            {
                "width": 32,
                "height": 32,
                "icons": {slug(label): {"body": body(index, radius)} for index, label in enumerate(LABELS)},
            }
        ),
        "info.json": json.dumps({"license": {"spdx": licence}}),
    }
    if characters:
        files["chars.json"] = json.dumps({code: slug(label) for label, (code, _) in LABELS.items()})
    return files


def pack(files, licence):
    files = {"package.json": json.dumps({"license": licence}), **files}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def publish(root, style, package, files, licence, **keywords):
    data = pack(files, licence)
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    source = IconSource(style, package, "1.0.0", integrity, licence, "nobody", **keywords)
    path = root / package / "-" / f"{package.rpartition('/')[2]}-1.0.0.tgz"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return source


@pytest.fixture(scope="session")
def registry(tmp_path_factory):
    """The registry's URL, the source of names and the sources of icons."""
    root = tmp_path_factory.mktemp("registry")
    entries = [{"hexcode": code.upper(), "label": label, "group": group} for label, (code, group) in LABELS.items()]
    names = publish(root, "names", "labels", {"en/data.json": json.dumps(entries)}, "MIT")
    pictures = {f"assets/{code}.webp": picture(index) for index, (code, _) in enumerate(LABELS.values())}
    icons = (
        publish(root, "coded", "@sets/coded", iconify("MIT", 14, characters=True), "MIT"),
        publish(root, "named", "@sets/named", iconify("Apache-2.0", 12, characters=False), "Apache-2.0"),
        publish(root, "painted", "@sets/painted", pictures, "MIT"),
        publish(
            root, "other", "@sets/other", iconify("CC-BY-SA-4.0", 9, characters=True), "CC-BY-SA-4.0", held_out=True
        ),
    )
    return root.as_uri(), names, icons


@pytest.fixture(scope="session")
def work(registry, tmp_path_factory):
    """A working folder with the icons of the little registry."""
    url, names, icons = registry
    folder = tmp_path_factory.mktemp("work")
    build(folder, icons, names, url)
    return folder
