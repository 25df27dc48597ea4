"""Fetch the icon sets from the npm registry, at pinned versions, and check their licences.

    python -m tools.emoji.sources

writes `build/emoji/npm/<style>/` (40 MB, half a minute).
"""

import base64
import hashlib
import io
import json
import tarfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

WORK = Path("build/emoji")
REGISTRY = "https://registry.npmjs.org"
TRAINABLE_LICENCES = ("Apache-2.0", "MIT", "CC-BY-4.0")


@dataclass(frozen=True)
class IconSource:
    """One npm package with drawings (or names) of emoji.

    Args:
        style: Our name of it; also its folder's.
        package: npm's name of it.
        version: The pinned version.
        integrity: npm's checksum of the tarball, "sha512-<base64>".
        licence: The SPDX name that the package states.
        credit: Who made it, as the attribution says.
        held_out: No model is ever trained on it; it is the style on which models are judged.
    """

    style: str
    package: str
    version: str
    integrity: str
    licence: str
    credit: str
    held_out: bool = False

    def __post_init__(self) -> None:
        if not self.held_out and self.licence not in TRAINABLE_LICENCES:
            raise ValueError(f"{self.package}: licence {self.licence!r} is not one to train on: {TRAINABLE_LICENCES}")

    def url(self, registry: str) -> str:
        """Return where the tarball is."""
        name = self.package.rpartition("/")[2]
        return f"{registry.rstrip('/')}/{self.package}/-/{name}-{self.version}.tgz"


NAMES = IconSource(
    "names",
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
    "emojibase by Miles Johnson",
)
ICONS = (
    IconSource(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Noto Emoji by Google",
    ),
    IconSource(
        "noto-v1",
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Noto Emoji v1 by Google",
    ),
    IconSource(
        "fluent",
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT",
        "Fluent Emoji by Microsoft",
    ),
    IconSource(
        "fluent-flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Fluent Emoji Flat by Microsoft",
    ),
    IconSource(
        "fluent-3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "MIT",
        "Fluent Emoji 3D by Microsoft, packaged by LobeHub",
    ),
    IconSource(
        "fxemoji",
        "@iconify-json/fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
        "Firefox OS Emoji by Mozilla",
    ),
    IconSource(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twemoji by Twitter, Inc. and other contributors (jdecked/twemoji)",
    ),
    IconSource(
        "emojitwo",
        "@iconify-json/emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "Emoji One (Colored), the EmojiTwo contributors",
    ),
    IconSource(
        "streamline",
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        "CC-BY-4.0",
        "Streamline Emojis by Streamline",
    ),
    IconSource(
        "openmoji",
        "@iconify-json/openmoji",
        "1.2.29",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0",
        "OpenMoji, HfG Schwäbisch Gmünd",
        held_out=True,
    ),
)


def check_integrity(data: bytes, integrity: str) -> None:
    """Raise `ValueError` unless the bytes have npm's checksum."""
    algorithm, _, expected = integrity.partition("-")
    found = base64.b64encode(hashlib.new(algorithm, data).digest()).decode()
    if found != expected:
        raise ValueError(f"the {algorithm} of the download is {found}, but {expected} is pinned: it is another file")


def stated_licence(folder: Path) -> str:
    """Return the licence of the drawings: Iconify's info.json speaks of them, package.json of the package."""
    info = folder / "info.json"
    if info.is_file():
        return json.loads(info.read_text())["license"]["spdx"]
    return json.loads((folder / "package.json").read_text())["license"]


def fetch(source: IconSource, work: Path = WORK, registry: str = REGISTRY) -> Path:
    """Return the folder of a source's files; it is downloaded if it is not there.

    Raises:
        ValueError: the download is not the pinned file, or its licence is not the one that was read when it was chosen.
    """
    folder = work / "npm" / source.style
    if (folder / "package.json").is_file():
        return folder
    with urllib.request.urlopen(source.url(registry), timeout=120) as answer:
        data = answer.read()
    check_integrity(data, source.integrity)
    partial = folder.with_name(folder.name + ".partial")
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        archive.extractall(partial, filter="data")
    if (licence := stated_licence(partial / "package")) != source.licence:
        raise ValueError(
            f"{source.package} {source.version} states the licence {licence!r}, expected {source.licence!r}"
        )
    (partial / "package").rename(folder)
    partial.rmdir()
    return folder


@dataclass
class Args:
    """Fetch the icon sets."""

    work: Path = WORK
    """Where everything is written."""
    registry: str = REGISTRY
    """The npm registry, or a mirror of it."""


def main(args: Args, sources: Sequence[IconSource] = (NAMES, *ICONS)) -> None:
    for source in sources:
        folder = fetch(source, args.work, args.registry)
        use = "held out" if source.held_out else "trained on"
        print(f"{source.style:12} {source.package} {source.version}, {source.licence}, {use}: {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
