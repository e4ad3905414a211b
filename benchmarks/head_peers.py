"""The peers of benchmarks/head.py: their own functions, from their packages or from their sources.

Packages: pip install --no-deps trl verl liger-kernel cut-cross-entropy triton ray tensordict datasets pandas.
prime-rl, unsloth-zoo and RL-Kernel ask for a GPU or for half a cluster when they are imported; of these the one function that
counts is read from a checkout: git clone them into a folder and name it in RLALIGN_PEERS. Nothing of theirs is changed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, D], weight [V, D], target [N] -> logprobs [N]


def trl(dtype: torch.dtype) -> Score:
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    return lambda h, w, t: function.apply(h.to(dtype), w.to(dtype), None, t, 1.0, 8192, None, 1.0, ())[0]


def verl(dtype: torch.dtype) -> Score:
    module = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO(impl_backend="torch")
    return lambda h, w, t: module(h[None].to(dtype), w.to(dtype), t[None])[0][0]


def liger(dtype: torch.dtype) -> Score:
    loss = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo").LigerFusedLinearPPOBase
    return lambda h, w, t: loss.chunk_forward(h[None].to(dtype), w.to(dtype), t[None])[0]


def cut_cross_entropy() -> Score:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda h, w, t: -function(h, w, t, impl="torch_compile", reduction="none")


def prime_rl(dtype: torch.dtype) -> Score:
    """Its chunked head, with its default of 8,192 tokens a chunk. The entropy, which it cannot leave out, comes too."""
    stand_ins = {"prime_rl": {}, "prime_rl.utils": {}}
    stand_ins |= {
        "prime_rl.utils.logger": {"get_logger": None},
        "prime_rl.utils.vlm": {"get_final_logit_softcapping": None},
    }
    for name, content in stand_ins.items():  # neither is called by the function that is measured
        module = sys.modules.setdefault(name, types.ModuleType(name))
        vars(module).update(content)
    function = _module("prime-rl/src/prime_rl/trainer/models/layers/lm_head.py")._SequenceChunkedLogProbEntropyFn
    return lambda h, w, t: function.apply(h.to(dtype), w.to(dtype), t, torch.ones(len(t), device=t.device), 8192)[0]


def unsloth() -> Score:
    """Its chunked head, compiled as there (dynamic, one graph); its inductor options are for CUDA and left out."""
    name, path = "chunked_hidden_states_selective_log_softmax", _checkout("unsloth-zoo/unsloth_zoo/rl_replacements.py")
    tree = ast.parse(path.read_text())
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    function.decorator_list = []
    # dynamo wants to find the source of what it compiles, hence a file name that exists
    names: dict[str, object] = {"torch": torch, "os": os}
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    compiled = torch.compile(names[name], dynamic=True, fullgraph=True)
    return lambda h, w, t: compiled(h[None], w, t[None]).reshape(-1)


def rl_kernel(dtype: torch.dtype) -> Score:
    """Its PyTorch operator, which is what runs without a GPU; its logits have the operands' dtype."""
    op = _module("RL-Kernel/rl_engine/kernels/ops/pytorch/loss/linear_logp.py").NativeLinearLogpOp()
    return lambda h, w, t: op(h.to(dtype), w.to(dtype), t)


def _checkout(file: str) -> Path:
    folder = os.environ.get("RLALIGN_PEERS")
    path = Path(folder or "", file)
    if folder is None or not path.is_file():
        raise ImportError(f"needs a checkout: no {file} in RLALIGN_PEERS ({folder})")
    return path


def _module(file: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(Path(file).stem + "_of_a_peer", _checkout(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
