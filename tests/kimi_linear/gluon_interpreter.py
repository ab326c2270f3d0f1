# ruff: noqa: ARG001, ARG002, ARG004, ARG005 (signatures are Gluon's; layouts are not looked at)
"""Runs Gluon kernels on the CPU, as Triton's interpreter runs Triton's: every tensor a PyTorch tensor.

Layouts decide where a kernel keeps its numbers, and all that a layout must agree with is checked when the
kernel is compiled; here they are ignored, but for shuffles between lanes, whose meaning they give. Shared
memory starts as NaN.
"""

import contextlib
import importlib.util
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton.experimental
import triton.experimental.gluon.language.nvidia.hopper
import triton.language


def unwrap(x: Any) -> Any:
    """A constant's value, whether Triton's or ours."""
    return x.value if hasattr(x, "value") else x


class Constant:
    """`gl.constexpr`, as an annotation and as a value."""

    def __init__(self, value: Any) -> None:
        self.value = unwrap(value)


class Tensor:
    """A kernel's tensor or scalar, with Triton's promotion: a Python number takes the tensor's dtype."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> "Tensor":
        return Tensor(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def __getitem__(self, index: Any) -> "Tensor":
        return Tensor(self.data[index])

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __neg__(self) -> "Tensor":
        return Tensor(-self.data)


def both(x: Any, y: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = unwrap(x), unwrap(y)
    x, y = getattr(x, "data", x), getattr(y, "data", y)
    if not isinstance(x, torch.Tensor):
        x = torch.as_tensor(x, dtype=number_dtype(x, y))
    if not isinstance(y, torch.Tensor):
        y = torch.as_tensor(y, dtype=number_dtype(y, x))
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def number_dtype(number: Any, other: Any) -> torch.dtype | None:
    if not isinstance(other, torch.Tensor):
        return None
    return torch.float32 if isinstance(number, float) and not other.is_floating_point() else other.dtype


def add_operators() -> None:
    operations = {
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "truediv": torch.true_divide,
        "floordiv": torch.floor_divide,
        "mod": torch.remainder,
        "and": torch.bitwise_and,
        "xor": torch.bitwise_xor,
        "lt": torch.lt,
        "le": torch.le,
        "gt": torch.gt,
        "ge": torch.ge,
        "eq": torch.eq,
    }

    def define(name: str, operation: Any) -> None:
        def forwards(self: Tensor, other: Any) -> Any:
            if isinstance(other, Pointer):
                return other + self
            return Tensor(operation(*both(self, other)))

        setattr(Tensor, f"__{name}__", forwards)
        setattr(Tensor, f"__r{name}__", lambda self, other: Tensor(operation(*both(other, self))))

    for name, operation in operations.items():
        define(name, operation)


class Pointer:
    """A place, or a tensor of places, in a PyTorch tensor's memory."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory = memory.view(-1)
        self.offset = offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, Tensor(torch.add(*both(self.offset, offset))))


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def store(self, x: Tensor) -> None:
        assert tuple(self.data.shape) == x.shape
        assert self.data.dtype == x.data.dtype
        self.data.copy_(x.data)

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.data.clone())

    def index(self, index: Any) -> "Shared":
        return Shared(self.data[int(getattr(index, "data", index))])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        assert start % length == 0, "Gluon takes aligned slices only"
        return Shared(self.data.narrow(dim, start, length))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "Shared":
        return Shared(self.data.view(dtype).view(shape))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order))


