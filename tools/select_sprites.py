"""Write `assets/sprites`: the small world's cast, from a folder of animated sprites.

    python -m tools.select_sprites src=PATH/emoji dst=assets/sprites

The source folder holds `index.json` (a list with file, hexcode, label, subgroup), `LICENSE` and the clips:
animated RGBA webp, 96x96, 24 frames of 125 ms.  Chosen clips are copied byte for byte, so the same source
gives the same folder.  The cast was chosen by eye for distinct silhouettes and colours, and by measure for
sprites whose own animation neither travels nor swells much: it must not be mistaken for the clip's motion.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from turbodiffusion.errors import UserError

SEEN = {
    "octopus": "1f419",
    "whale": "1f433",
    "shark": "1f988",
    "lobster": "1f99e",
    "fish": "1f420",
    "rooster": "1f413",
    "flamingo": "1f9a9",
    "parrot": "1f99c",
    "duck": "1f986",
    "owl": "1f989",
    "chick": "1f424",
    "peacock": "1f99a",
    "swan": "1f9a2",
    "tiger": "1f405",
    "cow": "1f404",
    "pig": "1f416",
    "elephant": "1f418",
    "rabbit": "1f407",
    "black cat": "1f408-200d-2b1b",
    "horse": "1f40e",
    "giraffe": "1f992",
    "zebra": "1f993",
    "hedgehog": "1f994",
    "panda": "1f43c",
    "koala": "1f428",
    "fox": "1f98a",
    "lion": "1f981",
    "unicorn": "1f984",
    "frog": "1f438",
    "snake": "1f40d",
    "dinosaur": "1f996",
    "rocket": "1f680",
    "helicopter": "1f681",
    "locomotive": "1f682",
    "bus": "1f68c",
    "fire engine": "1f692",
    "taxi": "1f695",
    "delivery truck": "1f69a",
    "tractor": "1f69c",
    "cable car": "1f6a0",
    "motorcycle": "1f3cd",
    "airplane": "2708",
    "flying saucer": "1f6f8",
    "sailboat": "26f5",
    "canoe": "1f6f6",
    "roller skate": "1f6fc",
    "pumpkin": "1f383",
    "christmas tree": "1f384",
    "birthday cake": "1f382",
    "snowman": "26c4",
    "rainbow": "1f308",
    "teddy bear": "1f9f8",
    "alarm clock": "23f0",
    "parachute": "1fa82",
    "astronaut": "1f9d1-200d-1f680",
    "ninja": "1f977",
    "umbrella": "2602",
    "planet": "1fa90",
    "beer mug": "1f37a",
    "flame": "1f525",
    "snowflake": "2744",
    "telephone": "1f4de",
    "mermaid": "1f9dc-200d-2640",
    "ghost": "1f47b",
}

# one whole subgroup (bugs): nothing of the kind is ever seen in training
HELD_OUT = {
    "ladybug": "1f41e",
    "snail": "1f40c",
    "bee": "1f41d",
    "spider": "1f577",
    "caterpillar": "1f41b",
    "scorpion": "1f982",
    "beetle": "1fab2",
    "fly": "1fab0",
}


@dataclass
class Options:
    """src: folder of clips with its index and licence; dst: folder to write."""

    src: str = MISSING
    dst: str = "assets/sprites"


def select(src: Path, dst: Path) -> list[dict[str, str | bool]]:
    """Copy the cast from src to dst and write its index; returns the index, seen subjects first."""
    if not (src / "index.json").is_file():
        raise UserError(f"{src} holds no index.json; src= must be the folder of sprite clips")
    source = {entry["hexcode"]: entry for entry in json.loads((src / "index.json").read_text())}
    missing = [name for name, code in (SEEN | HELD_OUT).items() if code not in source]
    if missing:
        raise UserError(f"{src}/index.json lacks {', '.join(missing)}; use the full collection")
    dst.mkdir(parents=True, exist_ok=True)
    index = []
    for name, code in (SEEN | HELD_OUT).items():
        entry = source[code]
        file = f"{name.replace(' ', '_')}.webp"
        shutil.copyfile(src / entry["file"], dst / file)
        index.append(
            {
                "name": name,
                "file": file,
                "held_out": name in HELD_OUT,
                "hexcode": code,
                "label": entry["label"],
                "subgroup": entry["subgroup"],
            }
        )
    lines = ",\n".join(json.dumps(entry) for entry in index)
    (dst / "index.json").write_text(f"[\n{lines}\n]\n")
    shutil.copyfile(src / "LICENSE", dst / "LICENSE")
    return index


def main() -> None:
    """Read src= and dst= from the command line and write the selection."""
    try:
        options = OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_cli())
        index = select(Path(options.src), Path(options.dst))
    except (UserError, OmegaConfBaseException) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
    print(f"{len(index)} sprites in {options.dst}")


if __name__ == "__main__":
    main()
