"""The recipe of distillation: a frozen teacher, and a student and a critic that start as its copies."""

from collections.abc import Callable
from copy import deepcopy
from typing import Protocol

import torch

from distill.conditioning import Material
from distill.objective import Parts
from distill.rcm import RCM, Method, check_negative
from distill.recipes import Hardware
from distill.students import Students
from turbodiffusion.checkpoints import load_network
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel


class Source(Protocol):
    """Where clips come from: `conditioning.SmallWorld` or `conditioning.StoredClips`."""

    def load(self, device: torch.device, dtype: torch.dtype) -> Material:
        """Everything on the device; raises UserError for what is missing."""
        ...


def distillation(
    hardware: Hardware,
    *,
    teacher: str | None,
    start: str | None,
    objective: Method,
    source: Source,
    outcome: Callable[..., Students],
) -> Parts:
    """Distil the teacher in a checkpoint; start is a student to go on from, None: the teacher itself."""
    if teacher is None:
        raise UserError("teacher= is missing: the checkpoint that is to be distilled")
    material = source.load(hardware.device, hardware.dtype)
    # before the teacher is read, which may take minutes
    check_negative(objective, material.negative)
    loaded = load_network(teacher, device=hardware.device, dtype=hardware.dtype)
    frozen = loaded.network.requires_grad_(False)
    student = deepcopy(frozen) if start is None else _load_student(start, frozen, hardware)
    critic = None if objective.matching is None else deepcopy(frozen)
    for network in filter(None, (student, critic)):
        network.requires_grad_(True)
    for network in filter(None, (frozen, student, critic)):
        hardware.prepare(network, WanModel.is_fp32, network.shard_units(), can_shard=True)
    rcm = RCM(objective, student, frozen, critic, material.negative)
    return Parts(rcm, material.train, outcome(objective=rcm, material=material, teacher=loaded))


def _load_student(path: str, teacher: WanModel, hardware: Hardware) -> WanModel:
    student = load_network(path, device=hardware.device, dtype=hardware.dtype).network
    if student.config != teacher.config:
        raise UserError(f"start={path} has other sizes than its teacher: {student.config}, {teacher.config}")
    return student
