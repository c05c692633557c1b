"""Rewrites the syntax tree of a user's function so that tracing sees all of its statements.

Knows Python's syntax. Does not know what the calls it inserts do (`constructs`). Locations are
kept, so spans and tracebacks stay right; closures keep their cells.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import threading
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, TypeVar

from tilejit.errors import Span, TraceError
from tilejit.language import constructs
from tilejit.language.frames import MARK

_SCOPE = "__tilejit_scope__"
_FLAGS = 0x1FE0000  # compiler flags of `from __future__ import ...` (Lib/__future__.py)

_lock = threading.Lock()
_rewritten: dict[tuple[str, CodeType], CodeType] = {}


def rewrite(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its statements rewritten for tracing, decorators stripped.

    Raises:
        TraceError: no source, or a statement that no kernel can contain.
    """
    if not isinstance(fn, FunctionType):
        raise TraceError(
            f"{fn!r} is not a plain Python function.",
            hint="Trace a function defined with `def`.",
        )
    key = (fn.__code__.co_filename, fn.__code__)
    with _lock:
        code = _rewritten.get(key)
    if code is None:
        code = _rewrite_code(fn)
        with _lock:
            _rewritten[key] = code
    cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
    cells[MARK] = CellType(constructs)
    closure = tuple(cells[name] for name in code.co_freevars)
    fresh = FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, closure)
    fresh.__kwdefaults__ = fn.__kwdefaults__
    fresh.__qualname__ = fn.__qualname__
    return fresh


