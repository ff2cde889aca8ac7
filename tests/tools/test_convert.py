"""The command that converts checkpoints, run as its users run it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tools import convert, inspect
from turbodiffusion.checkpoints import detect, load_network, load_text_encoder, load_vae, save
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import variants

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"dim": 128, "ffn_dim": 64, "heads": 1, "layers": 2}
TASKS = {
    "t2v": ("wan2.1_t2v_1.3b", {}),
    "i2v_clip": ("wan2.1_i2v_14b_480p", {"in_channels": 36, "clip_tokens": 257}),
    "flf2v": ("wan2.1_flf2v_14b", {"in_channels": 36, "clip_tokens": 514}),
}
WHERE = {
    "wan": "out.safetensors",
    "diffusers": "out",
    "turbodiffusion": "out.pth",
    "ours": "out2.safetensors",
}

Run = Callable[..., tuple[int, str]]


def write_network(path: Path, task: str = "t2v", *, student: bool = False) -> WanModel:
    variant, channels = TASKS[task]
    network = WanModel(**SIZES, **channels)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    sampling = variants()[variant].sampling
    save(path, network, sampling=sampling.as_student(80.0) if student else sampling, variant=variant)
    return network


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("format", WHERE)
def test_there_and_back_again_is_exact(task: str, format: str, run: Run, tmp_path: Path) -> None:
    network = write_network(tmp_path / "a.safetensors", task)
    there, back = tmp_path / WHERE[format], tmp_path / "back.safetensors"
    code, said = run(convert, f"src={tmp_path / 'a.safetensors'}", f"dst={there}", f"format={format}")
    assert code == 0, said
    assert detect(there, variant=TASKS[task][0]).format == ("rcm" if format == "turbodiffusion" else format)
    code, said = run(convert, f"src={there}", f"dst={back}", f"variant={TASKS[task][0]}")
    assert code == 0, said
    loaded = load_network(back, device="cpu", dtype=torch.float32)
    assert is_same(loaded.network.state_dict(), network.state_dict())
    assert loaded.network.config == network.config
    assert loaded.variant.name == TASKS[task][0]


@pytest.mark.parametrize("task", TASKS)
def test_diffusers_loads_our_folder_and_we_load_theirs(task: str, run: Run, tmp_path: Path) -> None:
    network = write_network(tmp_path / "a.safetensors", task)
    words = (
        f"src={tmp_path / 'a.safetensors'}",
        f"dst={tmp_path / 'out'}",
        "format=diffusers",
        "shard_gb=0.002",
    )
    assert run(convert, *words)[0] == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    theirs, info = WanTransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    loaded = load_network(tmp_path / "pipeline", device="cpu", dtype=torch.float32, variant=TASKS[task][0])
    assert is_same(loaded.network.state_dict(), network.state_dict())


def test_the_small_worlds_heads_survive_formats_without_metadata(run: Run, tmp_path: Path) -> None:
    network = WanModel(**variants()["wan_tiny"].network)
    save(tmp_path / "a.safetensors", network)
    assert (
        run(
            convert, f"src={tmp_path / 'a.safetensors'}", f"dst={tmp_path / 'b.pth'}", "format=turbodiffusion"
        )[0]
        == 0
    )
    # heads of 64, where every published network has heads of 128
    assert (
        load_network(tmp_path / "b.pth", device="cpu", dtype=torch.float32).network.config == network.config
    )


def test_sla_projections_travel_between_our_names_and_turbodiffusions(run: Run, tmp_path: Path) -> None:
    state = write_network(tmp_path / "a.safetensors").state_dict()
    state["patch_embedding.weight"] = state["patch_embedding.weight"].flatten(1)
    place = "self_attn.attn_op.local_attn.proj_l"
    state |= {f"blocks.{b}.{place}.weight": torch.randn(128, 128) for b in range(2)}
    state |= {f"blocks.{b}.{place}.bias": torch.randn(128) for b in range(2)}
    torch.save(state, tmp_path / "a.pth")
    asked = f"variant={TASKS['t2v'][0]}"
    assert run(convert, f"src={tmp_path / 'a.pth'}", f"dst={tmp_path / 'b.safetensors'}", asked)[0] == 0
    assert "blocks.1.self_attn.core.proj_l.bias" in load_file(tmp_path / "b.safetensors")
    words = (f"src={tmp_path / 'b.safetensors'}", f"dst={tmp_path / 'c.pth'}", "format=turbodiffusion")
    code, said = run(convert, *words)
    assert code == 0
    assert "a .pth can not say its attention: sla, ratio 0.1" in " ".join(said.split())
    assert is_same(torch.load(tmp_path / "c.pth", weights_only=True), state)
    assert "sla, ratio 0.1, block_q 64" in run(inspect, f"ckpt={tmp_path / 'b.safetensors'}")[1]
    for format in ("diffusers", "wan"):
        words = (f"src={tmp_path / 'b.safetensors'}", f"dst={tmp_path / 'd'}", f"format={format}")
        code, said = run(convert, *words)
        assert (code, "no place for SLA" in said, (tmp_path / "d").exists()) == (2, True, False)


def test_dtype_is_written_and_norms_stay_fp32(run: Run, tmp_path: Path) -> None:
    network = write_network(tmp_path / "a.safetensors", student=True)
    words = (f"src={tmp_path / 'a.safetensors'}", f"dst={tmp_path / 'b.safetensors'}", "dtype=bfloat16")
    assert run(convert, *words)[0] == 0
    for name, tensor in load_file(tmp_path / "b.safetensors").items():
        wanted = torch.float32 if WanModel.is_fp32(name) else torch.bfloat16
        assert tensor.dtype == wanted
        assert torch.equal(tensor, network.state_dict()[name].to(wanted))
    report = detect(tmp_path / "b.safetensors")
    assert report.sampling.student
    assert report.metadata.history[-1] == {
        "converted": "a.safetensors",
        "from": "ours",
        "dtype": "torch.bfloat16",
    }


def test_a_vae_goes_to_diffusers_and_back(run: Run, tmp_path: Path) -> None:
    vae = VideoVAE(base=8, latent_channels=4, res_blocks=1, latent_mean=[0.1] * 4, latent_std=[2.0] * 4)
    save(tmp_path / "a.safetensors", vae)
    assert (
        run(convert, f"src={tmp_path / 'a.safetensors'}", f"dst={tmp_path / 'vae'}", "format=diffusers")[0]
        == 0
    )
    theirs, info = AutoencoderKLWan.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(info.values())
    assert theirs.config.latents_std == [2.0] * 4
    assert run(convert, f"src={tmp_path / 'vae'}", f"dst={tmp_path / 'b.safetensors'}", "kind=vae")[0] == 0
    back = load_vae(tmp_path / "b.safetensors", device="cpu", dtype=torch.float32)
    assert is_same(back.state_dict(), vae.state_dict())
    assert back.config == vae.config


def test_a_text_encoder_goes_to_the_published_names_and_back(run: Run, tmp_path: Path) -> None:
    sizes = {"vocab": 259, "dim": 16, "ffn_dim": 24, "heads": 2, "head_dim": 8, "layers": 2}
    encoder = TextEncoder(tokenizer=ByteTokenizer(), **sizes)
    save(tmp_path / "a.safetensors", encoder)
    assert (
        run(convert, f"src={tmp_path / 'a.safetensors'}", f"dst={tmp_path / 'b.pth'}", "format=wan")[0] == 0
    )
    assert run(convert, f"src={tmp_path / 'b.pth'}", f"dst={tmp_path / 'c.safetensors'}")[0] == 0
    back = load_text_encoder(tmp_path / "c.safetensors", device="cpu", dtype=torch.float32)
    assert is_same(back.state_dict(), encoder.state_dict())


WRONG = {
    "no option": ([], "src= and dst= must be given"),
    "unknown option": (["source=x"], "did you mean src=?"),
    "no value": (["src"], "options are written name=value"),
    "unknown format": (["src=a.safetensors", "dst=b", "format=gguf"], "format=gguf"),
    "missing file": (["src=none.safetensors", "dst=b.safetensors"], "does not exist"),
    "existing target": (["src=a.safetensors", "dst=a.safetensors"], "overwrite=true"),
    "truncated": (["src=cut.safetensors", "dst=b.safetensors"], "truncated"),
    "code": (["src=evil.pth", "dst=b.safetensors"], "nothing was run"),
    "wrong variant": (["src=a.safetensors", "dst=b.safetensors", "variant=wan2.1_flf2v_14b"], "in_channels"),
    "unknown variant": (["src=a.safetensors", "dst=b.safetensors", "variant=wan9"], "choose one of"),
    "mismatch": (["src=short.safetensors", "dst=b.safetensors"], "1 missing: head.head.bias"),
    "file for a folder": (["src=a.safetensors", "dst=b.safetensors", "format=diffusers"], "a folder"),
    "wrong suffix": (["src=a.safetensors", "dst=b.safetensors", "format=turbodiffusion"], "a .pth file"),
    "no such format of a vae": (
        ["src=vae.safetensors", "dst=b.pth", "format=turbodiffusion"],
        "a vae can be",
    ),
}


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('trace', 'w').close()",)


@pytest.mark.parametrize("wrong", WRONG)
def test_every_wrong_input_is_one_sentence_exit_code_2_and_no_file(
    wrong: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = write_network(Path("a.safetensors"))
    state = network.state_dict()
    del state["head.head.bias"]
    save_file(state, "short.safetensors")
    Path("cut.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:-5])
    torch.save({"a": Evil()}, "evil.pth")
    save(
        "vae.safetensors",
        VideoVAE(base=4, latent_channels=1, res_blocks=1, latent_mean=[0.0], latent_std=[1.0]),
    )
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    words, part = WRONG[wrong]
    code, said = run(convert, *words)
    assert code == 2
    assert part in said
    assert len(said.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_overwrite_replaces(run: Run, tmp_path: Path) -> None:
    network = write_network(tmp_path / "a.safetensors")
    words = (f"src={tmp_path / 'a.safetensors'}", f"dst={tmp_path / 'a.safetensors'}", "overwrite=true")
    assert run(convert, *words)[0] == 0
    assert is_same(load_file(tmp_path / "a.safetensors"), network.state_dict())
    for _ in range(2):
        words = (
            f"src={tmp_path / 'a.safetensors'}",
            f"dst={tmp_path / 'out'}",
            "format=diffusers",
            "overwrite=true",
        )
        assert run(convert, *words)[0] == 0


def test_inspect_says_what_and_why(run: Run, tmp_path: Path) -> None:
    write_network(tmp_path / "a.safetensors", "i2v_clip")
    code, said = run(inspect, f"ckpt={tmp_path / 'a.safetensors'}")
    assert code == 0
    for part in ("wan2.1_i2v_14b_480p", "float32", "clip_tokens", "why:", "from our metadata", "steps 40"):
        assert part in " ".join(said.split())
    assert run(inspect, f"ckpt={tmp_path / 'none.pth'}")[0] == 2


def test_it_runs_as_a_module() -> None:
    words = [sys.executable, "-m", "tools.convert", "nonsense"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
