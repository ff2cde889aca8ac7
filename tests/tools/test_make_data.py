"""The command that makes training data, run as its users run it, on the small world's models."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.shard_files import SHARDS, Sample, find_shards, read_context
from distill.shards import ShardedClips
from tools import make_data
from turbodiffusion.checkpoints import load_network, load_text_encoder, load_vae, save
from turbodiffusion.pipelines.generate import Clip, Models, Pipeline, Watch
from turbodiffusion.pipelines.sizes import Size

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets"
CPU = {"device": "cpu", "dtype": torch.float32}
SMALL = ("device=cpu", "steps=2", "frames=5", "size=32x32", "samples_per_shard=3")

Make = Callable[..., tuple[int, str]]


@pytest.fixture
def make(run: Callable[..., tuple[int, str]]) -> Make:
    """The words of the command -> its exit code and what it printed."""
    return lambda *words: run(make_data, *words)


@pytest.fixture(scope="module")
def teacher_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of each of four prompts, in three shards."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "prompts.txt").write_text("a red cat\nan owl\na bee\na tree\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_data", *again(folder, folder / "data")])
        make_data.main()
    return folder


def again(folder: Path, dst: Path, *words: str) -> tuple[str, ...]:
    """The words that made the set, for another place."""
    given = ("mode=sample", f"dst={dst}", f"prompt_file={folder / 'prompts.txt'}", "repeat=2")
    return (*given, *SMALL, "seed=5", *words)


def samples(folder: Path, *, text_only: bool = False) -> dict[str, Sample]:
    shards = [SHARDS[path.suffix](path, text_only=text_only) for path in find_shards(str(folder))]
    return {key: shard.read(i) for shard in shards for i, key in enumerate(shard.keys)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file there, the hidden too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_samples_are_what_the_pipeline_makes_of_prompt_and_seed(teacher_set: Path) -> None:
    made = samples(teacher_set / "data")
    assert list(made) == [f"{i:09d}" for i in range(8)]
    prompts = ["a red cat", "an owl", "a bee", "a tree"]
    assert [sample.prompt for sample in made.values()] == prompts * 2
    loaded = load_network(ASSETS / "wan_tiny.safetensors", **CPU)
    models = Models(
        network=loaded.network,
        vae=load_vae(ASSETS / "vae_tiny.safetensors", **CPU),
        text_encoder=load_text_encoder(ASSETS / "text_tiny.safetensors", **CPU),
    )
    pipeline = Pipeline(models, replace(loaded.sampling, steps=2), device=torch.device("cpu"))
    for number in (0, 6):
        clip = Clip(prompts=[prompts[number % 4]], size=Size(32, 32), frames=5)
        watch = Watch(torch.device("cpu"))
        encoded = pipeline.encode(clip, watch)
        latents = pipeline.denoise(encoded, [5 + number], watch)
        assert torch.equal(made[f"{number:09d}"].latents, latents[0].bfloat16())
        assert torch.equal(made[f"{number:09d}"].context, encoded.context[0].bfloat16())


def test_training_reads_what_was_made(teacher_set: Path) -> None:
    batch = ShardedClips(str(teacher_set / "data"), count=8, seed=0).batch(0)
    assert batch.latents.shape == (8, 16, 2, 4, 4)
    assert batch.context.shape == (8, 96, 128)
    # this network has room for a picture: told that there is none
    assert batch.condition is not None
    assert not batch.condition.any()


def test_any_number_of_processes_make_the_same_files(
    teacher_set: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, whole in (("1", "1 of 3"), ("0", "3 of 3")):
        monkeypatch.setenv("RANK", rank)
        code, said = make(*again(teacher_set, tmp_path / "data"))
        assert (code, whole in said) == (0, True)
    assert contents(tmp_path / "data") == contents(teacher_set / "data")


def test_both_formats_hold_the_same(teacher_set: Path, make: Make, tmp_path: Path) -> None:
    assert make(*again(teacher_set, tmp_path / "data", "format=safetensors"))[0] == 0
    ours, tar = samples(tmp_path / "data"), samples(teacher_set / "data")
    assert ours.keys() == tar.keys()
    for key, sample in ours.items():
        assert all(torch.equal(x, tar[key].tensors()[name]) for name, x in sample.tensors().items())


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(teacher_set: Path, make: Make, tmp_path: Path) -> None:
    """Killed hard once the first shard is there, which is kept; the one that was being made is made again."""
    words = again(teacher_set, tmp_path / "data")
    first = tmp_path / "data" / "shard_000000.tar"
    child = subprocess.Popen([sys.executable, "-m", "tools.make_data", *words], cwd=ROOT)
    while not first.exists() and child.poll() is None:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "data" / "shard_000002.tar").exists()
    stamp = first.stat().st_mtime_ns
    # as if writing a shard had been cut, too
    (tmp_path / "data" / ".shard_000001.tar.99999.part").write_bytes(b"half")
    (tmp_path / "data" / "shard_000001.tar").unlink(missing_ok=True)
    assert make(*words)[0] == 0
    assert first.stat().st_mtime_ns == stamp
    assert contents(tmp_path / "data") == contents(teacher_set / "data")


def test_a_finished_shard_is_not_made_again(teacher_set: Path, make: Make, tmp_path: Path) -> None:
    words = again(teacher_set, tmp_path, "batch=2")
    assert make(*words)[0] == 0
    before = contents(tmp_path)
    (tmp_path / "shard_000001.tar").write_bytes(b"whatever is there")
    (tmp_path / "shard_000002.tar").unlink()
    assert make(*words)[0] == 0
    assert contents(tmp_path) == before | {"shard_000001.tar": b"whatever is there"}


def test_other_options_for_the_same_folder_are_refused(teacher_set: Path, make: Make, tmp_path: Path) -> None:
    before = contents(teacher_set / "data")
    for word, part in (("steps=3", "other sampling"), ("seed=6", "other seed"), ("batch=2", "other batch")):
        code, said = make(*again(teacher_set, teacher_set / "data", word))
        assert (code, part in said) == (2, True)
    (teacher_set / "other.txt").write_text("a dog\nan owl\na bee\na tree\n")
    words = [w.replace("prompts.txt", "other.txt") for w in again(teacher_set, teacher_set / "data")]
    assert "other prompts" in make(*words)[1]
    assert contents(teacher_set / "data") == before
    (tmp_path / "shard_000000.tar").touch()
    assert "unknown making" in make(*again(teacher_set, tmp_path))[1]


def test_texts_and_the_negative_prompt_are_what_the_encoder_says(make: Make, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n"an owl at night"\n')
    words = (f"prompt_file={tmp_path / 'prompts.jsonl'}", "device=cpu", "format=safetensors")
    assert make("mode=text", f"dst={tmp_path}", *words)[0] == 0
    code, said = make(
        "mode=negative", f"dst={tmp_path / 'n.safetensors'}", "negative_prompt=ugly", "device=cpu"
    )
    assert (code, "'ugly'" in said) == (0, True)
    encoder = load_text_encoder(ASSETS / "text_tiny.safetensors", **CPU)
    stream = ShardedClips(str(tmp_path), count=1, seed=0, text_only=True, latent_shape=[4, 1, 2, 2])
    for number in stream.samples(0) + stream.samples(1):
        _, sample = stream.read(number)
        assert torch.equal(sample.context, encoder([sample.prompt])[0].bfloat16())
    assert torch.equal(read_context(tmp_path / "n.safetensors"), encoder(["ugly"])[0].bfloat16())


def test_texts_are_kept_and_read_where_asked(teacher_set: Path, make: Make, tmp_path: Path) -> None:
    cache = tmp_path / "texts"
    assert make(*again(teacher_set, tmp_path / "data", f"text_cache={cache}"))[0] == 0
    assert contents(tmp_path / "data") == contents(teacher_set / "data")
    first, *others = sorted(cache.iterdir())
    assert len(others) == 4  # four prompts and the negative one, which guidance needs
    # no encoder would say that they are all the same
    for other in others:
        other.write_bytes(first.read_bytes())
    words = ("mode=text", f"prompt_file={teacher_set / 'prompts.txt'}", "device=cpu", f"text_cache={cache}")
    assert make(*words, f"dst={tmp_path / 'texts_alone'}")[0] == 0
    made = torch.stack([each.context for each in samples(tmp_path / "texts_alone", text_only=True).values()])
    assert torch.equal(made, made[:1].expand(4, -1, -1))


@pytest.mark.slow
def test_a_compiled_teacher_makes_the_same_clips(teacher_set: Path, make: Make, tmp_path: Path) -> None:
    words = again(teacher_set, tmp_path, "compile=true")
    torch.compiler.reset()
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        make(*words)  # is compiled
    assert make(*words)[0] == 0
    made, wanted = samples(tmp_path), samples(teacher_set / "data")
    for key, sample in made.items():
        # fp32 sums in another order, then bf16: of values of about 1, the last of its 8 bits
        torch.testing.assert_close(sample.latents, wanted[key].latents, rtol=2**-7, atol=1e-3)


@pytest.mark.gpu
def test_recorded_steps_make_the_same_clips(teacher_set: Path, make: Make, tmp_path: Path) -> None:
    sets = [tmp_path / graph for graph in ("false", "true")]
    for dst in sets:
        assert make(*again(teacher_set, dst, f"graph={dst.name}", "device=cuda", "dtype=float32"))[0] == 0
    plain, recorded = map(samples, sets)
    assert all(torch.equal(sample.latents, recorded[key].latents) for key, sample in plain.items())


def test_a_broken_teacher_leaves_no_shard(teacher_set: Path, make: Make, tmp_path: Path) -> None:
    loaded = load_network(ASSETS / "wan_tiny.safetensors", **CPU)
    with torch.no_grad():
        loaded.network.head.head.bias.fill_(float("nan"))
    ckpt = tmp_path / "nan.safetensors"
    save(ckpt, loaded.network, sampling=loaded.sampling, variant="wan_tiny")
    code, said = make(f"ckpt={ckpt}", *again(teacher_set, tmp_path / "d"))
    assert (code, "sample 000000000" in said, "NaN" in said) == (2, True, True)
    assert set(contents(tmp_path / "d")) == {"data.json"}


WRONG = {
    "no mode": (["dst=d"], "mode= must be given"),
    "unknown mode": (["mode=make", "dst=d"], "mode=make"),
    "no destination": (["mode=sample"], "dst= must be given"),
    "no prompts": (["mode=sample", "dst=d"], "prompt_file=FILE"),
    "missing prompts": (["mode=sample", "dst=d", "prompt_file=none.txt"], "does not exist"),
    "another mode's option": (["mode=encode", "dst=d", "videos=.", "steps=3"], "steps= means nothing to"),
    "size": (["mode=sample", "dst=d", "prompt_file=p.txt", "size=33x32"], "divide by 16"),
    "frames": (["mode=sample", "dst=d", "prompt_file=p.txt", "frames=4"], "1 more than a multiple"),
    "batch": (["mode=sample", "dst=d", "prompt_file=p.txt", "batch=0"], "batch=0"),
    "seed": (["mode=sample", "dst=d", "prompt_file=p.txt", "seed=4294967296"], "from 0 to 4294967295"),
    "own seeds": (["mode=sample", "dst=d", "prompt_file=seeds.jsonl"], "hold for all samples"),
    "empty prompt": (["mode=sample", "dst=d", "prompt_file=blank.jsonl"], "the prompt is empty"),
    "mixed pictures": (["mode=sample", "dst=d", "prompt_file=mixed.jsonl"], "must be alike"),
    "format": (["mode=sample", "dst=d", "prompt_file=p.txt", "format=zip"], "format=zip"),
    "missing checkpoint": (
        ["mode=sample", "dst=d", "prompt_file=p.txt", "ckpt=none.safetensors"],
        "does not exist",
    ),
    "graph": (["mode=sample", "dst=d", "device=cpu", "graph=true"], "graph=true records"),
    "compile": (["mode=sample", "dst=d", "compile=true", "offload=block"], "compile=true needs"),
    "nothing to record": (["mode=text", "dst=d", "graph=true"], "graph= means nothing to mode=text"),
    "no videos": (["mode=encode", "dst=d"], "videos=FOLDER or csv=FILE"),
    "an empty folder": (["mode=encode", "dst=d", "videos=empty"], "names no video"),
    "no caption": (["mode=encode", "dst=d", "videos=bare"], "a.mp4 has no caption"),
    "csv columns": (["mode=encode", "dst=d", "csv=columns.csv"], "lacks the column caption"),
    "csv video": (["mode=encode", "dst=d", "csv=lost.csv"], "lost.mp4 does not exist"),
    "fps": (["mode=encode", "dst=d", "videos=empty", "fps=0"], "fps=0.0"),
    "negative's place": (["mode=negative", "dst=d"], ".safetensors"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_wrong_input_is_one_sentence_exit_code_2_and_no_file(
    wrong: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seeds.jsonl").write_text('{"prompt": "a", "seed": 3}')
    Path("mixed.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "image": "a.png"}')
    Path("p.txt").write_text("a")
    Path("blank.jsonl").write_text('{"prompt": ""}')
    Path("empty").mkdir()
    Path("bare").mkdir()
    Path("bare/a.mp4").touch()
    Path("columns.csv").write_text("path,text\na.mp4,a\n")
    Path("lost.csv").write_text("path,caption\nlost.mp4,a\n")
    before = contents(tmp_path)
    words, part = WRONG[wrong]
    code, said = make(*words)
    assert code == 2
    assert part in said
    assert len(said.strip().splitlines()) == 1
    assert contents(tmp_path) == before


def test_pictures_of_the_prompts_become_conditions(make: Make, tmp_path: Path) -> None:
    for name, shade in (("dark", 40), ("light", 200)):
        Image.new("RGB", (32, 32), (shade, shade, shade)).save(tmp_path / f"{name}.png")
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "dusk", "image": "dark.png"}\n{"prompt": "dawn", "image": "light.png"}'
    )
    words = ("mode=sample", f"prompt_file={tmp_path / 'p.jsonl'}", f"dst={tmp_path / 'd'}", "batch=2")
    assert make(*words, *SMALL)[0] == 0
    vae = load_vae(ASSETS / "vae_tiny.safetensors", **CPU)
    for sample, shade in zip(samples(tmp_path / "d").values(), (40, 200), strict=True):
        clip = torch.full((1, 3, 1, 32, 32), shade / 127.5 - 1)
        with torch.no_grad():
            first = vae.encode(clip)[0, :, 0]
        assert sample.condition[:4, 0].eq(1).all()
        # bf16 has 8 bits
        torch.testing.assert_close(sample.condition[4:, 0].float(), first, rtol=2**-8, atol=1e-4)


def test_it_runs_as_a_module() -> None:
    words = [sys.executable, "-m", "tools.make_data", "nonsense"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
