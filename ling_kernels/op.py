"""The tools of an op file: `@op` declares a launcher and chooses its kernel, `expect` checks arguments, and more.

A launcher writes into tensors that its caller allocated and returns nothing. Hence its schema names what it writes, its
fake kernel is empty, and one argument list serves Python, pybind11 and CUDA.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import backend as backends
from .errors import InputError, one_line

E4M3 = torch.float8_e4m3fn
NAMESPACE = "ling" if __package__ == "ling_kernels" else __package__  # the Hub kernel is a second copy of these files
KERNEL_FLOATS = (torch.float32, torch.bfloat16, torch.float16, E4M3)  # no kernel takes other floating-point numbers


def op(*writes: str, cuda: Callable[..., str | None] | bool = False, runs: str = "triton"):
    """Declare the launcher `fn(...) -> None`, which writes its arguments `writes`, as torch.ops.ling.<fn>.

    fn itself launches Triton kernels, unless `runs` is "cuda", where it calls csrc/ itself, or "torch": an eager
    reference, registered as an op because it reads values on the host, which a compiler cannot trace.

    cuda: which arguments csrc/'s launcher of the same name and argument list supports, on backend "cuda". A function of
    the arguments returns None for those that it supports, otherwise what it does not support, in words; then fn runs.
    True: it supports all arguments. False: csrc/ has no such launcher.
    """

    def declare(fn):
        name = fn.__name__
        written = [i for i, parameter in enumerate(inspect.signature(fn).parameters) if parameter in writes]

        @functools.wraps(fn)
        def launch(*args):
            args = with_dense_integers(args, written)
            use_csrc = cuda and backends.backend(first_tensor(args)) == "cuda"
            if use_csrc and (reason := reason_against(cuda, args)):
                report_fallback(name, reason, "Triton runs")
                use_csrc = False
            try:
                (getattr(backends._C, name) if use_csrc else fn)(*args)
            except Exception:
                if reason := backends.why_not_forced(first_tensor(args).device):
                    raise InputError(reason) from None
                raise

        registered = torch.library.custom_op(f"{NAMESPACE}::{name}", launch, mutates_args=writes)
        registered.register_fake(lambda *args: None)

        @functools.wraps(fn)
        def call(*args):
            if _choices is not None and runs != "torch":  # use_reference already recorded that one
                note_choice(name, *(("cuda", None) if runs == "cuda" else chosen(cuda, args)))
            # Compilers, fake tensors and selective checkpointing must see the op. Plain eager need not, and
            # would pay the dispatcher 30 us a call, more than many a kernel takes.
            if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
                registered(*args)
                return
            launch(*args)
            raise_version([args[i] for i in written])

        call.registered = registered
        return call

    return declare


def with_dense_integers(args: tuple, written: list[int]) -> tuple:
    """Kernels read offsets, slots and other integers one after another: those that lie otherwise are copied."""
    for i, a in enumerate(args):
        if isinstance(a, Tensor) and not a.is_contiguous() and not a.is_floating_point() and i not in written:
            args = (*args[:i], a.contiguous(), *args[i + 1 :])
    return args


def reason_against(cuda: Callable[..., str | None] | bool, args) -> str | None:
    """Why csrc/ does not support a launcher's arguments; None where it does."""
    unsupported = cuda(*args) if callable(cuda) else None
    return unsupported and f"csrc/ does not support {unsupported}"


def first_tensor(args) -> Tensor:
    return next(a for a in args if isinstance(a, Tensor))


def raise_version(tensors: list[Tensor | None]) -> None:
    """Tell autograd that these tensors changed, as an in-place operation of torch would.

    A backward that saved one before then raises, and a cached copy of a weight knows that it is stale.
    """
    torch.autograd.graph.increment_version([t for t in tensors if t is not None and not t.is_inference()])


def use_cuda(name: str, unsupported: str | None) -> bool:
    """Whether csrc/ runs op `name`, which has no Triton kernel of its own, on backend "cuda": unless `unsupported`
    says what it does not support. Then other ops compose the op, and the reason is reported."""
    if unsupported is None:
        return True
    fall_back(name, "composed of other ops", f"csrc/ does not support {unsupported}", "other ops compose it")
    return False


def use_reference(name: str, *tensors: Tensor | None, unsupported: str | None = None) -> bool:
    """Whether the eager torch reference of op `name` runs for `tensors`, of which the first decides the backend.

    It runs on backend "torch", for float64, and where `unsupported` says what no kernel supports.
    """
    if backends.backend(tensors[0]) == "torch":
        note_choice(name, "torch", "LING_BACKEND is torch" if backends._forced else "the tensors are on the CPU")
        return True
    unsupported = unsupported_dtype(tensors) or unsupported
    if unsupported is None:
        return False
    fall_back(name, "torch", f"no kernel supports {unsupported}", "the eager torch reference runs")
    return True


def fall_back(name: str, implementation: str, reason: str, instead: str) -> None:
    """Note for `explain`, and report, that `implementation` runs op `name` for that reason."""
    note_choice(name, "refused" if backends.strict() else implementation, reason)
    report_fallback(name, reason, instead)


def unsupported_dtype(tensors) -> str | None:
    floats = (t.dtype for t in tensors if t is not None and t.is_floating_point())
    return next((str(dtype).removeprefix("torch.") for dtype in floats if dtype not in KERNEL_FLOATS), None)


def report_fallback(name: str, reason: str, instead: str) -> None:
    """Warn once for each op and reason; raise where LING_BACKEND=cuda asks for csrc/ alone. Silent within `explain`."""
    if _choices is not None:
        return
    if backends.strict():
        raise ValueError(f"LING_BACKEND=cuda: {name}: {reason}")
    if (name, reason) not in _reported:
        _reported.add((name, reason))
        warnings.warn(f"{name}: {reason}; {instead}", stacklevel=4)


