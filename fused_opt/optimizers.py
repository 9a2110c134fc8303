"""The drop-in classes. Everything but `step` is inherited from the installed torch."""

from __future__ import annotations

import torch

from fused_opt import rules
from fused_opt.step import FusedStep


class Adam(FusedStep, torch.optim.Adam):
    """torch.optim.Adam with a fused step: Kingma & Ba, 2015, https://arxiv.org/abs/1412.6980; amsgrad: Reddi et al., 2018.

    Arguments, defaults, errors, `param_groups` and `state` are torch's: see `torch.optim.Adam`.
    """

    _rule = rules.ADAM
    _torch_class = torch.optim.Adam


class AdamW(FusedStep, torch.optim.AdamW):
    """torch.optim.AdamW with a fused step: Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101.

    Arguments, defaults, errors, `param_groups` and `state` are torch's: see `torch.optim.AdamW`.
    """

    _rule = rules.ADAMW
    _torch_class = torch.optim.AdamW


class RMSprop(FusedStep, torch.optim.RMSprop):
    """torch.optim.RMSprop with a fused step: Hinton, 2012, lecture 6e; centered: Graves, 2013, https://arxiv.org/abs/1308.0850.

    Arguments, defaults, errors, `param_groups` and `state` are torch's: see `torch.optim.RMSprop`.
    """

    _rule = rules.RMSPROP
    _torch_class = torch.optim.RMSprop


class SGD(FusedStep, torch.optim.SGD):
    """torch.optim.SGD with a fused step; momentum and nesterov as in Sutskever et al., 2013, in torch's form.

    Arguments, defaults, errors, `param_groups` and `state` are torch's: see `torch.optim.SGD`.
    """

    _rule = rules.SGD
    _torch_class = torch.optim.SGD


class Adam8bit(Adam):
    """`Adam` with `state_dtype="int8"`: one byte a value for each state (see `AdamW8bit`)."""

    _default_state_dtype = "int8"


class AdamW8bit(AdamW):
    """`AdamW` with `state_dtype="int8"`: states in 8-bit codes, 2.03 bytes a parameter with their scales instead of 8.

    Each block of `block_size` values (a power of two from 32 to 4096, default 256) has a float32 scale, its largest magnitude; each value
    one byte of mu-law code (see `quantize_blockwise`), rounded stochastically, such that it is right on average and small changes are not
    lost. A step computes in float32: it decodes, updates and encodes a block at a time. Parameters of less than `min_8bit_size` elements
    (default 4096) have float32 states. The three options can be given for each group; `state_dtype` may be a dict of patterns of parameter
    names, for example {"*embed*": torch.float32}, with model.named_parameters(); what no pattern fits is 8-bit.

    After Dettmers et al., 2022, https://arxiv.org/abs/2110.02861, with another code: see bench/CODES.md.
    """

    _default_state_dtype = "int8"


class RMSprop8bit(RMSprop):
    """`RMSprop` with `state_dtype="int8"`: one byte a value for each state (see `AdamW8bit`).

    With `centered=True` states are float32: the variance, a small difference of two of them, would not survive codes.
    """

    _default_state_dtype = "int8"


class SGD8bit(SGD):
    """`SGD` with `state_dtype="int8"`: one byte a value for the momentum (see `AdamW8bit`)."""

    _default_state_dtype = "int8"
