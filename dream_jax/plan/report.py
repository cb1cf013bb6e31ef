"""Renders a plan as text for the terminal."""

from __future__ import annotations

from dream_jax.plan.settings import MemoryPlan, RunPlan

# A plan that needs more than this share of the memory is called tight, because runtimes differ by about 3 %.
_TIGHT = 0.97


def render(plan: RunPlan) -> str:
    """Returns the plan as text; its last lines say whether the step fits."""
    return "\n".join(
        [*_run(plan), "", *_memory(plan), "", *_work(plan), "", *_rollout(plan), *_cost(plan), "", *_verdict(plan)]
    )


def _run(plan: RunPlan) -> list[str]:
    settings, rows = plan.settings, plan.rows
    how = "arithmetic only" if plan.compile_seconds is None else f"compiled in {plan.compile_seconds:.0f} s"
    lines = [
        f"plan for {plan.hardware}: {plan.devices} devices, mesh {settings['mesh']}, {how} "
        f"({', '.join(f'{name} {version}' for name, version in plan.versions.items())})",
        f"model {settings['model']}: {plan.trained:,} parameters trained"
        + (f", {plan.frozen:,} frozen (base {settings['base']})" if plan.frozen else ""),
        f"batch {settings['batch_size']} x {rows.max_length} tokens, accumulation {settings['accumulation']}, remat "
        f"{settings['remat']}, {settings['optimizer']} with {settings['moments']} moments, {settings['steps']} steps",
    ]
    if plan.remat is not None:
        lines.append(plan.remat)
    if rows.rows is not None:
        lines.append(
            f"data {settings['data']}: {rows.rows:,} rows of {rows.mean_length:.0f} tokens on average, "
            f"{rows.masked_share:.0%} of all positions masked, {rows.epochs:.2f} epochs"
        )
    else:
        lines.append(f"data not read: {rows.masked_share:.0%} of all positions are assumed to be masked")
    return lines


def _memory(plan: RunPlan) -> list[str]:
    memory = plan.memory
    parts = [
        ("parameters", memory.parameters),
        ("optimizer", memory.optimizer),
        ("batch", memory.batch),
        ("working, at the worst moment", memory.working),
        ("peak", memory.peak),
        ("a program can have", memory.limit),
    ]
    lines = ["memory of a device, GiB", *(f"  {name:<30}{gib(size):>8}" for name, size in parts)]
    if memory.share is not None:
        lines.append(f"  that is {memory.share}")
    lines.append(f"  working is {_source(memory)}; by arithmetic the parts are")
    arithmetic = [
        ("gradients", memory.gradients),
        ("kept for the backward pass", memory.kept),
        ("one layer at work", memory.layer),
        ("the loss at work", memory.loss),
        ("peak by arithmetic", memory.estimate),
    ]
    lines += [f"    {name:<28}{gib(size):>8}" for name, size in arithmetic]
    if memory.host:
        lines.append(f"  {'in the memory of the host':<30}{gib(memory.host):>8}")
    return lines


def _source(memory: MemoryPlan) -> str:
    if memory.compiled:
        return "the compiler's"
    return "an estimate" if memory.refused is None else "at least this, the compiler gave up"


def _work(plan: RunPlan) -> list[str]:
    time = plan.time
    lines = [
        "one step, all devices together",
        f"  {time.model_flops:.3g} FLOP for the model (6 a weight and token, attention in full)"
        + (f", {time.remat_flops:.3g} more to recompute" if time.remat_flops else ""),
        "one step, each device",
    ]
    for one in plan.collectives:
        lines.append(f"  {one.kind:<20}{one.count:>7,} x, {gib(one.sent)} GiB sent")
    if not plan.collectives:
        lines.append("  no collectives")
    return lines


def _rollout(plan: RunPlan) -> list[str]:
    """Returns lines about the sampling of answers, and an empty line after them; nothing without sampling."""
    rollout = plan.rollout
    if rollout is None:
        return []
    updates = plan.settings["updates"]
    return [
        f"a step is one rollout and {updates} update(s); all numbers above and the seconds below are those of one update",
        f"  the rollout: {rollout.answers} answers, {rollout.passes} forward passes each, {rollout.flops:.3g} FLOP, "
        f"{rollout.fast:.2f} to {rollout.slow:.2f} s",
        f"  share of the time in rollouts: {min(rollout.share):.0%} to {max(rollout.share):.0%}, besides that of rewards",
        f"  memory while sampling, by arithmetic: {gib(rollout.peak)} GiB, of which {gib(rollout.working)} besides weights "
        "and optimizer",
        "",
    ]


def _cost(plan: RunPlan) -> list[str]:
    time, price = plan.time, plan.price
    low, high = plan.time.compute
    lines = [
        f"seconds of a step: {time.fast:.2f} if everything overlaps, {time.slow:.2f} if nothing does",
        f"  arithmetic {high:.2f} to {low:.2f}, device memory at least {time.memory_traffic:.2f}, network "
        f"{time.network[1]:.2f} to {time.network[0]:.2f}",
        *([f"  copies to and from the host {time.host[1]:.2f} to {time.host[0]:.2f}"] if time.host[0] else []),
        f"  MFU {time.mfu[0]:.0%} to {time.mfu[1]:.0%} of the dense bfloat16 peak",
        f"hours of {plan.settings['steps']} steps: {price.hours[0]:.2f} to {price.hours[1]:.2f}, besides compiling, saving "
        "and evaluating",
    ]
    if price.usd is None or price.rmb is None:
        lines.append("price: no list price is known; pass --price-per-chip-hour")
    else:
        lines.append(
            f"price at {price.usd_per_chip_hour:.2f} USD a chip and hour, {price.chips} chips: {price.rmb[0]:.2f} to "
            f"{price.rmb[1]:.2f} RMB, {price.usd[0]:.2f} to {price.usd[1]:.2f} USD"
        )
    return lines


def _verdict(plan: RunPlan) -> list[str]:
    memory = plan.memory
    notes = [f"  {line}" for line in plan.advice]
    if memory.fits and not plan.fits:
        assert plan.rollout is not None
        return [
            f"NO: sampling needs {gib(plan.rollout.peak)} GiB of {gib(memory.limit)}",
            "what would help:",
            "  a smaller --rollout-rows",
            *notes,
        ]
    if memory.fits:
        tight = memory.peak > _TIGHT * memory.limit
        spare = f"YES: it fits, with {gib(memory.limit - memory.peak)} GiB to spare"
        return [spare + (", which is tight: runtimes differ by as much" if tight else ""), *notes]
    reason = f"NO: a device needs {'at least ' if memory.refused else ''}{gib(memory.peak)} GiB of {gib(memory.limit)}"
    said = [] if memory.refused is None else [f"  the compiler: {memory.refused}"]
    return [reason, *said, "what would help:", *notes]


def gib(size: float) -> str:
    """Returns bytes as a number of GiB, with two decimals."""
    return f"{size / 2**30:.2f}"
