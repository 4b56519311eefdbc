"""The process in which TensorRT runs; `child.run_task` starts it. Prints TensorRT's log, sends events as JSON lines to a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["TASKS", "main"]

_PLUGIN = ("SampleAttention", "1", "")


class Failure(Exception):
    """The task cannot be done; one sentence."""


def tensorrt() -> Any:
    """The module that polygraphy uses in this process."""
    from polygraphy.mod.trt_importer import lazy_import_trt

    return lazy_import_trt()


def load_plugin(trt: Any, path: str | None) -> None:
    """Loads a plugin library through the registry; nothing is done when there is no path, or the plugin is there already."""
    registry = trt.get_plugin_registry()
    if path is None or registry.get_creator(*_PLUGIN) is not None:
        return
    # What load_library returns says nothing: some versions give None for a library that registered itself as it was opened.
    registry.load_library(path)
    if registry.get_creator(*_PLUGIN) is None:
        raise Failure(
            f"{path} does not register the plugin {_PLUGIN[0]} version {_PLUGIN[1]} with TensorRT {trt.__version__}; build the library again with the headers of this version."
        )


def build(request: dict[str, Any], send: Callable[..., None]) -> dict[str, Any]:
    """Builds an engine into a file.

    Request: model, engine, plugin or None, profiles (min, opt, max of each), capabilities, timing_cache, workspace_mib, level, layers
    (layers of type PLUGIN_V3 that there must be), decomposable.
    """
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, Profile, SetDecomposableAttentions
    from polygraphy.exception import PolygraphyException

    trt = tensorrt()
    load_plugin(trt, request["plugin"])
    send(progress=("parse", None))
    parsed = NetworkFromOnnxPath(request["model"], strongly_typed=_strongly_typed(trt))
    network = SetDecomposableAttentions(parsed) if request["decomposable"] else parsed
    try:
        builder, definition, *rest = network()
    except PolygraphyException:
        raise Failure("TensorRT's parser refuses the model") from None
    layers = [definition.get_layer(i) for i in range(definition.num_layers)]
    plugins = [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    if len(plugins) != request["layers"]:
        raise Failure(
            f"the network has {len(plugins)} plugin layers where the model has {request['layers']} SampleAttention nodes; the plugin was not taken for each of them"
        )
    profiles = []
    for shapes in request["profiles"]:
        profile = Profile()
        for name, least in shapes["min"].items():
            profile.add(name, tuple(least), tuple(shapes["opt"][name]), tuple(shapes["max"][name]))
        profiles.append(profile)
    options: dict[str, Any] = {
        "profiles": profiles,
        "progress_monitor": _monitor(trt, send),
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if request["workspace_mib"]:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: request["workspace_mib"] << 20}
    if request["level"] is not None:
        options["builder_optimization_level"] = request["level"]
    if request["timing_cache"] and Path(request["timing_cache"]).is_file():
        options["load_timing_cache"] = request["timing_cache"]
    send(progress=("build", None))
    try:
        data = bytes(
            EngineBytesFromNetwork(
                (builder, definition, *rest), config=_config(options, request), save_timing_cache=request["timing_cache"]
            )()
        )
    except PolygraphyException:
        limit = request["workspace_mib"]
        within = f" within --workspace {limit} MiB, which the attention layers may exceed: raise it or leave it out" if limit else ""
        raise Failure(f"TensorRT's builder refuses the network{within}") from None
    Path(request["engine"]).write_bytes(data)
    tensors = [("input", definition.get_input(i)) for i in range(definition.num_inputs)]
    tensors += [("output", definition.get_output(i)) for i in range(definition.num_outputs)]
    return {
        "version": trt.__version__,
        "plugin_layers": plugins,
        "layers": len(layers),
        "bytes": len(data),
        "tensors": [{"name": t.name, "kind": kind, "dtype": t.dtype.name, "shape": list(t.shape)} for kind, t in tensors],
    }


def parse(request: dict[str, Any], send: Callable[..., None]) -> dict[str, Any]:
    """What the parser says of a model. Request: model, plugin or None.

    Result: `ok`, and `errors`, each with node, op and the parser's text; `layers` of type PLUGIN_V3 when it is ok.
    """
    from polygraphy.backend.trt import create_network, get_trt_logger

    trt = tensorrt()
    load_plugin(trt, request["plugin"])
    _, network = create_network(strongly_typed=_strongly_typed(trt))
    parser = trt.OnnxParser(network, get_trt_logger())
    path = request["model"]
    ok = parser.supports_model_v2(Path(path).read_bytes(), path)
    errors = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        errors.append({"node": error.node_name(), "op": error.node_operator(), "text": error.desc()})
    layers = [network.get_layer(i).type for i in range(network.num_layers)]
    return {"version": trt.__version__, "ok": bool(ok), "errors": errors, "plugin_layers": layers.count(trt.LayerType.PLUGIN_V3)}


def operators(request: dict[str, Any], send: Callable[..., None]) -> dict[str, Any]:
    """Which operators the parser has an importer for. Request: names."""
    from polygraphy.backend.trt import create_network, get_trt_logger

    trt = tensorrt()
    _, network = create_network()
    parser = trt.OnnxParser(network, get_trt_logger())
    return {"version": trt.__version__, "supported": [n for n in request["names"] if parser.supports_operator(n)]}


TASKS: dict[str, Callable[[dict[str, Any], Callable[..., None]], dict[str, Any]]] = {"build": build, "parse": parse, "operators": operators}


def main(arguments: list[str]) -> int:
    task, pipe, runtime, request = arguments
    with open(int(pipe), "w", encoding="utf-8") as events:

        def send(**event: Any) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        try:
            send(result=TASKS[task](json.loads(request), send))
        except Failure as error:
            send(error=str(error))
            return 1
        except Exception as error:  # the parent has no other sight of it
            send(error=f"{runtime} cannot be used ({type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]})")
            raise
    return 0


def _strongly_typed(trt: Any) -> bool | None:
    """The types of the file hold: always so from TensorRT 11 on, asked for before."""
    return True if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") else None


def _config(options: dict[str, Any], request: dict[str, Any]) -> Any:
    from polygraphy import config

    if config.USE_TENSORRT_RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [tuple(c) for c in request["capabilities"]]
        return CreateConfigRTX(compute_capabilities=capabilities or None, **options)
    from polygraphy.backend.trt import CreateConfig

    return CreateConfig(**options)


def _monitor(trt: Any, send: Callable[..., None]) -> Any:
    """Sends the name and the share of the outermost phase; the phases inside it refine the share."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[int, int]] = {}  # steps done and steps, outermost first

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (0, max(num_steps, 1))
            self.tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases[phase_name] = (step + 1, self.phases.get(phase_name, (0, step + 1))[1])
            self.tell()
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def tell(self) -> None:
            share = 0.0
            for step, steps in reversed(self.phases.values()):
                share = min((step + share) / steps, 1.0)
            send(progress=(f"build: {next(iter(self.phases))}", share))

    return Monitor()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main(sys.argv[1:]))
