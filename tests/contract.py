"""Run by ComfyUI's own Python (tests/test_nodes.py): compares the schema of every node with its execute. Prints the differences as JSON."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAME = "contract_pack"


def pack() -> Any:
    """The pack as ComfyUI loads it, in a process configured as ComfyUI on a CPU."""
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


def differences(where: str, inputs: list[Any], function: Callable[..., Any], given: set[str]) -> list[str]:
    """The differences between a function's parameters and a list of schema inputs; ``given`` parameters are not inputs."""
    parameters = {k: p for k, p in inspect.signature(function).parameters.items() if k not in given}
    out = [f"{where}: {name} is a parameter and no input" for name in set(parameters) - {i.id for i in inputs}]
    for item in inputs:
        if item.id not in parameters:
            out.append(f"{where}: {item.id} is an input and no parameter")
            continue
        default = parameters[item.id].default
        if item.optional and default is inspect.Parameter.empty:
            out.append(f"{where}: {item.id} is optional and has no Python default")
        wanted = getattr(item, "default", None)
        if default is not inspect.Parameter.empty and wanted is not None and default != wanted:
            out.append(f"{where}: {item.id} is {wanted!r} in the schema and {default!r} in Python")
    return out


def input_ids(schema: Any) -> set[str]:
    """Ids of the inputs of a node, including those inside a dynamic choice."""
    dynamic = [option for item in schema.inputs for option in getattr(item, "options", None) or [] if not isinstance(option, str)]
    return {item.id for item in schema.inputs} | {item.id for option in dynamic for item in option.inputs}


def wrong_controls(schemas: list[Any]) -> list[str]:
    """Where the table of the inputs that error messages name does not fit the schemas: inputs that do not exist, options that are left out."""
    runtime, options = (importlib.import_module(f"{NAME}.{module}") for module in ("nodes.runtime", "blended_core.options"))
    known = {schema.display_name: input_ids(schema) for schema in schemas}
    declared = {*options.declared(options.EditOptions), *options.declared(options.GuidanceOptions)}
    out = [f"{node} is no node" for node in runtime.INPUTS if node not in known]
    for node, ids in known.items():
        table = runtime.INPUTS.get(node, {})
        out += [f"{node} has no input {name}" for name in table.values() if name not in ids]
        out += [f"{name} of {node} is left out" for name in sorted(ids & declared - set(table.values()))]
    return out


def messages(hostile: list[str]) -> list[str]:
    """What reaches ComfyUI's log and its page for warnings, errors and texts of a node that contain these texts."""
    runtime, errors = (importlib.import_module(f"{NAME}.{module}") for module in ("nodes.runtime", "blended_core.errors"))
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    for text in hostile:
        for error in (errors.BlendedError(text, "seed"), RuntimeError(text)):
            try:
                with runtime.library_scope("Demo Scene"):
                    warnings.warn(errors.BlendedWarning(text, "seed"), stacklevel=1)
                    seen.extend(runtime.shown_text(f"a table\n{text}").as_dict()["text"][0].split("\n"))
                    raise error
            except (ValueError, RuntimeError) as raised:
                seen.append(str(raised))
    logging.getLogger().removeHandler(handler)
    return seen


def main() -> None:
    """Checks every node of the pack."""

    async def nodes() -> list[Any]:
        extension = await pack().comfy_entrypoint()
        await extension.on_load()
        return list(await extension.get_node_list())

    found: list[str] = []
    names = []
    schemas = []
    for node in asyncio.run(nodes()):
        schema = node.define_schema()
        names.append(schema.node_id)
        schemas.append(schema)
        found += differences(schema.node_id, schema.inputs, node.execute, {"cls"})
        outputs = [o.id for o in schema.outputs]
        if len(set(outputs)) != len(outputs):
            found.append(f"{schema.node_id}: two outputs have one id")
        for item in schema.inputs:
            for option in getattr(item, "options", None) or []:
                if not isinstance(option, str):
                    function = getattr(sys.modules[node.__module__], {"start": "start_edit", "match": "match_level"}[option.key])
                    found += differences(f"{schema.node_id} ({option.key})", option.inputs, function, {"image"})
    said = messages(json.loads(sys.stdin.read() or "[]"))
    print(json.dumps({"nodes": names, "differences": found, "controls": wrong_controls(schemas), "messages": said}))


if __name__ == "__main__":
    main()
