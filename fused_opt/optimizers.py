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
