"""What is computed once a clip, recorded once a form, and reported apart from the steps."""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.models.int8 import to_eight_bits
from turbodiffusion.models.wan import Conditions, WanModel
from turbodiffusion.pipelines.found import find, load
from turbodiffusion.pipelines.generate import Clip, Models, Pipeline
from turbodiffusion.pipelines.graphs import Capture, Recording, capture_cuda, check_graph
from turbodiffusion.pipelines.offload import Residence
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.pipelines.steps import Runner, Steps
from turbodiffusion.pipelines.watch import Watch
from turbodiffusion.samplers.denoiser import Denoiser
from turbodiffusion.samplers.few_step import sample_rcm
from turbodiffusion.samplers.noise import SampleNoise
from turbodiffusion.samplers.time import student_times
from turbodiffusion.variants import Sampling

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZE = Size(64, 32)


class Rerun:
    """A graph as its caller sees it: the function runs again in the same memory, over its last output."""

    def __init__(self):
        self.count = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.count += 1
        output = run()
        return lambda: output.copy_(run()), output


def refuse(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    raise RuntimeError("operation not permitted\nand a second line")


@pytest.fixture
def parts(family: Callable) -> Callable[[str], tuple[Models, Sampling]]:
    def make(variant: str, **changed: object) -> tuple[Models, Sampling]:
        found = find(family(variant).options())
        models = load(found, device=CPU, dtype=torch.float32)
        return models, replace(found.sampling, **{"steps": 3, **changed})

    return make


def recorded(pipeline: Pipeline, capture: Capture) -> Pipeline:
    pipeline.runners = {
        name: Runner(runner.network, pipeline.residence, capture, compiled=False)
        for name, runner in pipeline.runners.items()
    }
    return pipeline


def picture() -> Tensor:
    return torch.rand(1, 3, SIZE.height, SIZE.width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_recording_gives_what_its_function_would() -> None:
    def fn(x: Tensor, pair: tuple[Tensor, dict[int, Tensor]], nothing: None) -> Tensor:
        assert nothing is None
        return x + pair[0] * pair[1][3]

    def inputs() -> tuple:
        return torch.randn(2, 3), (torch.randn(3), {3: torch.randn(2, 1)}), None

    first, second = inputs(), inputs()
    recording = Recording(fn, first, Rerun())
    one, two = recording(*second), recording(*first)
    # the first answer is still the first after the second
    assert torch.equal(one, fn(*second))
    assert torch.equal(two, fn(*first))
    assert torch.equal(recording(*second), one)


@pytest.mark.parametrize("mode", ["none", "stage"])
@pytest.mark.parametrize("variant", ["wan_tiny", "wan2.2_i2v_a14b", "wan2.1_i2v_14b_480p", "wan2.2_ti2v_5b"])
def test_recorded_steps_make_the_same_video(parts: Callable, variant: str, mode: str) -> None:
    models, sampling = parts(variant)
    clips = [Clip(prompts=[text], size=SIZE, frames=5, image=picture()) for text in ("a cat", "a dog")]
    plain = Pipeline(models, sampling, device=CPU)
    wanted = [plain(clip, [1]).frames for clip in clips]
    pipeline = recorded(Pipeline(models, sampling, device=CPU, offload=mode), Rerun())
    for clip, frames in zip(clips, wanted, strict=True):
        assert torch.equal(pipeline(clip, [1]).frames, frames)
    assert not torch.equal(*wanted)


def test_a_form_is_recorded_once_and_the_last_one_kept(parts: Callable) -> None:
    capture = Rerun()
    pipeline = recorded(Pipeline(*parts("wan_tiny"), device=CPU), capture)
    counts = []
    for width, prompts in ((64, ["a"]), (64, ["b"]), (64, ["a", "b"]), (32, ["a"]), (64, ["a"])):
        clip = Clip(prompts=prompts, size=Size(width, 32), frames=5)
        seconds = pipeline(clip, list(range(len(prompts)))).seconds
        counts.append((capture.count, "warm-up" in seconds))
    # each branch of guidance uses the one recording
    assert counts == [(1, True), (1, False), (2, True), (3, True), (4, True)]


def test_weights_that_leave_take_their_recording_along(parts: Callable) -> None:
    pipeline = recorded(Pipeline(*parts("wan2.2_t2v_a14b"), device=CPU, offload="stage"), Rerun())
    clip, watch = Clip(prompts=["a"], size=SIZE, frames=5), Watch(CPU)
    pipeline.denoise(pipeline.encode(clip, watch), [0], watch)
    assert [name for name, runner in pipeline.runners.items() if runner.recording] == ["network_low"]
    pipeline.residence.release()
    assert not any(runner.recording for runner in pipeline.runners.values())


def test_what_can_not_be_recorded_runs_all_the_same_and_is_said_once(parts: Callable) -> None:
    models, sampling = parts("wan_tiny")
    clip = Clip(prompts=["a cat"], size=SIZE, frames=5)
    wanted = Pipeline(models, sampling, device=CPU)(clip, [0]).frames
    pipeline = recorded(Pipeline(models, sampling, device=CPU), refuse)
    with pytest.warns(UserWarning, match="run one by one: operation not permitted$"):
        made = pipeline(clip, [0])
    assert torch.equal(made.frames, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pipeline(clip, [0]).frames, wanted)


def test_the_warm_up_runs_a_block_of_each_kind(parts: Callable) -> None:
    models, sampling = parts("wan_tiny", guidance=1.0)
    blocks, runs = models.network.blocks, []
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    pipeline = recorded(Pipeline(models, sampling, device=CPU), refuse)
    clip = Clip(prompts=["a"], size=SIZE, frames=5)
    with pytest.warns(UserWarning, match="run one by one"):
        pipeline(clip, [0])
    assert len(runs) == 1 + 3 * len(blocks)


@pytest.mark.parametrize(("mode", "calls"), [("none", 2), ("stage", 2), ("block", 6)])
def test_keys_of_texts_are_made_once_for_each_text(parts: Callable, mode: str, calls: int) -> None:
    models, sampling = parts("wan_tiny")
    made: list[int] = []
    for block in models.network.blocks:
        block.cross_attn.k.register_forward_pre_hook(lambda *_: made.append(1))
    embedded: list[int] = []
    models.network.text_embedding.register_forward_pre_hook(lambda *_: embedded.append(1))
    Pipeline(models, sampling, device=CPU, offload=mode)(Clip(prompts=["a"], size=SIZE, frames=5), [0])
    # the prompt and the negative one; streamed blocks make their own at each of three steps
    assert len(made) == calls * len(models.network.blocks)
    assert len(embedded) == 2


def test_a_stage_within_a_stage_is_counted_once() -> None:
    watch, start = Watch(CPU), time.perf_counter()
    with watch.stage("steps"), watch.stage("warm-up"):
        time.sleep(0.02)
    whole = time.perf_counter() - start
    assert list(watch.seconds) == ["warm-up", "steps"]
    assert watch.seconds["warm-up"] >= 0.02
    assert sum(watch.seconds.values()) <= whole


@pytest.mark.parametrize(
    ("asked", "device", "offload", "answer"),
    [
        ("auto", "cuda", "none", True),
        ("auto", "cuda", "stage", True),
        ("auto", "cuda", "block", False),
        ("auto", "cpu", "none", False),
        ("false", "cuda", "none", False),
        ("true", "cuda", "stage", True),
        ("true", "cpu", "none", "a CUDA device"),
        ("true", "cuda", "block", "leave offload=block away"),
        ("yes", "cuda", "none", "not one of auto, true, false"),
    ],
)
def test_graphs_are_where_they_can_be(asked: str, device: str, offload: str, answer: bool | str) -> None:
    if isinstance(answer, bool):
        assert check_graph(asked, torch.device(device), offload) is answer
    else:
        with pytest.raises(UserError, match=answer):
            check_graph(asked, torch.device(device), offload)


@pytest.mark.slow
def test_compiled_blocks_make_the_same_video(parts: Callable) -> None:
    models, sampling = parts("wan_tiny")
    clip = Clip(prompts=["a cat"], size=SIZE, frames=5)
    wanted = Pipeline(models, sampling, device=CPU)(clip, [1]).frames
    made = Pipeline(models, sampling, device=CPU, compile=True)(clip, [1])
    # fp32, sums in another order: 1e-6 a layer, which a decoder of random weights may amplify
    torch.testing.assert_close(made.frames, wanted, atol=1e-3, rtol=0)
    # compiling is not denoising: of three steps of a thin network
    assert made.seconds["warm-up"] > made.seconds["denoise"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "stage"])
@pytest.mark.parametrize("variant", ["wan_tiny", "wan2.2_i2v_a14b", "wan2.1_i2v_14b_480p", "wan2.2_ti2v_5b"])
def test_cuda_graphs_make_the_same_video(parts: Callable, variant: str, mode: str) -> None:
    models, sampling = parts(variant)
    clips = [Clip(prompts=[text], size=SIZE, frames=5, image=picture()) for text in ("a cat", "a dog")]
    eager = Pipeline(models, sampling, device=CUDA, offload=mode)
    wanted = [eager(clip, [1]).frames for clip in clips]
    pipeline = Pipeline(models, sampling, device=CUDA, offload=mode, graph=True)
    warm_ups = []
    for clip, frames in zip(clips, wanted, strict=True):
        made = pipeline(clip, [1])
        assert torch.equal(made.frames, frames)
        warm_ups.append("warm-up" in made.seconds)
    assert warm_ups == [True, mode == "stage"]
    # nothing fell back to running one by one
    assert all(runner.capture is not None for runner in pipeline.runners.values())


def wide(attention: str, quant: str) -> WanModel:
    """A network on the GPU whose heads are as wide as Wan's, for which the kernels are."""
    sizes = {"dim": 256, "ffn_dim": 512, "heads": 2, "layers": 3, "text_dim": 64}
    options = {} if attention == "dense" else {"ratio": 0.3, "block_q": 128, "block_k": 64}
    network = WanModel(**sizes, attention={"name": attention, **options})
    for name, parameter in network.named_parameters():
        value = parameter.data + 0.05 * torch.randn_like(parameter)
        parameter.data = value.to(CUDA, torch.float32 if WanModel.is_fp32(name) else torch.bfloat16)
    if quant != "none":
        to_eight_bits(network, quant=quant)
    return network


# 1,000 tokens: more than a block of queries, and ragged
LATENTS = (16, 10, 20, 20)
KERNELS = [("dense", "none"), ("sla", "none"), ("sla_int8", "int8"), ("sla_int8", "fp8")]


@pytest.mark.gpu
@pytest.mark.parametrize(("attention", "quant"), KERNELS)
@torch.no_grad()
def test_cuda_graphs_replay_every_kernel_to_the_bit(attention: str, quant: str) -> None:
    network, watch = wide(attention, quant), Watch(CUDA)
    runner = Runner(network, Residence(CUDA), capture_cuda, compiled=False)

    def inputs(time: float) -> tuple[Tensor | Conditions | None, ...]:
        x, context = (torch.randn(1, *size, device=CUDA) for size in (LATENTS, (7, 64)))
        return x, torch.full((1,), time, device=CUDA), network.prepare(x, context), None

    given = [inputs(time) for time in (900.0, 400.0, 10.0)]
    wanted = [network(*each[:3]) for each in given]
    made = [runner(watch, *each) for each in given]
    assert runner.recording is not None
    assert all(torch.equal(*pair) for pair in zip(made, wanted, strict=True))
    assert not torch.equal(*wanted[:2])


@pytest.mark.gpu
def test_a_recording_that_is_forgotten_gives_its_memory_back(parts: Callable) -> None:
    models, sampling = parts("wan_tiny", guidance=1.0)
    clip = Clip(prompts=["a"], size=Size(512, 512), frames=81)

    def held(graph: bool) -> int:
        pipeline = Pipeline(models, sampling, device=CUDA, graph=graph)
        watch = Watch(CUDA)
        pipeline.denoise(pipeline.encode(clip, watch), [0], watch)
        for runner in pipeline.runners.values():
            assert (runner.recording is not None) == graph
            runner.forget()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    plain = held(graph=False)
    # 21,504 tokens of width 32 in fp32 are 2.75 MB a tensor, and a forward has a dozen at a time; a segment
    # that PyTorch takes has 2 or 20 MiB and may be kept for what is small
    assert held(graph=True) <= plain + 22 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [None, capture_cuda], ids=["one by one", "graph"])
@pytest.mark.parametrize(("attention", "quant"), KERNELS)
@torch.no_grad()
def test_the_host_waits_for_no_step(attention: str, quant: str, capture: Capture | None) -> None:
    runner = Runner(wide(attention, quant), Residence(CUDA), capture, compiled=False)
    context, negative = torch.randn(2, 1, 7, 64, device=CUDA)
    texts = {"context": context, "negative": negative, "guidance": 3.0}
    denoiser = Denoiser(network=Steps(runner, Watch(CUDA)), **texts)
    noise, times = SampleNoise([0], LATENTS, device=CUDA), student_times(4, 80.0)
    start = noise.draw()
    wanted = sample_rcm(denoiser, start, times, lambda: start)
    torch.cuda.set_sync_debug_mode("error")
    try:
        latents = sample_rcm(denoiser, start, times, lambda: start)
        sample_rcm(denoiser, start, times, noise.draw)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(latents, wanted)
