"""Masks of the weights to keep, for `optimizer.set_masks`. Each is a bool tensor, True where the weight stays."""

from __future__ import annotations

from collections.abc import Iterable

import torch

Params = torch.nn.Module | Iterable[torch.Tensor]
Masks = dict[torch.Tensor, torch.Tensor]


@torch.no_grad()
def magnitude_masks(params: Params, amount: float, scope: str = "global") -> Masks:
    """Prune the weights of smallest magnitude: Han et al., 2015, https://arxiv.org/abs/1506.02626.

    Exactly as many as asked for are pruned; of those with the same magnitude, the first ones. NaN counts as the largest. A weight that is
    zero is pruned before all others, so that a larger `amount` in the course of training prunes what is pruned already, and more. It needs
    no copy of all weights, but some 40 bytes for each of the largest tensor for a moment, and two passes over all (of float64: four).

    Args:
        params: floating-point tensors of any shapes, dtypes and devices, or a module: then its parameters of 2 or more dimensions.
        amount: how much to prune, as in torch.nn.utils.prune: a float is a fraction, at least 0 and less than 1, of all weights (rounded to
            a whole number, halves to the even one), an int a number of them.
        scope: "global" compares all weights with each other, "tensor" prunes `amount` of each tensor by itself.

    Returns:
        Tensor -> mask of its shape, on its device.

    Raises:
        TypeError: `params` is not as above.
        ValueError: `amount` or `scope` is none of these, or there are fewer weights than `amount`.
    """
    tensors = _tensors(params)
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not (amount >= 0 if isinstance(amount, int) else 0 <= amount < 1):
        raise ValueError(f"Invalid amount: {amount!r}; give a fraction, at least 0.0 and less than 1.0, or a whole number of weights")
    if scope not in ("global", "tensor"):
        raise ValueError(f"Invalid scope: {scope!r}; use 'global' (all weights together) or 'tensor' (each tensor by itself)")
    masks: Masks = {}
    for together in [tensors] if scope == "global" else [[tensor] for tensor in tensors]:
        size = sum(tensor.numel() for tensor in together)
        number = amount if isinstance(amount, int) else round(amount * size)
        if number > size:
            where = "there are" if scope == "global" else f"a tensor of shape {tuple(together[0].shape)} has"
            raise ValueError(f"amount={amount}, but {where} {size} weights; give a fraction, or a whole number of {size} or less")
        masks |= _without_smallest(together, number)
    return masks


@torch.no_grad()
def n_of_m_masks(params: Params, n: int = 2, m: int = 4, dim: int = -1) -> Masks:
    """Keep the `n` weights of largest magnitude of each `m` consecutive ones: Mishra et al., 2021, https://arxiv.org/abs/2104.08378 (2:4).

    Of those with the same magnitude, the first ones are pruned. NaN counts as the largest.

    Args:
        params: floating-point tensors of 1 or more dimensions, or a module: then its parameters of 2 or more dimensions.
        n: weights that are kept, 1 to `m`.
        m: weights in a row, of which `n` are kept.
        dim: the dimension along which they are consecutive. Hardware for 2:4 (cuSPARSELt, torch.sparse.to_sparse_semi_structured) wants the
            input dimension: the last of a Linear's weight, dimension 1 of a convolution's.

    Returns:
        Tensor -> mask of its shape, on its device.

    Raises:
        TypeError: `params` is not as above.
        ValueError: `n` or `m` is out of range, a tensor has no such dimension, or its size is no multiple of `m`.
    """
    tensors = _tensors(params)
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in (n, m)) or not 1 <= n <= m:
        raise ValueError(f"Invalid n={n!r}, m={m!r}; give whole numbers with 1 <= n <= m, such as n=2, m=4")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise ValueError(f"Invalid dim: {dim!r}; give a whole number: -1 for the last dimension, 1 for a convolution's input channels")
    for tensor in tensors:
        shape = tuple(tensor.shape)
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"dim={dim}, but a tensor has shape {shape}: leave it out, or give another dim")
        if shape[dim] % m:
            raise ValueError(
                f"a tensor of shape {shape} has {shape[dim]} weights along dim={dim}, which is no multiple of m={m}; leave it out: pass a "
                "list of those that are, or give another dim (1: the input channels of a convolution)"
            )
    return {tensor: _largest_of_each(tensor, n, m, dim) for tensor in tensors}


