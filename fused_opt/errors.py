"""Makes torch's constructor errors complete: same exception type, torch's own sentence first, then the limit and the remedy."""

from __future__ import annotations

# The beginning of torch's message, and what it leaves out.
_REMEDIES = (
    ("Invalid learning rate", "lr must be 0 or greater; to follow the gradient uphill pass maximize=True"),
    ("Invalid epsilon value", "eps must be 0 or greater; torch's default is 1e-8"),
    ("Invalid beta parameter", "each beta must be at least 0 and less than 1; torch's default is (0.9, 0.999)"),
    ("Invalid weight_decay value", "weight_decay must be 0 or greater; 0 switches it off"),
    ("Invalid momentum value", "momentum must be 0 or greater; 0 switches it off"),
    ("Invalid alpha value", "alpha must be 0 or greater; torch's default is 0.99"),
    ("Nesterov momentum requires", "pass momentum > 0 and dampening=0, or nesterov=False"),
    ("optimizer got an empty parameter list", "pass model.parameters(), and note that a generator can be used once"),
    ("params argument given to the optimizer should be an iterable", "pass [tensor], or model.parameters()"),
    ("optimizer can only optimize Tensors", "make it one with torch.nn.Parameter(torch.as_tensor(value))"),
    ("can't optimize a non-leaf Tensor", "pass the tensor that it was computed from, or its .detach().requires_grad_()"),
)


def completed(error: Exception) -> Exception:
    """An exception of the same type whose message ends with limit and remedy, or `error` itself if it is not one of those known."""
    for beginning, remedy in _REMEDIES:
        if str(error).startswith(beginning) and remedy not in str(error):
            return type(error)(f"{error}; {remedy}")
    return error
