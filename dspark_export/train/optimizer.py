"""The optimizer of a training: Muon for the matrices of the decoder layers, AdamW for everything else, one state.

Muon replaces the gradient of a matrix by the nearest orthogonal one, so that every direction learns at the same pace;
its updates are scaled to the size of AdamW's, and one learning rate serves both. Tables looked up by token (Markov
head), the confidence head, norms and biases stay with AdamW, as in Muon's publication (Jordan et al., 2024).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dspark_export.train.options import TrainOptions

_FIRST, _SECOND = "exp_avg", "exp_avg_sq"
_MOMENTUM = "momentum_buffer"


class DrafterOptimizer:
    """Steps the named parameters; its state is tensors by parameter name, for safetensors files."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], options: TrainOptions) -> None:
        self._parameters = dict(parameters)
        chosen = {n for n, p in parameters.items() if options.optimizer == "muon" and orthogonalized(n, p)}
        rest = [p for n, p in parameters.items() if n not in chosen]
        matrices = [parameters[n] for n in parameters if n in chosen]
        self._parts: list[torch.optim.Optimizer] = []
        if rest:
            adam = torch.optim.AdamW(rest, lr=options.rate, weight_decay=0.0, betas=(0.9, 0.999))
            self._parts.append(adam)
        if matrices:
            muon = torch.optim.Muon(matrices, lr=options.rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """One step at this learning rate."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def first(self) -> dict[str, Tensor]:
        """First moments (AdamW) and momenta (Muon) by parameter name; empty before the first step."""
        return self._stored((_FIRST, _MOMENTUM))

    def second(self) -> dict[str, Tensor]:
        """Second moments by parameter name, of the parameters that AdamW steps."""
        return self._stored((_SECOND,))

    def load(self, step: int, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        """Go on after ``step`` steps, from what :meth:`first` and :meth:`second` gave then."""
        names = {id(p): n for n, p in self._parameters.items()}
        for part in self._parts:
            adam = isinstance(part, torch.optim.AdamW)
            for group in part.param_groups:
                for parameter in group["params"]:
                    name = names[id(parameter)]
                    if name not in first:
                        continue
                    moment = first[name].to(parameter.device)
                    if adam:
                        variance = second[name].to(parameter.device)
                        part.state[parameter] = {
                            "step": torch.tensor(float(step)),
                            _FIRST: moment,
                            _SECOND: variance,
                        }
                    else:
                        part.state[parameter] = {_MOMENTUM: moment}

    def _stored(self, keys: Iterable[str]) -> dict[str, Tensor]:
        states = {id(p): state for part in self._parts for p, state in part.state.items()}
        found = {n: states.get(id(p), {}) for n, p in self._parameters.items()}
        return {n: state[key] for n, state in found.items() for key in keys if key in state}


def orthogonalized(name: str, parameter: Tensor) -> bool:
    """Whether Muon steps this parameter: a matrix that maps features to features."""
    return parameter.dim() == 2 and "markov" not in name and "confidence" not in name
