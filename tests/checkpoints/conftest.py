"""Networks small enough for a file a test, with the channels of published ones."""

from collections.abc import Callable

import pytest
import torch

from turbodiffusion.models.wan import WanModel

SIZES = {"dim": 128, "ffn_dim": 64, "heads": 1, "layers": 2}
TASKS = {
    "t2v": ("wan2.1_t2v_1.3b", {}),
    "i2v_clip": ("wan2.1_i2v_14b_480p", {"in_channels": 36, "clip_tokens": 257}),
    "flf2v": ("wan2.1_flf2v_14b", {"in_channels": 36, "clip_tokens": 514}),
    "i2v": ("wan2.2_i2v_a14b", {"in_channels": 36}),
    "ti2v": ("wan2.2_ti2v_5b", {"in_channels": 48, "out_channels": 48}),
}


@pytest.fixture
def make_network() -> Callable[[str], tuple[WanModel, str]]:
    """A task -> a network whose every parameter is random, and the variant with its channels."""

    def make(task: str = "t2v") -> tuple[WanModel, str]:
        variant, channels = TASKS[task]
        network = WanModel(**SIZES, **channels)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
        return network, variant

    return make
