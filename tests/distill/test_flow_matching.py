from collections.abc import Callable

import pytest
import torch

from distill.data import LatentClips
from distill.flow_matching import (
    FlowMatching,
    TextToVelocity,
    condition,
    empty_caption,
    flow_matching_loss,
)
from distill.objective import unwatched
from distill.times import LogNormal
from turbodiffusion.pipelines import conditioning

MakeStudent = Callable[..., TextToVelocity]
TIMES = LogNormal(1.1, 1.4)
MakeClips = Callable[..., LatentClips]


def draw(count: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return scale * torch.randn(count, 4, 2, 4, 4, dtype=torch.float64), torch.randn(
        count, 4, 2, 4, 4, dtype=torch.float64
    )


def test_exact_velocity_has_zero_loss():
    x0, noise = draw(3)
    s = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    loss = flow_matching_loss(lambda x, times: noise - x0, x0, noise, s)
    assert loss.shape == (3,)
    # the prediction is compared in fp32: squared rounding of numbers of order one
    assert loss.max() < 1e-12


def test_network_sees_the_noised_latents_and_thousandfold_time():
    x0, noise = draw(2)
    s = torch.tensor([0.25, 1.0], dtype=torch.float64)
    seen = {}

    def velocity(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        seen.update(x=x, times=times)
        return x

    flow_matching_loss(velocity, x0, noise, s)
    torch.testing.assert_close(seen["x"][0], 0.75 * x0[0] + 0.25 * noise[0])
    torch.testing.assert_close(seen["x"][1], noise[1])
    assert seen["times"].tolist() == [250.0, 1000.0]


def test_best_velocity_on_gaussian_data_has_the_closed_form_loss():
    scale, time = 0.5, 0.3
    x0, noise = draw(512, scale)
    variance = (1 - time) ** 2 * scale**2 + time**2
    slope = (time - (1 - time) * scale**2) / variance
    s = torch.full((512,), time, dtype=torch.float64)
    loss = flow_matching_loss(lambda x, times: slope * x, x0, noise, s).mean()
    # E|v - E[v|x]|^2 = scale^2 / variance; 65536 squares of a normal: 4 standard errors are 2.2 %
    assert loss.item() == pytest.approx(scale**2 / variance, rel=0.022)


def test_condition_is_what_the_pipelines_feed_and_zero_without_image():
    image = torch.randn(2, 16, 3, 4, 4)
    given = condition(image, torch.tensor([True, False]))
    assert torch.equal(given[:1], conditioning.condition(image[:1], has_last=False))
    assert not given[1].any()


def test_empty_caption_is_what_the_tokenizer_makes_of_nothing(make_student: MakeStudent):
    tokens = torch.full((2, 5), 9)
    ids, _ = make_student().text_encoder.tokenize([""])
    expected = torch.zeros_like(tokens)
    expected[:, : ids.shape[1]] = ids
    assert torch.equal(empty_caption(tokens), expected)


def test_shares_of_captions_and_images_are_dropped(make_student: MakeStudent, make_clips: MakeClips):
    student, seen = make_student(), {}

    def compute(
        x: torch.Tensor, times: torch.Tensor, tokens: torch.Tensor, given: torch.Tensor
    ) -> torch.Tensor:
        seen.update(tokens=tokens, condition=given)
        return x

    batch = make_clips(student.text_encoder, count=2000).batch(0)
    objective = FlowMatching(compute, times=TIMES, text_drop=0.25, image_share=0.6)
    list(objective.losses(batch, 0, torch.Generator().manual_seed(0), unwatched))
    empty = (seen["tokens"] == empty_caption(seen["tokens"])).all(1).float().mean().item()
    shown = seen["condition"].flatten(1).any(1).float().mean().item()
    # 4 standard errors of a share of 2000
    assert empty == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    assert shown == pytest.approx(0.6, abs=4 * (0.6 * 0.4 / 2000) ** 0.5)


@pytest.mark.parametrize("freeze_text", [False, True])
def test_text_encoder_learns_unless_it_is_frozen(
    freeze_text: bool, make_student: MakeStudent, make_clips: MakeClips
):
    student = make_student(freeze_text=freeze_text)
    torch.nn.init.normal_(student.network.head.head.weight)
    batch = make_clips(student.text_encoder).batch(0)
    rng = torch.Generator().manual_seed(0)
    for _, loss in FlowMatching(student, times=TIMES).losses(batch, 0, rng, unwatched):
        loss.mean().backward()
    learnt = [p.grad is not None and bool(p.grad.any()) for p in student.text_encoder.parameters()]
    assert any(learnt) is not freeze_text
