"""Published weights of networks that judge videos: where they come from, where they lie, what is in them.

Nothing is downloaded: whoever wants a score gets its files, and accepts their licences.
"""

import hashlib
import os
import pickle
import tomllib
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from turbodiffusion.checkpoints.locate import FOLDER_VARIABLE
from turbodiffusion.checkpoints.sources import open_source
from turbodiffusion.errors import UserError

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Weights:
    """A file, where it comes from and what is known of it, as weights.toml explains."""

    file: str
    size: int
    licence: str
    source: str
    sha256: str | None = None


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
WEIGHTS = {name: Weights(**row) for name, row in _TABLE.items()}


def find_weights(needs: Mapping[str, Iterable[str]], folder: str | Path | None = None) -> dict[str, Path]:
    """Files by name in WEIGHTS, for whoever (the keys of `needs`) needs them; whole, and the right ones.

    The first found of: `folder`; $TURBODIFFUSION_WEIGHTS or ./weights; $VBENCH_CACHE_DIR or ~/.cache/vbench;
    each with upstream's subfolders or without.  Raises one UserError for all that is missing or damaged.
    """
    needed: dict[str, list[str]] = {}
    for who, names in needs.items():
        for name in names:
            needed.setdefault(name, []).append(who)
    roots = [
        *([] if folder is None else [Path(folder)]),
        Path(os.environ.get(FOLDER_VARIABLE) or "weights"),
        Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench"),
    ]
    found = {name: _first(WEIGHTS[name], roots) for name in needed}
    faults = []
    for name, who in needed.items():
        if fault := _fault(wanted := WEIGHTS[name], found[name]):
            known = f"{wanted.size / 1e6:.3g} MB, licence {wanted.licence}"
            faults.append(f"{fault}, for {' and '.join(who)} ({known}), from {wanted.source}")
    if faults:
        where = ", ".join(["weights=DIR"] * (folder is None) + [*map(str, roots)])
        raise UserError(f"get weights into one of {where}, or leave out their dims=: {'; '.join(faults)}")
    return found


def _first(wanted: Weights, roots: list[Path]) -> Path | None:
    places = [root.expanduser() / file for root in roots for file in (wanted.file, Path(wanted.file).name)]
    return next((place for place in places if place.is_file()), None)


def _fault(wanted: Weights, path: Path | None) -> str | None:
    if path is None:
        return f"{wanted.file}, which is in none"
    if path.stat().st_size < wanted.size:
        return f"{wanted.file}, as {path} was cut off at {path.stat().st_size / 1e6:.3g} MB"
    with path.open("rb") as file:
        if wanted.sha256 and hashlib.file_digest(file, "sha256").hexdigest() != wanted.sha256:
            return f"{wanted.file}, as {path} is another file: its sha256 is not {wanted.sha256}"
    return None


def named(**layers: nn.Module) -> nn.Sequential:
    """Layers one after the other, under names of their own."""
    return nn.Sequential(OrderedDict(layers))


def filled(make: Callable[[], Net], state: Mapping[str, Tensor], path: Path) -> Net:
    """A network with the tensors of a file, fp32, for looking only; UserError if any is missing or left."""
    with torch.device("meta"):
        net = make()
    try:
        net.load_state_dict({name: x.float() for name, x in state.items()}, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{path} holds other weights than it should: {reason}") from error
    return net.requires_grad_(requires_grad=False).eval()


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a torch file, safetensors file or TorchScript archive, less the prefix of DataParallel."""
    if zipfile.is_zipfile(path) and any(
        name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()
    ):
        state = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        state = {name: entry.load() for name, entry in open_source(path).entries.items()}
    return {name.removeprefix("module."): x for name, x in state.items()}


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it."""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def read_flax(path: Path) -> dict[str, Tensor]:
    """Arrays of a pickled tree, their names joined by slashes; UserError if it holds anything else."""
    try:
        return {name: torch.from_numpy(x) for name, x in _leaves(_Arrays(path.open("rb")).load())}
    except (pickle.UnpicklingError, AttributeError, EOFError) as error:
        raise UserError(f"{path} is not a pickle of arrays: {error}") from error


def _leaves(tree: Mapping[str, object], above: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, each in tree.items():
        if isinstance(each, np.ndarray):
            yield above + name, each
        else:
            yield from _leaves(each, f"{above}{name}/")


class _Arrays(pickle.Unpickler):
    """Makes arrays and nothing else, so that a file can run nothing."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module.endswith("core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it wants {module}.{name}")
