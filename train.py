"""Train: `python train.py experiment=NAME [key=value ...]`; the names are the files of configs/experiment.

Everything is written to runs/NAME.  The same command again goes on where the last one stopped.
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from turbodiffusion.cli import entry_point


# debug: its choices are the files true and false of configs/debug, which Hydra wants named by strings
@entry_point("train", free_text=["name", "out", "debug", "wandb"])
def main(cfg: DictConfig) -> None:
    """Build what the config names, and train it."""
    # imported here: a wrong option, and Ctrl-C while torch loads, are answered at once
    import torch
    from hydra.utils import instantiate

    from distill.recipes import Hardware
    from distill.tracking import Tracking
    from distill.trainer import Trainer
    from turbodiffusion.parallel import joined, rank

    folder = Path(cfg.out, cfg.name)
    torch.manual_seed(cfg.seed)
    # every batch has one shape: let cuDNN look for its fastest convolutions
    torch.backends.cudnn.benchmark = True
    plan, tracking = instantiate(cfg.plan), Tracking(cfg.wandb, cfg.wandb_mode)
    optims = {role: instantiate(optim) for role, optim in cfg.optims.items()}
    names = ("precision", "compile", "shard", "context", "remat")
    hardware = Hardware.named(cfg.device, **{name: cfg[name] for name in names})
    with joined(hardware.device):
        parts = instantiate(cfg.recipe)(hardware)
        settings = OmegaConf.to_container(cfg, resolve=True)
        tracker = tracking.start(folder, settings) if rank() == 0 else None
        trainer = Trainer(parts, optims=optims, plan=plan, folder=folder, tracker=tracker)
        # only now: what was refused left nothing behind
        if rank() == 0:
            (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        trainer.fit()


if __name__ == "__main__":
    main()
