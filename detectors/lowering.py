"""Lowering TorchScript: a graph without loops and growing lists, which engines cannot convert."""

from __future__ import annotations

import io

import torch

# Each pass unrolls what the one before has made constant; the bundled RetinaNet needs five.
MOST_PASSES = 12
# What no engine converts.
UNWANTED = ("prim::Loop", "aten::append", "aten::insert")


def lowered(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A frozen copy that computes the same, with its loops unrolled where their length is known.

    Mutations become values of their own, lists of known length become their elements. It is what
    TorchBlade did with its graphs, too. Where the length of a loop depends on an input, it stays.

    Args:
        module: in eval mode; it is left as it is.
    """
    # A frozen copy of its own: freezing alone shares the graphs of functions.
    frozen = torch.jit.freeze(copied(module).eval())
    graph = frozen.graph
    before = ""
    for _ in range(MOST_PASSES):
        torch._C._jit_pass_inline(graph)
        torch._C._jit_pass_remove_mutation(graph)
        torch._C._jit_pass_peephole_list_idioms(graph, refine_list_len=True)
        torch._C._jit_pass_peephole(graph)
        torch._C._jit_pass_constant_propagation(graph)
        torch._C._jit_pass_constant_loop_unrolling(graph)
        torch._C._jit_pass_cse(graph)
        torch._C._jit_pass_dce(graph)
        after = str(graph)
        if after == before or not any(kind in after for kind in UNWANTED):
            break
        before = after
    return frozen


def copied(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """The module with parameters and graphs of its own."""
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)
