"""Train: `python train.py experiment=NAME [key=value ...]`; the names are the files of configs/experiment.

Everything is written to runs/NAME.  The same command again goes on where the last one stopped.
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from turbodiffusion.cli import entry_point


# debug: its choices are the files true and false of configs/debug, which Hydra wants named by strings
@entry_point("train", free_text=["name", "out", "debug"])
def main(cfg: DictConfig) -> None:
    """Build what the config names, and train it."""
    # imported here: a wrong option, and Ctrl-C while torch loads, are answered at once
    import torch
    from hydra.utils import instantiate

    from distill.recipes import Hardware
    from distill.replicas import joined
    from distill.trainer import Trainer

    folder = Path(cfg.out, cfg.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    torch.manual_seed(cfg.seed)
    # every batch has one shape: let cuDNN look for its fastest convolutions
    torch.backends.cudnn.benchmark = True
    hardware = Hardware.named(cfg.device, precision=cfg.precision, compile=cfg.compile)
    with joined(hardware.device):
        parts = instantiate(cfg.recipe)(hardware)
        optims = {role: instantiate(optim) for role, optim in cfg.optims.items()}
        Trainer(parts, optims=optims, plan=instantiate(cfg.plan), folder=folder).fit()


if __name__ == "__main__":
    main()