def _rewrite_code(fn: FunctionType) -> CodeType:
    definition = _parse(fn)
    tree = _Rewriter(fn, definition).module()
    flags = fn.__code__.co_flags & _FLAGS
    try:
        outer = compile(tree, fn.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    except SyntaxError as error:  # the user's own code compiled: blocks are nested too deep
        raise TraceError(
            f"`{fn.__name__}` cannot be traced: {error.msg}.",
            span=Span(fn.__code__.co_filename, error.lineno or 1, function=fn.__name__),
            hint="Python nests 20 blocks, and each `elif` is one more here: write an `if` for each "
            "case, or put some of the code in a @T.macro.",
        ) from None
    (wrapper,) = (c for c in outer.co_consts if isinstance(c, CodeType))
    (code,) = (
        c for c in wrapper.co_consts if isinstance(c, CodeType) and c.co_name == definition.name
    )
    code = _name_lambdas(code, fn.__name__)
    return code.replace(co_qualname=fn.__code__.co_qualname)


def _name_lambdas(code: CodeType, name: str) -> CodeType:
    """Let errors inside inserted lambdas name the user's function."""
    constants = tuple(
        _name_lambdas(c.replace(co_name=name), name)
        if isinstance(c, CodeType) and c.co_name == "<lambda>"
        else c
        for c in code.co_consts
    )
    return code.replace(co_consts=constants)


def _parse(fn: FunctionType) -> ast.FunctionDef:
    """The function's definition, with the line numbers of its file."""
    code = fn.__code__
    span = Span(code.co_filename, code.co_firstlineno, function=fn.__name__)
    lines = linecache.getlines(code.co_filename, fn.__globals__)
    if len(lines) < code.co_firstlineno:
        raise TraceError(
            f"The source of `{fn.__name__}` is not available, and tracing needs to read it.",
            span=span,
            hint="Define it in a file or a notebook cell, not through `exec`.",
        )
    block = inspect.getblock(lines[code.co_firstlineno - 1 :])
    text, shift = "".join(block), code.co_firstlineno - 1
    if block[0][:1].isspace():
        text, shift = f"if 1:\n{text}", shift - 1
    try:
        (top,) = ast.parse(text).body
    except (SyntaxError, ValueError):
        top = ast.Pass()
    if isinstance(top, ast.If):
        top = top.body[0]
    if isinstance(top, ast.AsyncFunctionDef):
        raise TraceError(f"`{fn.__name__}` is async, and a kernel cannot be.", span=span)
    if not isinstance(top, ast.FunctionDef) or _parameters(top) != _code_parameters(code):
        raise TraceError(
            f"The source of `{fn.__name__}` is not what was run: its file has changed, or it is "
            "a lambda.",
            span=span,
            hint="Define it with `def`, and import the module again after editing.",
        )
    ast.increment_lineno(top, shift)
    return top


def _parameters(definition: ast.FunctionDef) -> tuple[str, ...]:
    a = definition.args
    names = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return (definition.name, *(arg.arg for arg in names))


def _code_parameters(code: CodeType) -> tuple[str, ...]:
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return (code.co_name, *code.co_varnames[:count])


_NESTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def _inside(nodes: list[ast.stmt] | ast.AST, *stop: type[ast.AST]) -> Iterator[ast.AST]:
    """Every syntax node below, not looking into nested functions or nodes of class `stop`."""
    queue: list[ast.AST] = list(nodes) if isinstance(nodes, list) else [nodes]
    while queue:
        node = queue.pop()
        yield node
        if not isinstance(node, (*_NESTED, *stop)):
            queue.extend(ast.iter_child_nodes(node))


def _has_jump(body: list[ast.stmt]) -> str | None:
    """`break` or `continue` that belongs to the loop around `body`."""
    for node in _inside(body, ast.For, ast.While, ast.AsyncFor):
        if isinstance(node, ast.Break | ast.Continue):
            return type(node).__name__.lower()
        if isinstance(node, ast.For | ast.While):
            found = _has_jump(node.orelse)
            if found:
                return found
    return None


def _has_return(body: list[ast.stmt]) -> bool:
    return any(isinstance(n, ast.Return) for n in _inside(body))


def _stored_names(target: ast.AST) -> list[str]:
    """Names that an assignment to `target` binds."""
    return [
        n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    ]


def _display_names(target: ast.AST | None) -> ast.expr:
    """The names of a `for` or `with` target as a tuple of strings, () when it is not that."""
    names: list[str] = []
    parts = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
    if all(isinstance(p, ast.Name) for p in parts):
        names = [p.id for p in parts if isinstance(p, ast.Name)]
    return ast.Tuple([ast.Constant(n) for n in names], ast.Load())


_Syntax = TypeVar("_Syntax", bound=ast.AST)


def _at(node: _Syntax, origin: ast.AST) -> _Syntax:
    """A new syntax node, placed where `origin` stands."""
    ast.copy_location(node, origin)
    ast.fix_missing_locations(node)
    return node


def _call(function: str, *args: ast.expr) -> ast.Call:
    """`__tilejit__.function(*args)`."""
    return ast.Call(ast.Attribute(ast.Name(MARK, ast.Load()), function, ast.Load()), [*args], [])


def _scope(method: str, *args: ast.expr) -> ast.Call:
    """`__tilejit_scope__.method(*args)`."""
    return ast.Call(ast.Attribute(ast.Name(_SCOPE, ast.Load()), method, ast.Load()), [*args], [])


def _thunk(body: ast.expr) -> ast.expr:
    empty = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return ast.Lambda(empty, body)


def _bind(method: str, name: str) -> ast.stmt:
    """`name = scope.method("name", name)`."""
    value = _scope(method, ast.Constant(name), ast.Name(name, ast.Load()))
    return ast.Assign([ast.Name(name, ast.Store())], value)


class _Rewriter(ast.NodeTransformer):
    """Turns statements into calls of `constructs`; nested functions are left as they are."""

    def __init__(self, fn: FunctionType, definition: ast.FunctionDef) -> None:
        self.fn = fn
        self.definition = definition
        self.loops: list[tuple[str, str]] = []
        self.serial = 0
        self.hidden: list[set[str]] = []
        self.watched = {
            inner.id
            for node in _inside(definition.body)
            if isinstance(node, ast.For | ast.While | ast.If | ast.With | ast.Match)
            for inner in _inside(node)
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
        }

    def module(self) -> ast.Module:
        """A module with one function, whose parameters are the closure, around the definition."""
        definition, args = self.definition, self.definition.args
        names = list(_parameters(definition)[1:])
        body = [self.visit(s) for s in definition.body]
        arguments = ast.Dict(
            [ast.Constant(n) for n in names], [ast.Name(n, ast.Load()) for n in names]
        )
        start = ast.Assign([ast.Name(_SCOPE, ast.Store())], _call("Scope", arguments))
        flat = [s for part in body for s in (part if isinstance(part, list) else [part])]
        definition.body = [_at(start, definition), *flat]
        definition.decorator_list, definition.returns = [], None
        for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
            if arg is not None:
                arg.annotation = None
        args.defaults = [_at(ast.Constant(None), definition) for _ in args.defaults]
        args.kw_defaults = [
            _at(ast.Constant(None), definition) if d is not None else None for d in args.kw_defaults
        ]
        free = [*self.fn.__code__.co_freevars, MARK]
        (wrapper,) = ast.parse(f"def closure({', '.join(free)}): pass").body
        assert isinstance(wrapper, ast.FunctionDef), "not a function"
        wrapper.body = [definition]
        return ast.Module([_at(wrapper, definition)], [])

    def _refuse(self, node: ast.AST, what: str, hint: str) -> TraceError:
        span = Span(
            self.fn.__code__.co_filename,
            getattr(node, "lineno", self.definition.lineno),
            getattr(node, "col_offset", None),
            getattr(node, "end_lineno", None),
            getattr(node, "end_col_offset", None),
            self.fn.__name__,
        )
        return TraceError(f"{what} cannot be traced.", span=span, hint=hint)

    # -- nested scopes ------------------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Nonlocal | ast.Global):
                self.visit(inner)  # refuses
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> Any:
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        a = node.args
        names = {x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)}
        names |= {x.arg for x in (a.vararg, a.kwarg) if x is not None}
        return self._hiding(names, node)

    def _comprehension(self, node: Any) -> Any:
        return self._hiding({n for g in node.generators for n in _stored_names(g.target)}, node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def _hiding(self, names: set[str], node: ast.AST) -> ast.AST:
        """Visit below `node`, where `names` mean other variables."""
        self.hidden.append(names)
        result = self.generic_visit(node)
        self.hidden.pop()
        return result

    # -- names ----------------------------------------------------------------------------------

    def visit_Name(self, node: ast.Name) -> Any:
        is_hidden = any(node.id in names for names in self.hidden)
        if not isinstance(node.ctx, ast.Load) or node.id not in self.watched or is_hidden:
            return node
        return _at(_scope("read", ast.Constant(node.id), node), node)

    def _value(self, value: ast.expr) -> ast.expr:
        """The right side of an assignment; a bare name copies a device variable."""
        if isinstance(value, ast.Tuple):
            elements = [self._value(e) for e in value.elts]
            return _at(ast.Tuple(elements, ast.Load()), value)
        visited: ast.expr = self.visit(value)
        return _at(_call("value_of", visited), value) if isinstance(value, ast.Name) else visited

    def visit_Assign(self, node: ast.Assign) -> Any:
        value = self._value(node.value)
        if len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            node.value = _at(_scope("bind", ast.Constant(name), value), node)
            return node
        names = [n for t in node.targets for n in _stored_names(t)]
        node.targets = [self.visit(t) for t in node.targets]
        node.value = value
        return [node, *(_at(_bind("bind", n), node) for n in names)]

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        owner = node.value
        if not isinstance(owner, ast.Name) or isinstance(node.ctx, ast.Load):
            return self.generic_visit(node)
        value = _scope("container", ast.Constant(owner.id), self.visit(owner))
        return _at(ast.Subscript(_at(value, owner), self.visit(node.slice), node.ctx), node)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        if not isinstance(node.target, ast.Name):
            return self.generic_visit(node)
        name = node.target.id
        old = self.visit(_at(ast.Name(name, ast.Load()), node.target))
        result = _call("inplace", ast.Constant(type(node.op).__name__), old, self.visit(node.value))
        value = _scope("bind", ast.Constant(name), _at(result, node))
        return _at(ast.Assign([ast.Name(name, ast.Store())], value), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is None:
            return self._declared(node)
        if not isinstance(node.target, ast.Name):
            node.value = self.visit(node.value)
            return node
        name = node.target.id
        value = _call("annotated", self._value(node.value), _thunk(node.annotation))
        value = _scope("bind", ast.Constant(name), _at(value, node))
        return _at(ast.Assign([ast.Name(name, ast.Store())], value), node)

    def _declared(self, node: ast.AnnAssign) -> ast.stmt:
        """`A: T.Tensor(...)` alone says what a parameter is; of other names it says nothing."""
        target = node.target
        if not isinstance(target, ast.Name) or target.id not in _parameters(self.definition)[1:]:
            return node
        known = ast.Name(target.id, ast.Load())
        value = _call("declare", ast.Constant(target.id), known, _thunk(node.annotation))
        return _at(ast.Expr(_at(value, node.annotation)), node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Any:
        value = _scope("bind", ast.Constant(node.target.id), self.visit(node.value))
        return _at(ast.NamedExpr(node.target, value), node)

    # -- expressions ----------------------------------------------------------------------------

    def _is_pure(self, *parts: ast.AST) -> bool:
        """False where a lambda would change the meaning of `:=`."""
        return not any(isinstance(n, ast.NamedExpr) for p in parts for n in _inside(p))

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        if not self._is_pure(*node.values[1:]):
            first = _call("host_test", self.visit(node.values[0]), ast.Constant(":="))
            rest = [self.visit(v) for v in node.values[1:]]
            return _at(ast.BoolOp(node.op, [first, *rest]), node)
        first, *others = (self.visit(v) for v in node.values)
        name = "and_" if isinstance(node.op, ast.And) else "or_"
        return _at(_call(name, first, *map(_thunk, others)), node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        operand = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return _at(_call("not_", operand), node)
        return _at(ast.UnaryOp(node.op, operand), node)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        test, a, b = self.visit(node.test), self.visit(node.body), self.visit(node.orelse)
        if not self._is_pure(node.body, node.orelse):
            test = _at(_call("host_test", test, ast.Constant(":=")), node)
            return _at(ast.IfExp(test, a, b), node)
        return _at(_call("ternary", test, _thunk(a), _thunk(b)), node)

    def visit_Compare(self, node: ast.Compare) -> Any:
        if len(node.ops) == 1 or not self._is_pure(*node.comparators):
            return self.generic_visit(node)
        links: list[ast.expr] = [
            ast.Tuple([ast.Constant(type(op).__name__), _thunk(self.visit(right))], ast.Load())
            for op, right in zip(node.ops, node.comparators, strict=True)
        ]
        return _at(_call("chain", self.visit(node.left), *links), node)

    def visit_Yield(self, node: ast.Yield) -> Any:
        raise self._refuse(node, "`yield`", "A kernel function runs to its end.")

    def visit_YieldFrom(self, node: ast.YieldFrom) -> Any:
        raise self._refuse(node, "`yield from`", "A kernel function runs to its end.")

    def visit_Await(self, node: ast.Await) -> Any:
        raise self._refuse(node, "`await`", "A kernel function runs to its end.")

    # -- statements -----------------------------------------------------------------------------

    def _block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        for statement in body:
            visited = self.visit(statement)
            result.extend(visited if isinstance(visited, list) else [visited])
        return result

    def _fresh(self, hint: str) -> str:
        self.serial += 1
        return f"__tilejit_{hint}_{self.serial}__"

    def visit_If(self, node: ast.If) -> Any:
        test = self.visit(node.test)
        both = [*node.body, *node.orelse]
        escape = _has_jump(both) or ("return" if _has_return(both) else None)
        if escape:
            test = _at(_call("host_test", test, ast.Constant(escape)), node.test)
            return _at(ast.If(test, self._block(node.body), self._block(node.orelse)), node)
        which = self._fresh("branch")
        rounds = _at(_call("branches", test, ast.Constant(bool(node.orelse))), node.test)
        inner = ast.If(
            ast.Name(which, ast.Load()), self._block(node.body), self._block(node.orelse)
        )
        loop = ast.For(ast.Name(which, ast.Store()), rounds, [_at(inner, node)], [])
        return _at(loop, node)

    def visit_While(self, node: ast.While) -> Any:
        test = self.visit(node.test)
        around, body_frame = self._fresh("around"), self._fresh("body")
        self.loops.append((around, body_frame))
        body = self._block(node.body)
        self.loops.pop()
        orelse = self._block(node.orelse)
        if not self._is_pure(node.test):
            test = _at(_call("host_test", test, ast.Constant(":=")), node.test)
            loop: ast.stmt = ast.While(test, body, orelse)
        else:
            rounds = _at(_call("loop_while", _thunk(test)), node.test)
            loop = ast.For(ast.Name(self._fresh("round"), ast.Store()), rounds, body, orelse)
        return self._framed(node, loop, around, body_frame, _has_jump(node.body))

    def visit_For(self, node: ast.For) -> Any:
        source = node.iter
        is_range = (
            isinstance(source, ast.Call)
            and isinstance(source.func, ast.Name)
            and source.func.id == "range"
        )
        visited = self.visit(source)
        if is_range and isinstance(visited, ast.Call):
            visited.func = _at(_call("loop_range", visited.func), source)
        rounds = _at(_call("iterate", visited, _display_names(node.target)), source)
        around, body_frame = self._fresh("around"), self._fresh("body")
        names = _stored_names(node.target)
        self.loops.append((around, body_frame))
        body = [*(_at(_bind("target", n), node.target) for n in names), *self._block(node.body)]
        self.loops.pop()
        loop = ast.For(self.visit(node.target), rounds, body, self._block(node.orelse))
        return self._framed(node, loop, around, body_frame, _has_jump(node.body))

    def _framed(
        self, node: ast.stmt, loop: Any, around: str, body_frame: str, jumps: str | None
    ) -> list[ast.stmt]:
        """The loop, remembering its frames when a `break` or `continue` needs them."""
        if not jumps:
            return [_at(loop, node)]
        inner = ast.Assign([ast.Name(body_frame, ast.Store())], _call("frame"))
        outer = ast.Assign([ast.Name(around, ast.Store())], _call("frame"))
        loop.body.insert(0, _at(inner, node))
        return [_at(outer, node), _at(loop, node)]

    def visit_AsyncFor(self, node: ast.AsyncFor) -> Any:
        raise self._refuse(node, "`async for`", "Use a plain `for`.")

    def _jump(self, node: ast.stmt) -> Any:
        around, body_frame = self.loops[-1]
        check = _call(
            "jump",
            ast.Constant(type(node).__name__.lower()),
            ast.Name(body_frame, ast.Load()),
            ast.Name(around, ast.Load()),
        )
        return [_at(ast.Expr(_at(check, node)), node), node]

    visit_Break = visit_Continue = _jump

    def visit_With(self, node: ast.With) -> Any:
        names: list[str] = []
        for item in node.items:
            target = item.optional_vars
            expression = item.context_expr
            unpacks = isinstance(target, ast.Tuple | ast.List) and len(target.elts) == 1
            entered = _call(
                "context",
                self.visit(expression),
                _display_names(target),
                ast.Constant(unpacks),
            )
            item.context_expr = _at(entered, expression)
            if target is not None:
                names += _stored_names(target)
                item.optional_vars = self.visit(target)
        binds = [_at(_bind("target", n), node.items[0].context_expr) for n in names]
        node.body = [*binds, *self._block(node.body)]
        return node

    def visit_AsyncWith(self, node: ast.AsyncWith) -> Any:
        raise self._refuse(node, "`async with`", "Use a plain `with`.")

    def _try(self, node: Any) -> Any:
        refuse = ast.Expr(_at(_call("refuse_in_kernel", ast.Constant("try")), node))
        node.body = self._block(node.body)
        for handler in node.handlers:
            handler.body = self._block(handler.body)
        node.orelse = self._block(node.orelse)
        node.finalbody = self._block(node.finalbody)
        return [_at(refuse, node), node]

    visit_Try = visit_TryStar = _try

    def visit_Return(self, node: ast.Return) -> Any:
        value = self._value(node.value) if node.value is not None else ast.Constant(None)
        return _at(ast.Return(_at(_scope("leave", value), node)), node)

    def visit_Assert(self, node: ast.Assert) -> Any:
        node.test = _at(
            _call("host_test", self.visit(node.test), ast.Constant("assert")), node.test
        )
        if node.msg is not None:
            node.msg = self.visit(node.msg)
        return node

    def visit_Match(self, node: ast.Match) -> Any:
        node.subject = self.visit(node.subject)
        for case in node.cases:
            names = [
                name
                for p in ast.walk(case.pattern)
                for name in (getattr(p, "name", None), getattr(p, "rest", None))
                if name is not None
            ]
            if case.guard is not None:
                case.guard = self.visit(case.guard)
            binds = [_at(_bind("bind", n), case.pattern) for n in names]
            case.body = [*binds, *self._block(case.body)]
        return node

    def visit_Global(self, node: ast.Global) -> Any:
        raise self._refuse(
            node, f"`global {', '.join(node.names)}`", "Return the value or pass it in."
        )

    def visit_Nonlocal(self, node: ast.Nonlocal) -> Any:
        raise self._refuse(
            node, f"`nonlocal {', '.join(node.names)}`", "Return the value or pass it in."
        )
