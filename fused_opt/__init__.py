"""Drop-in torch.optim classes whose step is one native call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fused_opt.explanation import explain
    from fused_opt.optimizers import SGD, Adam, AdamW, RMSprop

__version__ = "0.1.0"

__all__ = ["SGD", "Adam", "AdamW", "RMSprop", "explain"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `fused-opt doctor` can run where torch cannot be imported.
    if name not in __all__:
        raise AttributeError(f"module 'fused_opt' has no attribute {name!r}")
    import fused_opt.explanation
    import fused_opt.optimizers

    source = fused_opt.explanation if name == "explain" else fused_opt.optimizers
    return globals().setdefault(name, getattr(source, name))


def __dir__() -> list[str]:
    return [*globals(), *__all__]
