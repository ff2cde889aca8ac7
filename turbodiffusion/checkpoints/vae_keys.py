"""Names of the video autoencoder's parameters: the original checkpoints' and diffusers'."""

import re

_TOP = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_STEM = {
    "conv1": "conv_in",
    "head.0": "norm_out",
    "head.2": "conv_out",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
}
_LEAF = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_KEY = re.compile(
    r"(?P<half>encoder|decoder)\.(?P<stem>conv1|head\.\d|middle\.\d|(?:down|up)samples\.\d+)"
    r"(?:\.(?:down|up)samples\.(?P<layer>\d+))?(?:\.(?P<leaf>residual\.\d|shortcut))?\.(?P<rest>.+)"
)


def vae_to_diffusers(key: str, *, res_blocks: int = 2) -> str:
    """An original parameter name (Wan2.1: flat, Wan2.2: nested) -> diffusers' name in AutoencoderKLWan.

    `res_blocks` (of an encoder level) is needed because the flat decoder layout hides where levels end.
    Raises KeyError for a name that no video autoencoder has.
    """
    top, _, rest = key.partition(".")
    if top in _TOP:
        return f"{_TOP[top]}.{rest}"
    match = _KEY.fullmatch(key)
    if match is None:
        raise KeyError(key)
    half, stem, layer, leaf, rest = match.group("half", "stem", "layer", "leaf", "rest")
    place = _STEM[stem] if stem in _STEM else _level(stem, layer, res_blocks, is_resampler=leaf is None)
    return ".".join(part for part in (half, place, leaf and _LEAF[leaf], rest) if part)


def _level(stem: str, layer: str | None, res_blocks: int, *, is_resampler: bool) -> str:
    """`downsamples.I` or `upsamples.I`, and in the nested layout the layer inside -> diffusers' place."""
    direction, index = stem.split(".")
    way = direction.removesuffix("samples")
    if layer is not None:
        return f"{way}_blocks.{index}." + (f"{way}sampler" if is_resampler else f"resnets.{layer}")
    if way == "down":
        return f"down_blocks.{index}"
    # a decoder level: one residual block more than an encoder's, then the upsampling
    level, place = divmod(int(index), res_blocks + 2)
    return f"up_blocks.{level}." + ("upsamplers.0" if is_resampler else f"resnets.{place}")
