"""Builds an engine of a model, with its description beside it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sa_export.errors import UserError
from sa_export.files import staged_files
from sa_export.tensorrt import commands
from sa_export.tensorrt.child import Answer, run_task
from sa_export.tensorrt.dense import FORMS, write_dense
from sa_export.tensorrt.library import NAME, find_plugin
from sa_export.tensorrt.model import check_sites, nodes_of, read_model, sites_of
from sa_export.tensorrt.profiles import Limits, Profile, profiles_of
from sa_export.tensorrt.runtime import Runtime, find_runtime

__all__ = ["Plan", "build_engine", "capabilities_of", "make_plan", "read_description"]

SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """All that a build will do, known before it begins.

    Attributes:
        model: the ONNX file; engine: the file to write, with `engine`.json beside it.
        dense: "" for the model as it is, else the form (`dense.FORMS`) in which its SampleAttention nodes become full attention.
        dense_onnx: where the dense model is kept; None does not keep it.
        plugin: the plugin library, None when the model needs none.
        capabilities: compute capabilities to build for (TensorRT for RTX alone).
        sites: names of the SampleAttention nodes that become plugin layers.
        decomposable: full attention may be computed in several kernels where none fits it.
    """

    model: Path
    engine: Path
    runtime: Runtime
    profiles: list[Profile]
    dense: str = ""
    plugin: Path | None = None
    capabilities: tuple[tuple[int, int], ...] = ()
    timing_cache: Path | None = None
    workspace_mib: int | None = None
    level: int | None = None
    sites: tuple[str, ...] = ()
    decomposable: bool = False
    dense_onnx: Path | None = None

    @property
    def parsed(self) -> Path:
        """The model that TensorRT reads: that of a dense build is written first."""
        return self.model if not self.dense else self.dense_onnx or self.model.with_suffix(f".{self.dense}.onnx")

    def trtexec(self) -> str:
        """The equal `trtexec` 11.x command."""
        return commands.script(
            commands.trtexec_build(
                self.parsed,
                self.engine,
                self.profiles,
                plugin=self.plugin,
                timing_cache=self.timing_cache,
                workspace_mib=self.workspace_mib,
                level=self.level,
            )
        )

    def polygraphy(self) -> str:
        """The equal `polygraphy convert` command."""
        arguments = commands.polygraphy_build(
            self.parsed,
            self.engine,
            self.profiles,
            plugin=self.plugin,
            timing_cache=self.timing_cache,
            workspace_mib=self.workspace_mib,
            level=self.level,
            capabilities=self.capabilities,
        )
        return commands.script(arguments, environment="POLYGRAPHY_USE_TENSORRT_RTX=1" if self.runtime.name == "tensorrt_rtx" else "")

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "engine": str(self.engine),
            "runtime": self.runtime.name,
            "runtime_version": self.runtime.version,
            "dense": self.dense,
            "plugin": None if self.plugin is None else str(self.plugin),
            "compute_capabilities": [f"{a}.{b}" for a, b in self.capabilities],
            "timing_cache": None if self.timing_cache is None else str(self.timing_cache),
            "profiles": [p.as_dict() for p in self.profiles],
            "sites": list(self.sites),
            "trtexec": self.trtexec(),
            "polygraphy": self.polygraphy(),
        }


def make_plan(
    model: Path,
    engine: Path,
    limits: Limits,
    *,
    runtime: str = "tensorrt",
    plugin: Path | None = None,
    dense: str = "",
    dense_onnx: Path | None = None,
    capabilities: Sequence[tuple[int, int]] = (),
    timing_cache: Path | None = None,
    workspace_mib: int | None = None,
    level: int | None = None,
) -> Plan:
    """Everything that can be told, and refused, before TensorRT runs.

    Args:
        model: an ONNX file, rewritten or not.
        engine: the file to write.
        runtime: one of `runtime.RUNTIMES`.
        plugin: the plugin library; None looks for it (`library.find_plugin`). Only a model with SampleAttention nodes needs it.
        dense: a form of `dense.FORMS`: SampleAttention nodes become full attention, for comparison.
        capabilities: (8, 6) for compute capability 8.6; TensorRT for RTX alone, TensorRT builds for the GPU at hand.

    Raises:
        UserError, GraphError: what cannot be built, by site, and what to do.
    """
    model, engine = model.expanduser().absolute(), engine.expanduser().absolute()
    proto = read_model(model)
    nodes = nodes_of(proto)
    if dense and not nodes:
        raise UserError(f"{model} has no SampleAttention node, so it is dense as it stands; leave --dense out.")
    if dense and dense not in FORMS:
        raise UserError(f"--dense is {dense!r}; allowed are {', '.join(FORMS)}.")
    sites = sites_of(model, proto) if nodes else []
    check_sites(model, sites)
    found = find_runtime(runtime)
    if capabilities and runtime != "tensorrt_rtx":
        raise UserError("--compute-capability is for --runtime tensorrt_rtx; TensorRT builds for the GPU of the machine it runs on.")
    low = [c for c in capabilities if c < (7, 5)]
    if low:
        raise UserError(f"--compute-capability is {low[0][0]}.{low[0][1]}; allowed are 7.5 and newer.")
    for option, value, least in (("--workspace", workspace_mib, 1), ("--optimization-level", level, 0)):
        if value is not None and value < least:
            raise UserError(f"{option} is {value}; allowed is an integer >= {least}.")
    if timing_cache is not None and not timing_cache.expanduser().absolute().parent.is_dir():
        raise UserError(f"--timing-cache {timing_cache}: the folder {timing_cache.parent} does not exist; make it or choose another.")
    needs_plugin = bool(nodes) and not dense
    fp32 = any(s.dtype == "FLOAT" for s in sites) or any(n.op_type == "Attention" for n in proto.graph.node)
    return Plan(
        model,
        engine,
        found,
        profiles_of(model, limits),
        dense,
        find_plugin(plugin) if needs_plugin else None,
        tuple(capabilities),
        None if timing_cache is None else timing_cache.expanduser().absolute(),
        workspace_mib,
        level,
        tuple(s.name for s in sites) if needs_plugin else (),
        decomposable=fp32 and not needs_plugin,
        dense_onnx=None if dense_onnx is None else dense_onnx.expanduser().absolute(),
    )


def build_engine(
    plan: Plan,
    *,
    force: bool = False,
    progress: Callable[[str, float | None], None] = lambda _what, _share: None,
    log: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """Builds, writes the engine and its description, and returns the description.

    Args:
        force: replace an engine that is there.
        progress: told what the builder does, and its share.
        log: given all that TensorRT printed.

    Raises:
        UserError: TensorRT cannot build it (its own words are quoted), or the output is in the way. Nothing is left behind.
    """
    description = plan.engine.with_name(plan.engine.name + ".json")
    with staged_files([plan.engine, description], force=force) as (engine, text), TemporaryDirectory(prefix="sa-export-") as folder:
        model = plan.model
        if plan.dense:
            model = write_dense(plan.model, plan.dense_onnx or Path(folder) / "dense.onnx", plan.dense, force=force)
        began = time.monotonic()
        answer = run_task(
            plan.runtime.name,
            "build",
            {
                "model": str(model),
                "engine": str(engine),
                "plugin": None if plan.plugin is None else str(plan.plugin),
                "profiles": [p.as_dict() for p in plan.profiles],
                "capabilities": plan.capabilities,
                "timing_cache": None if plan.timing_cache is None else str(plan.timing_cache),
                "workspace_mib": plan.workspace_mib,
                "level": plan.level,
                "layers": len(plan.sites),
                "decomposable": plan.decomposable,
            },
            progress,
        )
        log(answer.log)
        if answer.error:
            raise UserError(_sentence(plan, answer))
        built = {
            "schema": SCHEMA,
            **plan.as_dict(),
            "runtime_version": answer.result["version"],
            "seconds": round(time.monotonic() - began, 1),
            "bytes": answer.result["bytes"],
            "layers": answer.result["layers"],
            "plugin_layers": answer.result["plugin_layers"],
            "tensors": answer.result["tensors"],
            "sha256": {
                "engine": _sha256(engine),
                "model": _sha256(plan.model),
                **({"plugin": _sha256(plan.plugin)} if plan.plugin else {}),
            },
        }
        text.write_text(json.dumps(built, indent=1) + "\n", encoding="utf-8")
    return built


def read_description(engine: Path) -> dict[str, Any]:
    """What `build_engine` wrote beside an engine.

    Raises:
        UserError: there is no engine, or no description of this schema beside it.
    """
    path = engine.with_name(engine.name + ".json")
    if not engine.is_file():
        raise UserError(f"{engine} does not exist; give an engine that `sa-export build` wrote.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is missing or of another version; build the engine with `sa-export build`.") from None
    return dict(value)


def capabilities_of(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """("8.6", "89") -> ((8, 6), (8, 9)). Raises UserError."""
    out = []
    for text in texts:
        digits = text.removeprefix("sm_").replace(".", "")
        if not (digits.isdecimal() and 2 <= len(digits) <= 3):
            raise UserError(f"--compute-capability is {text!r}; allowed are numbers such as 8.6 or 12.0.")
        out.append((int(digits[:-1]), int(digits[-1])))
    return tuple(out)


def _sentence(plan: Plan, answer: Answer) -> str:
    said = " | ".join(line.replace("\n", " ")[:300] for line in answer.complaints())
    hint = "; -v shows all that TensorRT printed"
    if "Plugin not found" in answer.log:
        hint = f"; the node names what is missing: an operator that TensorRT does not have, or {NAME} of another TensorRT"
    return f"{plan.model}: {answer.error.rstrip('.')}" + (f". TensorRT says: {said}" if said else "") + hint + "."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