_reported = set()
# torch.compile calls it while it traces, and does not look inside.
report_fallback._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Choice(NamedTuple):
    """What `explain` tells of one launcher: its name, "cuda", "triton" or "torch", and why not the faster one.

    "refused" where LING_BACKEND=cuda makes the call raise.
    """

    name: str
    implementation: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.implementation}" + (f" ({self.reason})" if self.reason else "")


class Choices(tuple):
    """Choices in the order of the launches; printed, a line for each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


_choices: list[Choice] | None = None  # of the `explain` under way


def note_choice(name: str, implementation: str, reason: str | None = None) -> None:
    """Tell `explain`, where one is under way."""
    if _choices is not None:
        _choices.append(Choice(name, implementation, reason))


def chosen(cuda, args) -> tuple[str, str | None]:
    """The implementation for these arguments, and the reason where it is not csrc/'s."""
    if backends.backend(first_tensor(args)) != "cuda":
        return "triton", backends.why_not_cuda(first_tensor(args))
    reason = reason_against(cuda, args) if cuda else "csrc/ has no such kernel"
    return ("cuda", None) if reason is None else ("refused" if cuda and backends.strict() else "triton", reason)


def explain(fn: Callable, *args, **kwargs) -> Choices:
    """Which implementation of each kernel `fn(*args, **kwargs)` would run, and why not csrc/'s.

    `print(lk.explain(lk.route, logits, bias))`. fn is an op, a module or a function over them. Nothing is computed and
    no argument changes: fn runs on tensors without values, those of the FakeTensorMode that is active, if one is. Where
    a result requires a gradient, the launches of the backward follow. Returns one (name, implementation, reason) for
    each launcher or eager reference; some launchers start more than one kernel.
    """
    global _choices
    mode, before = detect_fake_mode() or FakeTensorMode(allow_non_fake_inputs=True), _choices

    def fake(t: Tensor) -> Tensor:
        return t if isinstance(t, FakeTensor) else mode.from_tensor(t.detach()).requires_grad_(t.requires_grad)

    args, kwargs = tree_map_only(Tensor, fake, (args, kwargs))
    _choices = []
    try:
        with mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = fn(*args, **kwargs)
            result = vars(result) if dataclasses.is_dataclass(result) else result
            outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
            if leaves := leaves_of(outputs):  # torch.autograd.backward would write the gradients of real parameters
                torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)
        return Choices(
            _choices
            or [Choice(getattr(fn, "__name__", type(fn).__name__), "torch", "it is made of torch's own operations")]
        )
    finally:
        _choices = before


def explaining() -> bool:
    """Whether `explain` runs: then caches must neither be read nor written."""
    return _choices is not None


def leaves_of(outputs: list[Tensor]) -> list[Tensor]:
    """The leaves of the autograd graph of `outputs`."""
    nodes, seen, leaves = [t.grad_fn for t in outputs], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return leaves


def rows_aligned(*tensors: Tensor | None) -> bool:
    """Whether the last dimension is dense and every row starts at a multiple of 16 bytes, which csrc/ loads at once."""
    for t in tensors:  # loops, since generators would take several times as long, and every launch asks
        if t is not None and not _rows_aligned(t):
            return False
    return True


def _rows_aligned(t: Tensor) -> bool:
    size, strides, shape = t.element_size(), t.stride(), t.shape
    if (t.storage_offset() * size if isinstance(t, FakeTensor) else t.data_ptr()) % 16:
        return False
    if strides and strides[-1] != 1 and shape[-1] != 1:
        return False
    for stride, n in zip(strides[:-1], shape, strict=False):
        if stride * size % 16 and n != 1:
            return False
    return True


def first_derivative_only(backward):
    """Decorate an autograd.Function's backward that has no derivative of its own, as one made of launchers.

    With create_graph=True it raises. torch's once_differentiable gives 0 where the incoming gradient is constant, and
    where a saved tensor is a copy of the input.
    """

    @functools.wraps(backward)
    def call(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("this op has no second derivative, which create_graph=True asks for")
        return backward(ctx, *grads)

    return call


def upcast(x: Tensor) -> Tensor:
    """x in the dtype references compute in: fp32, or fp64 when a test asks for the truth."""
    return x if x.dtype == torch.float64 else x.float()


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where torch.autocast is on, as torch's own matrix products would take them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t if t.dtype == torch.float64 else t.to(torch.get_autocast_dtype(device)) for t in tensors)


def expect(condition: bool, contract: str, *args) -> None:
    """Raise a ValueError that states the contract and what came instead."""
    if not condition:
        got = ", ".join(map(described, args))
        raise ValueError(one_line(f"expected {contract}; got {got}".replace("torch.", "")))


def described(value) -> str:
    """A tensor's dtype and shape, also inside tuples; other values as they print."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    return f"({', '.join(map(described, value))})" if isinstance(value, tuple) else repr(value)


def values_on_host(x: Tensor) -> bool:
    """Whether the host may look at x's values at no cost: x lies on a CPU, and nothing traces or fakes the call."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def few_calls_on_cpu(*tensors: Tensor | tuple) -> bool:
    """Whether the form of an op runs that a decode step on a CPU takes, where the calls of torch cost more than the
    arithmetic: fp32 (no FP8 pairs), no gradient, no autocast; nothing traces, and no backend is
    forced."""
    if torch.is_grad_enabled() or backends.forced():
        return False
    for t in tensors:
        if not isinstance(t, Tensor) or t.dtype != torch.float32 or not t.is_cpu or isinstance(t, FakeTensor):
            return False
    return not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of that GPU; a CPU, where kernels are only interpreted or built, stands for an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
