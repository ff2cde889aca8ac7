"""Functions of tensors, recorded once for inputs of one form and replayed on other values."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.offload import Offload

Replay = Callable[[], object]
# runs a function once -> what runs it again in the same memory, and its output, which that overwrites
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


def check_graph(
    name: str, device: torch.device, offload: Offload, *, compiled: bool = False, shared: bool = False
) -> bool:
    """Whether steps are recorded: as asked or, with auto, where they can be; shared: by processes.

    UserError for what can not be recorded, or compiled.
    """
    choices = ("auto", "true", "false")
    if name not in choices:
        raise UserError(f"graph={name} is not one of {', '.join(choices)}.")
    if compiled and offload == "block":
        raise UserError("compile=true needs weights that stay in their place: leave offload=block away.")
    if name != "auto":
        if name == "true" and device.type != "cuda":
            raise UserError(f"graph=true records what a CUDA device does, and this is {device}.")
        if name == "true" and offload == "block":
            raise UserError("graph=true needs weights that stay in their place: leave offload=block away.")
        if name == "true" and shared:
            raise UserError("graph=true can not record what processes tell each other: leave it away.")
        return name == "true"
    return device.type == "cuda" and offload != "block" and not shared


def capture_cuda(run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """A CUDA graph of the function, which must have run before on inputs of the same form."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # what other threads do meanwhile is not recorded, and does no harm
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = run()
    finally:  # a recording that fails leaves its own stream the current one
        torch.cuda.set_stream(stream)
    return graph.replay, output


def form_of(inputs: tuple[object, ...]) -> object:
    """What inputs must have in common for one recording: nesting, shapes, dtypes, devices, all but values."""
    flat, nesting = tree_flatten(inputs)
    kinds = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in flat]
    return nesting, kinds


class Recording:
    """fn, recorded on its inputs; called with others of that form, it gives what fn would.

    inputs: nests of tensors.  They are copied to places of their own, from which fn reads every time.
    """

    def __init__(self, fn: Callable[..., Tensor], inputs: tuple[object, ...], capture: Capture):
        flat, nesting = tree_flatten(inputs)
        places = [x.clone() if isinstance(x, Tensor) else x for x in flat]
        self.places = [x for x in places if isinstance(x, Tensor)]
        self.replay, self.output = capture(lambda: fn(*tree_unflatten(places, nesting)))

    def __call__(self, *inputs: object) -> Tensor:
        # all of them, also those that have not changed: who tells?  A few hundred MB take 0.1 ms
        torch._foreach_copy_(self.places, [x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor)])
        self.replay()
        return self.output.clone()
