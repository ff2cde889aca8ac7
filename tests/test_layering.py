"""Who may import whom, read from the source, and what importing us must not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ERRORS = "turbodiffusion.errors"
OURS = ("turbodiffusion", "distill", "kernels", "evaluation", "tools")

# package -> the packages of ours that it may import beside itself
ALLOWED = {
    "kernels": (),
    "turbodiffusion.errors": (),
    "turbodiffusion.cli": (ERRORS,),
    "turbodiffusion.variants": (ERRORS,),
    "turbodiffusion.samplers": (ERRORS,),
    "turbodiffusion.small_world": (ERRORS,),
    "turbodiffusion.attention": ("kernels", ERRORS),
    "turbodiffusion.models": ("turbodiffusion.attention", "kernels", ERRORS),
    "turbodiffusion.checkpoints": (
        "turbodiffusion.models",
        "turbodiffusion.attention",
        "turbodiffusion.variants",
        ERRORS,
    ),
    "turbodiffusion.parallel": ("turbodiffusion.models", ERRORS),
    "turbodiffusion.pipelines": (
        "turbodiffusion.models",
        "turbodiffusion.parallel",
        "turbodiffusion.attention",
        "turbodiffusion.samplers",
        "turbodiffusion.checkpoints",
        "turbodiffusion.variants",
        ERRORS,
    ),
    "distill": (
        "turbodiffusion.models",
        "turbodiffusion.parallel",
        "turbodiffusion.attention",
        "turbodiffusion.samplers",
        "turbodiffusion.checkpoints",
        "turbodiffusion.variants",
        "turbodiffusion.small_world",
        ERRORS,
    ),
    "evaluation": ("turbodiffusion",),
    "tools": ("turbodiffusion", "kernels", "distill"),
}


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _files(package: str) -> list[Path]:
    path = ROOT / package.replace(".", "/")
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_its_layer_may(package: str) -> None:
    files = _files(package)
    assert files
    wrong = []
    for path in files:
        for name in _imports(path):
            ours = name.split(".")[0] in OURS
            bare = any(other.startswith(name + ".") for other in ALLOWED)  # a parent package
            if ours and not bare and not any(_is_within(name, p) for p in (package, *ALLOWED[package])):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_every_module_belongs_to_a_layer() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in OURS
        for path in (ROOT / name).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert not [m for m in modules if not any(_is_within(m, package) for package in ALLOWED)]


def test_only_kernels_import_triton() -> None:
    paths = [p for name in OURS if name != "kernels" for p in (ROOT / name).rglob("*.py")]
    assert not [p for p in paths if any(_is_within(name, "triton") for name in _imports(p))]


def test_importing_needs_no_triton_no_gpu_and_no_network() -> None:
    code = (
        "import sys, socket\n"
        "sys.modules['triton'] = None\n"  # any import of it now raises
        "def refuse(*args, **kwargs): raise OSError('no network in this test')\n"
        "socket.socket.connect = refuse\n"
        "import turbodiffusion.models.wan, turbodiffusion.models.vae, turbodiffusion.variants\n"
        "import turbodiffusion.checkpoints, turbodiffusion.samplers.ode\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={"CUDA_VISIBLE_DEVICES": ""})


def test_kernels_is_our_package_not_the_hub_client_of_that_name() -> None:
    import kernels

    assert Path(kernels.__file__).parent == ROOT / "kernels"
