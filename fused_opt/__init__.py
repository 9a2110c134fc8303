"""Drop-in torch.optim classes whose step is one native call."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fused_opt.backward import step_in_backward
    from fused_opt.checkpoints import torch_state_dict
    from fused_opt.explanation import explain
    from fused_opt.optimizers import SGD, Adam, Adam8bit, AdamW, AdamW8bit, RMSprop, RMSprop8bit, SGD8bit
    from fused_opt.pruning import magnitude_masks, n_of_m_masks, pruned_masks
    from fused_opt.quantization import QuantizedTensor, dequantize_blockwise, quantize_blockwise

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "QuantizedTensor",
    "RMSprop",
    "RMSprop8bit",
    "SGD8bit",
    "dequantize_blockwise",
    "explain",
    "magnitude_masks",
    "n_of_m_masks",
    "pruned_masks",
    "quantize_blockwise",
    "step_in_backward",
    "torch_state_dict",
]

# The modules of those that are not classes of optimizers.
_MODULES = {
    "QuantizedTensor": "quantization",
    "dequantize_blockwise": "quantization",
    "explain": "explanation",
    "magnitude_masks": "pruning",
    "n_of_m_masks": "pruning",
    "pruned_masks": "pruning",
    "quantize_blockwise": "quantization",
    "step_in_backward": "backward",
    "torch_state_dict": "checkpoints",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `fused-opt doctor` can run where torch cannot be imported.
    if name not in __all__:
        raise AttributeError(f"module 'fused_opt' has no attribute {name!r}")
    source = importlib.import_module(f"fused_opt.{_MODULES.get(name, 'optimizers')}")
    return globals().setdefault(name, getattr(source, name))


def __dir__() -> list[str]:
    return [*globals(), *__all__]