def pruned_masks(model: torch.nn.Module) -> Masks:
    """The masks of a model that was pruned with torch.nn.utils.prune: parameter `<name>_orig` -> buffer `<name>_mask`.

    With them an optimizer holds the originals, too, at zero; the results are the same, and `torch.nn.utils.prune.remove` can be called
    at any time, before or after. The buffers are not copied, and have the parameter's dtype. A model that is not pruned has none.

    Raises:
        ValueError: two modules share a parameter, and prune it differently.
    """
    masks: Masks = {}
    for name, module in model.named_modules():
        for original, param in module.named_parameters(recurse=False):
            mask = getattr(module, f"{original.removesuffix('_orig')}_mask", None) if original.endswith("_orig") else None
            if not isinstance(mask, torch.Tensor):
                continue
            if param in masks and not torch.equal(mask, masks[param]):
                raise ValueError(
                    f"{original!r} of module {name!r} is a parameter of another module, too, and has another mask there; prune both alike"
                )
            masks[param] = mask
    return masks


def _tensors(params: Params) -> list[torch.Tensor]:
    if isinstance(params, torch.nn.Module):
        tensors: list[torch.Tensor] = [param for param in params.parameters() if param.dim() >= 2]
    elif isinstance(params, torch.Tensor):
        raise TypeError(f"params is a tensor of shape {tuple(params.shape)}; pass [tensor], or a module")
    else:
        tensors = list(dict.fromkeys(params))
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"params has a {type(tensor).__name__}; pass tensors: of named_parameters() the second of each pair")
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise TypeError(f"params has a tensor of {tensor.dtype} and {tensor.layout}; leave it out: it must be dense, of a float dtype")
    return tensors


def _without_smallest(tensors: list[torch.Tensor], number: int) -> Masks:
    """Masks that are False for `number` weights of smallest magnitude, and of the largest one among those for the first ones."""
    bits = 64 if any(tensor.dtype == torch.float64 for tensor in tensors) else 32
    largest = 0  # magnitude that is pruned, as bits
    left = number  # of those that have its leading bits
    for shift in range(bits - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for tensor in tensors:
            keys = _magnitudes(tensor, bits).flatten() >> shift
            counts += torch.bincount(keys[keys >> 16 == largest] & 0xFFFF, minlength=1 << 16).cpu()
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, left))
        left -= int(up_to[digit] - counts[digit])
        largest = largest << 16 | digit
    masks = {}
    for tensor in tensors:
        keys = _magnitudes(tensor, bits)
        alike = (keys == largest).flatten()
        first = alike & (alike.cumsum(0) <= left)
        left -= int(first.sum())
        masks[tensor] = ~((keys < largest) | first.view(keys.shape))
    return masks


def _magnitudes(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers in the order of the magnitudes, NaN last: the bits of the numbers without their signs."""
    floats, ints = (torch.float64, torch.int64) if bits == 64 else (torch.float32, torch.int32)
    return tensor.detach().to(floats).view(ints).to(torch.int64) & ((1 << (bits - 1)) - 1)


def _largest_of_each(tensor: torch.Tensor, n: int, m: int, dim: int) -> torch.Tensor:
    magnitudes = tensor.detach().abs().movedim(dim, -1)
    in_rows = magnitudes.reshape(*magnitudes.shape[:-1], magnitudes.shape[-1] // m, m)
    pruned = in_rows.sort(dim=-1, stable=True).indices[..., : m - n]
    mask = torch.ones_like(in_rows, dtype=torch.bool).scatter_(-1, pruned, False)
    return mask.view(magnitudes.shape).movedim(-1, dim)
