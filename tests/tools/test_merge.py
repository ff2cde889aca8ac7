"""Merging: what the issue's T19 asks for, exactly, and who may be merged with whom."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools import merge
from turbodiffusion.checkpoints import detect, load_network, save
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import variants

SIZES = {"dim": 128, "ffn_dim": 64, "heads": 1, "layers": 2}
VARIANT = "wan2.1_t2v_1.3b"
PROJ = "blocks.{}.self_attn.attn_op.local_attn.proj_l"

Run = Callable[..., tuple[int, str]]
State = dict[str, Tensor]


def write(
    path: str, *, seed: int, student: bool = False, dtype: torch.dtype = torch.bfloat16, **other: int
) -> State:
    """A random network, saved; its tensors."""
    network = WanModel(**{**SIZES, **other})
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator)
    sampling = variants()[VARIANT].sampling
    save(
        path, network.to(dtype), variant=VARIANT, sampling=sampling.as_student(80.0) if student else sampling
    )
    return load_file(path)


def is_same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


WORDS = ("base=a.safetensors", "diff_base=b.safetensors", "diff_target=c.safetensors", "dst=out.safetensors")


def test_weight_zero_is_base(run: Run) -> None:
    base, _, _ = (write(f"{name}.safetensors", seed=i) for i, name in enumerate("abc"))
    assert run(merge, *WORDS, "weight=0")[0] == 0
    assert is_same(load_file("out.safetensors"), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_from_its_own_base_the_target_comes_back(dtype: torch.dtype, run: Run) -> None:
    for name in ("a", "b"):
        write(f"{name}.safetensors", seed=0, dtype=dtype)
    target = write("c.safetensors", seed=1, dtype=dtype)
    code, said = run(merge, *WORDS)
    assert code == 0
    assert f"{len(target)} merged, 0 kept (missing), 0 kept (shape), 0 copied" in said
    assert is_same(load_file("out.safetensors"), target)


@pytest.mark.parametrize("weight", [1.0, -0.5, 4.0])
def test_the_sum_is_rounded_once(weight: float, run: Run) -> None:
    states = [
        write(f"{name}.safetensors", seed=i, dtype=torch.float32) for i, name in enumerate("bc", start=1)
    ]
    base = write("a.safetensors", seed=0)
    assert run(merge, *WORDS, f"weight={weight}")[0] == 0
    for name, merged in load_file("out.safetensors").items():
        b, minus, plus = (state[name].double() for state in (base, *states))
        exact = b + weight * (plus - minus)
        # half a bf16 step of the result, and four fp32 roundings of sums no larger than these terms
        terms = b.abs() + abs(weight) * (plus.abs() + minus.abs())
        assert ((merged.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-22 * terms).all()


def test_an_sla_targets_projections_are_copied_whatever_the_files_prefix(run: Run) -> None:
    base, diff_base = write("a.safetensors", seed=0, student=True), write("b.safetensors", seed=1)
    target = write("t.safetensors", seed=2)
    extra = {f"{PROJ.format(block)}.weight": torch.randn(128, 128) for block in range(2)}
    extra |= {f"{PROJ.format(block)}.bias": torch.randn(128) for block in range(2)}
    published = {**target, **extra, "patch_embedding.weight": target["patch_embedding.weight"].flatten(1)}
    torch.save({f"net.{name}": tensor for name, tensor in published.items()}, "c.pth")
    code, said = run(merge, WORDS[0], WORDS[1], "diff_target=c.pth", "dst=folder")
    assert code == 0
    assert f"{len(base)} merged" in said
    assert "copied: blocks.*.self_attn.core.proj_l.weight (2)" in said
    merged = load_file("folder/diffusion_pytorch_model.safetensors")
    for block, leaf in product(range(2), ("weight", "bias")):
        ours = f"blocks.{block}.self_attn.core.proj_l.{leaf}"
        assert torch.equal(merged.pop(ours), extra[f"{PROJ.format(block)}.{leaf}"])
    expected = {
        n: (b.float() - diff_base[n].float() + target[n].float()).to(b.dtype) for n, b in base.items()
    }
    assert is_same(merged, expected)
    report = detect("folder")
    assert report.config["attention"]["name"] == "sla"
    assert report.sampling.student
    assert report.metadata.history[-1] == {
        "merged": {"base": "a.safetensors", "diff_base": "b.safetensors", "diff_target": "c.pth"},
        "weight": 1.0,
        "tensors": {"merged": len(base), "copied": 4},
    }


def sparse(path: str, *, seed: int, ratio: float, **other: int) -> WanModel:
    """A random network with sparse-linear attention, saved."""
    network = WanModel(**{**SIZES, **other}, attention={"name": "sla", "ratio": ratio, "block_k": 16})
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator)
    save(path, network, variant=VARIANT, sampling=variants()[VARIANT].sampling)
    return network


def test_attention_comes_along_and_at_weight_zero_with_base_as_it_was(run: Run) -> None:
    write("a.safetensors", seed=0, student=True, dtype=torch.float32)
    write("b.safetensors", seed=1, dtype=torch.float32)
    target = sparse("c.safetensors", seed=2, ratio=0.25)
    assert run(merge, *WORDS, "weight=0")[0] == 0
    student, merged = (
        load_network(path, device="cpu", dtype=torch.float32).network
        for path in ("a.safetensors", "out.safetensors")
    )
    assert merged.config == target.config
    assert merged.config["attention"]["ratio"] == 0.25
    student.set_attention(target.config["attention"])
    for ours, theirs in zip(student.blocks, target.blocks, strict=True):
        ours.self_attn.core.load_state_dict(theirs.self_attn.core.state_dict())
    assert is_same(merged.state_dict(), student.state_dict())


def test_a_sparse_base_keeps_its_own_attention(run: Run) -> None:
    base = sparse("a.safetensors", seed=0, ratio=0.5)
    write("b.safetensors", seed=1)
    sparse("c.safetensors", seed=2, ratio=0.25)
    code, said = run(merge, *WORDS)
    assert code == 0, said
    assert detect("out.safetensors").config == base.config
    assert "kept (missing): blocks.*.self_attn.core.proj_l.weight (2)" in said


def test_other_shapes_keep_base_and_a_students_change_makes_a_student(run: Run) -> None:
    base = write("a.safetensors", seed=0, in_channels=36)
    teacher, student = write("b.safetensors", seed=1), write("c.safetensors", seed=2, student=True)
    # 1.3B's variant is text to video; of those with 36 channels, this one has no CLIP
    code, said = run(merge, *WORDS, "variant=wan2.2_i2v_a14b")
    assert code == 0, said
    assert "kept (shape): patch_embedding.weight (1)" in said
    loaded = load_network("out.safetensors", device="cpu", dtype=torch.bfloat16)
    assert loaded.sampling.student
    assert loaded.sampling.sigma_max == 200.0
    merged, patch = load_file("out.safetensors"), "patch_embedding.weight"
    assert torch.equal(merged[patch], base[patch])
    bias = "head.head.bias"
    exact = base[bias].float() - teacher[bias].float() + student[bias].float()
    assert torch.equal(merged[bias], exact.to(base[bias].dtype))


def test_what_a_diff_file_lacks_keeps_base(run: Run) -> None:
    base = write("a.safetensors", seed=0)
    partial = write("b.safetensors", seed=1)
    del partial["head.head.bias"]
    save_file(partial, "b.safetensors")
    write("c.safetensors", seed=2)
    code, said = run(merge, *WORDS)
    assert code == 0
    assert "1 kept (missing), 0 kept (shape)" in said
    assert "kept (missing): head.head.bias (1)" in said
    assert torch.equal(load_file("out.safetensors")["head.head.bias"], base["head.head.bias"])


def test_int8_weights_merge_as_the_numbers_they_stand_for(run: Run) -> None:
    state, layer = write("a.safetensors", seed=0), "blocks.0.ffn.0"
    whole, scale = torch.randint(-127, 128, (64, 128), dtype=torch.int8), torch.tensor([[0.01]])
    del state[f"{layer}.weight"]
    torch.save({**state, f"{layer}.int8_weight": whole, f"{layer}.scale": scale}, "a.pth")
    states = [write(f"{name}.safetensors", seed=i)[f"{layer}.weight"] for i, name in enumerate("bc", start=1)]
    code, said = run(merge, "base=a.pth", *WORDS[1:], f"variant={VARIANT}")
    assert code == 0, said
    exact = whole * scale - states[0].float() + states[1].float()
    assert torch.equal(load_file("out.safetensors")[f"{layer}.weight"], exact.bfloat16())


WRONG = {
    "a projection is lost": (
        [*WORDS[:2], "diff_target=halved.pth", WORDS[3]],
        "1 missing: blocks.1.self_attn",
    ),
    "projections of another head width": (
        [*WORDS[:2], "diff_target=sparse_wide.safetensors", WORDS[3]],
        "blocks.0.self_attn.core.proj_l.weight (64, 64)",
    ),
    "nothing fits": ([*WORDS[:2], "diff_target=wide.safetensors", WORDS[3]], "nothing merged"),
    "an unknown prefix": ([*WORDS[:2], "diff_target=prefixed.safetensors", WORDS[3]], "is no Wan network"),
    "dst is base": ([*WORDS[:3], "dst=a.safetensors"], "a.safetensors exists"),
    "dst is a target": ([*WORDS[:3], "dst=c.safetensors"], "c.safetensors exists"),
    "no number": ([*WORDS, "weight=nan"], "weight=nan"),
    "a tensor base has no place for": (
        [*WORDS[:2], "diff_target=more.safetensors", WORDS[3]],
        "1 unexpected: stray",
    ),
    "one missing": (WORDS[:3], "dst= must be given"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_input_is_one_sentence_and_no_file(wrong: str, run: Run, tmp_path: Path) -> None:
    for i, name in enumerate("abc"):
        state = write(f"{name}.safetensors", seed=i)
    wide = {
        "dim": 256,
        "ffn_dim": 128,
        "text_dim": 64,
        "freq_dim": 128,
        "in_channels": 48,
        "out_channels": 48,
    }
    save("wide.safetensors", WanModel(**{**SIZES, **wide}))
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, "prefixed.safetensors")
    save_file({**state, "stray": torch.zeros(1)}, "more.safetensors")
    halved = sparse("sparse.safetensors", seed=0, ratio=0.5).state_dict()
    del halved["blocks.1.self_attn.core.proj_l.bias"]
    torch.save(halved, "halved.pth")
    sparse("sparse_wide.safetensors", seed=0, ratio=0.5, heads=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words, part = WRONG[wrong]
    code, said = run(merge, *words)
    assert code == 2
    assert part in said
    assert len(said.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
