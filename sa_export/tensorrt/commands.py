"""The same build as command lines of `trtexec` (11.x) and `polygraphy`, for people who would rather run those."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from sa_export.tensorrt.profiles import Profile, Shape

__all__ = ["polygraphy_build", "polygraphy_run", "script", "trtexec_build", "trtexec_run"]


def trtexec_build(
    model: Path,
    engine: Path,
    profiles: Sequence[Profile],
    *,
    plugin: Path | None,
    timing_cache: Path | None = None,
    workspace_mib: int | None = None,
    level: int | None = None,
) -> list[str]:
    """Arguments of `trtexec` that build `engine`. There is no precision flag: from TensorRT 11 on the file alone decides."""
    # polygraphy and `sa-export build` compute float32 in float32, trtexec in TF32 unless told.
    out = ["trtexec", f"--onnx={model}", f"--saveEngine={engine}", "--skipInference", "--noTF32", "--profilingVerbosity=detailed"]
    out += [f"--dynamicPlugins={plugin}"] if plugin else []
    for index, profile in enumerate(profiles):
        out.append(f"--profile={index}")
        for flag, shapes in (("minShapes", profile.least), ("optShapes", profile.usual), ("maxShapes", profile.most)):
            out.append(f"--{flag}={_shapes(shapes)}")
    out += [f"--timingCacheFile={timing_cache}"] if timing_cache else []
    out += [f"--memPoolSize=workspace:{workspace_mib}M"] if workspace_mib else []
    out += [f"--builderOptimizationLevel={level}"] if level is not None else []
    return out


def trtexec_run(engine: Path, profile: Profile, index: int, *, plugin: Path | None) -> list[str]:
    """Arguments of `trtexec` that time the usual shapes of one profile."""
    out = ["trtexec", f"--loadEngine={engine}", f"--useProfile={index}", f"--shapes={_shapes(profile.usual)}"]
    return out + ([f"--dynamicPlugins={plugin}"] if plugin else [])


def polygraphy_build(
    model: Path,
    engine: Path,
    profiles: Sequence[Profile],
    *,
    plugin: Path | None,
    timing_cache: Path | None = None,
    workspace_mib: int | None = None,
    level: int | None = None,
    capabilities: Sequence[tuple[int, int]] = (),
) -> list[str]:
    """Arguments of `polygraphy convert` that build `engine`."""
    out = ["polygraphy", "convert", str(model), "--convert-to", "trt", "-o", str(engine)]
    out += ["--plugins", str(plugin)] if plugin else []
    for profile in profiles:
        for flag, shapes in (("min", profile.least), ("opt", profile.usual), ("max", profile.most)):
            out += [f"--trt-{flag}-shapes", *(f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items())]
    out += ["--load-timing-cache", str(timing_cache), "--save-timing-cache", str(timing_cache)] if timing_cache else []
    out += ["--pool-limit", f"workspace:{workspace_mib}M"] if workspace_mib else []
    out += ["--builder-optimization-level", str(level)] if level is not None else []
    out += ["--compute-capabilities", *(f"{a}.{b}" for a, b in capabilities)] if capabilities else []
    return out


def polygraphy_run(engine: Path, *, plugin: Path | None, inputs: str, reference: str, profile: int = 0) -> list[str]:
    """Arguments of `polygraphy run` that hold an engine against saved outputs of full attention."""
    out = ["polygraphy", "run", str(engine), "--model-type", "engine", "--trt", "--optimization-profile", str(profile)]
    out += ["--plugins", str(plugin)] if plugin else []
    out += ["--load-inputs", inputs, "--load-outputs", reference]
    # Elementwise figures say little of sparse attention: the median is looked at here, the gates of the check decide.
    return [*out, "--check-error-stat", "median", "--atol", "0.05", "--rtol", "0.05"]


def script(arguments: Sequence[str], *, environment: str = "") -> str:
    """A command line for a shell, one option a line."""
    words = [shlex.quote(a) for a in arguments]
    lines = [words[0]]
    for word in words[1:]:
        if word.startswith("-"):
            lines.append(word)
        else:
            lines[-1] += " " + word
    return (environment + " " if environment else "") + " \\\n    ".join(lines)


def _shapes(shapes: dict[str, Shape]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
