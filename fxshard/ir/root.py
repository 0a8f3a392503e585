"""A graph, and the tensors that it reads.

``fx.GraphModule`` makes attributes and Python code of the names of what its graph reads. These are the names of the
user's modules, which may be anything: keywords, quotes, ``code``, ``graph``. A :class:`Root` holds them as torch does,
in dicts, and runs its graph without generating code.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxshard.ir.info import copy_graph
from fxshard.ir.origins import branch_of
from fxshard.runtime.conditional import TAKEN
from fxshard.runtime.hidden_writes import HIDDEN, overwrite
from fxshard.runtime.module import find, is_word, place


class Root(nn.Module):
    """A graph over what it reads.

    Args:
        graph: the graph.
        attributes: the name by which it reads something -> the tensor, or the graph of a higher-order operator.
        title: the name of the model's class.
        non_persistent: names of buffers that are not part of the state dict.
    """

    def __init__(
        self, graph: fx.Graph, attributes: Mapping[str, Any], title: str, non_persistent: Collection[str] = ()
    ) -> None:
        super().__init__()
        self._graph, self._title, self._non_persistent = graph, title, frozenset(non_persistent)
        for name, value in attributes.items():
            place(self, name, value, name not in self._non_persistent)

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self._graph

    @property
    def title(self) -> str:
        """The name of the model's class."""
        return self._title

    def over(self, graph: fx.Graph) -> Root:
        """Another graph over the same tensors: those that it reads."""
        names = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr"))
        return Root(graph, {name: find(self, name) for name in names}, self._title, self._non_persistent)

    def as_graph_module(self) -> fx.GraphModule:
        """The same as torch has it, under names that Python can read."""
        graph, attributes, empty = copy_graph(self._graph), {}, fx.GraphModule({}, fx.Graph())
        for number, node in enumerate(graph.find_nodes(op="get_attr")):
            value, parts = find(self, str(node.target)), str(node.target).split(".")
            if not all(is_word(part) or part.isdecimal() for part in parts) or hasattr(empty, parts[0]):
                node.target = f"attribute_{number}"
            attributes[node.target] = value
        return fx.GraphModule(attributes, graph, class_name="GraphModule")

    def forward(self, *leaves: Any) -> Any:
        """Runs the graph."""
        return Interpreter(self).run(*leaves)


class Interpreter(fx.Interpreter):
    """Runs a graph whose names may be anything.

    Args:
        root: holds what the graph reads.
        graph: the graph; by default the root's own.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph | None = None, keep: bool = False) -> None:
        super().__init__(root, garbage_collect_values=not keep, graph=graph)

    @functools.cached_property
    def _decisions(self) -> dict[int, fx.Node]:
        """Branch -> what decides it."""
        return {node.args[3]: node.args[0] for node in self.graph.nodes if node.target is TAKEN}

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node, unless it is on a way that is not taken."""
        way = branch_of(n) if self._decisions else None
        if way is not None and bool(self.env[self._decisions[way[0]]]) != way[1]:
            return None
        if n.target is TAKEN:
            values: Any = self.map_nodes_to_values(n.args, n)
            decision, yes, no, _ = values
            return yes if decision else no
        if n.target is torch.ops.aten.copy_.default and n.meta.get(HIDDEN):
            target, value = map(self.env.__getitem__, n.all_input_nodes)
            return overwrite(target, value)
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """See ``fx.Interpreter.get_attr``."""
        return find(self.module, str(target))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """See ``fx.Interpreter.call_function``."""
        if target is torch.ops.aten.copy_.default and isinstance(args[0], nn.Parameter):
            return overwrite(*args)
        return super().call_function(target, args, kwargs)
