"""AdamW as Ling 2.0 is trained with (betas 0.9 and 0.95, weight decay on matrices), in 8 bits too; and Muon.

Each is one torch.optim.Optimizer whose `step` asks the host nothing (Muon excepted). As in torch's fused ones, two of
its attributes are scalars on the device: grad_scale, which gradients are divided by, and found_inf; unless that is 0,
a step changes nothing.
"""

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_functional

from ..ops.adamw_8bit import Moments, adamw_8bit, adamw_8bit_state

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
MASTERS = ("fp32", "bf16")
BETAS, EPS = (0.9, 0.95), 1e-8


def make_optimizer(model: nn.Module, kind: str, lr: float, weight_decay: float, seed: int = 0) -> torch.optim.Optimizer:
    """Of that kind, over all parameters; seed: of adamw8bit's stochastic rounding."""
    if kind == "adamw":
        return adamw(model, lr, weight_decay)
    if kind == "adamw8bit":
        return AdamW8bit(by_decay(model.parameters(), weight_decay), lr, seed)
    return MuonAdamW(model, lr, weight_decay)


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Weight decay acts on whatever has two dimensions or more, embedding, head and router included (as in Megatron);
    norms are vectors and do not decay, the experts' bias is no parameter."""
    return torch.optim.AdamW(by_decay(model.parameters(), weight_decay), lr=lr, betas=BETAS, eps=EPS, fused=True)


def by_decay(parameters, weight_decay: float) -> list[dict]:
    parameters = list(parameters)
    return [
        dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=weight_decay),
        dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0),
    ]


def to_masters(model: nn.Module, kind: str) -> None:
    """ "bf16": matrices become bf16, embedding and head included, in place; vectors and the router stay fp32.

    Those are 0.1 % of Ling-mini and cost nothing; the router's products are fp32 anyway, and a norm's weights lie near
    1, where bf16 has steps of 0.4 to 0.8 %.
    """
    if kind == "bf16":
        for name, p in model.named_parameters():
            if p.ndim >= 2 and not name.endswith("router.weight"):
                p.data = p.data.bfloat16()


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with the moments of matrices in 8 bits, those of vectors in fp32; bf16 parameters rounded stochastically.

    A parameter whose attribute `fp8` is a copy of nn.fp8 that is up to date gets it requantised in the same pass.
    """

    grad_scale = found_inf = None
    raises_version = True

    def __init__(self, groups, lr: float, seed: int = 0, betas=BETAS, eps: float = EPS, weight_decay: float = 0.0):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.seed = seed

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            self.step_matrices([p for p in params if p.ndim >= 2], group, self.seed + number)
            self.step_vectors([p for p in params if p.ndim < 2], group)
            torch.autograd.graph.increment_version(params)
            for p in params:
                if (copy := getattr(p, "fp8", None)) is not None and copy.written:
                    copy.is_of(p)
        return loss

    def step_matrices(self, params: list[Tensor], group: dict, seed: int) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                (moments,) = adamw_8bit_state([p])
                self.state[p] = dict(step=torch.zeros((), device=p.device), **moments._asdict())
        states = [self.state[p] for p in params]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        copies = [getattr(p, "fp8", None) for p in params]
        pow2 = any(c is not None and c.pow2 for c in copies)
        for p, copy in zip(params, copies, strict=True):
            if copy is not None:
                copy.written = copy.pow2 == pow2 and copy.up_to_date(p)
        adamw_8bit(
            params, [p.grad for p in params], [Moments(*(s[k] for k in Moments._fields)) for s in states],
            group["lr"], group["betas"], group["eps"], group["weight_decay"], torch.stack(steps),
            self.grad_scale, self.found_inf, seed, [c.made if c is not None and c.written else None for c in copies],
            pow2,
        )  # fmt: skip
        if self.found_inf is not None:  # a step that was skipped is none
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def step_vectors(self, params: list[Tensor], group: dict) -> None:
        for p in params:
            if not self.state[p]:
                zeros = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
                self.state[p] = dict(step=torch.zeros((), device=p.device), **zeros)
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw_functional(
            params, [p.grad for p in params], *([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq")), [],
            [s["step"] for s in states], fused=True, grad_scale=self.grad_scale, found_inf=self.found_inf,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for the matrices of the layers, each expert's its own, and AdamW for the rest: embedding, head,
    routers and vectors. Muon's updates have the size of AdamW's (arXiv 2502.16982), so one learning rate serves both.

    Before a step the host waits for found_inf: torch's Muon knows none.
    """

    grad_scale = found_inf = None

    def __init__(self, model: nn.Module, lr: float, weight_decay: float):
        named = dict(model.named_parameters())
        others = ("word_embeddings.weight", "lm_head.weight", "router.weight")
        hidden = [p for name, p in named.items() if p.ndim >= 2 and not name.endswith(others)]
        taken = {id(p) for p in hidden}
        rest = by_decay((p for p in named.values() if id(p) not in taken), weight_decay)
        super().__init__([dict(params=hidden, weight_decay=weight_decay), *rest], dict(lr=lr))
        self.adamw = torch.optim.AdamW(self.param_groups[1:], lr=lr, betas=BETAS, eps=EPS, fused=True)
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.found_inf is not None and self.found_inf.item():
            return loss
        matrices, momenta = [], []
        for p in (p for p in self.param_groups[0]["params"] if p.grad is not None):
            if self.grad_scale is not None:
                p.grad.div_(self.grad_scale)
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            views = [t if p.ndim == 3 else t[None] for t in (p.detach(), p.grad, self.state[p]["momentum_buffer"])]
            for w, g, m in zip(*views, strict=True):
                w.grad = g
                matrices.append(w)
                momenta.append(m)
        if matrices:
            like = {k: self.param_groups[0][k] for k in ("lr", "weight_decay")}
            muon = torch.optim.Muon(matrices, **like, adjust_lr_fn="match_rms_adamw")
            muon.state.update((w, dict(momentum_buffer=m)) for w, m in zip(matrices, momenta, strict=True))
            muon.step()
        self.adamw.grad_scale = self.grad_scale
        self.adamw.step()
        return loss


def bytes_per_weight(kind: str, master: str) -> int:
    """Of a matrix: the weight, its gradient, and the optimizer's state."""
    return 2 * (4 if master == "fp32" else 2) + dict(adamw=8, adamw8bit=2, muon=4)[kind]


def clipped_step(optimizer: torch.optim.Optimizer, lr: float, norm: Tensor, limit: float, sound: Tensor) -> None:
    """A step with gradients scaled so that `norm`, that of all, is at most `limit`. None where `sound` is False."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1)
    optimizer.found_inf = (~sound).float()
    optimizer.step()
