"""Optimizers: AdamW with Ling 2.0's betas (0.9, 0.95) and weight decay on matrices, 8-bit AdamW, and
Muon.

Each is one torch.optim.Optimizer whose `step` never waits for the device. As with torch's fused optimizers, two
attributes are scalars on the device: grad_scale divides the gradients, and a found_inf other than 0 makes the step
change nothing.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_functional

from ..nn.fp8_cache import cache_of
from ..ops.adamw_8bit import BLOCK, Moments, adamw_8bit, round_stochastically, rounding_keys, seeds
from ..ops.grad_norm import grad_norm
from ..parallel.sharded import adamw_8bit_moments, is_sharded, local, shard_index
from ..parallel.whole import Stepped

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
OF_WHOLE = ("adamw8bit", "muon")  # whose state is of whole matrices
MASTERS = ("fp32", "bf16")
BETAS, EPS = (0.9, 0.95), 1e-8
EMBEDDINGS = ("word_embeddings", "lm_head")  # most of their rows have no gradient in a step
SHARD_SEEDS = 0x9E3779B1  # distance between the seeds of a parameter's shards
MUON_SEEDS = 1 << 20  # distance between the seeds of AdamW's parameters and those of Muon's
CHUNK = 1 << 22  # elements that Muon holds in fp32 at a time, at least one matrix


def make_optimizer(
    model: nn.Module | Stepped, kind: str, lr: float, weight_decay: float, seed: int = 0
) -> torch.optim.Optimizer:
    """An optimizer of a kind in OPTIMIZERS over all parameters that are not frozen. seed is for stochastic rounding."""
    if kind == "adamw":
        return adamw(model, lr, weight_decay)
    if kind == "adamw8bit":
        return AdamW8bit(by_decay(model.parameters(), weight_decay), lr, seed, fp32_moments=embeddings(model))
    return MuonAdamW(model, lr, weight_decay, seed)


def adamw(model: nn.Module | Stepped, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """torch's fused AdamW. Parameters with two or more dimensions decay, embedding, head and router included (as in
    Megatron); norms, which are vectors, do not. The experts' bias is not a parameter."""
    return torch.optim.AdamW(by_decay(model.parameters(), weight_decay), lr=lr, betas=BETAS, eps=EPS, fused=True)


def by_decay(parameters, weight_decay: float) -> list[dict]:
    parameters = [p for p in parameters if p.requires_grad]
    return [
        dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=weight_decay),
        dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0),
    ]


def embeddings(model: nn.Module | Stepped) -> list[nn.Parameter]:
    """Embedding and head, whose moments 8-bit AdamW keeps in fp32.

    A block of 256 moments has one scale, and a token's row has gradients of very different sizes from step to step.
    """
    return [p for name, p in model.named_parameters() if any(part in name for part in EMBEDDINGS)]


def to_masters(model: nn.Module, kind: str) -> None:
    """Give the weights the precision that the optimizer updates, in place. "bf16" converts matrices, embedding and head
    included; vectors and the router stay fp32.

    These are 0.1 % of Ling-mini. The router computes in fp32 anyway, and norm weights are near 1, where bf16's steps
    are 0.4 to 0.8 %.
    """
    if kind == "bf16":
        for name, p in model.named_parameters():
            if p.ndim >= 2 and not name.endswith("router.weight"):
                p.data = p.data.bfloat16()


class DeviceOptimizer(torch.optim.Optimizer):
    """Base of the optimizers here: `step` runs the closure, then `update`; a loaded state keeps its precisions."""

    grad_scale = found_inf = None
    copied: tuple[str, ...] = ()  # further attributes of a copy

    def __getstate__(self) -> dict:
        """What copy.deepcopy and pickle take: torch's own method leaves out what a subclass adds."""
        return super().__getstate__() | {name: self.__dict__[name] for name in self.copied}

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Load copies of the states as they are. torch's own method casts them to the parameter's precision, and shares
        tensors that need no cast."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = value.to(p.device, copy=True)


