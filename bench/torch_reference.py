"""Implements the published model, sampler and loss of Dream in PyTorch, for comparisons with dream_jax.

The transformer is the Qwen2 of `transformers` without its causal mask. What Dream adds to it (the right shift,
`diffusion_generate`, the weighted loss) is written here from its description, in efficient eager PyTorch: inference mode,
fused attention, fused AdamW, filters on masked rows only. `check_torch_reference.py` compares it with numbers of the
published code.

It uses neither jax nor `dream_jax`; the two sides share only a Hugging Face directory. The argument `head_rows` says where
logits are computed: "all" at every position, as in the published code; "masked" at masked positions only, which is a simple
improvement.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

HeadRows = Literal["all", "masked"]
WeightFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Fields that determine what the weights compute. They are read key by key, so that no default of a library replaces one.
_COPIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "pad_token_id",
)


# ------------------------------------------------------------------------------------------------------ model


def qwen2_config(fields: Mapping[str, Any]) -> Qwen2Config:
    """Returns the Qwen2 configuration for a published Dream `config.json`. Raises KeyError for a missing field."""
    return Qwen2Config(
        **{name: fields[name] for name in _COPIED_FIELDS},
        hidden_act="silu",
        attention_dropout=0.0,
        use_sliding_window=False,
        use_cache=False,
        # transformers 5 reads the base from here only; with a top-level rope_theta it would silently use 10,000.
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["rope_theta"])},
    )


def build_model(
    fields: Mapping[str, Any], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Qwen2ForCausalLM:
    """Returns a bidirectional Qwen2 with the initial weights of transformers and SDPA attention.

    The weights are made on the device: on a CPU the initial weights of a 7B model would take minutes.

    Args:
      fields: the published `config.json`.
      device: where the model is.
      dtype: the dtype of the weights, and of the computation unless autocast is on.

    Raises:
      RuntimeError: this release of transformers ignores `rope_theta`.
    """
    config = qwen2_config(fields)
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    head_dim = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    found = model.model.rotary_emb.inv_freq.float().cpu()
    # A GPU computes powers with a few more roundings than a CPU; a wrong base would be off by far more.
    if not torch.allclose(found, 1.0 / fields["rope_theta"] ** exponents, rtol=1e-5):
        raise RuntimeError(f"transformers ignored rope_theta={fields['rope_theta']!r}; adapt qwen2_config to it")
    return model


def random_model(fields: Mapping[str, Any], *, seed: int) -> Qwen2ForCausalLM:
    """Returns a model whose weights, biases and norm scales are all random, so that a comparison depends on each.

    Matrices are multiplied by 2: with the standard deviation 0.02 of transformers, the confidences of masked positions are
    equal up to rounding, and the order in which a sampler writes them is random.
    """
    torch.manual_seed(seed)
    model = build_model(fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif "norm" in name:
                parameter.normal_(1.0, 0.1)
            else:
                parameter.mul_(2.0)
    return model


def load_model(directory: str | pathlib.Path) -> Qwen2ForCausalLM:
    """Returns the model of a directory with `config.json` and safetensors, whose tensor names must match exactly."""
    directory = pathlib.Path(directory)
    model = build_model(json.loads((directory / "config.json").read_text()))
    state = {}
    for path in sorted(directory.glob("*.safetensors")):
        state.update(safetensors.torch.load_file(path))
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def save_model(model: Qwen2ForCausalLM, fields: Mapping[str, Any], directory: str | pathlib.Path) -> None:
    """Writes `config.json` with the given fields, and `model.safetensors` with the published tensor names."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    safetensors.torch.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(fields), indent=2))


