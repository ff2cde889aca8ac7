"""A checkpoint's sampling defaults -> its sampler and the times."""

from dataclasses import replace

from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.samplers.ode import sample_dpmpp, sample_euler, sample_unipc
from turbodiffusion.samplers.time import dpmpp_times, shifted_times, student_times, unipc_times
from turbodiffusion.variants import Sampling

TEACHERS = {"unipc": sample_unipc, "euler": sample_euler, "dpmpp": sample_dpmpp}
STUDENT = "rcm"
# where students start unless their checkpoint says otherwise: from text, from a picture
SIGMA_MAX = {"t2v": 80.0, "i2v": 200.0}


def choose_sampler(sampling: Sampling, name: str, task: str) -> Sampling:
    """The defaults with another sampler; rcm makes a student of a checkpoint that does not say it is one."""
    if name in ("auto", sampling.sampler):
        return sampling
    if name == STUDENT:
        return sampling.as_student(SIGMA_MAX["t2v" if task == "t2v" else "i2v"])
    if name not in TEACHERS:
        raise UserError(f"sampler={name} is not one of auto, {', '.join(TEACHERS)}, {STUDENT}.")
    return replace(sampling, sampler=name)


def sampling_times(sampling: Sampling) -> Tensor:
    """Rectified-flow times s (steps + 1,), fp64, down to 0."""
    if sampling.student:
        if sampling.sigma_max is None:
            raise UserError(f"sampler={STUDENT} needs sigma_max=, such as {SIGMA_MAX['t2v']:g}.")
        return student_times(sampling.steps, sampling.sigma_max)
    if sampling.sampler == "euler":
        return shifted_times(sampling.steps, sampling.shift, sigma_max=sampling.sigma_max)
    if sampling.sampler not in TEACHERS:
        raise UserError(f"the checkpoint wants the sampler {sampling.sampler!r}, which is unknown here.")
    return (dpmpp_times if sampling.sampler == "dpmpp" else unipc_times)(sampling.steps, sampling.shift)
