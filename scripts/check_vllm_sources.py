"""Check rlalign's hooks against the Python sources of a vLLM release that cannot be started here: VERSION FOLDER.

1. By syntax tree: the methods we override exist with the signatures we give them, and go where we think they go.
2. By execution: our layer on that release's own LogitsProcessor (which is plain torch) gives float32 logits, bit-equal to
   `head.project`, and the release's argmax over them; switched off, that release's own.
Exits with an assertion that says what is different.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "vllm.model_executor.layers.logits_processor"
SIGNATURES = {
    "_get_logits": ["self", "hidden_states", "lm_head", "embedding_bias"],
    "get_top_tokens": ["self", "lm_head", "hidden_states", "embedding_bias"],
    "_apply_head": ["self", "lm_head", "hidden_states", "embedding_bias"],
    "__init__": ["self", "vocab_size", "org_vocab_size", "scale", "logits_as_input", "soft_cap"],
}


def main(version: str, sources: Path) -> None:
    from rlalign.rollout import versions

    versions.require_supported(version)
    hook = versions.hook(version)
    layer = class_of(sources / "vllm/model_executor/layers/logits_processor.py", "LogitsProcessor")
    wanted = ["__init__", *hook.value.split(", ")]
    for name in wanted:
        found = [a.arg for a in layer[name].args.args]
        assert found == SIGNATURES[name], (
            f"{version}: {name}{tuple(found)}, the hook was written for {SIGNATURES[name]}"
        )
    assert ("_apply_head" in layer) == (hook is versions.Hook.APPLY_HEAD), f"{version}: the wrong hook is chosen"
    callers = [n for n, f in layer.items() if "quant_method.apply" in ast.unparse(f)]
    expected = {"_apply_head"} if hook is versions.Hook.APPLY_HEAD else {"_get_logits", "get_top_tokens"}
    assert set(callers) == expected, (
        f"{version}: the lm_head's kernel is called in {callers}, we replace {sorted(expected)}"
    )
    wrapper = class_of(sources / "vllm/v1/worker/worker_base.py", "WorkerWrapperBase")
    assert "__getattr__" in wrapper, f"{version}: RPC names are not looked up through WorkerWrapperBase.__getattr__"
    embedding = class_of(sources / "vllm/model_executor/layers/vocab_parallel_embedding.py", "VocabParallelEmbedding")
    assert "weight_loader" in embedding, f"{version}: VocabParallelEmbedding has no weight_loader to hook"
    execute(version, sources)
    print(
        f"hook {hook.value}: signatures and callers agree; our layer on its LogitsProcessor is bit-equal to head.project"
    )


def class_of(file: Path, name: str) -> dict[str, ast.FunctionDef]:
    """The methods of a class, by name."""
    tree = ast.parse(file.read_text())
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    return {n.name: n for n in found.body if isinstance(n, ast.FunctionDef)}


def execute(version: str, sources: Path) -> None:
    """Our layer on the release's own LogitsProcessor, with the installed vLLM underneath."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    import vllm

    vllm.__version__ = version  # what the hooks are chosen by
    load(sources / "vllm/model_executor/layers/logits_processor.py")
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    from rlalign import ranks
    from rlalign.head import projection
    from rlalign.rollout import head_plugin, names
    from rlalign.rollout.head import logits_processor

    settings = VllmConfig(device_config=DeviceConfig("cpu"))
    with set_current_vllm_config(settings):
        store = f"tcp://127.0.0.1:{ranks.free_port()}"
        init_distributed_environment(1, 0, store, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        head_plugin.register()
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        torch.manual_seed(0)
        lm_head = ParallelLMHead(300, 128, params_dtype=torch.bfloat16)
        weight_VD: Any = lm_head.weight
        weight_VD.data.copy_(torch.randn(320, 128) * 0.1)
        method: Any = lm_head.quant_method
        method.process_weights_after_loading(lm_head)
        bias, hidden = torch.randn(320).bfloat16(), torch.randn(7, 128).bfloat16()
        settings.additional_config = {names.SETTINGS_KEY: {"head_dtype": "float32", "mode": "auto"}}
        layer = LogitsProcessor(300, 300)
        assert isinstance(layer, logits_processor.AlignedLogitsProcessor), f"{version}: the slot was not taken"
        expected = projection.project(hidden, weight_VD, bias)[:, :300]
        for copies in (False, True):
            logits_processor.reads_weight_directly = lambda hidden, weight, copies=copies: not copies
            logits = layer(lm_head, hidden, bias)
            assert logits.dtype == torch.float32 and torch.equal(logits, expected), (
                f"{version}: other logits than head.project"
            )
        tokens = layer.get_top_tokens(lm_head, hidden, bias)
        assert torch.equal(tokens, expected.argmax(-1)), f"{version}: other top tokens than the argmax of our logits"
        layer.set_mode(logits_processor.HeadMode.OFF)
        own = method.apply(lm_head, hidden)[:, :300]
        assert torch.equal(layer(lm_head, hidden), own), f"{version}: switched off it is not vLLM's own head"
        assert layer.calls == 4, f"{version}: {layer.calls} of 4 calls were counted"


def load(file: Path) -> ModuleType:
    """Import one file of the release in place of the installed one."""
    spec = importlib.util.spec_from_file_location(MODULE, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    import vllm.model_executor.layers as package

    package.__dict__["logits_processor"] = module
    return module


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
