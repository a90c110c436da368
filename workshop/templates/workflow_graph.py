"""A graph as the templates describe it: nodes, links, and its form for ComfyUI's API."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ObjectInfo = Mapping[str, Mapping[str, Any]]

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


@dataclass(frozen=True)
class ModelFile:
    """A file that a loader needs.

    Attributes:
        name: of the file, as the loader lists it.
        folder: below ComfyUI's `models`.
        page: where it is offered; its files lie below `resolve/main` there.
        remark: what else a person should know about it, after a semicolon.
    """

    name: str
    folder: str
    page: str
    remark: str = ""

    @property
    def url(self) -> str:
        return f"{self.page}/resolve/main/{self.name}"


class Output(NamedTuple):
    """One output of a node, to be given as another node's input."""

    node: Node
    slot: int


@dataclass(frozen=True, eq=False)
class Node:
    """One node; its inputs are values or other nodes' outputs.

    Attributes:
        title: shown in place of the node's own name.
        models: the files it loads.
    """

    number: int
    kind: str
    title: str | None
    inputs: Mapping[str, Any]
    models: tuple[ModelFile, ...] = ()

    def out(self, slot: int = 0) -> Output:
        return Output(self, slot)


@dataclass
class Graph:
    """Nodes, numbered from 1 in the order in which they are added."""

    nodes: list[Node] = field(default_factory=list)

    def add(
        self,
        kind: str,
        title: str | None = None,
        /,
        models: tuple[ModelFile, ...] = (),
        **inputs: Any,
    ) -> Node:
        """Add a node. A node as an input's value means its first output."""
        given = {n: v.out() if isinstance(v, Node) else v for n, v in inputs.items()}
        node = Node(len(self.nodes) + 1, kind, title, given, models)
        self.nodes.append(node)
        return node


@dataclass(frozen=True)
class Subgraph:
    """Nodes of a graph that the editor shows as one.

    Attributes:
        name: of the subgraph and of its node.
        nodes: those inside, from left to right.
        inputs: what is shown outside, in order -> the inputs inside that it feeds. If these are
            linked, all have one source, which then feeds the subgraph; the others are left free.
        outputs: what is shown outside -> the output inside that it is.
    """

    name: str
    nodes: Sequence[Node]
    inputs: Mapping[str, Sequence[tuple[Node, str]]]
    outputs: Mapping[str, Output]


def schema_inputs(
    info: Mapping[str, Any], given: Collection[str] = ()
) -> Iterator[tuple[str, str, Mapping[str, Any], bool]]:
    """A node's inputs in the editor's order: name, type, options, whether it is optional.

    Args:
        given: names of what is connected. An input that grows has a socket more than these.
    """
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, ()):
            type_of, *rest = info["input"][kind][name]
            options = rest[0] if rest else {}
            if type_of == "COMFY_AUTOGROW_V3":
                yield from _grown(name, options["template"], given)
                continue
            if isinstance(type_of, list):
                type_of, options = "COMBO", {"default": next(iter(type_of), None), **options}
            yield name, type_of, options, kind != "required"


def _grown(
    group: str, template: Mapping[str, Any], given: Collection[str]
) -> Iterator[tuple[str, str, Mapping[str, Any], bool]]:
    """The sockets of an input that grows: those that are there at least, and one that is free."""
    names = [f"{group}.{name}" for name in template["names"]]
    if unknown := [name for name in given if name.startswith(f"{group}.") and name not in names]:
        raise ValueError(f"{group} does not grow to {', '.join(unknown)}")
    last = max((place for place, name in enumerate(names, 1) if name in given), default=0)
    ((kind, inputs),) = ((k, i) for k, i in template["input"].items() if i)
    ((type_of, options),) = inputs.values()
    for place, name in enumerate(names[: max(template["min"], last + 1)], 1):
        optional = kind == "optional" or place > template["min"]
        yield name, type_of, {**options, "label": name.rpartition(".")[2]}, optional


def input_values(node: Node, info: Mapping[str, Any]) -> dict[str, Any]:
    """What a node is given, widgets that nothing was said of with their defaults.

    Raises:
        ValueError: an input is unknown, or a required one is missing.
    """
    values: dict[str, Any] = {}
    for name, type_of, options, optional in schema_inputs(info, node.inputs):
        if name in node.inputs:
            values[name] = node.inputs[name]
        elif type_of in WIDGETS:
            values[name] = options["default"]
        elif not optional:
            raise ValueError(f"{node.kind}: nothing is connected to {name}")
    if unknown := node.inputs.keys() - values.keys():
        raise ValueError(f"{node.kind} has no input {', '.join(sorted(unknown))}")
    return values


def shown_title(node: Node, info: Mapping[str, Any]) -> str:
    return node.title or info["display_name"]


def api_form(graph: Graph, object_info: ObjectInfo) -> dict[str, Any]:
    """The graph as it is posted to ComfyUI's /prompt."""
    return {
        str(node.number): {
            "class_type": node.kind,
            "_meta": {"title": shown_title(node, object_info[node.kind])},
            "inputs": {
                name: [str(value.node.number), value.slot] if isinstance(value, Output) else value
                for name, value in input_values(node, object_info[node.kind]).items()
            },
        }
        for node in graph.nodes
    }
