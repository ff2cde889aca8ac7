"""The whole of infer.py below Hydra, on random models of every variant."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import infer
from turbodiffusion import checkpoints
from turbodiffusion.errors import UserError
from turbodiffusion.pipelines.command import generate, make_plan
from turbodiffusion.pipelines.found import find
from turbodiffusion.pipelines.memory import GIB, Free, Plan, Stage, free_memory
from turbodiffusion.pipelines.options import Options
from turbodiffusion.pipelines.request import resolve
from turbodiffusion.pipelines.video_io import read_picture, read_video
from turbodiffusion.variants import variants

CASES = [
    ("wan2.1_t2v_1.3b", 0),
    ("wan2.1_i2v_14b_480p", 1),
    ("wan2.1_flf2v_14b", 2),
    ("wan2.2_t2v_a14b", 0),
    ("wan2.2_i2v_a14b", 1),
    ("wan2.2_ti2v_5b", 0),
    ("wan2.2_ti2v_5b", 1),
    ("wan_tiny", 0),
    ("wan_tiny", 1),
]


@pytest.mark.parametrize(("variant", "pictures"), CASES)
def test_every_task_writes_a_video(
    variant: str, pictures: int, family: Callable, picture: Callable, tmp_path: Path
) -> None:
    given = {}
    if pictures > 0:
        given["image"] = str(picture("first.png"))
    if pictures > 1:
        given["last_image"] = str(picture("last.png", shade=200))
    generate(family(variant).options(out=str(tmp_path / "a.mp4"), **given))
    pixels, fps = read_video(tmp_path / "a.mp4")
    assert pixels.shape == (5, 32, 64, 3)
    assert fps == variants()[variant].sampling.fps
    assert pixels.float().std() > 1  # not one flat colour


def test_one_frame_is_a_picture(family: Callable, tmp_path: Path) -> None:
    generate(family("wan_tiny").options(frames=1, out=str(tmp_path / "new"), prompt="Ein Haus, am See!"))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "ein-haus-am-see_seed0.json",
        "ein-haus-am-see_seed0.png",
    ]
    assert read_picture(tmp_path / "new" / "ein-haus-am-see_seed0.png").shape == (3, 32, 64)


def test_samples_are_the_single_runs_of_their_seeds(family: Callable, tmp_path: Path) -> None:
    options = family("wan_tiny").options(num_samples=2, seed=4, out=str(tmp_path / "all.mp4"))
    generate(options)
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["all_seed4.mp4", "all_seed5.mp4"]
    generate(replace(options, num_samples=1, seed=5, out=str(tmp_path / "one.mp4")))
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "all_seed5.mp4").read_bytes()


def test_the_json_repeats_the_video_to_the_pixel(
    family: Callable, picture: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.mp4"
    prompt = 'it\'s "a cat", = [x] {y} ${z} \\ \n 猫'
    options = family("wan2.2_i2v_a14b").options(
        **{"image": str(picture()), "prompt": prompt, "steps": 3, "boundary": 0.8, "sampler": "dpmpp"},
        **{"out": str(out), "num_samples": 2, "adaptive": True, "crf": 0},
    )
    generate(options)
    record = json.loads((tmp_path / "a_seed1.json").read_text())
    assert record["options"]["prompt"] == prompt
    assert record["sampling"]["steps"] == 3
    assert len(record["times"]) == 4
    assert set(record["files"]) == {"network", "network_low", "vae", "text_encoder"}
    network = record["files"]["network"]
    assert network["bytes"] == Path(network["path"]).stat().st_size
    assert set(record["seconds"]) == {"text", "image", "denoise", "decode", "write"}
    assert record["environment"]["torch"] == torch.__version__
    words = shlex.split(record["command"])
    assert words[:2] == ["python", "infer.py"]
    monkeypatch.setattr("sys.argv", [*words[1:], f"out={tmp_path / 'again.mp4'}"])
    infer.main()
    assert torch.equal(read_video(tmp_path / "again.mp4")[0], read_video(tmp_path / "a_seed1.mp4")[0])


def test_a_prompt_file_is_resumed_where_it_stopped(family: Callable, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        '"a cat"',
        json.dumps({"prompt": "a dog", "seed": 9, "name": "dog"}),
        json.dumps({"prompt": "a bird", "negative_prompt": ""}),
    ]
    prompts.write_text("\n\n".join(lines) + "\n")
    options = family("wan_tiny").options(prompt=None, prompt_file=str(prompts), out=str(tmp_path / "out"))
    generate(options)
    names = ["0000-a-cat_seed0.mp4", "0002-a-bird_seed0.mp4", "dog_seed9.mp4"]
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.mp4")}
    assert sorted(made) == names
    (tmp_path / "out" / "dog_seed9.mp4").unlink()
    generate(options)
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.mp4")}
    assert sorted(again) == names
    assert {name for name in names if again[name] != made[name]} == {"dog_seed9.mp4"}


def test_a_student_checkpoint_needs_no_options(family: Callable, tmp_path: Path) -> None:
    loaded = checkpoints.load_network(
        family("wan_tiny").folder / "network.safetensors", device="cpu", dtype=torch.float32
    )
    student = loaded.sampling.as_student(80.0)
    checkpoints.save(tmp_path / "student.safetensors", loaded.network, sampling=student, variant="wan_tiny")
    out = str(tmp_path / "a.mp4")
    generate(family("wan_tiny").options(ckpt=str(tmp_path / "student.safetensors"), steps=None, out=out))
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["options"]["sampler"] == "rcm"
    # the published table for four steps from sigma 80, models.json
    assert record["times"] == pytest.approx([0.987654, 0.933781, 0.852895, 0.608979, 0], abs=1e-6)


def test_attention_is_what_was_asked_or_what_the_checkpoint_carries(family: Callable, tmp_path: Path) -> None:
    options = family("wan_tiny").options(out=str(tmp_path / "a.mp4"))
    # 16 tokens: four blocks of keys, of which one
    sparse = {"ratio": 0.25, "block_q": 8, "block_k": 4}
    generate(options)
    generate(replace(options, attention="sla", **sparse, out=str(tmp_path / "b.mp4")))
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["options"]["attention"] == "sla"
    assert {name: record["options"][name] for name in sparse} == sparse
    loaded = checkpoints.load_network(options.ckpt, device="cpu", dtype=torch.float32)
    loaded.network.set_attention({"name": "sla", **sparse})
    tuned = str(tmp_path / "sla.safetensors")
    checkpoints.save(tuned, loaded.network, sampling=loaded.sampling, variant="wan_tiny")
    generate(replace(options, ckpt=tuned, out=str(tmp_path / "c.mp4")))
    densely = replace(options, ckpt=tuned, attention="dense", out=str(tmp_path / "d.mp4"))
    with pytest.raises(UserError, match="another one when run densely"):
        generate(densely)
    generate(replace(densely, drop_linear=True))
    # a CPU has no 8-bit kernels, but their twin
    for name, attention in (("e", "auto"), ("f", "sla_int8")):
        generate(replace(options, ckpt=tuned, attention=attention, out=str(tmp_path / f"{name}.mp4")))
    a, b, c, d, e, f = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abcdef")
    assert (a == d, b == c == e, a == b, b == f) == (True, True, False, False)
    assert json.loads((tmp_path / "e.json").read_text())["options"]["attention"] == "sla"


def test_experts_of_different_attention_are_told_what_to_do(family: Callable, tmp_path: Path) -> None:
    options = family("wan2.2_t2v_a14b").options()
    loaded = checkpoints.load_network(options.ckpt_low, device="cpu", dtype=torch.float32)
    loaded.network.set_attention({"name": "sla"})
    low = str(tmp_path / "low.safetensors")
    checkpoints.save(low, loaded.network, sampling=loaded.sampling, variant=loaded.variant.name)
    with pytest.raises(UserError, match=r"experts differ in attention \(dense and sla, ratio 0.1"):
        find(replace(options, ckpt_low=low))
    assert find(replace(options, ckpt_low=low, attention="sla", ratio=0.5)).attention["ratio"] == 0.5


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits_are_what_was_asked_or_what_the_file_says(
    kind: str, family: Callable, tmp_path: Path
) -> None:
    options = family("wan_tiny").options(out=str(tmp_path / "plain.mp4"))
    eight = str(tmp_path / "eight.safetensors")
    loaded = checkpoints.load_network(options.ckpt, device="cpu", dtype=torch.float32, quant=kind)
    checkpoints.save(eight, loaded.network, sampling=loaded.sampling, variant="wan_tiny")
    for name, ckpt, quant, runs in (
        ("plain", options.ckpt, "auto", "none"),
        ("at load", options.ckpt, kind, kind),
        ("as said", eight, "auto", kind),
        ("asked", eight, kind, kind),
        ("undone", eight, "none", "none"),
    ):
        generate(replace(options, ckpt=ckpt, quant=quant, out=str(tmp_path / f"{name}.mp4")))
        assert json.loads((tmp_path / f"{name}.json").read_text())["options"]["quant"] == runs
    made = {path.stem: path.read_bytes() for path in tmp_path.glob("*.mp4")}
    assert made["at load"] == made["as said"] == made["asked"]
    assert len(set(made.values())) == 3


def test_experts_that_differ_in_bits_are_told_what_to_do(family: Callable, tmp_path: Path) -> None:
    options = family("wan2.2_t2v_a14b").options()
    loaded = checkpoints.load_network(options.ckpt_low, device="cpu", dtype=torch.float32, quant="int8")
    low = str(tmp_path / "low.safetensors")
    checkpoints.save(low, loaded.network, sampling=loaded.sampling, variant=loaded.variant.name)
    with pytest.raises(UserError, match="quantised in two ways"):
        find(replace(options, ckpt_low=low))
    assert find(replace(options, ckpt_low=low, quant="int8")).quant == "int8"


def test_two_experts_may_be_two_folders_of_one(family: Callable, tmp_path: Path) -> None:
    files = family("wan2.2_t2v_a14b").folder
    for name, file in (("high_noise_model", "network"), ("low_noise_model", "low")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.safetensors").symlink_to(files / f"{file}.safetensors")
    options = family("wan2.2_t2v_a14b").options(out=str(tmp_path / "one.mp4"))
    generate(options)
    generate(replace(options, ckpt=str(tmp_path), ckpt_low=None, out=str(tmp_path / "two.mp4")))
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


def test_plan_only_writes_nothing(
    family: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(family("wan_tiny").options(plan_only=True, out=str(tmp_path / "a.mp4")))
    said = capsys.readouterr().err
    assert "memory plan" in said
    assert "text_encoder" in said
    assert "fits" in said
    assert list(tmp_path.iterdir()) == []


def plan_of(options: Options, free: int = 10**15) -> Plan:
    found = find(options)
    request = resolve(options, found.variant, found.sampling, found.multiple())
    return make_plan(options, found, request, torch.float32, Free(free, None))


def test_the_plan_counts_the_weights_that_are_loaded(family: Callable) -> None:
    options = family("wan2.2_t2v_a14b").options()
    found = find(options)
    stages = {stage.name: stage for stage in plan_of(options).stages}
    for name, load in (("network", checkpoints.load_network), ("vae", checkpoints.load_vae)):
        loaded = load(found.reports[name].path, device="cpu", dtype=torch.float32)
        module = loaded.network if name == "network" else loaded
        assert stages[name].weights == sum(4 * p.numel() for p in module.parameters())


def test_the_plan_counts_eight_bits(family: Callable, tmp_path: Path) -> None:
    options = family("wan_tiny").options(quant="int8")
    loaded = checkpoints.load_network(options.ckpt, device="cpu", dtype=torch.float32, quant="int8")
    checkpoints.save(tmp_path / "eight.safetensors", loaded.network, variant="wan_tiny")
    state = loaded.network.state_dict()
    scales = sum(tensor.nbytes for name, tensor in state.items() if name.endswith(".scale"))
    for ckpt, uncounted in ((options.ckpt, scales), (str(tmp_path / "eight.safetensors"), 0)):
        network = next(s for s in plan_of(replace(options, ckpt=ckpt)).stages if s.name == "network")
        assert network.weights == sum(tensor.nbytes for tensor in state.values()) - uncounted


def test_the_plan_grows_with_the_clip(family: Callable) -> None:
    options = family("wan_tiny").options()
    small, large = (
        {stage.name: stage.activations for stage in plan_of(replace(options, size=size)).stages}
        for size in ("128x128", "256x256")
    )
    # four times the pixels and tokens; the text is the same
    assert large["network"] == 4 * small["network"]
    assert large["vae"] == 4 * small["vae"]
    assert large["text_encoder"] == small["text_encoder"]


def plan(free: float, *, host: float = 1000, offload: str = "none") -> Plan:
    """Two experts of 28 GiB, umT5 of 11, activations of 5 to 6."""
    sizes = [("network", 28, 2, 5), ("network_low", 28, 2, 5), ("vae", 1, 1, 6), ("text_encoder", 11, 11, 1)]
    stages = tuple(Stage(name, *(size * GIB for size in rest)) for name, *rest in sizes)
    return Plan(stages, offload, False, int(free * GIB), int(host * GIB))


def test_the_plan_knows_the_peak_of_each_mode() -> None:
    assert plan(0).peak("none") == (28 + 28 + 1 + 11 + 6) * GIB
    assert plan(0).peak("stage") == (28 + 5) * GIB  # never both experts
    assert plan(0).peak("block") == (11 + 1) * GIB


@pytest.mark.parametrize(
    ("free", "offload", "said"),
    [
        (80, "none", "74.0 GiB needed with offload=none, 80.0 GiB free: fits."),
        (40, "none", "pass offload=stage"),
        (24, "none", "pass offload=block"),
        (24, "stage", "33.0 GiB needed with offload=stage, 24.0 GiB free; pass offload=block"),
        (10, "none", "no offload mode would do"),
    ],
)
def test_the_plan_says_whether_it_fits_and_what_to_pass(free: float, offload: str, said: str) -> None:
    try:
        verdict = plan(free, offload=offload).verdict()
    except UserError as error:
        verdict = str(error)
    assert said in verdict


def test_offloading_needs_the_weights_in_host_memory() -> None:
    assert plan(40, host=100, offload="stage").fits("stage")
    with pytest.raises(UserError, match=r"host memory, of which 60\.0 GiB are free"):
        plan(40, host=60, offload="stage").verdict()  # 68 GiB of weights


def test_tiles_are_chosen_when_the_whole_picture_does_not_fit(family: Callable) -> None:
    options = family("wan_tiny").options(size="1024x1024")
    roomy = plan_of(options)
    assert not roomy.tiled
    vae = next(stage.activations for stage in roomy.stages if stage.name == "vae")
    cramped = plan_of(options, roomy.peak("none") - 1)
    assert cramped.tiled
    assert next(stage.activations for stage in cramped.stages if stage.name == "vae") < vae
    assert cramped.fits("none")


def test_this_machine_says_how_much_is_free() -> None:
    free = free_memory(torch.device("cpu"))
    assert free.host is None  # the device's memory is the host's
    assert free.device is None or 0 < free.device < 2**50
