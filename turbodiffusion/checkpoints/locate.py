"""Where the files beside a network are: its VAE, text encoder, tokenizer and image encoder."""

import os
from pathlib import Path

from turbodiffusion.errors import UserError

ASSETS = Path(__file__).resolve().parents[2] / "assets"
FOLDER_VARIABLE = "TURBODIFFUSION_WEIGHTS"

_OURS = "this repository's assets/"
_T2V = "huggingface.co/Wan-AI/Wan2.1-T2V-1.3B"
_TI2V = "huggingface.co/Wan-AI/Wan2.2-TI2V-5B"
_I2V = "huggingface.co/Wan-AI/Wan2.1-I2V-14B-480P"
_T5 = "models_t5_umt5-xxl-enc-bf16.pth"
_CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
# (kind, name) -> who publishes it, and its file or folder names: as published, ours, and diffusers'
_PUBLISHED = {
    ("network", "turbo_tiny"): (_OURS, "turbo_tiny.safetensors"),
    ("network", "wan_tiny"): (_OURS, "wan_tiny.safetensors"),
    ("vae", "tiny"): (_OURS, "vae_tiny.safetensors"),
    ("vae", "wan2.1"): (_T2V, "Wan2.1_VAE.pth", "wan2.1_vae.safetensors", "vae"),
    ("vae", "wan2.2"): (_TI2V, "Wan2.2_VAE.pth", "wan2.2_vae.safetensors", "vae"),
    ("text_encoder", "tiny"): (_OURS, "text_tiny.safetensors"),
    ("text_encoder", "umt5_xxl"): (_T2V, _T5, "umt5_xxl.safetensors", "text_encoder"),
    ("tokenizer", "umt5_xxl"): (_T2V, "google/umt5-xxl", "umt5-xxl", "tokenizer"),
    ("image_encoder", "clip_vit_h"): (_I2V, _CLIP, "clip_vit_h.safetensors", "image_encoder"),
}


def locate(kind: str, name: str, beside: Path, *, given: str | Path | None = None) -> Path:
    """The file or folder of a `kind` (vae, text_encoder, tokenizer, image_encoder) called `name`.

    `given` if the user named one; else the first found beside the checkpoint `beside` (its folder, and the
    one above, where pipelines keep their parts), in $TURBODIFFUSION_WEIGHTS, ./weights and assets/.  Raises
    UserError saying where it was looked for and where to get it.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.exists():
            raise UserError(f"{kind} {path} does not exist; give an existing file or folder")
        return path
    publisher, *files = _PUBLISHED[kind, name]
    beside = beside.expanduser().absolute()
    own = beside if beside.is_dir() else beside.parent
    stated = Path(os.environ.get(FOLDER_VARIABLE) or "weights").expanduser()
    folders = [own, own.parent, stated, Path("weights"), ASSETS]
    for path in (folder / file for folder in folders for file in files):
        if path.exists():
            return path
    places = ", ".join(dict.fromkeys(map(str, folders)))
    raise UserError(
        f"no {kind.replace('_', ' ')} {name}: looked for {' or '.join(files)} in {places}; "
        f"get it from {publisher}, or say where it is with {kind}="
    )