class AdamW8bit(DeviceOptimizer):
    """AdamW with 8-bit moments for matrices, and fp32 moments for vectors and the matrices `fp32_moments`. bf16
    parameters are rounded stochastically; the random bits depend on the seed and on the parameter's place in its group.
    Moments that were loaded keep their precision.

    A parameter's FP8 copy, where nn.fp8 keeps one, is requantised in the same pass if it is up to date.
    State of parameters that FSDP2 has sharded is sharded alike (parallel/sharded.py). Results are those of an
    unsharded run to the bit, except for stochastic rounding, whose random bits differ between shards.
    """

    copied = "seed", "seeds", "fp32_moments"

    def __init__(
        self, groups, lr: float, seed: int = 0, betas=BETAS, eps: float = EPS, weight_decay: float = 0.0,
        fp32_moments: Iterable[Tensor] = (),
    ):  # fmt: skip
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.seed, self.seeds, self.fp32_moments = seed, {}, frozenset(fp32_moments)

    @property
    def raises_version(self) -> bool:
        """Whether a step raises the versions of the weights that the forward uses. Not with sharded parameters: FSDP2
        gathers the whole ones into other tensors."""
        return not any(is_sharded(p) for group in self.param_groups for p in group["params"])

    def update(self) -> None:
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            self.step_matrices([p for p in params if p.ndim >= 2], group, number)
            self.step_vectors([p for p in params if p.ndim < 2], group)
            torch.autograd.graph.increment_version(params)
            for p in params:
                if (copy := cache_of(p)) is not None and copy.written:
                    copy.mark_current(p)

    def step_matrices(self, params: list[Tensor], group: dict, number: int) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                zeros = adamw_8bit_moments(p, p in self.fp32_moments)
                self.state[p] = dict(step=torch.zeros((), device=p.device), **zeros)
        if number not in self.seeds:
            matrices = [p for p in group["params"] if p.ndim >= 2]
            group_seeds = seeds(len(matrices), self.seed + number, local(params[0]).device).unbind()
            self.seeds[number] = {
                p: seed + SHARD_SEEDS * shard_index(p) for p, seed in zip(matrices, group_seeds, strict=True)
            }
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, 1)
        copies = [cache_of(p) for p in params]
        pow2 = any(c is not None and c.pow2 for c in copies)
        for p, copy in zip(params, copies, strict=True):
            if copy is not None:
                copy.written = copy.pow2 == pow2 and copy.is_current(p)
        flat = [{k: local(t).view(-1) for k, t in self.state[p].items()} for p in params]
        moments = [Moments(*(state.get(name) for name in Moments._fields)) for state in flat]
        adamw_8bit(
            [local(p) for p in params], [local(p.grad) for p in params], moments,
            group["lr"], group["betas"], group["eps"], group["weight_decay"], torch.stack(steps),
            self.grad_scale, self.found_inf, torch.stack([self.seeds[number][p] for p in params]),
            [c.pair if c is not None and c.written else None for c in copies], pow2,
        )  # fmt: skip
        if self.found_inf is not None:  # a skipped step does not count
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


