"""From a finished trace to a `Program`: kernels, their parameters, results.

Knows which arguments a kernel uses and which of them nothing else writes. Does not know how the
trace was made.
"""

from __future__ import annotations

from typing import Any

from tilejit.errors import TraceError
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, VarKind, variables
from tilejit.ir.kernel import Kernel, Param, ParamKind, Program
from tilejit.ir.node import Body, walk
from tilejit.language.finish import finish_body, shape_variables, used_variables
from tilejit.language.handle import BufferHandle
from tilejit.language.hazards import check_filled, check_iterations
from tilejit.language.layout import check_views
from tilejit.language.schedule import check_schedules
from tilejit.language.trace import Trace
from tilejit.language.warps import check_roles
from tilejit.language.wgmma import check_multiplies


def make_program(
    host: Trace, result: Any, overlaps: dict[Expr, frozenset[str]], fast_math: bool
) -> Program:
    if not host.kernels:
        raise TraceError(
            f"`{host.name}` opens no kernel, so a call would do nothing.",
            span=host.span,
            hint="Put the work under `with T.Kernel(...) as ...:`.",
        )
    kernels = []
    for position, trace in enumerate(host.kernels):
        name = host.name if len(host.kernels) == 1 else f"{host.name}_{position}"
        kernels.append(_kernel(host, trace, name, overlaps, fast_math))
    results, returns_tuple = _results(host, result)
    return Program(
        name=host.name,
        kernels=tuple(kernels),
        arguments=tuple(host.arguments),
        outputs=tuple(host.outputs),
        results=results,
        returns_tuple=returns_tuple,
        span=host.span,
    )


def _results(host: Trace, result: Any) -> tuple[tuple[Buffer, ...], bool]:
    if result is None:
        return (), False
    items = list(result) if isinstance(result, tuple | list) else [result]
    known = [*host.outputs, *(a for a in host.arguments if isinstance(a, Buffer))]
    buffers = []
    for item in items:
        if not isinstance(item, BufferHandle) or item.buffer not in known:
            raise TraceError(
                f"`{host.name}` returns `{item!r}`, which is no tensor of the call.",
                span=host.span,
                hint="Return what T.empty made, or a tensor argument.",
            )
        buffers.append(item.buffer)
    return tuple(buffers), isinstance(result, tuple | list)


def _kernel(
    host: Trace,
    trace: Trace,
    name: str,
    overlaps: dict[Expr, frozenset[str]],
    fast_math: bool,
) -> Kernel:
    body = finish_body(trace.root.nodes)
    check_iterations(body)
    check_roles(trace, body)
    check_views(trace, body)
    body = check_multiplies(body)
    check_filled(body)
    kernel = Kernel(
        name=name,
        params=_params(host, trace, body, overlaps),
        grid=trace.grid,
        threads=trace.threads,
        is_free=trace.is_free,
        block_vars=trace.block_vars,
        thread_vars=trace.thread_vars,
        body=body,
        fast_math=fast_math,
        given=trace.given,
        cluster=trace.cluster,
        span=trace.span,
    )
    check_schedules(kernel)
    return kernel


def _params(
    host: Trace, trace: Trace, body: Body, overlaps: dict[Expr, frozenset[str]]
) -> tuple[Param, ...]:
    """The parameters the kernel uses: arguments in call order, outputs, symbols."""
    used = used_variables(body).union(*(variables(e) for e in trace.grid))
    tensors = [a for a in (*host.arguments, *host.outputs) if isinstance(a, Buffer)]
    # a parameter says what its tensor's shape is, where only views of it are used too
    used = used.union(*(shape_variables(b) for b in tensors if b.data in used))
    given = [a for a in host.arguments if isinstance(a, Buffer)]
    symbols = list(dict.fromkeys(v for b in given for v in shape_variables(b)))
    symbols = [v for v in symbols if v.kind is VarKind.SYMBOL]
    made = {v for b in host.outputs for v in shape_variables(b)}
    _check_symbols(trace, used | made, symbols)
    names: set[str] = set()
    params: list[Param] = []
    readable, shared = _noalias(tensors, body, overlaps)
    for item in (*host.arguments, *host.outputs, *symbols):
        var = item.data if isinstance(item, Buffer) else item
        assert isinstance(var, Var), f"{item} has no address"
        if var not in used:
            continue
        text, n = var.name, 0
        while text in names:
            n += 1
            text = f"{var.name}_{n}"
        names.add(text)
        is_tensor = isinstance(item, Buffer)
        params.append(
            Param(
                name=text,
                kind=ParamKind.TENSOR if is_tensor else _PARAM_KINDS[var.kind],
                var=var,
                buffer=item if isinstance(item, Buffer) else None,
                noalias=var in readable,
                overlaps=var in shared,
            )
        )
    return tuple(params)


_PARAM_KINDS = {
    VarKind.POINTER: ParamKind.POINTER,
    VarKind.SCALAR: ParamKind.SCALAR,
    VarKind.SYMBOL: ParamKind.SYMBOL,
}


def _check_symbols(trace: Trace, used: set[Var], symbols: list[Var]) -> None:
    for var in sorted(used, key=lambda v: v.serial):
        if var.kind is VarKind.SYMBOL and var not in symbols:
            raise TraceError(
                f"The symbol `{var.name}` stands in no argument's shape, so a call cannot know it.",
                span=trace.span,
                hint=f'Declare an argument with it: `A: T.Tensor(({var.name},), "float32")`.',
            )


def _noalias(
    tensors: list[Buffer], body: Body, overlaps: dict[Expr, frozenset[str]]
) -> tuple[set[Expr], set[Expr]]:
    """Addresses of tensors that are never written and share no byte with what is, and of those
    that share bytes with another one that is written."""
    written = {
        b.root.data for node in walk(body) for b in node.writes if b.root.scope is Scope.GLOBAL
    }
    own = {b.data for b in tensors if isinstance(b.data, Expr)}
    if written - own:  # through a raw pointer, which may point anywhere
        return set(), own
    changed = {b.name for b in tensors if b.data in written}
    result: set[Expr] = set()
    shared: set[Expr] = set()
    for b in tensors:
        assert isinstance(b.data, Var), f"{b.name} has no address"
        if changed & overlaps.get(b.data, frozenset()):
            shared.add(b.data)
        elif b.data not in written:
            result.add(b.data)
    return result, shared
