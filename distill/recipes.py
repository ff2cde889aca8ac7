"""What an experiment trains, put together: objective, data and outcome on one device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from distill import sharding
from distill.autoencoding import Autoencoder, AutoencoderOutcome, Autoencoding, initialize
from distill.caption_reading import CaptionReading, CaptionStream, Reader, ReaderOutcome
from distill.compiled import compile_units
from distill.data import EncodedClips, RenderedClips
from distill.flow_matching import FlowMatching, TextToVelocity
from distill.objective import Parts, everything, nothing
from distill.precision import lower
from distill.remat import rematerialize
from distill.videos import Videos
from distill.widening import widen
from turbodiffusion.checkpoints import detect, load_network, load_text_encoder, load_vae
from turbodiffusion.errors import UserError
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.parallel import neighbours, own_device, split_tokens, started
from turbodiffusion.small_world.sprites import load_sprites
from turbodiffusion.variants import variant

HELD_OUT = "held_out_combinations"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class Hardware:
    """Where and in which precision to compute; the master weights are fp32 everywhere."""

    device: torch.device
    dtype: torch.dtype
    compile_mode: str | None  # torch.compile's, None: eager
    shard: int = 1  # how many ranks in a row hold one copy of the weights together
    context: int = 1  # how many in a row share the tokens of a batch
    remat: str = "none"  # what is computed again in a backward: a mode of distill.remat

    @classmethod
    def named(
        cls, device: str, *, precision: str, compile: bool | str, shard: int, remat: str, context: int = 1
    ) -> "Hardware":
        """From the words of a config; device "auto" is the accelerator, or else the CPU."""
        mode = {False: None, True: "default"}.get(compile, compile)
        if mode not in (None, *COMPILE_MODES):
            raise UserError(f"compile={compile}: choose false, true or {', '.join(COMPILE_MODES)}")
        if precision not in PRECISIONS:
            raise UserError(f"precision={precision}: choose {' or '.join(PRECISIONS)}")
        _, ranks = started()
        for name, count in {"shard": shard, "context": context}.items():
            if count < 1 or ranks % count:
                raise UserError(
                    f"{name}={count} does not divide the {ranks} processes: start more with torchrun"
                )
        rematerialize([], remat)  # refuses what is none of its modes
        if device == "auto":
            device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device={device} is not to be had here: {error}") from error
        return cls(own_device(chosen), PRECISIONS[precision], mode, shard, context, remat)

    def prepare(
        self,
        module: nn.Module,
        keep_fp32: Callable[[str], bool],
        units: list[nn.Module],
        *,
        can_shard: bool = False,
    ) -> None:
        """Move the module here, in this precision but for what keep_fp32 names; checkpoint, compile units.

        With shard > 1 units and module are sharded, and nothing is kept in fp32: a unit is gathered as one
        piece of memory, of one dtype.  Raises UserError where that, or context > 1, is not possible.
        """
        for name, count in {"shard": self.shard, "context": self.context}.items():
            if count > 1 and not can_shard:
                raise UserError(f"{name}={count}: only distillation shares its networks; leave {name}=1")
        lower(module, self.dtype, nothing if self.shard > 1 else keep_fp32).to(self.device)
        rematerialize(units, self.remat)
        if self.compile_mode is not None:
            # what ranks tell each other is nothing to trace
            compiler = partial(torch.compile, mode=self.compile_mode)
            compile_units(units, compiler, tangents=self.context == 1)
        if self.context > 1:
            split_tokens(module, self._team)
        if self.shard > 1:
            sharding.shard(module, units, self._ranks, self.context)

    @cached_property
    def _team(self) -> ProcessGroup:
        return neighbours(self.context)

    @cached_property
    def _ranks(self) -> DeviceMesh:
        return sharding.mesh(self.device, self.shard)


def autoencoder(
    hardware: Hardware,
    *,
    vae: VideoVAE,
    start: str | None,
    objective: Callable[..., Autoencoding],
    data: Callable[..., RenderedClips],
    judged: Callable[..., RenderedClips],
    outcome: Callable[..., AutoencoderOutcome],
) -> Parts:
    """Train a VAE on clips rendered as they are needed.

    start is a checkpoint to continue from; None: from scratch.  judged makes the clips that are measured.
    """
    history = ()
    if start is None:
        initialize(vae)
    else:
        vae.load_state_dict(load_vae(start, device="cpu", dtype=torch.float32).state_dict())
        history = detect(start).history
    module = Autoencoder(vae)
    hardware.prepare(module, nothing, [vae.encoder, vae.decoder])
    sprites = load_sprites().to(hardware.device)
    seen, held_out = (judged(sprites=sprites, split=split) for split in ("train", HELD_OUT))
    judge = outcome(held_out, seen, history=history)
    return Parts(objective(module), data(sprites=sprites, split="train"), judge)


def caption_reader(
    hardware: Hardware, *, text_encoder: TextEncoder, batch: int, seed: int, measured: int, file: str
) -> Parts:
    """Train a text encoder to read captions; `measured` of held-out combinations judge it."""
    reader = Reader(text_encoder)
    hardware.prepare(reader, everything, [])
    train, held_out = (CaptionStream(text_encoder, batch, seed, split) for split in ("train", HELD_OUT))
    return Parts(CaptionReading(reader), train, ReaderOutcome(held_out, max(1, measured // batch), file))


@dataclass(frozen=True)
class Start:
    """Checkpoints to continue from; None: from scratch."""

    network: str | None = None  # its feed-forward layers may be narrower
    text_encoder: str | None = None


def text_to_video(
    hardware: Hardware,
    *,
    student: TextToVelocity,
    start: Start,
    objective: Callable[..., FlowMatching],
    data: EncodedClips,
    vae: str,
    file: str,
) -> Parts:
    """Train a network, and a text encoder with it, on clips encoded once by the VAE in file `vae`."""
    device, history = hardware.device, ()
    if start.network is not None:
        loaded = load_network(start.network, device=device, dtype=torch.float32)
        widen(student.network, loaded.network)
        history = loaded.report.history
    if start.text_encoder is not None:
        text_encoder = load_text_encoder(start.text_encoder, device=device, dtype=torch.float32)
        student.text_encoder.load_state_dict(text_encoder.state_dict())
    # as one graph: so small a network is bound by launching its kernels, not by running them
    hardware.prepare(student, student.is_fp32, [student])
    coder = load_vae(vae, device=device, dtype=hardware.dtype)
    train, held_out = data.load(coder, student.text_encoder)
    flow_matching = objective(student)
    files = {"network": file} | ({} if student.is_text_frozen else {"text_encoder": "text_tiny"})
    return Parts(
        flow_matching, train, Videos(flow_matching, held_out, coder, variant("wan_tiny"), files, history)
    )
