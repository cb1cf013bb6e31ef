"""Chooses the rematerialisation policy of a run with `--remat auto`: the fastest one with which a step fits.

Arithmetic (`step_memory`) orders the policies by time, and estimates the memory that a step needs with each. Where the step
can be compiled, the size that the compiler reports decides. All policies compute the same numbers up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import get_args

import jax
from jax.sharding import Mesh

from dream_jax import distributed, sharding
from dream_jax.chips import Chip, chip_of
from dream_jax.device_memory import Shortage, memory_of_device, share_in_force
from dream_jax.remat import Remat
from dream_jax.step_memory import (
    AbstractStep,
    StepShape,
    bytes_on_device,
    compile_step,
    peak_bytes,
    recomputed_share,
    remat_flops,
)
from dream_jax.trainer.build import Build, build_step, describe_model, step_shape, with_shapes
from dream_jax.trainer.settings import TrainSettings

ARITHMETIC_SHARE = 0.9
"""The share of the memory into which a step must fit if its size is an estimate by arithmetic, which can be too low."""
COMPILED_SHARE = 0.98
"""The share of the memory into which a step must fit if the compiler says its size. The rest is for fragmentation."""
# An estimate can also be too high, so a policy is compiled if its estimate is at most this share of the memory.
_TRIED_SHARE = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class RematChoice:
    """The policy that was chosen, and the reason.

    Attributes:
      taken: the chosen policy.
      peak: bytes that a step with this policy needs on a device, by the compiler or by arithmetic.
      fits: whether the step fits into the memory of a device.
      reason: one line of text with the policy, the reason, the memory and the repeated share of the forward pass.
    """

    taken: Remat
    peak: int
    fits: bool
    reason: str


def choose(
    step: AbstractStep,
    shape: StepShape,
    *,
    platform: str,
    chip: Chip | None,
    limit: int | None,
    compiled: Callable[[Remat], int | None] | None = None,
    begun: Remat | None = None,
) -> RematChoice:
    """Returns the fastest policy, according to `seconds`, with which the step fits into the memory.

    `offload` is only chosen if no other policy fits. If no policy fits, the choice is `full`. If the memory is not known,
    the choice is `none`.

    Args:
      step: the step; the policy with which it was made is not used.
      shape: the sizes of the step; its policy is not used.
      platform: the name of the platform of the devices in jax: "cpu", "gpu" or "tpu".
      chip: the kind of the devices; None if the table of chips does not have it, as for a CPU.
      limit: bytes that a program can have on a device; None if the number is not known.
      compiled: function that compiles the step with a policy, and returns the bytes that the step needs on a device, or
        None if the compiler found too little memory. Without this function nothing is compiled.
      begun: the policy with which a resumed run began; it is kept if it fits. None for a new run.
    """

    def needed(remat: Remat) -> int:
        found = bytes_on_device(step, dataclasses.replace(shape, remat=remat), platform)
        return found.given + found.working

    def said(remat: Remat, peak: int, how: str, why: str) -> str:
        share = recomputed_share(step, dataclasses.replace(shape, remat=remat), platform)
        again = (
            "no product is computed twice"
            if not share
            else f"{share:.0%} of the forward pass of the layers is repeated"
        )
        size = f"{_gib(peak)} GiB" if limit is None else f"{_gib(peak)} of {_gib(limit)} GiB"
        return f"remat auto: {remat}, {why}; {size} on a device {how}, {again}"

    if limit is None:
        # An accelerator has less memory than the machine of a CPU, so the policy that needs the least is taken there.
        taken: Remat = begun or ("none" if platform == "cpu" else "full")
        peak = needed(taken)
        why = "because the memory of this device is not known"
        return RematChoice(taken=taken, peak=peak, fits=True, reason=said(taken, peak, "by arithmetic", why))
    if begun is not None and (peak := needed(begun)) <= (limit if compiled is None else _TRIED_SHARE * limit):
        how, share = "by arithmetic", 1.0
        if compiled is not None:
            size = compiled(begun)
            peak, how, share = (limit + 1 if size is None else size), "as compiled", COMPILED_SHARE
        if peak <= share * limit:
            why = "as at the beginning of the run"
            return RematChoice(taken=begun, peak=peak, fits=True, reason=said(begun, peak, how, why))
    order = sorted(
        (remat for remat in get_args(Remat) if remat != "offload"),
        key=lambda one: seconds(step, shape, one, platform, chip),
    )
    refused: dict[Remat, str] = {}
    # The memory of a CPU is that of the host, so nothing can be moved out of it.
    candidates: list[Remat] = order if platform == "cpu" else [*order, "offload"]
    for remat in candidates:
        peak, how, share = needed(remat), "by arithmetic", ARITHMETIC_SHARE
        if refused and peak >= min(map(needed, refused)):
            continue  # a policy that does not fit needs no more memory than this one, which is also slower
        over = f"{_gib(peak)} GiB"
        if compiled is not None and peak <= _TRIED_SHARE * limit:
            how, share = "as compiled", COMPILED_SHARE
            size = compiled(remat)
            over = "more than there is" if size is None else f"{_gib(size)} GiB"
            peak = limit + 1 if size is None else size
        if peak <= share * limit:
            first, would = next(iter(refused.items()), ("", ""))
            why = f"the fastest that fits ({first} would need {would})" if refused else "the fastest"
            return RematChoice(taken=remat, peak=peak, fits=True, reason=said(remat, peak, how, why))
        refused[remat] = over
    peak = needed("full")
    last, would = list(refused.items())[-1]
    why = f"although no policy fits ({last} would need {would})"
    return RematChoice(taken="full", peak=peak, fits=False, reason=said("full", peak, "by arithmetic", why))


def choose_for_run(
    settings: TrainSettings, mesh: Mesh, max_length: int, begun: Remat | None, most_texts: int | None = None
) -> tuple[Build, RematChoice]:
    """Returns the step of a run with the chosen policy, and the choice. All processes of the run must call this.

    On accelerators the step is compiled; the run does not compile it again. On a CPU arithmetic alone decides.

    Args:
      settings: the settings of the run, whose `remat` is "auto".
      mesh: the mesh of the run.
      max_length: length of the rows in tokens.
      begun: the policy with which a resumed run began; None for a new run.
      most_texts: `Batches.most_texts` of the run; None if each row is one text.

    Raises:
      ValueError, FileNotFoundError, ConnectionError: as for `build.build_step` and `build.describe_model`.
    """

    @functools.cache
    def built(remat: Remat) -> Build:
        chosen = settings.replaced(remat=remat)
        return build_step(chosen, describe_model(chosen, mesh), mesh)

    def compiled(remat: Remat) -> int | None:
        found = compile_step(with_shapes(settings, built(remat), mesh, max_length, most_texts))
        peak = None if isinstance(found, Shortage) else peak_bytes(found)
        # The policy must be the same in all processes, so the largest size counts.
        return None if distributed.which_say(peak is None) or peak is None else -distributed.smallest(-peak)

    platform = sharding.platform_of(mesh)
    limit = memory_of_device([device for device in mesh.devices.flat if device.process_index == jax.process_index()])
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if limit is None and chip is not None:  # some allocators of jax do not tell it
        limit = int(min(1.0, share_in_force().share) * chip.memory) if chip.platform == "gpu" else chip.memory
    choice = choose(
        with_shapes(settings, built("none"), mesh, max_length, most_texts),
        step_shape(settings, mesh, max_length),
        platform=platform,
        chip=chip,
        limit=None if limit is None else distributed.smallest(limit),
        compiled=None if platform == "cpu" else compiled,
        begun=begun,
    )
    return built(choice.taken), choice


def seconds(step: AbstractStep, shape: StepShape, remat: Remat, platform: str, chip: Chip | None) -> float:
    """Returns the seconds that a policy costs in a step at the peak rates of the chip.

    This is the time of the repeated operations. Keeping the result of a product costs no time, because a repeated product
    would also write it to the memory. But "none" also keeps values that other policies never write to the memory, so the
    time to write and read these values is added. If `chip` is None, the result is the number of repeated operations
    instead, which is enough to order the policies.
    """
    repeated = remat_flops(step, dataclasses.replace(shape, remat=remat), platform)
    if chip is None:
        return repeated
    kept, products = (
        bytes_on_device(step, dataclasses.replace(shape, remat=one), platform).kept for one in (remat, "products")
    )
    more = shape.accumulation * max(0, kept - products)
    return repeated / (math.prod(shape.mesh.values()) * chip.peak_flops) + 2 * more / chip.memory_bandwidth


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
