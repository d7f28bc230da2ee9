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
_BESIDE_MUON = 5.0  # times the rate of the matrices: tables and norms have further to go in as many steps
_NS = (3.4445, -4.7750, 2.0315)  # coefficients of Newton-Schulz, chosen for speed rather than for ending at 1


class DrafterOptimizer:
    """Steps the named parameters; its state is tensors by parameter name, for safetensors files."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], options: TrainOptions) -> None:
        self._parameters = dict(parameters)
        chosen = {n for n, p in parameters.items() if options.optimizer == "muon" and orthogonalized(n, p)}
        rest = [p for n, p in parameters.items() if n not in chosen]
        matrices = [parameters[n] for n in parameters if n in chosen]
        self._parts: list[torch.optim.Optimizer] = []
        if rest:
            adam = torch.optim.AdamW(rest, lr=options.peak_rate, weight_decay=0.0, betas=(0.9, 0.999))
            self._parts.append(adam)
        if matrices:
            self._parts.append(Muon(matrices, options.peak_rate))

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """One step at this learning rate."""
        for part in self._parts:
            faster = _BESIDE_MUON if len(self._parts) > 1 and isinstance(part, torch.optim.AdamW) else 1.0
            for group in part.param_groups:
                group["lr"] = rate * faster
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


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal, scaled to the size of AdamW's steps (0.2 sqrt(longer side)).

    ``torch.optim.Muon`` does the same in bfloat16 alone, which a processor without instructions for it imitates number
    by number: 40 s for the matrices of a small drafter where float32 takes 1 s.
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter], rate: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": rate, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here has a closure
        """One step with Nesterov's momentum."""
        for group in self.param_groups:
            keep = group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if _MOMENTUM not in state:
                    state[_MOMENTUM] = torch.zeros_like(parameter)
                state[_MOMENTUM].lerp_(parameter.grad, 1 - keep)
                ahead = parameter.grad.lerp(state[_MOMENTUM], keep)
                scale = 0.2 * max(parameter.shape) ** 0.5
                parameter.add_(nearest_orthogonal(ahead), alpha=-group["lr"] * scale)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition of ``matrix``: five Newton-Schulz steps of fifth order (Jordan et
    al., 2024), whose singular values end between 0.7 and 1.2. In bfloat16 on a GPU, in float32 elsewhere."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_NS[1], alpha=_NS[2]), x, beta=_NS[0])
    return (x if wide else x.T).to(matrix.dtype)


def orthogonalized(name: str, parameter: Tensor) -> bool:
    """Whether Muon steps this parameter: a matrix that maps features to features."""
    return parameter.dim() == 2 and "markov" not in name and "confidence" not in name
