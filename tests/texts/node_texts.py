"""The texts in the nodes' schemas, parsed from the source without importing ComfyUI.

    python tests/texts/node_texts.py     write them to locales/en/nodeDefs.json

The frontend prefers a locale's text to the schema's, so the English locale must be the same.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENGLISH = ROOT / "locales" / "en" / "nodeDefs.json"

Names = Mapping[str, Any]


@dataclass(frozen=True)
class Shared:
    """The functions and constants of `nodes/inputs.py`."""

    functions: Mapping[str, ast.FunctionDef]
    constants: Names


@dataclass(frozen=True)
class NodeTexts:
    """The texts of a node's schema.

    Attributes:
        inputs: name -> tooltip, in order.
        outputs: (name, tooltip), in order.
    """

    node_id: str
    display_name: str
    description: str
    inputs: Mapping[str, str]
    outputs: tuple[tuple[str, str], ...]


def node_texts() -> list[NodeTexts]:
    """All nodes of the pack, by file name."""
    inputs = _parsed(ROOT / "nodes" / "inputs.py")
    shared = Shared(
        {node.name: node for node in inputs.body if isinstance(node, ast.FunctionDef)},
        _constants(inputs),
    )
    return [
        node
        for path in sorted((ROOT / "nodes").glob("*.py"))
        for node in _nodes_of(_parsed(path), shared)
    ]


def english_locale() -> dict[str, Any]:
    """The nodes' texts in the format of a locale."""
    return {
        node.node_id: {
            "display_name": node.display_name,
            "description": node.description,
            "inputs": {n: {"name": n, "tooltip": tip} for n, tip in node.inputs.items()},
            "outputs": {
                str(index): {"name": name, "tooltip": tip}
                for index, (name, tip) in enumerate(node.outputs)
            },
        }
        for node in node_texts()
    }


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _constants(module: ast.Module) -> Names:
    return {
        target.id: statement.value.value
        for statement in module.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _nodes_of(module: ast.Module, shared: Shared) -> Iterator[NodeTexts]:
    constants = _constants(module)
    for call in ast.walk(module):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema":
            fields = {keyword.arg: keyword.value for keyword in call.keywords}
            inputs = [_slot(c, n, shared) for c, n in _calls(fields["inputs"], constants)]
            outputs = [_slot(c, n, shared) for c, n in _calls(fields["outputs"], constants)]
            yield NodeTexts(
                _value(fields["node_id"], constants),
                _value(fields["display_name"], constants),
                _value(fields["description"], constants),
                dict(inputs),
                tuple(outputs),
            )


def _calls(node: ast.expr, names: Names) -> Iterator[tuple[ast.Call, Names]]:
    """The calls in a list expression: elements, a sum of lists, or a comprehension."""
    if isinstance(node, ast.List):
        for element in node.elts:
            assert isinstance(element, ast.Call)
            yield element, names
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _calls(node.left, names)
        yield from _calls(node.right, names)
    elif isinstance(node, ast.ListComp) and isinstance(node.elt, ast.Call):
        (loop,) = node.generators
        assert isinstance(loop.target, ast.Name)
        for value in _value(loop.iter, names):
            yield node.elt, {**names, loop.target.id: value}
    else:
        raise AssertionError(f"cannot read {ast.unparse(node)}")


def _slot(call: ast.Call, names: Names, shared: Shared) -> tuple[str, str]:
    """Name and tooltip of an input or output."""
    if isinstance(call.func, ast.Name) and call.func.id in shared.functions:
        call, names = _returned(shared.functions[call.func.id], call, names, shared.constants)
    fields = {keyword.arg: keyword.value for keyword in call.keywords}
    name = call.args[0] if call.args else fields["display_name"]
    return _value(name, names), _value(fields["tooltip"], names)


def _returned(
    function: ast.FunctionDef, call: ast.Call, names: Names, constants: Names
) -> tuple[ast.Call, Names]:
    """The call that a function of shared inputs returns, with the values of its names."""
    (returned,) = (part for part in function.body if isinstance(part, ast.Return))
    assert isinstance(returned.value, ast.Call)
    parameters = [parameter.arg for parameter in function.args.args]
    defaults = function.args.defaults
    optional = dict(zip(parameters[len(parameters) - len(defaults) :], defaults, strict=True))
    values = {**constants, **{name: _value(node, constants) for name, node in optional.items()}}
    given = dict(zip(parameters, call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    # Only texts are evaluated; numbers may be any expression.
    texts = {name: node for name, node in given.items() if name in ("name", "tooltip")}
    return returned.value, {**values, **{n: _value(node, names) for n, node in texts.items()}}


def _value(node: ast.expr, names: Names) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return names[node.id]
        case ast.JoinedStr():
            return "".join(str(_value(part, names)) for part in node.values)
        case ast.FormattedValue():
            return _value(node.value, names)
        case ast.BinOp(op=ast.Add()):
            return _value(node.left, names) + _value(node.right, names)
        case ast.Call(func=ast.Name(id="range")):
            return range(*(_value(argument, names) for argument in node.args))
    raise AssertionError(f"cannot read {ast.unparse(node)}")


def main() -> None:
    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(english_locale(), indent=2, ensure_ascii=False)
    ENGLISH.write_text(text + "\n", encoding="utf-8")
    print(ENGLISH)


if __name__ == "__main__":
    main()