def hidden_states(
    model: Qwen2ForCausalLM,
    tokens_BT: torch.Tensor,
    attention_mask_BS: torch.Tensor | None = None,
    positions_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the hidden states [B, T, D] after the final norm, not shifted. Attention is faster without a mask."""
    mask = None
    if attention_mask_BS is not None:
        batch, length = tokens_BT.shape
        mask = attention_mask_BS.bool()[:, None, None, :].expand(batch, 1, length, length)
    # If the mask is a mapping, Qwen2Model does not make its causal mask.
    outputs = model.model(
        input_ids=tokens_BT,
        attention_mask={"full_attention": mask},
        position_ids=positions_BT,
        use_cache=False,
    )
    return outputs.last_hidden_state


def logits(
    model: Qwen2ForCausalLM,
    tokens_BT: torch.Tensor,
    attention_mask_BS: torch.Tensor | None = None,
    positions_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the logits [B, T, V] at every position, not shifted."""
    return model.lm_head(hidden_states(model, tokens_BT, attention_mask_BS, positions_BT))


def positions_from_mask(attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """Returns positions [B, T] that count valid tokens from 0; padding gets 1, as in the published code."""
    positions = attention_mask_BT.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask_BT == 0, 1)


def shift_right(values_BTX: torch.Tensor) -> torch.Tensor:
    """Moves position i - 1 to i, because Dream predicts token i at position i - 1. Position 0 is duplicated."""
    return torch.cat([values_BTX[:, :1], values_BTX[:, :-1]], dim=1)


def _masked_row_logits(
    model: Qwen2ForCausalLM,
    noisy_BT: torch.Tensor,
    masked_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor | None,
    positions_BT: torch.Tensor | None,
    head_rows: HeadRows,
) -> torch.Tensor:
    """Returns the shifted logits [rows, V] of the masked positions, in row-major order."""
    hidden_BTD = hidden_states(model, noisy_BT, attention_mask_BT, positions_BT)
    if head_rows == "all":
        return shift_right(model.lm_head(hidden_BTD))[masked_BT]
    return model.lm_head(shift_right(hidden_BTD)[masked_BT])


# ---------------------------------------------------------------------------------------------------- sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """The published generation config, with its names and defaults."""

    max_new_tokens: int
    steps: int = 512
    alg: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = "origin"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    eps: float = 1e-3


def _filter_top_p(logits_RV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keeps the most probable tokens up to and including the one at which their sum exceeds `top_p`."""
    sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=True)
    drop_RV = sorted_RV.softmax(dim=-1).cumsum(dim=-1) > top_p
    drop_RV = F.pad(drop_RV[:, :-1], (1, 0), value=False)
    drop_RV = torch.empty_like(drop_RV).scatter_(-1, order_RV, drop_RV)
    return logits_RV.masked_fill(drop_RV, torch.finfo(logits_RV.dtype).min)


def _filter_top_k(logits_RV: torch.Tensor, top_k: int) -> torch.Tensor:
    """Keeps every token that is at least as probable as the k-th."""
    kth_R1 = logits_RV.topk(min(top_k, logits_RV.shape[-1]), dim=-1).values[:, -1:]
    return logits_RV.masked_fill(logits_RV < kth_R1, torch.finfo(logits_RV.dtype).min)


def _choose_tokens(logits_RV: torch.Tensor, settings: SamplerSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a token and its confidence for each row, both [rows], from the filtered distribution."""
    if settings.temperature > 0:
        logits_RV = logits_RV / settings.temperature
    if settings.top_p is not None and settings.top_p < 1:
        logits_RV = _filter_top_p(logits_RV, settings.top_p)
    if settings.top_k is not None:
        logits_RV = _filter_top_k(logits_RV, settings.top_k)
    probs_RV = logits_RV.softmax(dim=-1)
    if settings.temperature > 0:
        tokens_R1 = torch.multinomial(probs_RV, 1)
        confidence_R1 = probs_RV.gather(-1, tokens_R1)
    else:
        confidence_R1, tokens_R1 = probs_RV.max(dim=-1, keepdim=True)
    if settings.alg == "topk_margin":
        best_R2 = probs_RV.topk(2, dim=-1).values
        return tokens_R1[:, 0], best_R2[:, 0] - best_R2[:, 1]
    if settings.alg == "entropy":
        return tokens_R1[:, 0], (probs_RV * torch.log(probs_RV + 1e-10)).sum(dim=-1)
    return tokens_R1[:, 0], confidence_R1[:, 0]


@torch.inference_mode()
def diffusion_generate(
    model: Qwen2ForCausalLM,
    prompt_BP: torch.Tensor,
    settings: SamplerSettings,
    *,
    mask_token_id: int,
    prompt_mask_BP: torch.Tensor | None = None,
    head_rows: HeadRows = "all",
    history: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Runs the published sampler: each step is a forward pass, after which the most confident masked positions are written.

    As published, the number of positions that are written in a row comes from the mean number of masked positions per row.

    Args:
      model: a model from `load_model` or `random_model`.
      prompt_BP: token ids [B, P], padded on the left if rows differ in length.
      settings: the generation config.
      mask_token_id: the token id of a masked position.
      prompt_mask_BP: 1 at valid tokens, 0 at padding; None if there is no padding.
      head_rows: "all" or "masked", where logits are computed.
      history: a list to which the canvas after each step is appended, or None.

    Returns:
      Token ids [B, P + max_new_tokens].
    """
    canvas_BT = F.pad(prompt_BP, (0, settings.max_new_tokens), value=mask_token_id)
    attention_mask_BT = positions_BT = None
    if prompt_mask_BP is not None and not prompt_mask_BP.bool().all():
        attention_mask_BT = F.pad(prompt_mask_BP, (0, settings.max_new_tokens), value=1)
        positions_BT = positions_from_mask(attention_mask_BT)
    times = torch.linspace(1, settings.eps, settings.steps + 1)
    for step in range(settings.steps):
        masked_BT = canvas_BT == mask_token_id
        logits_RV = _masked_row_logits(model, canvas_BT, masked_BT, attention_mask_BT, positions_BT, head_rows)
        is_last = step == settings.steps - 1
        share = 1.0 if is_last else 1 - times[step + 1] / times[step]
        if settings.alg == "origin":
            written_R = torch.rand(logits_RV.shape[0], device=canvas_BT.device) < share
            proposal_R = torch.full_like(written_R, mask_token_id, dtype=canvas_BT.dtype)
            proposal_R[written_R] = _choose_tokens(logits_RV[written_R], settings)[0]
            canvas_BT[masked_BT] = proposal_R
        else:
            tokens_R, confidence_R = _choose_tokens(logits_RV, settings)
            mean_masked = masked_BT.sum() / masked_BT.shape[0]
            count = int(mean_masked if is_last else mean_masked * share)
            if count > 0:
                confidence_BT = torch.full(
                    canvas_BT.shape, -torch.inf, dtype=confidence_R.dtype, device=canvas_BT.device
                )
                confidence_BT[masked_BT] = confidence_R
                if settings.alg_temp:
                    chances_BT = (confidence_BT / settings.alg_temp).softmax(dim=-1)
                    chosen_BN = torch.multinomial(chances_BT, count)
                else:
                    chosen_BN = confidence_BT.topk(count, dim=-1).indices
                proposal_BT = torch.full_like(canvas_BT, mask_token_id)
                proposal_BT[masked_BT] = tokens_R
                canvas_BT.scatter_(1, chosen_BN, proposal_BT.gather(1, chosen_BN))
        if history is not None:
            history.append(canvas_BT.clone())
    return canvas_BT


# --------------------------------------------------------------------------------------------------- training


def inverse_time_weight(masked_BT: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """Returns the weight "original", 1 / t at every position [B, T]."""
    return (1 / t_B)[:, None].expand(masked_BT.shape)


def linear_weight(masked_BT: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """Returns the weight "linear", 1 - t at every position [B, T]."""
    return (1 - t_B)[:, None].expand(masked_BT.shape)


def uniform_weight(masked_BT: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """Returns the weight "uniform", 1 at every position [B, T]."""
    return torch.ones(masked_BT.shape, dtype=t_B.dtype, device=t_B.device)


def cart_weight(masked_BT: torch.Tensor, t_B: torch.Tensor, *, p: float = 0.1) -> torch.Tensor:
    """Returns the weight "cart": at i, the sum over unmasked j of 0.5 p (1-p)^(|i-j|-1), by the published T x T matrix."""
    positions_T = torch.arange(masked_BT.shape[1], device=t_B.device)
    distance_TT = (positions_T[:, None] - positions_T[None, :]).abs()
    kernel_TT = 0.5 * p * (1 - p) ** (distance_TT - 1).to(t_B.dtype)
    kernel_TT.fill_diagonal_(0.0)
    return (~masked_BT).to(t_B.dtype) @ kernel_TT


def masked_diffusion_loss(
    model: Qwen2ForCausalLM,
    tokens_BT: torch.Tensor,
    masked_BT: torch.Tensor,
    t_B: torch.Tensor,
    *,
    mask_token_id: int,
    weight: WeightFn = cart_weight,
    head_rows: HeadRows = "all",
) -> torch.Tensor:
    """Returns the weighted cross entropy of the clean `tokens_BT` at masked positions, divided by their number.

    With `head_rows="all"` the cross entropy is computed at every position and then masked, as published.
    """
    noisy_BT = tokens_BT.masked_fill(masked_BT, mask_token_id)
    weight_BT = weight(masked_BT, t_B)
    if head_rows == "all":
        logits_BTV = shift_right(logits(model, noisy_BT))
        nll_BT = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="none").view_as(weight_BT)
        total = (nll_BT * weight_BT).masked_fill(~masked_BT, 0.0).sum()
    else:
        logits_RV = _masked_row_logits(model, noisy_BT, masked_BT, None, None, head_rows)
        total = (F.cross_entropy(logits_RV, tokens_BT[masked_BT], reduction="none") * weight_BT[masked_BT]).sum()
    return total / masked_BT.sum()


def adamw(model: Qwen2ForCausalLM, *, learning_rate: float) -> torch.optim.AdamW:
    """Returns the published optimizer (betas 0.9 and 0.95, weight decay 0.01 on all parameters), fused."""
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, fused=True
    )


def train_step(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokens_BT: torch.Tensor,
    masked_BT: torch.Tensor,
    t_B: torch.Tensor,
    *,
    mask_token_id: int,
    head_rows: HeadRows = "all",
) -> float:
    """Does a step with CART weights, gradients clipped to norm 1, and AdamW; returns the loss before the update."""
    optimizer.zero_grad(set_to_none=True)
    loss = masked_diffusion_loss(model, tokens_BT, masked_BT, t_B, mask_token_id=mask_token_id, head_rows=head_rows)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()
