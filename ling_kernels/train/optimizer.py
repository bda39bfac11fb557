"""AdamW as Ling 2.0 is trained with (betas 0.9 and 0.95, weight decay on matrices), in 8 bits too; and Muon.

Each is one torch.optim.Optimizer whose `step` asks the host nothing. As in torch's fused ones, two of its attributes
are scalars on the device: grad_scale, which gradients are divided by, and found_inf; unless that is 0, a step changes
nothing.
"""

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_functional

from ..ops.adamw_8bit import Moments, adamw_8bit, round_stochastically, rounding_keys, seeds
from ..ops.grad_norm import grad_norm
from .sharded import is_sharded, local, moments_of, place

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
MASTERS = ("fp32", "bf16")
BETAS, EPS = (0.9, 0.95), 1e-8
SHARD = 0x9E3779B1  # between the seeds of a parameter's shards
OTHERS = 1 << 20  # between those of AdamW's parameters and Muon's
CHUNK = 1 << 22  # elements, or one matrix, that Muon has in fp32 at a time


def make_optimizer(model: nn.Module, kind: str, lr: float, weight_decay: float, seed: int = 0) -> torch.optim.Optimizer:
    """Of that kind, over all parameters; seed: of stochastic rounding."""
    if kind == "adamw":
        return adamw(model, lr, weight_decay)
    if kind == "adamw8bit":
        return AdamW8bit(by_decay(model.parameters(), weight_decay), lr, seed)
    return MuonAdamW(model, lr, weight_decay, seed)


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


class Stepping(torch.optim.Optimizer):
    """torch.optim's closure, in one place: `update` is the step."""

    grad_scale = found_inf = None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss


class AdamW8bit(Stepping):
    """AdamW with the moments of matrices in 8 bits, those of vectors in fp32; bf16 parameters rounded stochastically,
    by random bits that the seed and a parameter's place in its group choose.

    A parameter whose attribute `fp8` is a copy of nn.fp8 that is up to date gets it requantised in the same pass. Those
    that FSDP2 has sharded have state that is sharded alike (`sharded`), and the bits of a run that is not, but for
    random ones, which differ from shard to shard.
    """

    def __init__(self, groups, lr: float, seed: int = 0, betas=BETAS, eps: float = EPS, weight_decay: float = 0.0):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.seed, self.seeds = seed, {}

    @property
    def raises_version(self) -> bool:
        """Of a sharded parameter not that of the whole ones, which are gathered anew."""
        return not any(is_sharded(p) for group in self.param_groups for p in group["params"])

    def load_state_dict(self, state_dict: dict) -> None:
        """torch casts a state to its parameter's precision, and shares what it need not cast: here neither."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = value.to(p.device, copy=True)

    def update(self) -> None:
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            self.step_matrices([p for p in params if p.ndim >= 2], group, number)
            self.step_vectors([p for p in params if p.ndim < 2], group)
            torch.autograd.graph.increment_version(params)
            for p in params:
                if (copy := getattr(p, "fp8", None)) is not None and copy.written:
                    copy.mark_current(p)

    def step_matrices(self, params: list[Tensor], group: dict, number: int) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p] = dict(step=torch.zeros((), device=p.device), **moments_of(p))
        if number not in self.seeds:
            matrices = [p for p in group["params"] if p.ndim >= 2]
            of_each = seeds(len(matrices), self.seed + number, local(params[0]).device).unbind()
            self.seeds[number] = {p: s + SHARD * place(p) for p, s in zip(matrices, of_each, strict=True)}
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, 1)
        copies = [getattr(p, "fp8", None) for p in params]
        pow2 = any(c is not None and c.pow2 for c in copies)
        for p, copy in zip(params, copies, strict=True):
            if copy is not None:
                copy.written = copy.pow2 == pow2 and copy.is_current(p)
        moments = [Moments(*(local(self.state[p][k]).view(-1) for k in Moments._fields)) for p in params]
        adamw_8bit(
            [local(p) for p in params], [local(p.grad) for p in params], moments,
            group["lr"], group["betas"], group["eps"], group["weight_decay"], torch.stack(steps),
            self.grad_scale, self.found_inf, torch.stack([self.seeds[number][p] for p in params]),
            [c.pair if c is not None and c.written else None for c in copies], pow2,
        )  # fmt: skip
        if self.found_inf is not None:  # a step that was skipped is none
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def step_vectors(self, params: list[Tensor], group: dict) -> None:
        for p in params:
            if not self.state[p]:
                zeros = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
                self.state[p] = dict(step=torch.zeros((), device=p.device), **zeros)
        beta1, beta2 = group["betas"]
        moments = ([local(self.state[p][k]) for p in params] for k in ("exp_avg", "exp_avg_sq"))
        adamw_functional(
            [local(p) for p in params], [local(p.grad) for p in params], *moments, [],
            [self.state[p]["step"] for p in params], fused=True, grad_scale=self.grad_scale, found_inf=self.found_inf,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip


class MuonAdamW(Stepping):
    """torch.optim.Muon for the matrices of the layers, each expert's its own, and AdamW for the rest: embedding, head,
    routers and vectors. Muon's updates have the size of AdamW's (arXiv 2502.16982), so one learning rate serves both.

    Muon runs in fp32; matrices and momenta that are bf16 are rounded stochastically. Where there are any, the rest has
    8-bit AdamW.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, seed: int = 0):
        named = dict(model.named_parameters())
        others = ("word_embeddings.weight", "lm_head.weight", "router.weight")
        hidden = [p for name, p in named.items() if p.ndim >= 2 and not name.endswith(others)]
        taken = {id(p) for p in hidden}
        rest = by_decay((p for p in named.values() if id(p) not in taken), weight_decay)
        super().__init__([dict(params=hidden, weight_decay=weight_decay), *rest], dict(lr=lr))
        if any(p.dtype == torch.bfloat16 for p in named.values()):
            self.adamw = AdamW8bit(self.param_groups[1:], lr, seed)
        else:
            self.adamw = torch.optim.AdamW(self.param_groups[1:], lr=lr, betas=BETAS, eps=EPS, fused=True)
        self.adamw.state = self.state
        self.seeds = seeds(2 * len(hidden), seed + OTHERS, hidden[0].device).view(-1, 2).unbind()

    def update(self) -> None:
        for p, seed in zip(self.param_groups[0]["params"], self.seeds, strict=True):
            if p.grad is not None:
                self.step_matrices(p, seed)
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf
        self.adamw.step()

    def step_matrices(self, p: Tensor, seed: Tensor) -> None:
        """p [N, K] or [E, N, K]; seed [2], of p and of its momentum."""
        if not self.state[p]:
            self.state[p] = dict(step=torch.zeros((), device=p.device), momentum_buffer=torch.zeros_like(p))
        step = self.state[p]["step"].add_(1)
        keys = rounding_keys(seed, step)
        views = [t.view(-1, *t.shape[-2:]) for t in (p.detach(), self.state[p]["momentum_buffer"], p.grad)]
        at_once = max(CHUNK // views[0][0].numel(), 1)
        options = {k: self.param_groups[0][k] for k in ("lr", "weight_decay")} | dict(adjust_lr_fn="match_rms_adamw")
        for number, parts in enumerate(zip(*(t.split(at_once) for t in views), strict=True)):
            new_w, new_m, g = (t.to(torch.float32, copy=True) for t in parts)
            if self.grad_scale is not None:
                g /= self.grad_scale
            matrices = [*new_w.unbind()]
            for w, w_grad in zip(matrices, g.unbind(), strict=True):
                w.grad = w_grad
            muon = torch.optim.Muon(matrices, **options)
            muon.state.update((w, dict(momentum_buffer=m)) for w, m in zip(matrices, new_m.unbind(), strict=True))
            muon.step()
            for old, new, key in zip(parts[:2], (new_w, new_m), keys, strict=True):
                if old.dtype == torch.bfloat16:
                    new = round_stochastically(new.flatten(), key, number * at_once * w.numel()).view_as(old)
                new = new.to(old.dtype)
                old.copy_(new if self.found_inf is None else torch.where(self.found_inf != 0, old, new))
        if self.found_inf is not None:  # a step that was skipped is none
            step.sub_(self.found_inf)


class StepInBackward:
    """Takes an optimizer's steps in the backward: each parameter's as soon as its gradient is complete, which it frees.

    One backward must make whole gradients; their norm is known when it has ended, and nothing can be clipped by it. A
    gradient that is not finite stops the step: its parameter and those whose gradients follow stay as they are.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.norms = dict.fromkeys(model.parameters())
        self.stopped = None
        for p in self.norms:
            p.register_post_accumulate_grad_hook(self.arrived)

    def begin(self, lr: float, sound: Tensor) -> None:
        """Before the backward. Nothing is changed where `sound` is False."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.norms = dict.fromkeys(self.norms)
        self.stopped = ~sound

    def arrived(self, p: Tensor) -> None:
        norm = self.norms[p] = grad_norm([p.grad])
        self.stopped = self.stopped | ~norm.isfinite()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, self.stopped.float()
        self.optimizer.step()  # no other parameter has a gradient now
        p.grad = None

    def norm(self) -> Tensor:
        """Of all gradients of the last backward."""
        return grad_norm([norm for norm in self.norms.values() if norm is not None])


def bytes_per_weight(kind: str, master: str, gradients: bool = True) -> int:
    """Of a matrix: the weight, its gradient, and the optimizer's state."""
    size = 4 if master == "fp32" else 2
    return (1 + gradients) * size + dict(adamw=8, adamw8bit=2, muon=size)[kind]


def clipped_step(optimizer: torch.optim.Optimizer, lr: float, norm: Tensor, limit: float, sound: Tensor) -> None:
    """A step with gradients scaled so that `norm`, that of all, is at most `limit`, 0: as they are. None where `sound`
    is False."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1) if limit else None
    optimizer.found_inf = (~sound).float()
    optimizer.step()
