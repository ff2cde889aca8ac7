from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))

# counted once; a change of size would orphan the checkpoints in assets/
PARAMETERS = {"vae": 2_680_764, "network": 4_636_480, "text_encoder": 690_176}


def composed(experiment: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [f"experiment={experiment}", *overrides])


def networks(cfg: DictConfig) -> dict[str, nn.Module]:
    """The networks an experiment trains, on the meta device."""
    recipe = cfg.recipe.student if "student" in cfg.recipe else cfg.recipe
    with torch.device("meta"):
        return {name: instantiate(recipe[name]) for name in PARAMETERS if OmegaConf.is_dict(recipe.get(name))}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("debug", ["'false'", "'true'"])
def test_experiment_composes_and_resolves(experiment: str, debug: str):
    cfg = composed(experiment, f"debug={debug}")
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert cfg.name == experiment
    for node in (cfg.optims.default, cfg.plan):
        instantiate(node)
    with torch.device("meta"):
        assert callable(instantiate(cfg.recipe))


@pytest.mark.parametrize("experiment", ["vae_tiny", "text_tiny", "teacher_tiny", "teacher_tiny_i2v"])
def test_networks_have_the_expected_size(experiment: str):
    built = networks(composed(experiment))
    assert built
    for name, module in built.items():
        assert all(p.is_meta for p in module.parameters())
        assert sum(p.numel() for p in module.parameters()) == PARAMETERS[name]


UNKNOWN = ["optims.default.learning_rate=1", "recipe.objective.image_shar=1", "step=3"]


@pytest.mark.parametrize("override", UNKNOWN)
def test_unknown_option_is_refused(override: str):
    with pytest.raises(ConfigCompositionException):
        composed("teacher_tiny", override)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_file_begins_with_its_command(experiment: str):
    lines = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python train.py experiment={experiment}")


def test_debug_is_small():
    cfg = composed("teacher_tiny", "debug='true'")
    assert (cfg.steps, cfg.batch, cfg.window.frames, cfg.device) == (6, 2, 9, "cpu")