class MuonAdamW(DeviceOptimizer):
    """torch.optim.Muon for the matrices of the layers, each expert's on its own, and AdamW for embedding, head, routers
    and vectors. Muon's updates are scaled to AdamW's size (arXiv 2502.16982), so both use one learning rate.

    Muon computes in fp32; bf16 matrices and momenta are rounded stochastically. With any bf16 parameter the AdamW is
    the 8-bit one. AdamW also takes the groups that are added later.
    """

    copied = "adamw", "seeds"

    def __init__(self, model: nn.Module | Stepped, lr: float, weight_decay: float, seed: int = 0):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        others = ("word_embeddings.weight", "lm_head.weight", "router.weight")
        hidden = [p for name, p in named.items() if p.ndim >= 2 and not name.endswith(others)]
        for_muon = {id(p) for p in hidden}
        rest = by_decay((p for p in named.values() if id(p) not in for_muon), weight_decay)
        super().__init__([dict(params=hidden, weight_decay=weight_decay), *rest], dict(lr=lr))
        if any(p.dtype == torch.bfloat16 for p in named.values()):
            self.adamw = AdamW8bit(self.param_groups[1:], lr, seed, fp32_moments=embeddings(model))
        else:
            self.adamw = torch.optim.AdamW(self.param_groups[1:], lr=lr, betas=BETAS, eps=EPS, fused=True)
        self.adamw.state = self.state
        self.seeds = seeds(2 * len(hidden), seed + MUON_SEEDS, hidden[0].device).view(-1, 2).unbind()

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        if "adamw" in self.__dict__:  # later than in __init__
            self.adamw.add_param_group(group | dict(weight_decay=group.get("weight_decay", 0.0)))
            self.param_groups[-1] = self.adamw.param_groups[-1]

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)  # replaces state and param_groups, which AdamW must go on sharing
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]

    def update(self) -> None:
        for p, seed in zip(self.param_groups[0]["params"], self.seeds, strict=True):
            if p.grad is not None:
                self.muon_step(p, seed)
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf
        self.adamw.step()

    def muon_step(self, p: Tensor, seed: Tensor) -> None:
        """p [N, K] or [E, N, K]; seed [2]: one for p, one for its momentum."""
        if not self.state[p]:
            self.state[p] = dict(step=torch.zeros((), device=p.device), momentum_buffer=torch.zeros_like(p))
        step = self.state[p]["step"].add_(1)
        keys = rounding_keys(seed, step)
        views = [t.view(-1, *t.shape[-2:]) for t in (p.detach(), self.state[p]["momentum_buffer"], p.grad)]
        matrix_size = views[0][0].numel()
        at_once = max(CHUNK // matrix_size, 1)
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
                    new = round_stochastically(new.flatten(), key, number * at_once * matrix_size).view_as(old)
                new = new.to(old.dtype)
                old.copy_(new if self.found_inf is None else torch.where(self.found_inf != 0, old, new))
        if self.found_inf is not None:  # a skipped step does not count
            step.sub_(self.found_inf)


class StepInBackward:
    """Takes the optimizer's steps during the backward: each parameter's as soon as its gradient is complete, and frees
    the gradient.

    The backward must produce whole gradients (one micro batch). The norm of all gradients is known only afterwards, so
    that nothing can be clipped by it. A gradient that is not finite stops the step: its parameter and those whose
    gradients come later do not change. `remove()` takes the hooks off the parameters, as garbage collection does.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.norms: dict[nn.Parameter, Tensor | None] = dict.fromkeys(p for p in model.parameters() if p.requires_grad)
        self.stopped: Tensor | None = None
        method = weakref.WeakMethod(self.on_gradient)  # a hook must not keep this alive
        hooks = [p.register_post_accumulate_grad_hook(lambda p: method()(p)) for p in self.norms]
        self.remove = weakref.finalize(self, lambda: [hook.remove() for hook in hooks])

    def begin(self, lr: float, take_step: Tensor) -> None:
        """Call before the backward. Nothing changes where `take_step`, a bool scalar on the device, is False."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.norms = dict.fromkeys(self.norms)
        self.stopped = ~take_step

    def on_gradient(self, p: Tensor) -> None:
        norm = self.norms[p] = grad_norm([p.grad])
        self.stopped = self.stopped | ~norm.isfinite()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, self.stopped.float()
        self.optimizer.step()  # no other parameter has a gradient now
        p.grad = None

    def norm(self) -> Tensor:
        """Norm of all gradients of the last backward."""
        return grad_norm([norm for norm in self.norms.values() if norm is not None])


def bytes_per_weight(kind: str, master: str, gradients: bool = True, embedding: bool = False) -> float:
    """Bytes for each element of a matrix, or of embedding and head: weight, gradient and optimizer state."""
    size = 4 if master == "fp32" else 2
    moments = dict(adamw=8, adamw8bit=2 * (1 + 4 / BLOCK), muon=size)[kind]  # codes and their share of a scale
    return (1 + gradients) * size + (8 if embedding else moments)  # both moments of `embeddings` are fp32


def clipped_step(optimizer: torch.optim.Optimizer, lr: float, norm: Tensor, limit: float, take_step: Tensor) -> None:
    """Step with gradients scaled down so that their norm, which is `norm`, is at most `limit`; 0: never scaled.

    Skips the step, on the device, where `take_step` (bool scalar) is False.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1) if limit else None
    optimizer.found_inf = (~take_step).float()
    optimizer.step()
