"""Compile the units of a network; also their pass with dual numbers, of which torch.compile knows nothing."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from turbodiffusion.attention import SparseLinearAttention

Compiler = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
Tangents = list[Tensor | None]
Graph = Callable[[dict[str, Tensor], list[object], Tangents], tuple[Tensor, Tensor]]


def compile_units(units: Iterable[nn.Module], compiler: Compiler, *, tangents: bool = True) -> None:
    """Have each unit run as compiled code, whatever its inputs carry; compiler: torch.compile, with options.

    Units of one class must differ in nothing but their weights: they share the graphs of their tangents.
    Sparse-linear attention passes tangents uncompiled, as tangents=False has all units do: its kernels are
    not all operators that can be traced.
    """
    shared: dict[type, Tangent] = {}
    for unit in units:
        is_sparse = any(isinstance(module, SparseLinearAttention) for module in unit.modules())
        if tangents and type(unit) not in shared and not is_sparse:
            # before its forward is replaced; without memory, to be called with the weights of any unit
            shared[type(unit)] = Tangent(deepcopy(unit).to("meta"), compiler)
        unit.forward = _Compiled(unit, unit.forward, compiler(unit.forward), shared.get(type(unit)))


@dataclass(frozen=True)
class Tangent:
    """The forward-mode derivative of a unit as a graph of plain tensors, made and compiled when first needed.

    Forward-mode rules run while the graph is traced, so what is compiled are their ordinary operators.
    """

    unit: nn.Module
    compiler: Compiler
    graphs: dict[object, Graph] = field(default_factory=dict)

    def __call__(self, weights: dict[str, Tensor], args: tuple[object, ...]) -> Tensor:
        """The unit's answer to args, of which some carry tangents, as a dual number."""
        flat, structure = tree_flatten(args)
        pairs = [unpack_dual(x) if isinstance(x, Tensor) else (x, None) for x in flat]
        primals, tangents = (list(each) for each in zip(*pairs, strict=True))
        key = structure, *(_signature(x) for x in (*primals, *tangents))
        if key not in self.graphs:

            def derive(
                weights: dict[str, Tensor], primals: list[object], tangents: Tangents
            ) -> tuple[Tensor, Tensor]:
                duals = [x if t is None else make_dual(x, t) for x, t in zip(primals, tangents, strict=True)]
                out = functional_call(self.unit, weights, tree_unflatten(duals, structure))
                return tuple(unpack_dual(out))

            graph = make_fx(derive)(weights, primals, tangents)
            # questions that the rules asked of shapes, which torch.compile does not take
            graph.graph.eliminate_dead_code()
            graph.recompile()
            self.graphs[key] = self.compiler(graph)
        return make_dual(*self.graphs[key](weights, primals, tangents))


@dataclass(frozen=True)
class _Compiled:
    """A unit's forward."""

    unit: nn.Module
    eager: Callable[..., Tensor]
    compiled: Callable[..., Tensor]
    tangent: Tangent | None

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        given = tree_flatten((args, kwargs))[0]
        if all(unpack_dual(x).tangent is None for x in given if isinstance(x, Tensor)):
            return self.compiled(*args, **kwargs)
        if self.tangent is None:
            return self.eager(*args, **kwargs)
        assert not kwargs
        return self.tangent(dict(self.unit.named_parameters()), args)


def _signature(x: object) -> object:
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x
