"""infer.py as it is typed: one sentence for what can not be, and an exit code."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import infer
from turbodiffusion import checkpoints
from turbodiffusion.cli import split_texts
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.wan import WanModel
from turbodiffusion.pipelines.options import Options
from turbodiffusion.pipelines.video_io import read_video
from turbodiffusion.variants import variants

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random models of the small world's kind, thinner still, as ckpt=, vae= and text_encoder=."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    thin = {"dim": 32, "ffn_dim": 48, "heads": 2, "layers": 1, "freq_dim": 32, "text_length": 64}
    network = WanModel(**{**variants()["wan_tiny"].network, **thin})
    torch.nn.init.normal_(network.head.head.weight, std=0.2)
    statistics = {"latent_mean": [0.0] * 16, "latent_std": [1.0] * 16}
    vae = VideoVAE(base=4, multipliers=(1, 1, 1, 1), res_blocks=1, **statistics)
    sizes = {"length": 64, "vocab": 259, "dim": 128, "ffn_dim": 8, "heads": 1, "head_dim": 8, "layers": 1}
    text = TextEncoder(tokenizer=ByteTokenizer(), **sizes)
    paths = {name: folder / f"{name}.safetensors" for name in ("ckpt", "vae", "text_encoder")}
    checkpoints.save(paths["ckpt"], network, sampling=variants()["wan_tiny"].sampling, variant="wan_tiny")
    checkpoints.save(paths["vae"], vae)
    checkpoints.save(paths["text_encoder"], text)
    return {name: str(path) for name, path in paths.items()}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Outcome]:
    """Types a command in this process; small clips unless the words say otherwise."""

    def type_in(*words: str) -> Outcome:
        small = ["steps=1", "frames=5", "size=32x32", "prompt=a cat", f"out={tmp_path / 'out'}"]
        small += ["text_cache=none"]
        given = [f"{name}={path}" for name, path in files.items()]
        monkeypatch.setattr("sys.argv", ["infer.py", *given, *small, *words])
        code = 0
        try:
            infer.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    return type_in


def test_the_config_and_the_options_agree() -> None:
    config = set(OmegaConf.load(ROOT / "configs" / "infer.yaml")) - {"defaults", "hydra"}
    assert config == {field.name for field in fields(Options)}


def test_free_text_is_kept_from_hydra_unless_it_chooses_a_file() -> None:
    words = ["prompt=a, b", "vae=null", "debug=it's", "steps=3", "negative_prompt="]
    texts, rest = split_texts(
        words, ["prompt", "vae", "debug", "negative_prompt"], ["prompt", "vae", "steps", "negative_prompt"]
    )
    assert texts == {"prompt": "a, b", "vae": None, "negative_prompt": ""}
    assert rest == [r"debug='it\'s'", "steps=3"]


def test_help_is_the_config_with_its_comments(run: Callable) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    for name in (field.name for field in fields(Options)):
        assert f"\n{name}:" in outcome.out
    assert "# the first frame" in outcome.out


def test_a_prompt_is_taken_as_typed(run: Callable, tmp_path: Path) -> None:
    prompts = [
        "commas, 'single' and \"double\" quotes",
        "a = b, [x], {y}, (z) & 100% #1 @home",
        "${oc.env:HOME} and \\${x} and C:\\dir\\",
        "two\nlines\tand 猫 🐙",
        "'quoted'",
        "\\",
        "true",
        "12",
        "~tilde + plus ?",
    ]
    for i, prompt in enumerate(prompts):
        outcome = run(f"prompt={prompt}", f"out={tmp_path / f'{i}.mp4'}")
        assert outcome.code == 0, outcome.err
        assert json.loads((tmp_path / f"{i}.json").read_text())["options"]["prompt"] == prompt


def test_paths_are_taken_as_typed(run: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "it's, a [folder] = {here}"
    outcome = run(f"out={folder}")
    assert outcome.code == 0
    assert outcome.out.split("\n")[0] == str(folder / "a-cat_seed0.mp4")
    assert (folder / "a-cat_seed0.json").exists()


def test_it_reports_every_stage_and_its_time(run: Callable) -> None:
    said = run().err
    for word in ("memory plan", "loading", "text", "denoise", "decode", "write", "all but loading"):
        assert word in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stepz=3"], "There is no option 'stepz'; did you mean steps="),
        (["--prompt", "x"], "did you mean prompt="),
        (["octopus"], "options are written name=value"),
        (["steps=many"], "'many'"),
        (["size=33x32"], "the nearest that do: 32x32, 48x32"),
        (["ckpt=nowhere.safetensors"], "nowhere.safetensors"),
        (["vae=nowhere.safetensors"], "nowhere.safetensors"),
        (["variant=wan9"], "wan2.1_t2v_1.3b"),
        (["variant=wan2.2_ti2v_5b"], "wan2.2_ti2v_5b"),
        (["image=nowhere.png"], "nowhere.png does not exist"),
        (["image=README.md"], "README.md"),
        (["last_image=x.png"], "takes no last_image="),
        (["prompt_file=nowhere.txt", "prompt=null"], "nowhere.txt does not exist"),
        (["out=/proc/version/x"], "can not be made"),
        (["device=tpu9"], "device=tpu9"),
        (["dtype=int8"], "dtype=int8"),
        (["attention=foo"], "attention=foo: choose dense or sla"),
        (["ratio=0.1"], "dense attention has no ratio: pass attention=sla"),
        (["attention=sla", "ratio=1.5"], "ratio=1.5"),
        (["attention=sla", "block_k=0"], "at least one token"),
        (["quant=fp4"], "quant=fp4: choose none, int8, fp8 or auto"),
        (["offload=disk"], "none, stage, block"),
        (["tiling=maybe"], "true, false, auto"),
        (["graph=maybe"], "auto, true, false"),
        (["graph=true", "device=cpu"], "graph=true records what a CUDA device does"),
        (["compile=true", "offload=block"], "compile=true needs weights that stay"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(run: Callable, words: list[str], said: str) -> None:
    outcome = run(*words)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_damaged_files_are_one_sentence(run: Callable, files: dict[str, str], tmp_path: Path) -> None:
    for name in files:
        whole = Path(files[name]).read_bytes()
        for label, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("text", b"hello " * 50)):
            broken = tmp_path / f"{label}.safetensors"
            broken.write_bytes(content)
            outcome = run(f"{name}={broken}")
            assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
            assert str(broken) in outcome.err


def test_a_pickle_with_code_in_it_is_refused_and_not_run(run: Callable, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was_run",))

    torch.save({"patch_embedding.weight": Payload()}, tmp_path / "evil.pth")
    outcome = run(f"ckpt={tmp_path / 'evil.pth'}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert not (tmp_path / "was_run").exists()


def test_files_exchanged_are_named(run: Callable, files: dict[str, str]) -> None:
    assert "wanted a" in run(f"ckpt={files['vae']}").err
    assert "wanted a" in run(f"vae={files['ckpt']}").err


def test_what_can_not_fit_is_refused_before_loading(run: Callable, tmp_path: Path) -> None:
    outcome = run("size=20480x20480", "frames=401")  # terabytes
    assert outcome.code == 2
    assert "no offload mode would do" in outcome.err
    assert "denoise" not in outcome.err
    assert not list((tmp_path / "out").glob("*"))


def test_the_traceback_is_there_for_who_wants_it(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBODIFFUSION_TRACEBACK", "1")
    assert "Traceback" in run("frames=4").err


def type_in_a_shell(files: dict[str, str], *words: str, **settings: object) -> subprocess.Popen:
    given = [f"{name}={path}" for name, path in files.items()]
    return subprocess.Popen(
        [
            sys.executable,
            "infer.py",
            *given,
            "prompt=a cat",
            "frames=5",
            "size=32x32",
            "text_cache=none",
            *words,
        ],
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings},
    )


@pytest.mark.slow
def test_the_script_runs_and_says_where_the_video_is(files: dict[str, str], tmp_path: Path) -> None:
    out, err = (process := type_in_a_shell(files, "steps=1", f"out={tmp_path / 'a.mp4'}")).communicate()
    assert process.returncode == 0, err
    assert out == f"{tmp_path / 'a.mp4'}\n"
    assert read_video(tmp_path / "a.mp4")[0].shape == (5, 32, 32, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4"]


@pytest.mark.slow
def test_ctrl_c_in_the_middle_leaves_nothing(files: dict[str, str], tmp_path: Path) -> None:
    process = type_in_a_shell(files, "steps=100000", f"out={tmp_path / 'a.mp4'}", bufsize=1)
    said = ""
    while "a cat" not in said:  # the prompt is announced when generation starts
        line = process.stderr.readline()
        assert line, said
        said += line
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130
    assert rest.rstrip("\n").split("\n")[-1].startswith("Stopped")
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_file_that_can_not_grow_leaves_nothing(files: dict[str, str], tmp_path: Path) -> None:
    def tighten() -> None:
        # the nearest to a full disk that needs no rights: the kernel refuses to write past 1 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    process = type_in_a_shell(
        files,
        *("steps=1", f"out={tmp_path / 'a.mp4'}"),
        preexec_fn=tighten,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    _, err = process.communicate()
    assert process.returncode not in (0, 130)
    assert "Traceback" not in err
    assert "a.mp4 could not be written" in err.rstrip("\n").split("\n")[-1]
    assert list(tmp_path.iterdir()) == []


EVALUATION = ("prompt=null", "dims=[temporal_flickering]")


def test_an_evaluation_generates_what_is_missing_and_scores_all(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    (tmp_path / "long.txt").write_text("a very fluffy cat\na very old dog\n")
    words = (
        f"prompt_file={tmp_path / 'p.txt'}",
        f"augmented={tmp_path / 'long.txt'}",
        "num_samples=2",
        "seed=3",
    )
    made = tmp_path / "out" / "videos"
    outcome = run("evaluation=custom", *EVALUATION, *words)
    assert outcome.code == 0, outcome.err
    records = {path.stem: json.loads(path.read_text())["options"] for path in made.glob("*.json")}
    # named after the prompt, made from the longer one, seeded as VBench's own samples
    assert {name: (each["prompt"], each["seed"]) for name, each in records.items()} == {
        **{f"a cat-{j}": ("a very fluffy cat", 3 + j) for j in range(2)},
        **{f"a dog-{j}": ("a very old dog", 100003 + j) for j in range(2)},
    }
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["dimensions"]["temporal_flickering"]["videos"] == 4
    assert results["generation"]["seconds"] > 0
    told = results["generation"]["options"]
    # what all videos share, which seeds are not
    assert (told["steps"], told["size"], told["crf"]) == (1, "32x32", 18)
    assert "report.html" in {path.name for path in (tmp_path / "out").iterdir()}
    (made / "a dog-1.mp4").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in made.glob("*.mp4")}
    outcome = run("evaluation=custom", *EVALUATION, *words)
    assert outcome.out.split("\n")[0] == str(made / "a dog-1.mp4")
    assert {name: (made / name).stat().st_mtime_ns for name in times} == times
    assert json.loads((tmp_path / "out" / "results.json").read_text())["dimensions"] == results["dimensions"]


def test_an_evaluation_from_images_takes_the_crop_of_the_videos_shape(run: Callable, tmp_path: Path) -> None:
    for ratio in ("1-1", "16-9"):
        (tmp_path / "crop" / ratio).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "crop" / ratio / "cat.png")
    entry = {"prompt_en": "a cat", "dimension": ["i2v_subject"], "image_name": "cat.png"}
    (tmp_path / "p.json").write_text(json.dumps([entry]))
    words = (f"prompt_file={tmp_path / 'p.json'}", f"image={tmp_path / 'crop'}", "steps=1")
    outcome = run("evaluation=i2v", *EVALUATION, *words)
    assert outcome.code == 0, outcome.err
    names = {path.stem for path in (tmp_path / "out" / "videos").glob("*.json")}
    assert names == {f"a cat-{i}" for i in range(5)}
    record = json.loads((tmp_path / "out" / "videos" / "a cat-4.json").read_text())
    assert record["options"]["image"] == str(tmp_path / "crop" / "1-1" / "cat.png")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluation=beauty"], "evaluation=beauty: choose vbench, vbench_quality, i2v, tiny, custom"),
        (["evaluation=vbench"], "needs prompt_file=FILE: pip download --no-deps vbench"),
        (["evaluation=custom", "prompt_file=no.txt"], "no.txt does not exist: evaluation=custom needs"),
        (["evaluation=tiny", "prompt=a cat"], "takes prompt_file=, not prompt="),
        (["evaluation=tiny", "dims=[beauty]"], "there is no metric beauty"),
        (["evaluation=tiny", "dims=[color]"], "color: upstream=PYTHON must have VBench's own package"),
        (["evaluation=tiny", "dims=[scene]", "upstream=no"], "upstream=no is no interpreter"),
        (["evaluation=tiny", "augmented=README.md"], "lines for 128 prompts"),
        (["evaluation=i2v", "prompt_file=README.md"], "a prompt file ends in .txt, .json or .jsonl"),
        (["naming={seed:x"], "naming={seed:x: it may name {name}, {seed} and {sample}"),
        (["naming=a/b"], "'a/b' is not a plain file name"),
    ],
)
def test_what_can_not_be_evaluated_is_one_sentence(
    run: Callable, words: list[str], said: str, tmp_path: Path
) -> None:
    outcome = run("prompt=null" if "evaluation" in words[0] else "seed=0", *words)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert said in outcome.err
    assert not (tmp_path / "out" / "videos").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_share_an_evaluation(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\na dog\na bird\n")
    given = [f"{name}={path}" for name, path in files.items()]
    small = ["frames=5", "size=32x32", "text_cache=none", "steps=1", "device=cpu", *EVALUATION]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["evaluation=custom", f"prompt_file={tmp_path / 'p.txt'}", *given, *small]
    for name, start in (("one", []), ("two", torchrun)):
        command = [sys.executable, *start, "infer.py", *words, f"out={tmp_path / name}"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    one, two = (sorted((tmp_path / name / "videos").glob("*.mp4")) for name in ("one", "two"))
    assert (
        [path.name for path in one]
        == [path.name for path in two]
        == [*("a bird-0.mp4", "a cat-0.mp4", "a dog-0.mp4")]
    )
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["dimensions"] == results[1]["dimensions"]


def test_weights_are_missed_before_anything_is_generated(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TURBODIFFUSION_WEIGHTS", "VBENCH_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "p.txt").write_text("a cat\n")
    outcome = run("evaluation=custom", "prompt=null", f"prompt_file={tmp_path / 'p.txt'}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "get weights into one of" in outcome.err
    assert not (tmp_path / "out").exists()
