"""A network's sizes from its tensors' shapes; the variant from them, from metadata or the file's name."""

import inspect
import re
from functools import partial
from pathlib import Path

from turbodiffusion.attention import DENSE, chosen
from turbodiffusion.checkpoints.keys import count_layers, is_projection
from turbodiffusion.checkpoints.metadata import Numbers, Report, shape_of
from turbodiffusion.checkpoints.sources import Entries
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import CLIP_TOKENS, WanModel
from turbodiffusion.variants import Variant, variants
from turbodiffusion.variants import variant as named_variant

HEAD_WIDTH = 128  # of every published Wan network
_ARGUMENTS = {name: p.default for name, p in inspect.signature(WanModel).parameters.items()}
_DEFAULTS = {name: default for name, default in _ARGUMENTS.items() if isinstance(default, int)}


def network_config(report: Report, entries: Entries, folder_config: dict[str, object]) -> Numbers:
    """WanModel's arguments.  What shapes can not tell: metadata, config.json or the variant of that size."""
    if report.metadata:
        config = {"attention": dict(DENSE), **report.metadata.config}
        if differing := config.keys() ^ _ARGUMENTS.keys():
            raise UserError(f"{report.path} carries metadata with other sizes than WanModel's: {differing}")
        report.reasons.append("sizes: from our metadata")
        return config
    attention = dict(DENSE)
    if any(map(is_projection, entries)):
        attention = chosen(DENSE, {"name": "sla"})
        report.reasons.append(
            f"SLA: there is proj_l; no file says more, so as published ones were trained: {attention}"
        )
    seen = _sizes(report, entries)
    report.reasons.append("sizes, from shapes: " + ", ".join(f"{name} {size}" for name, size in seen.items()))
    known = next((_network(name) for name in _fitting(seen)), _DEFAULTS)
    heads = folder_config.get("num_heads", folder_config.get("num_attention_heads")) or known.get("heads")
    length = folder_config.get("text_len") or known["text_length"]
    if heads is None:
        heads, rest = divmod(dim := seen["dim"], HEAD_WIDTH)
        if rest:
            raise UserError(f"{report.path} does not say its heads: width {dim} is no multiple of 128")
    report.reasons.append(
        f"heads {heads} and text length {length}: from config.json, the variant, or Wan's usual"
    )
    return {**seen, "heads": heads, "text_length": length, "attention": attention}


def choose_variant(report: Report, asked: str | None) -> None:
    """Give the report candidates, variant, expert, sampling: asked for, stated, the only one or guessed."""
    report.candidates = fitting = _fitting(report.config)
    say = report.reasons.append
    say(f"variants of these sizes: {', '.join(fitting) or 'none'}")
    name = asked or (report.metadata and report.metadata.variant)
    if name:
        say(f"variant: {name}, " + ("as asked" if asked else "from our metadata"))
        _check_asked(report, named_variant(name))
    elif len(fitting) == 1:
        name = fitting[0]
    elif name := _named_in(report.path, fitting):
        say(f"variant: {name}, a guess from the file's name; variant= overrides it")
    elif fitting:
        say("variant: shapes can not tell these apart and the name does not say; pass variant=")
    if name:
        report.variant = name
        _choose_sampling(report, variants()[name])


def _choose_sampling(report: Report, variant: Variant) -> None:
    """Give the report the expert and the sampling."""
    say = report.reasons.append
    if variant.experts:
        report.expert = _expert(report.path)
        said = f"{report.expert} noise, from the name" if report.expert else "the name does not say"
        say(f"expert: keys can not tell high from low noise; {said}")
    if report.metadata and report.metadata.sampling:
        report.sampling = report.metadata.sampling
        say(f"sampling: from our metadata ({report.sampling.sampler})")
    elif any(re.search(r"turbowan|(?<![a-z])rcm(?![a-z])", part) for part in _parts(report.path)[:2]):
        # the published students start at these noise levels
        report.sampling = variant.sampling.as_student(80.0 if "t2v" in variant.tasks else 200.0)
        say("student: a guess from the name; keys can not tell teacher from student")
    else:
        report.sampling = variant.sampling
        say("teacher: assumed; keys can not tell, and the name does not say student")


def _check_asked(report: Report, variant: Variant) -> None:
    """A network of unknown size may take any variant whose inputs and outputs it shares."""
    wanted, got, fitting = _network(variant.name), report.config, report.candidates
    compared = wanted if fitting else ("in_channels", "out_channels", "clip_tokens", "text_dim")
    if differing := [
        f"{name} {got[name]} (wanted {wanted[name]})" for name in compared if got[name] != wanted[name]
    ]:
        hint = f"; its sizes are those of {' or '.join(fitting)}" if fitting else ""
        raise UserError(f"{report.path} is no {variant.name}: {', '.join(differing)}{hint}")


def _network(name: str) -> dict[str, int]:
    return _DEFAULTS | variants()[name].network


def _fitting(config: Numbers) -> tuple[str, ...]:
    """The variants of these sizes, whatever the attention."""
    sizes = {name: size for name, size in config.items() if name != "attention"}
    return tuple(name for name in variants() if sizes.items() <= _network(name).items())


def _sizes(report: Report, entries: Entries) -> dict[str, int]:
    """The sizes that shapes tell."""
    shape = partial(shape_of, report, entries)
    dim, in_channels = shape("patch_embedding.weight", 5)[:2]
    clip_tokens = CLIP_TOKENS if "img_emb.proj.0.weight" in entries else 0
    if "img_emb.emb_pos" in entries:
        clip_tokens = shape("img_emb.emb_pos", 3)[1]
    return {
        "dim": dim,
        "ffn_dim": shape("blocks.0.ffn.0.weight")[0],
        "layers": count_layers(entries),
        "in_channels": in_channels,
        "out_channels": shape("head.head.weight")[0] // 4,
        "text_dim": shape("text_embedding.0.weight")[1],
        "freq_dim": shape("time_embedding.0.weight")[1],
        "clip_tokens": clip_tokens,
    }


def _parts(path: Path) -> list[str]:
    """The words of the path's names, the innermost first; no deeper than a hub's cache goes."""
    names = reversed(path.absolute().parts)
    return [" ".join(re.findall(r"[a-z0-9]+", name.lower())) for name in names][:5]


def _named_in(path: Path, names: tuple[str, ...]) -> str | None:
    experts = [name for name in names if variants()[name].experts]
    for part in _parts(path):
        for name in names:
            if re.sub(r"[^a-z0-9]", "", name) in part.replace(" ", ""):
                return name
        if re.search(r"(high|low) ?noise", part) and len(experts) == 1:
            return experts[0]
    return None


def _expert(path: Path) -> str | None:
    for part in _parts(path)[:2]:
        if said := re.search(r"\b(high|low)\b", part):
            return said[1]
        # diffusers' folders
        if re.match(r"transformer\b", part):
            return "low" if part == "transformer 2" else "high"
    return None
