"""A network at the steps of a clip: constants are computed once, and a step may be one replayed graph."""

import warnings
from dataclasses import dataclass, field

from torch import Tensor

from turbodiffusion.models.wan import Conditions, WanModel
from turbodiffusion.pipelines.graphs import Capture, Recording, form_of
from turbodiffusion.pipelines.offload import Residence
from turbodiffusion.pipelines.watch import Watch


class Runner:
    """Forwards of a network, clip after clip, on the device.

    capture: records a forward, which is then replayed as long as clips have the same form; None: each runs
    anew.  compiled: its blocks compile when they first run.
    """

    def __init__(self, network: WanModel, residence: Residence, capture: Capture | None, *, compiled: bool):
        self.network, self.residence, self.capture, self.compiled = network, residence, capture, compiled
        self.has_warm_up = compiled or capture is not None or residence.device.type != "cpu"
        self.form: object = None
        self.recording: Recording | None = None

    def fetch(self) -> None:
        """Bring the network to the device.  Where it leaves, what was recorded of it is gone too."""
        self.residence.use(self.network, self.network.shard_units(), on_leave=self.forget)

    def forget(self) -> None:
        """Let go of the memory of the recording."""
        self.recording = None

    def prepare(self, x: Tensor, context: Tensor, clip: Tensor | None) -> Conditions:
        """Of the network; streamed blocks are not all there to make their keys and values."""
        return self.network.prepare(x, context, clip, memorise=self.residence.mode != "block")

    def __call__(self, watch: Watch, *inputs: object) -> Tensor:
        """The forward of (x, timesteps, conditions, condition); the first of a form comes after warm-up."""
        if self.has_warm_up:
            form = form_of(inputs)
            if form != self.form or (self.capture is not None and self.recording is None):
                with watch.stage("warm-up"):
                    self._warm_up(form, inputs)
        return self._forward(*inputs) if self.recording is None else self.recording(*inputs)

    def _warm_up(self, form: object, inputs: tuple[object, ...]) -> None:
        if form != self.form:
            self.forget()
            self._rehearse(*inputs)
            self.form = form
        if self.capture is None:
            return
        try:
            self.recording = Recording(self._forward, inputs, self.capture)
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(f"steps can not be recorded as a graph and run one by one: {reason}", stacklevel=2)
            self.capture = None

    def _rehearse(
        self, x: Tensor, timesteps: Tensor, conditions: Conditions, condition: Tensor | None
    ) -> None:
        """Have every kernel of a forward tried, compiled and chosen: a block of each kind shows them all."""
        blocks = self.network.blocks
        kinds = {repr(block): i for i, block in enumerate(blocks)}.values()
        # compiled ones may be alike and yet compile one by one
        shown = {i: conditions.blocks[i] for i in (range(len(blocks)) if self.compiled else kinds)}
        self._forward(x, timesteps, conditions._replace(blocks=shown), condition)

    def _forward(
        self, x: Tensor, timesteps: Tensor, conditions: Conditions, condition: Tensor | None
    ) -> Tensor:
        return self.network(x, timesteps, conditions, condition=condition)


@dataclass
class Steps:
    """A Denoiser's network over the steps of one clip; its texts and pictures are the same tensors always."""

    runner: Runner
    watch: Watch
    prepared: list[tuple[Tensor, Conditions]] = field(default_factory=list)

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        *,
        condition: Tensor | None,
        clip: Tensor | None,
    ) -> Tensor:
        self.runner.fetch()
        conditions = next((made for text, made in self.prepared if text is context), None)
        if conditions is None:
            conditions = self.runner.prepare(x, context, clip)
            self.prepared.append((context, conditions))
        return self.runner(self.watch, x, timesteps, conditions, condition)
