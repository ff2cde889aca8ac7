from pathlib import Path

import pytest
import torch

from turbodiffusion.checkpoints.metadata import Metadata, Report
from turbodiffusion.checkpoints.network_config import choose_variant, network_config
from turbodiffusion.checkpoints.sources import Entry
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import variants

NAMED = {
    "Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors": ("wan2.1_t2v_14b", None),
    "Wan2.2-T2V-A14B/high_noise_model": ("wan2.2_t2v_a14b", "high"),
    "Wan2.2-T2V-A14B-Diffusers/transformer_2": ("wan2.2_t2v_a14b", "low"),
    "Wan2.2-T2V-A14B-Diffusers/transformer": ("wan2.2_t2v_a14b", "high"),
    "wan2.2_t2v_low_noise_14B_fp16.safetensors": ("wan2.2_t2v_a14b", "low"),
    "TurboWan2.1-T2V-14B-720P-quant.pth": ("wan2.1_t2v_14b", None),
    "model.safetensors": (None, None),
}


def described(
    variant: str, path: str = "model.safetensors", asked: str | None = None, metadata: Metadata | None = None
) -> Report:
    """The report of a network of that variant's shapes in a file of that name."""
    with torch.device("meta"):
        state = WanModel(**variants()[variant].network).state_dict()
    entries = {name: Entry.of(tensor) for name, tensor in state.items()}
    report = Report(Path(path), "network", "wan", "safetensors", {}, [], metadata)
    report.config = network_config(report, entries, {})
    choose_variant(report, asked)
    return report


@pytest.mark.parametrize("variant", variants())
def test_sizes_come_from_shapes(variant: str) -> None:
    with torch.device("meta"):
        wanted = WanModel(**variants()[variant].network).config
    report = described(variant)
    assert report.config == wanted
    assert variant in report.candidates
    assert report.variant == (variant if len(report.candidates) == 1 else None)


@pytest.mark.parametrize("name", NAMED)
def test_what_shapes_can_not_tell_is_guessed_from_the_name_and_said(name: str) -> None:
    report = described("wan2.1_t2v_14b", name)
    assert (report.variant, report.expert) == NAMED[name]
    assert report.candidates == ("wan2.1_t2v_14b", "wan2.2_t2v_a14b")
    assert any("guess" in reason or "can not tell these apart" in reason for reason in report.reasons)


def test_the_resolution_is_guessed_from_the_name_and_variant_overrides_it() -> None:
    for size in ("480p", "720p"):
        assert (
            described("wan2.1_i2v_14b_480p", f"Wan2.1-I2V-14B-{size.upper()}").variant
            == f"wan2.1_i2v_14b_{size}"
        )
    report = described("wan2.1_i2v_14b_480p", "Wan2.1-I2V-14B-480P", asked="wan2.1_i2v_14b_720p")
    assert report.variant == "wan2.1_i2v_14b_720p"


def test_metadata_goes_before_the_name_and_the_option_before_metadata() -> None:
    config = described("wan2.1_t2v_14b").config
    metadata = Metadata("network", config, "wan2.2_t2v_a14b")
    assert described("wan2.1_t2v_14b", "Wan2.1-T2V-14B", metadata=metadata).variant == "wan2.2_t2v_a14b"
    asked = described("wan2.1_t2v_14b", "x", asked="wan2.1_t2v_14b", metadata=metadata)
    assert asked.variant == "wan2.1_t2v_14b"


@pytest.mark.parametrize(
    ("variant", "path", "sigma_max"),
    [
        ("wan2.1_t2v_1.3b", "TurboWan2.1-T2V-1.3B-480P.pth", 80.0),
        ("wan2.1_t2v_1.3b", "rCM_Wan2.1_T2V_1.3B_480p.pt", 80.0),
        ("wan2.2_i2v_a14b", "TurboWan2.2-I2V-A14B-low-720P.pth", 200.0),
    ],
)
def test_students_are_told_by_name(variant: str, path: str, sigma_max: float) -> None:
    report = described(variant, path)
    sampling = report.sampling
    assert report.variant == variant
    assert (sampling.student, sampling.sampler, sampling.steps, sampling.guidance) == (True, "rcm", 4, 1.0)
    assert (sampling.sigma_max, sampling.timesteps) == (sigma_max, "bfloat16")
    assert sampling.boundary == variants()[variant].sampling.boundary


def test_a_teacher_is_no_student_because_of_its_folder() -> None:
    assert not described("wan2.1_t2v_1.3b", "marcm/circmodels/Wan2.1-T2V-1.3B.safetensors").sampling.student


def test_an_incomplete_network_is_refused() -> None:
    entry = Entry((5, 16, 1, 2, 2), torch.float32, lambda: torch.zeros(1))
    report = Report(Path("x"), "network", "wan", "safetensors", {}, [])
    with pytest.raises(UserError, match=r"x looks like a Wan network but its .* is missing"):
        network_config(report, {"patch_embedding.weight": entry}, {})
