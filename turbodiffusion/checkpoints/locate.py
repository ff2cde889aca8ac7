"""Where the files beside a network are: its VAE, text encoder, tokenizer and image encoder."""

import os
from pathlib import Path

from turbodiffusion.errors import UserError

ASSETS = Path(__file__).resolve().parents[2] / "assets"
FOLDER_VARIABLE = "TURBODIFFUSION_WEIGHTS"

# (kind, name) -> file or folder names, as published, and who publishes them
_PUBLISHED = {
    ("network", "wan_tiny"): (("wan_tiny.safetensors",), "this repository's assets/"),
    ("vae", "tiny"): (("vae_tiny.safetensors",), "this repository's assets/"),
    ("vae", "wan2.1"): (
        ("Wan2.1_VAE.pth", "wan2.1_vae.safetensors", "vae"),
        "huggingface.co/Wan-AI/Wan2.1-T2V-1.3B",
    ),
    ("vae", "wan2.2"): (
        ("Wan2.2_VAE.pth", "wan2.2_vae.safetensors", "vae"),
        "huggingface.co/Wan-AI/Wan2.2-TI2V-5B",
    ),
    ("text_encoder", "tiny"): (("text_tiny.safetensors",), "this repository's assets/"),
    ("text_encoder", "umt5_xxl"): (
        ("models_t5_umt5-xxl-enc-bf16.pth", "umt5_xxl.safetensors", "text_encoder"),
        "huggingface.co/Wan-AI/Wan2.1-T2V-1.3B",
    ),
    ("tokenizer", "umt5_xxl"): (
        ("google/umt5-xxl", "umt5-xxl", "tokenizer"),
        "huggingface.co/Wan-AI/Wan2.1-T2V-1.3B (folder google/umt5-xxl)",
    ),
    ("image_encoder", "clip_vit_h"): (
        (
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
            "clip_vit_h.safetensors",
            "image_encoder",
        ),
        "huggingface.co/Wan-AI/Wan2.1-I2V-14B-480P",
    ),
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
    files, publisher = _PUBLISHED[kind, name]
    folders = _folders(beside)
    for folder in folders:
        for file in files:
            if (folder / file).exists():
                return folder / file
    places = ", ".join(dict.fromkeys(map(str, folders)))
    raise UserError(
        f"no {kind.replace('_', ' ')} {name}: looked for {' or '.join(files)} in {places}; "
        f"get it from {publisher}, or say where it is with {kind}="
    )


def _folders(beside: Path) -> list[Path]:
    beside = beside.expanduser().absolute()
    own = beside if beside.is_dir() else beside.parent
    folders = [own, own.parent]
    if stated := os.environ.get(FOLDER_VARIABLE):
        folders.append(Path(stated).expanduser())
    return [*folders, Path("weights"), ASSETS]
