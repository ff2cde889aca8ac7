"""What a text-to-video run shows and ships: its loss on held-out clips, sampled clips; its checkpoints."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill.data import LatentClips
from distill.flow_matching import FlowMatching, condition, empty_caption
from distill.objective import Product, nothing, seed_of, unwatched
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.wan import WanModel
from turbodiffusion.samplers.denoiser import Denoiser
from turbodiffusion.samplers.noise import SampleNoise
from turbodiffusion.samplers.ode import sample_unipc
from turbodiffusion.samplers.time import unipc_times
from turbodiffusion.variants import Variant

COLUMNS = 6
STEPS = 25  # of the preview's sampler


@dataclass(frozen=True)
class Videos:
    """Judged on combinations that training never saw.

    The preview's upper row is made from captions alone; the lower one also from the clips' first frames.
    """

    objective: FlowMatching
    held_out: LatentClips
    vae: VideoVAE
    variant: Variant
    files: dict[str, str]  # part of the student: file to ship it as
    history: tuple[dict[str, object], ...]

    @torch.no_grad()
    def measure(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """The training loss on held-out clips, at times and noise that are always the same."""
        batch = self.held_out.batch(0)
        rng = torch.Generator(batch.latents.device).manual_seed(seed_of("held out"))
        averaged = replace(self.objective, student=networks["student"])
        losses = averaged.losses(batch, 0, rng, unwatched)
        return {f"held_out/{name}": loss.mean().item() for name, loss in losses}

    def verdict(self, measures: dict[str, float]) -> str:
        loss = measures["held_out/velocity"]
        return f"on combinations it never saw, its velocity is off by {loss:.3f} (mean square)"

    @torch.no_grad()
    def preview(self, networks: dict[str, nn.Module]) -> Tensor:
        student, batch = networks["student"], self.held_out.batch(0)
        tokens = batch.tokens[:COLUMNS].repeat(2, 1)
        image = batch.image[:COLUMNS].float().repeat(2, 1, 1, 1, 1)
        count, sampling = len(image), self.variant.sampling
        denoiser = Denoiser(
            network=student.network,
            context=student.context(tokens),
            negative=student.context(empty_caption(tokens)),
            guidance=sampling.guidance,
            condition=condition(image, torch.arange(count, device=image.device) >= count // 2),
            timesteps=sampling.timesteps,
        )
        noise = SampleNoise(range(count), image.shape[1:], device=image.device).draw()
        latents = sample_unipc(denoiser, noise, unipc_times(STEPS, sampling.shift)).float()
        return self.vae.decode(latents, chunk=None).unflatten(0, (2, -1))

    def products(self, networks: dict[str, nn.Module]) -> list[Product]:
        files = [(networks["student"].get_submodule(part), file) for part, file in self.files.items()]
        return [self._product(module, file) for module, file in files]

    def _product(self, module: nn.Module, file: str) -> Product:
        if not isinstance(module, WanModel):
            return Product(file, module, history=self.history, keep_fp32=nothing)
        sampling = (self.variant.name, self.variant.sampling)
        return Product(file, module, *sampling, self.history, WanModel.is_fp32)