class Language(types.ModuleType):
    """`triton.experimental.gluon.language`, and as much of `triton.language` as kernels share."""

    constexpr = Constant
    float32, bfloat16, int32, int64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
    static_range = range

    def __init__(self) -> None:
        super().__init__("gluon_language")
        self.programs: tuple[int, ...] = (0, 0)
        for name in (
            "BlockedLayout",
            "SliceLayout",
            "DotOperandLayout",
            "NVMMADistributedLayout",
            "NVMMASharedLayout",
            "SwizzledSharedLayout",
        ):
            setattr(self, name, lambda *arguments, **options: None)

    @staticmethod
    def DistributedLinearLayout(**bases: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(**bases)

    def program_id(self, axis: int) -> Tensor:
        return Tensor(torch.tensor(self.programs[axis]))

    @staticmethod
    def arange(start: int, end: int, layout: Any = None) -> Tensor:
        return Tensor(torch.arange(start, end))

    @staticmethod
    def full(shape: list[int], value: float, dtype: torch.dtype, layout: Any = None) -> Tensor:
        return Tensor(torch.full(shape, value, dtype=dtype))

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: Any = None) -> Tensor:
        return self.full(shape, 0, dtype)

    def zeros_like(self, x: Tensor) -> Tensor:
        return Tensor(torch.zeros_like(x.data))

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Tensor:
        return Tensor(torch.where(torch.as_tensor(getattr(condition, "data", condition)), *both(x, y)))

    @staticmethod
    def minimum(x: Any, y: Any) -> Tensor:
        return Tensor(torch.minimum(*both(x, y)))

    @staticmethod
    def maximum(x: Any, y: Any) -> Tensor:
        return Tensor(torch.maximum(*both(x, y)))

    @staticmethod
    def cdiv(x: Any, y: Any) -> Any:
        return (x + y - 1) // y

    @staticmethod
    def cast(x: Any, dtype: torch.dtype) -> Tensor:
        return Tensor(torch.as_tensor(getattr(x, "data", x)).to(dtype))

    @staticmethod
    def barrier() -> None:
        pass

    @staticmethod
    def exp2(x: Tensor) -> Tensor:
        return Tensor(x.data.exp2())

    @staticmethod
    def abs(x: Tensor) -> Tensor:
        return Tensor(x.data.abs())

    @staticmethod
    def rsqrt(x: Tensor) -> Tensor:
        return Tensor(x.data.rsqrt())

    @staticmethod
    def sum(x: Tensor, axis: int) -> Tensor:
        return Tensor(x.data.sum(axis))

    @staticmethod
    def reduce(x: Tensor, axis: int, combine: Callable) -> Tensor:
        parts = [Tensor(part) for part in x.data.unbind(axis)]
        result = parts[0]
        for part in parts[1:]:
            result = combine(result, part)
        return result

    @staticmethod
    def reshape(x: Tensor, shape: list[int]) -> Tensor:
        return Tensor(x.data.reshape(shape))

    @staticmethod
    def permute(x: Tensor, order: tuple[int, ...]) -> Tensor:
        return Tensor(x.data.permute(order))

    @staticmethod
    def expand_dims(x: Tensor, axis: int) -> Tensor:
        return Tensor(x.data.unsqueeze(axis))

    @staticmethod
    def broadcast(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(Tensor(t) for t in torch.broadcast_tensors(x.data, y.data))

    @staticmethod
    def join(x: Tensor, y: Tensor) -> Tensor:
        return Tensor(torch.stack((x.data, y.data), -1))

    @staticmethod
    def split(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(Tensor(t) for t in x.data.unbind(-1))

    @staticmethod
    def convert_layout(x: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
        return x

    @staticmethod
    def inline_asm_elementwise(text: str, constraints: str, inputs: list[Tensor], **options: Any) -> Tensor:
        """A move, or a shuffle: lane bits 2 to 4 are tokens of tiles [4, 16, 32], bits 0 and 1 those of
        [4, 16, 16]."""
        (x,) = inputs
        if text.startswith("mov"):
            return x
        lane = int(text.split(",")[2])
        axis, distance = (1, lane // 4) if x.shape[2] == 32 else (2, 2 * lane)
        token = torch.arange(16) ^ distance
        return Tensor(x.data.index_select(axis, token))

    @staticmethod
    def allocate_shared_memory(
        dtype: torch.dtype, shape: list[int], layout: Any, value: Tensor | None = None
    ) -> Shared:
        memory = Shared(torch.full(shape, math.nan, dtype=dtype))
        if value is not None:
            memory.store(value)
        return memory

    @staticmethod
    def load(at: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
        offset, inside = both(at.offset, 0)[0], torch.tensor(True) if mask is None else mask.data
        offset, inside = torch.broadcast_tensors(offset, inside)
        x = at.memory[torch.where(inside, offset, 0)]
        return Tensor(torch.where(inside, x, torch.full_like(x, other)))

    @staticmethod
    def store(at: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
        offset, inside = both(at.offset, 0)[0], torch.tensor(True) if mask is None else mask.data
        offset, inside, x = torch.broadcast_tensors(offset, inside, value.data)
        assert x.dtype == at.memory.dtype
        at.memory[offset[inside]] = x[inside]


def multiply_matrices(a: Any, b: Any, acc: Tensor, use_acc: bool = True, **options: Any) -> Tensor:
    """Both products of the matrix units, float32 operands cut to TF32 as they do."""
    x, y = (t.data for t in (a, b))
    if x.dtype == torch.float32:
        x, y = ((t.contiguous().view(torch.int32) & -8192).view(torch.float32) for t in (x, y))
    result = x.float() @ y.float()
    return Tensor(acc.data + result if use_acc else result)


def copy_to_shared(target: Shared, source: Pointer, mask: Tensor | None = None) -> None:
    target.store(LANGUAGE.load(source, mask))


LANGUAGE = Language()


def plain(scope: dict[str, Any]) -> dict[str, Any]:
    """Names with Triton's constants as numbers, so that arithmetic with them is ours."""
    return {name: unwrap(x) if isinstance(x, triton.language.constexpr) else x for name, x in scope.items()}


class Kernel:
    """What `gluon.jit` makes of a function: callable from kernels, and launchable over a grid."""

    def __init__(self, fn: Callable) -> None:
        scope = fn.__globals__
        if scope.get("gl") is not LANGUAGE:
            # A function of Triton's that Gluon compiles too.
            scope = {**plain(scope), "tl": LANGUAGE}
        self.fn = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, fn.__closure__)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.fn(*arguments, **options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*arguments: Any, **constants: Any) -> None:
            for option in ("num_warps", "maxnreg"):
                constants.pop(option, None)
            pointers = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            for programs in itertools.product(*map(range, grid)):
                LANGUAGE.programs = programs
                self.fn(*pointers, **constants)

        return launch


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Let modules imported inside see this interpreter where they import Gluon."""
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.jit = lambda fn=None, **_: Kernel if fn is None else Kernel(fn)  # type: ignore[attr-defined]
    gluon.language = LANGUAGE  # type: ignore[attr-defined]
    hopper = types.ModuleType("triton.experimental.gluon.language.nvidia.hopper")
    hopper.mma_v2 = hopper.warpgroup_mma = multiply_matrices  # type: ignore[attr-defined]
    hopper.fence_async_shared = lambda: None  # type: ignore[attr-defined]
    hopper.warpgroup_mma_wait = (  # type: ignore[attr-defined]
        lambda pending, deps: deps if len(deps) > 1 else deps[0]
    )
    hopper.async_copy = types.SimpleNamespace(  # type: ignore[attr-defined]
        async_copy_global_to_shared=copy_to_shared,
        commit_group=lambda: None,
        wait_group=lambda pending: None,
    )
    modules = {module.__name__: module for module in (gluon, hopper)}
    with mock.patch.dict(sys.modules, modules), mock.patch.object(triton.experimental, "gluon", gluon):
        yield


def load_interpreted(name: str) -> types.ModuleType:
    """A fresh copy of a module of kernels, whose Gluon is this interpreter."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with interpreted():
        spec.loader.exec_module(module)
    vars(module).update(plain(vars(module)))
    return module


def load_hopper_kernels() -> types.SimpleNamespace:
    """The Hopper kernels by name, from fresh copies of their modules, which use one another's."""
    kernels = {}
    with mock.patch.dict(sys.modules):
        for name in ("prepare_hopper", "gradient_hopper", "scan_hopper"):
            module = load_interpreted(f"kimi_linear.ops.triton.{name}")
            sys.modules[module.__name__] = module
            kernels[name] = getattr(module, f"{name}_kernel")
    return types.SimpleNamespace(**kernels)


add_operators()
