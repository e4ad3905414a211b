"""The matrix of families as data: a tiny random model of each family people train, the columns, a cell, the table as a file.

Every model has a vocabulary padded beyond its tokenizer's ids. A family's own oddities are kept on: multipliers that are not 1,
caps, biases, more experts than are chosen, sliding windows shorter than a sequence, both kinds of layers of a hybrid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

VOCABULARY = 288  # of the model; the tokenizer has fewer ids
CONTEXT = 256

SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": CONTEXT,
}  # fmt: skip
EXPERTS: dict[str, object] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1, "norm_topk_prob": True,
}  # fmt: skip
LATENT: dict[str, object] = {
    "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
DEEPSEEK: dict[str, object] = LATENT | {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64,  # vLLM's kernels on CPU know this size alone
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
}  # fmt: skip
BOTH_WINDOWS = ["sliding_attention", "full_attention"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """transformers' model type, its settings beside SIZES, and settings of SIZES that it does not have."""

    model_type: str
    settings: dict[str, object]
    without: tuple[str, ...] = ()

    def arguments(self) -> dict[str, object]:
        """Everything the configuration is made of."""
        return {name: value for name, value in SIZES.items() if name not in self.without} | self.settings


RECIPES: dict[str, Recipe] = {
    "llama": Recipe("llama", {}),
    "mistral": Recipe("mistral", {"sliding_window": None}),
    "qwen2": Recipe("qwen2", {"tie_word_embeddings": True}, without=("head_dim",)),
    "qwen3": Recipe("qwen3", {}),
    "qwen3-moe": Recipe("qwen3_moe", EXPERTS),
    "qwen3-next": Recipe(
        "qwen3_next",
        EXPERTS
        | {
            "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 64, "linear_value_head_dim": 64, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "gemma2": Recipe(
        "gemma2",
        {
            "query_pre_attn_scalar": 32, "sliding_window": 16, "layer_types": BOTH_WINDOWS, "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": Recipe("gemma3_text", {"query_pre_attn_scalar": 32, "sliding_window": 16, "layer_types": BOTH_WINDOWS}),
    "phi3": Recipe("phi3", {"pad_token_id": 0}, without=("head_dim",)),
    "phi": Recipe("phi", {"partial_rotary_factor": 0.5}, without=("head_dim",)),
    "olmo2": Recipe("olmo2", {}, without=("head_dim",)),
    "olmo3": Recipe("olmo3", {"sliding_window": 16, "layer_types": BOTH_WINDOWS}, without=("head_dim",)),
    "smollm3": Recipe("smollm3", {"pad_token_id": 0, "no_rope_layers": [1, 0]}, without=("head_dim",)),
    "cohere2": Recipe("cohere2", {"logit_scale": 0.25, "sliding_window": CONTEXT, "layer_types": BOTH_WINDOWS}),
    "cohere2-beyond-window": Recipe("cohere2", {"logit_scale": 0.25, "sliding_window": 16, "layer_types": BOTH_WINDOWS}),
    "granite": Recipe(
        "granite",
        {
            "logits_scaling": 3.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1,
            "tie_word_embeddings": True,
        },
        without=("head_dim",),
    ),
    "granitemoehybrid": Recipe(
        "granitemoehybrid",
        {
            "logits_scaling": 3.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1,
            "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
            "shared_intermediate_size": 128, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1,
            "mamba_chunk_size": 32, "intermediate_size": 64,
        },
        without=("head_dim",),
    ),
    "gpt-oss": Recipe(
        "gpt_oss",
        {
            "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "layer_types": BOTH_WINDOWS,
            "rope_scaling": None, "intermediate_size": 128, "pad_token_id": 0,
        },
    ),
    "deepseek-v2": Recipe("deepseek_v2", DEEPSEEK | {"topk_method": "greedy"}),
    "deepseek-v3": Recipe("deepseek_v3", DEEPSEEK | {"topk_method": "noaux_tc"}),
    "mixtral": Recipe(
        "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128, "sliding_window": None}
    ),
    "gpt2": Recipe(
        "gpt2",
        {"n_positions": CONTEXT, "n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
        without=tuple(SIZES),
    ),
    "opt": Recipe(
        "opt",
        {"ffn_dim": 256, "word_embed_proj_dim": 128},
        without=("intermediate_size", "num_key_value_heads", "head_dim"),
    ),
    "gpt-neox": Recipe("gpt_neox", {}, without=("head_dim", "num_key_value_heads")),
    "falcon-h1": Recipe(
        "falcon_h1",
        {
            "lm_head_multiplier": 0.5, "embedding_multiplier": 4.0, "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32,
            "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32, "key_multiplier": 0.8,
            "attention_out_multiplier": 0.9, "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.7,
        },
    ),
    "mamba2": Recipe(
        "mamba2",
        {
            "vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 32,
            "state_size": 16, "n_groups": 1, "chunk_size": 32, "tie_word_embeddings": True,
        },
        without=tuple(SIZES),
    ),
    "exaone4": Recipe("exaone4", {"sliding_window": 16, "layer_types": BOTH_WINDOWS}, without=("head_dim",)),
    "glm4": Recipe("glm4", {}),
    "minicpm3": Recipe(
        "minicpm3",
        LATENT  # the epsilon: docs/upstream.md
        | {"scale_emb": 4.0, "scale_depth": 1.4, "dim_model_base": 32, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    ),
    "hyperclovax": Recipe(
        "hyperclovax",
        {
            "logits_scaling": 0.5, "embedding_multiplier": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
            "use_post_norm": True,
        },
    ),
}  # fmt: skip


def named(names: list[str]) -> dict[str, Recipe]:
    """The recipes asked for, in their order; all without names. Raises ValueError for one that is unknown."""
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise ValueError(f"no family is called {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    return {name: RECIPES[name] for name in names} if names else dict(RECIPES)


OK, REFUSED, FAILED = "ok", "refused", "failed"
# The cells that one process answers, in the order in which it does; a process is an engine.
PROCESSES: dict[str, tuple[str, ...]] = {
    "float32": ("head", "load", "score", "publish", "attribute", "train", "ZeRO-3", "LoRA"),
    "bfloat16": ("bfloat16", "bfloat16 publish"),
    "TP 2": ("TP 2",),
}
COLUMNS = tuple(column for columns in PROCESSES.values() for column in columns)


@dataclass(frozen=True, slots=True)
class Cell:
    """state: ok, refused (by name, before anything ran) or failed; found: a number, or the reason."""

    state: str
    found: str = ""


Cells = Mapping[str, Cell]  # of one family, by column


def as_markdown(table: Mapping[str, Cells]) -> str:
    """One row a family; the reasons below, by number."""
    columns = [c for c in COLUMNS if any(c in cells for cells in table.values())]
    lines = [f"| family | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    reasons: list[str] = []
    for family, cells in table.items():
        lines.append(f"| {family} | {' | '.join(_shown(cells.get(c), reasons) for c in columns)} |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def read(file: Path) -> dict[str, dict[str, Cell]]:
    """A table that `write` wrote; empty without one."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    return {family: {column: Cell(**cell) for column, cell in cells.items()} for family, cells in found.items()}


def write(table: Mapping[str, Cells], file: Path) -> None:
    """As JSON."""
    plain = {family: {column: asdict(cell) for column, cell in cells.items()} for family, cells in table.items()}
    file.write_text(json.dumps(plain, indent=1) + "\n")


def _shown(cell: Cell | None, reasons: list[str]) -> str:
    if cell is None:
        return "-"
    if cell.state == OK:
        return cell.found or "ok"
    if cell.found not in reasons:
        reasons.append(cell.found)
    return f"**{cell.state}** ({reasons.index(cell.found) + 1})"
