"""Generate videos from text and images.

python infer.py prompt="an octopus drifts left across a teal background"
python infer.py ckpt=wan2.1_t2v_1.3b.safetensors prompt="..." size=480p seed=1 out=clip.mp4
python infer.py evaluation=tiny out=RUN
torchrun --nproc-per-node=2 infer.py parallel=cp prompt="..."

Every option, with its meaning, is a line of configs/infer.yaml.
"""

from dataclasses import fields

from omegaconf import DictConfig

from turbodiffusion.cli import entry_point
from turbodiffusion.pipelines.options import Options, read


@entry_point("infer", free_text=[field.name for field in fields(Options) if field.type in (str, str | None)])
def main(cfg: DictConfig) -> None:
    """Read the options, then generate, and score if asked to."""
    options = read(cfg)
    # imported here: a wrong option, and Ctrl-C while torch loads, are answered at once
    from turbodiffusion.pipelines.together import check_parallel

    check_parallel(options)
    if options.evaluation is None:
        from turbodiffusion.pipelines.command import generate as task
    else:
        from evaluation.generated import generate_and_score as task

    task(options)


if __name__ == "__main__":
    main()
