"""Compares `torch_reference.py` with the recorded numbers of the published code: `python bench/check_torch_reference.py`.

On every tiny checkpoint under `tests/golden/` it compares logits with and without padding, the tokens of each sampler
case after every step, losses, weights and gradients, with both values of `head_rows`. It also checks that attention is
bidirectional and fused, and that the base of the rotary embedding has an effect. It prints a table, and its exit status is
1 if anything differs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch_reference as reference
import tyro
from rich.console import Console
from rich.table import Table

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "tests" / "golden"
WEIGHTS: dict[str, reference.WeightFn] = {
    "original": reference.inverse_time_weight,
    "linear": reference.linear_weight,
    "uniform": reference.uniform_weight,
    "cart:0.1": functools.partial(reference.cart_weight, p=0.1),
    "cart:0.3": functools.partial(reference.cart_weight, p=0.3),
    "cart:0.8": functools.partial(reference.cart_weight, p=0.8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table: the largest difference that was found, and the largest that is allowed."""

    name: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; a NaN is not allowed."""
        return self.difference <= self.allowed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchReferenceCheckSettings:
    """The golden checkpoints to compare with."""

    golden: pathlib.Path = GOLDEN
    """Folder of golden checkpoints."""


def _largest(actual: torch.Tensor, expected: np.ndarray) -> float:
    return (actual.detach() - torch.from_numpy(expected)).abs().max().item()


def check_model(model: Any, fields: dict[str, Any], arrays: Any) -> Iterator[Check]:
    """Checks the logits, that attention is bidirectional, the fused kernel and the rotary base."""
    tokens = torch.from_numpy(arrays["fwd_tokens"])
    with torch.inference_mode():
        plain = reference.logits(model, tokens)
        yield Check(name="logits", difference=_largest(plain, arrays["fwd_logits"]), allowed=1e-5)
        mask = torch.from_numpy(arrays["pad_mask"])
        positions = reference.positions_from_mask(mask)
        expected = torch.from_numpy(arrays["pad_positions"])
        yield Check(name="padded positions", difference=(positions != expected).sum().item(), allowed=0)
        padded = reference.logits(model, torch.from_numpy(arrays["pad_tokens"]), mask, positions)
        valid = mask.bool()
        yield Check(
            name="padded logits (valid tokens)",
            difference=_largest(padded[valid], arrays["pad_logits"][valid.numpy()]),
            allowed=1e-5,
        )
        changed = tokens.clone()
        changed[:, -1] = (changed[:, -1] + 1) % fields["vocab_size"]
        moved = (reference.logits(model, changed) - plain)[:, :-1].abs().amax(dim=-1).min().item()
        yield Check(name="blind to a later token", difference=float(moved < 1e-6), allowed=0)
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.FLASH_ATTENTION]):
            fused = reference.logits(model, tokens)  # raises if the fused kernel does not support these inputs
        yield Check(name="fused attention only", difference=(fused - plain).abs().max().item(), allowed=0)
        other = reference.build_model({**fields, "rope_theta": 123.0})
        other.load_state_dict(model.state_dict())
        unmoved = (reference.logits(other, tokens) - plain).abs().max().item() < 1e-4
        yield Check(name="rope_theta ignored", difference=float(unmoved), allowed=0)


def check_sampler(model: Any, fields: dict[str, Any], arrays: Any, cases: list[dict[str, Any]]) -> Iterator[Check]:
    """Checks the tokens and the canvas after every step of each deterministic case, and that random cases run."""
    known = {field.name for field in dataclasses.fields(reference.SamplerSettings)}
    for head_rows in ("all", "masked"):
        wrong = 0
        for case in cases:
            history: list[torch.Tensor] = []
            tokens = reference.diffusion_generate(
                model,
                torch.from_numpy(arrays[f"{case['id']}_prompt"]),
                reference.SamplerSettings(**{key: value for key, value in case.items() if key in known}),
                mask_token_id=fields["mask_token_id"],
                prompt_mask_BP=torch.from_numpy(arrays[f"{case['id']}_mask"]),
                head_rows=head_rows,
                history=history,
            )
            wrong += (tokens.numpy() != arrays[f"{case['id']}_sequences"]).sum()
            wrong += (torch.stack(history).numpy() != arrays[f"{case['id']}_history"]).sum()
        yield Check(name=f"wrong tokens in {len(cases)} sampler cases, {head_rows} rows", difference=wrong, allowed=0)
        # Random draws have no golden numbers (their filters have, above), so here each branch only has to run.
        torch.manual_seed(0)
        prompt = torch.from_numpy(arrays["s0_prompt"])
        left = changed = 0
        for alg in ("origin", "maskgit_plus", "topk_margin", "entropy"):
            random = reference.SamplerSettings(
                max_new_tokens=16, steps=8, alg=alg, temperature=0.7, top_p=0.95, top_k=50, alg_temp=0.5
            )
            tokens = reference.diffusion_generate(
                model, prompt, random, mask_token_id=fields["mask_token_id"], head_rows=head_rows
            )
            # A random draw may be the mask token itself; at the last step nothing replaces it, as in the published code.
            left += int((tokens[:, prompt.shape[1] :] == fields["mask_token_id"]).sum() > 4)
            changed += int((tokens[:, : prompt.shape[1]] != prompt).sum())
        yield Check(name=f"random runs left masked, {head_rows} rows", difference=left, allowed=0)
        yield Check(name=f"prompt tokens changed, {head_rows} rows", difference=changed, allowed=0)


def check_loss(model: Any, fields: dict[str, Any], arrays: Any, losses: dict[str, Any]) -> Iterator[Check]:
    """Checks the CART weights, and relative differences of losses, gradient norms and the recorded gradients."""
    tokens, masked = torch.from_numpy(arrays["loss_tokens"]), torch.from_numpy(arrays["loss_masked"])
    t = torch.from_numpy(arrays["loss_t"])
    for p in ("0.1", "0.3", "0.8"):
        weight = WEIGHTS[f"cart:{p}"](masked, t).masked_fill(~masked, 0)
        yield Check(
            name=f"CART weights {p}",
            difference=_largest(weight, arrays[f"loss_weight_cart_{p}"]),
            allowed=1e-6,
        )
    for head_rows in ("all", "masked"):
        for name, golden in losses.items():
            model.zero_grad()
            loss = reference.masked_diffusion_loss(
                model,
                tokens,
                masked,
                t,
                mask_token_id=fields["mask_token_id"],
                weight=WEIGHTS[name],
                head_rows=head_rows,
            )
            loss.backward()
            norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item()
            label = f"{name}, {head_rows} rows"
            off = abs(loss.item() / golden["loss"] - 1)
            yield Check(name=f"loss {label} (relative)", difference=off, allowed=1e-5)
            off = abs(norm / golden["grad_norm"] - 1)
            yield Check(name=f"gradient norm {label} (relative)", difference=off, allowed=1e-4)
            prefix = f"grad_{name.replace(':', '_')}_"
            if prefix + "embed" in arrays:
                inner = model.model
                gradients = {
                    "embed": inner.embed_tokens.weight.grad,
                    "q0_bias": inner.layers[0].self_attn.q_proj.bias.grad,
                    "down_last": inner.layers[-1].mlp.down_proj.weight.grad,
                    "norm": inner.norm.weight.grad,
                }
                off = max(
                    _largest(g, arrays[prefix + k]) / np.abs(arrays[prefix + k]).max() for k, g in gradients.items()
                )
                yield Check(name=f"gradients {label} (relative)", difference=off, allowed=1e-4)


def main(settings: TorchReferenceCheckSettings) -> int:
    """Runs all checks on each checkpoint and returns the exit status."""
    folders = sorted(path.parent for path in settings.golden.glob("*/golden.json"))
    if not folders:
        raise FileNotFoundError(f"no */golden.json under {settings.golden}")
    table = Table("checkpoint", "what", "largest\ndifference", "allowed", "")
    failed = 0
    for folder in folders:
        golden = json.loads((folder / "golden.json").read_text())
        arrays = np.load(folder / "golden.npz")
        fields = json.loads((folder / "hf" / "config.json").read_text())
        model = reference.load_model(folder / "hf")
        for check in (
            *check_model(model, fields, arrays),
            *check_sampler(model, fields, arrays, golden["sample_cases"]),
            *check_loss(model, fields, arrays, golden["losses"]),
        ):
            failed += not check.passed
            verdict = "[green]ok[/]" if check.passed else "[red]FAILED[/]"
            table.add_row(folder.name, check.name, f"{check.difference:.2g}", f"{check.allowed:g}", verdict)
    console = Console()
    console.print(table)
    console.print(f"{failed} of {table.row_count} checks failed" if failed else f"all {table.row_count} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(TorchReferenceCheckSettings, description=__doc__)))
