"""Which global buffers may share memory.

Knows parameters, what the kernel writes and buffers made from addresses. Does not know indexes:
buffers that share any byte count as one.
"""

from __future__ import annotations

from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Var
from tilejit.ir.kernel import Kernel


class Aliases:
    """Of a kernel's buffers, for each the one that stands for all that may share its memory."""

    def __init__(self, kernel: Kernel) -> None:
        self._own = {p.var: p.buffer for p in kernel.params if p.buffer is not None}
        self._same = self._unknown(kernel)

    def of(self, buffer: Buffer) -> Buffer:
        own = self._tensor(buffer)
        return self._same.get(own, own)

    def _tensor(self, buffer: Buffer) -> Buffer:
        """The argument whose memory a buffer uses: its own, or that of a view of it."""
        root = buffer.root
        return self._own.get(root.data, root) if isinstance(root.data, Var) else root

    def _unknown(self, kernel: Kernel) -> dict[Buffer, Buffer]:
        """What the kernel writes, and what is not known to lie apart from it, mapped to one of
        them."""
        own = set(self._own.values())
        apart = {p.buffer for p in kernel.params if p.buffer is not None and p.noalias}
        overlapping = {p.buffer for p in kernel.params if p.overlaps}
        written = {self._tensor(b) for b in kernel.written}
        found = dict.fromkeys(self._tensor(b) for b in kernel.scoped(Scope.GLOBAL))
        shared = [b for b in found if b not in apart]
        # what is read, or made from an address, or written in two places
        unknown = [b for b in shared if b not in written or b not in own or b in overlapping]
        if not unknown or not any(b in written for b in shared):
            return {}
        first = next(b for b in shared if b in written)
        return dict.fromkeys(shared, first)
