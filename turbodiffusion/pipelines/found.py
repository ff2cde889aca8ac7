"""Which checkpoint files a run uses, told from their headers, and the models in them."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from turbodiffusion import checkpoints
from turbodiffusion.attention import Attention, chosen, fastest, spoken
from turbodiffusion.checkpoints import Report
from turbodiffusion.checkpoints.metadata import empty_module
from turbodiffusion.checkpoints.quantised import NONE, settled
from turbodiffusion.errors import UserError
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.vae_tiling import TILE, decode_bytes
from turbodiffusion.models.wan import PATCH, WanModel
from turbodiffusion.pipelines.generate import Models, latent_shape
from turbodiffusion.pipelines.memory import (
    ENCODER_ACTIVATIONS,
    Stage,
    constant_bytes,
    denoise_bytes,
    streamed_text_bytes,
    vae_chunk,
)
from turbodiffusion.pipelines.options import Options
from turbodiffusion.pipelines.record import fingerprint
from turbodiffusion.pipelines.request import pick_device, pick_dtype
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.pipelines.texts import StoredTexts
from turbodiffusion.variants import Sampling, Variant, variants

SMALL_WORLD = "turbo_tiny"
# folders of two experts, high noise first: as Wan publishes them, and diffusers
EXPERT_FOLDERS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))


@dataclass(frozen=True)
class Found:
    """Every file of a run, recognised but not read."""

    variant: Variant
    sampling: Sampling
    attention: Attention
    quant: str  # none, int8 or fp8
    reports: dict[str, Report]  # by the names of Models
    tokenizer: Path | None

    def empty_vae(self) -> VideoVAE:
        """The VAE without weights, on the meta device."""
        return empty_module(self.reports["vae"])

    def multiple(self) -> int:
        """What width and height must divide by."""
        return self.empty_vae().spatial_factor * PATCH[-1]


def find(options: Options) -> Found:
    """Locate and recognise the files; UserError names what is missing or does not belong together."""
    high, low = _networks(options)
    report = _detect("ckpt", high, "network", variant=options.variant)
    variant = _variant(report, has_low=low is not None)
    reports = {"network": report}
    if low is not None:
        reports["network_low"] = _detect("ckpt_low", low, "network", variant=options.variant)
        if report.expert == "low" or reports["network_low"].expert == "high":
            raise UserError(
                f"{high} is the low-noise expert or {low} the high-noise one: exchange ckpt= and ckpt_low=."
            )
    attention, quant = _attention(options, list(reports.values())), _quant(options, list(reports.values()))
    names = {"vae": variant.vae, "text_encoder": variant.text_encoder}
    if report.config["clip_tokens"]:
        names["image_encoder"] = "clip_vit_h"
    for kind, name in names.items():
        path = checkpoints.locate(kind, name, high, given=getattr(options, kind))
        reports[kind] = _detect(kind, path, kind)
    tokenizer = None
    text = reports["text_encoder"]
    if options.tokenizer or text.config["vocab"] != ByteTokenizer.vocab:
        tokenizer = checkpoints.locate("tokenizer", "umt5_xxl", text.path, given=options.tokenizer)
    return Found(variant, report.sampling or variant.sampling, attention, quant, reports, tokenizer)


def load(found: Found, *, device: torch.device, dtype: torch.dtype, text_cache: Path | None = None) -> Models:
    """The models, on the device; a text_cache as `load_texts` has it."""

    def load_network(path: Path, **where: object) -> WanModel:
        known = {"variant": found.variant.name, "quant": found.quant}
        network = checkpoints.load_network(path, **known, **where).network
        network.set_attention(found.attention, drop_linear=True)  # `find` has refused what was not asked for
        return network

    loaders = {
        "network": load_network,
        "network_low": load_network,
        "vae": checkpoints.load_vae,
        "image_encoder": checkpoints.load_image_encoder,
    }
    where = {"device": device, "dtype": dtype}
    models = {
        name: read(found.reports[name].path, **where)
        for name, read in loaders.items()
        if name in found.reports
    }
    return Models(**models, text_encoder=load_texts(found, **where, text_cache=text_cache))


def load_texts(
    found: Found, *, device: torch.device, dtype: torch.dtype, text_cache: Path | None
) -> TextEncoder | StoredTexts:
    """The text encoder, on the device.  A text_cache spares it, until a text is not in there."""
    path = found.reports["text_encoder"].path
    read = partial(checkpoints.load_text_encoder, path, tokenizer=found.tokenizer, device=device, dtype=dtype)
    if text_cache is None:
        return read()
    files = [fingerprint(file)["quick_sha256"] for file in (path, found.tokenizer) if file]
    return StoredTexts(read, text_cache, " ".join([*files, str(dtype), device.type]))


def stages(found: Found, size: Size, frames: int, dtype: torch.dtype, *, tiled: bool) -> tuple[Stage, ...]:
    """Every model at work on one clip, for the memory plan."""
    vae, config = found.empty_vae().to(dtype), found.reports["network"].config
    latents = latent_shape(vae, frames, size)
    piece = tuple(map(min, latents[2:], TILE)) if tiled else latents[2:]
    chunk = vae_chunk(vae, (1, *latents), tiled=tiled)
    clip = 4 * 3 * frames * size.width * size.height  # encoded, or put together from tiles
    denoise = denoise_bytes(config, latents, dtype, per_token="ti2v" in found.variant.tasks)
    decode = clip + decode_bytes(vae, (latents[1], *piece), chunk=chunk)
    work = {"network": denoise, "network_low": denoise, "vae": decode}
    constants = constant_bytes(config, dtype, networks=2 if "network_low" in found.reports else 1)
    result = []
    for name, report in found.reports.items():
        weights = sum(count // kind.itemsize * dtype.itemsize for kind, (_, count) in report.dtypes.items())
        if name.startswith("network") and found.quant != NONE:
            weights -= sum(report.linear[layer] for layer in report.eight_bit_layers) * (dtype.itemsize - 1)
        streamed = weights
        if name.startswith("network"):  # two blocks of `layers`, and what is outside them, about one more
            streamed = 3 * weights // max(3, config["layers"])
        elif name == "text_encoder":
            streamed = streamed_text_bytes(report.config, weights, dtype)
        activations = work.get(name, int(ENCODER_ACTIVATIONS * weights))
        kept = constants if name.startswith("network") else 0
        result.append(Stage(name, weights, streamed, activations, kept))
    return tuple(result)


def _detect(option: str, path: Path, kind: str, *, variant: str | None = None) -> Report:
    """What the file of an option is; UserError if it is of another kind."""
    report = checkpoints.detect(path, kind=kind, variant=variant)
    if report.kind != kind:
        raise UserError(f"{option}={path} is a {report.kind.replace('_', ' ')}, wanted a {kind}.")
    return report


def _networks(options: Options) -> tuple[Path, Path | None]:
    """The network's file, or both experts'."""
    if options.ckpt is None:
        if options.ckpt_low is not None:
            raise UserError("ckpt_low= is the second of two experts: pass the first as ckpt=.")
        return checkpoints.locate("network", SMALL_WORLD, Path.cwd()), None
    high = Path(options.ckpt).expanduser()
    if options.ckpt_low is not None:
        return high, Path(options.ckpt_low).expanduser()
    for first, second in EXPERT_FOLDERS:
        if (high / first).is_dir() and (high / second).is_dir():
            return high / first, high / second
    return high, None


def _attention(options: Options, networks: list[Report]) -> Attention:
    """What was asked of what the networks carry; auto: that, as fast as the device can."""
    said = {name: getattr(options, name) for name in ("ratio", "block_q", "block_k")}
    said["name"] = options.attention
    asked = {name: value for name, value in said.items() if value not in (None, "auto")}
    carried = [report.config["attention"] for report in networks]
    first, *others = (chosen(each, asked, drop_linear=options.drop_linear) for each in carried)
    if any(other != first for other in others):
        both = " and ".join(map(spoken, carried))
        raise UserError(f"the experts differ in attention ({both}): pass attention= and what differs.")
    if options.attention != "auto":
        return first
    device, config = pick_device(options.device), networks[0].config
    return fastest(first, config["dim"] // config["heads"], device, pick_dtype(options.dtype, device))


def _quant(options: Options, networks: list[Report]) -> str:
    """none, int8 or fp8, as asked or as the networks' files say."""
    first, *others = (settled(options.quant, report.quantised) for report in networks)
    if any(other != first for other in others):
        raise UserError("the experts are quantised in two ways: pass quant=none, quant=int8 or quant=fp8.")
    return first


def _variant(report: Report, *, has_low: bool) -> Variant:
    """The variant; whether there are two experts settles what keys can not tell."""
    name, known = report.variant, variants()
    if name is None:
        fitting = [candidate for candidate in report.candidates if known[candidate].experts == has_low]
        if len(fitting) != 1:
            choices = ", ".join(fitting or report.candidates or known)
            raise UserError(f"{report.path} does not say which model it is: pass variant= one of {choices}.")
        name = fitting[0]
    variant = known[name]
    if variant.experts and not has_low:
        raise UserError(f"{name} has two experts: pass the low-noise one too, as ckpt_low=FILE.")
    if has_low and not variant.experts:
        raise UserError(f"{name} has one network: leave ckpt_low= away.")
    return variant
