"""The recipe of distillation: a frozen teacher, and a student and a critic that start as its copies."""

from collections.abc import Callable
from copy import deepcopy

from distill.conditioning import SmallWorld, StoredClips
from distill.objective import Objective, Outcome, Parts
from distill.rcm import Method, check_negative
from distill.recipes import Hardware
from distill.sla import Alignment
from turbodiffusion.attention import Attention
from turbodiffusion.checkpoints import load_network
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel

TRAINABLE = ("all", "proj_only", "no_proj")


def distillation(  # noqa: PLR0913 (a line of the config each)
    hardware: Hardware,
    *,
    teacher: str | None,
    start: str | None,
    objective: Method | Alignment,
    source: SmallWorld | StoredClips,
    outcome: Callable[..., Outcome],
    attention: Attention | None = None,
    trainable: str = "all",
) -> Parts:
    """Distil the teacher in a checkpoint; start is a student to go on from, None: the teacher itself.

    attention is the student's, None: what it carries; trainable: all of it, the projections of its linear
    attention alone ("proj_only"), or all else ("no_proj").
    """
    if teacher is None:
        raise UserError("teacher= is missing: the checkpoint that is to be distilled")
    if trainable not in TRAINABLE:
        raise UserError(f"trainable={trainable}: choose {', '.join(TRAINABLE)}")
    material = source.load(hardware.device, hardware.dtype, hardware.context)
    # before the teacher is read, which may take minutes
    check_negative(objective, material.negative)
    loaded = load_network(teacher, device=hardware.device, dtype=hardware.dtype)
    frozen = loaded.network.requires_grad_(False)
    student = deepcopy(frozen) if start is None else _load_student(start, frozen, hardware)
    if attention is not None:
        student.set_attention(dict(attention))
    choose_trained(student, trainable)
    # one after the other: a rank that shards them holds the teacher and one more whole
    _place(student, hardware)
    critic = deepcopy(frozen).requires_grad_(True) if objective.has_critic else None
    for network in filter(None, (critic, frozen)):
        _place(network, hardware)
    built: Objective = objective.build(student, frozen, critic, material.negative)
    judge = outcome(objective=built, material=material, teacher=loaded)
    return Parts(built, material.train, judge, hardware.context)


def choose_trained(student: WanModel, trainable: str) -> None:
    """Have a student train in what one of TRAINABLE says."""
    student.requires_grad_(trainable != "proj_only")
    for block in student.blocks:
        block.self_attn.core.requires_grad_(trainable != "no_proj")


def _place(network: WanModel, hardware: Hardware) -> None:
    hardware.prepare(network, WanModel.is_fp32, network.shard_units(), can_shard=True)


def _load_student(path: str, teacher: WanModel, hardware: Hardware) -> WanModel:
    student = load_network(path, device=hardware.device, dtype=hardware.dtype).network
    if student.config | {"attention": None} != teacher.config | {"attention": None}:
        raise UserError(f"start={path} has other sizes than its teacher: {student.config}, {teacher.config}")
    return student
