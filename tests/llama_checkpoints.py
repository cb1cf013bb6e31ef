"""Writes tiny Llama checkpoints with random weights, and records what transformers computes from them.

    python tests/llama_checkpoints.py

writes golden/llama_logits.json; it needs torch and transformers, which the tests do not.
"""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GOLDEN = pathlib.Path(__file__).parent / "golden" / "llama_logits.json"

# As transformers 4 writes it. The width of a head is 6, and two queries share a key.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 100,
}
KINDS: dict[str, dict[str, Any]] = {
    "apart": {},
    "tied": {"tie_word_embeddings": True, "rope_theta": 500.0, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
}


def tensors(fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns random weights by their published names, with norms that are not ones."""
    width, inner = fields["hidden_size"], fields["intermediate_size"]
    head = width // fields["num_attention_heads"]
    keys = fields["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (fields["vocab_size"], width)}
    for layer in range(fields["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for part, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }.items():
            shapes[f"{name}.{part}.weight"] = shape
    shapes["model.norm.weight"] = (width,)
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (fields["vocab_size"], width)
    random = np.random.default_rng(7)
    return {
        name: (random.normal(0, 0.25, shape) + (1.0 if "norm" in name else 0.0)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_llama(folder: pathlib.Path, **fields: Any) -> pathlib.Path:
    """Writes config.json and model.safetensors, and returns the folder."""
    folder.mkdir(parents=True)
    found = LLAMA | fields
    (folder / "config.json").write_text(json.dumps(found))
    save_file(tensors(found), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokens() -> np.ndarray:
    """Returns the tokens of the recorded logits, int32 [2, 20]."""
    return np.random.default_rng(1).integers(0, 100, (2, 20), dtype=np.int32)


def transformers_logits(folder: pathlib.Path) -> np.ndarray:
    """Returns the logits of transformers under the causal mask, float32 [2, 20, 100]."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: np.ndarray = model(input_ids=torch.from_numpy(tokens()).long()).logits.numpy()
    return logits


def main() -> None:
    """Records every seventh logit."""
    found = {}
    for kind, fields in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            logits = transformers_logits(write_llama(pathlib.Path(folder) / "llama", **fields))
        found[kind] = [round(float(value), 5) for value in logits.reshape(-1)[::7]]
    GOLDEN.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
