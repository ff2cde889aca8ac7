"""Copy the small world's cast, which `assets/sprites/index.json` lists, from a folder of animated sprites.

    python -m tools.select_sprites src=PATH/emoji dst=assets/sprites

The source folder holds `index.json` (a list with file, hexcode, label, subgroup), `LICENSE` and the clips:
animated RGBA webp, 96x96, 24 frames of 125 ms.  They are copied byte for byte, so the same source gives the
same folder.  The cast was chosen by eye for distinct silhouettes and colours, and by measure for sprites
whose own animation neither travels nor swells much: it must not be mistaken for the clip's motion.
"""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.options import MISSING, run
from turbodiffusion.errors import UserError
from turbodiffusion.small_world.sprites import SPRITES


@dataclass
class Options:
    """src: folder of clips with its index and licence; dst: folder to write."""

    src: str = MISSING
    dst: str = "assets/sprites"


def select(options: Options) -> str:
    """Copy the cast with its index, and say how many there are."""
    src, dst = Path(options.src), Path(options.dst)
    if not (src / "index.json").is_file():
        raise UserError(f"{src} holds no index.json; src= must be the folder of sprite clips")
    files = {entry["hexcode"]: entry["file"] for entry in json.loads((src / "index.json").read_text())}
    index = (SPRITES / "index.json").read_text()
    cast = json.loads(index)
    if missing := [sprite["name"] for sprite in cast if sprite["hexcode"] not in files]:
        raise UserError(f"{src}/index.json lacks {', '.join(missing)}; use the full collection")
    dst.mkdir(parents=True, exist_ok=True)
    for sprite in cast:
        shutil.copyfile(src / files[sprite["hexcode"]], dst / sprite["file"])
    shutil.copyfile(src / "LICENSE", dst / "LICENSE")
    (dst / "index.json").write_text(index)
    return f"{len(cast)} sprites in {dst}"


main = partial(run, Options, select)

if __name__ == "__main__":
    main()
