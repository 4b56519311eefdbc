"""The printed command lines against the option tables of trtexec 11.x and of the installed polygraphy."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sa_export.tensorrt import commands
from sa_export.tensorrt.profiles import Limits, Profile, profiles_of
from tests.tensorrt.engines import exported

# Options of trtexec 11.1.0.106 (github.com/NVIDIA/TensorRT, samples/common/sampleOptions.cpp) that take part here, and the form of their values.
TRTEXEC_SOURCE = "TensorRT 11.1.0.106"
SHAPES = r"[^:,]+:\d+(x\d+)*(,[^:,]+:\d+(x\d+)*)*"
TRTEXEC = {
    "--onnx": r".+",
    "--saveEngine": r".+",
    "--loadEngine": r".+",
    "--skipInference": None,
    "--noTF32": None,
    "--dynamicPlugins": r".+\.so",
    "--profile": r"\d+",
    "--useProfile": r"\d+",
    "--shapes": SHAPES,
    "--minShapes": SHAPES,
    "--optShapes": SHAPES,
    "--maxShapes": SHAPES,
    "--timingCacheFile": r".+",
    "--memPoolSize": r"workspace:\d+M",
    "--builderOptimizationLevel": r"[0-5]",
    "--profilingVerbosity": r"layer_names_only|detailed|none",
    "--loadInputs": r".+",
    "--loadRefOutputs": r".+",
}
GONE_IN_11 = ("--fp16", "--bf16", "--int8", "--best", "--plugins", "--workspace", "--buildOnly", "--explicitBatch")


@pytest.fixture(scope="module")
def profiles() -> list[Profile]:
    return profiles_of(exported(), Limits(max_batch=2, max_seq=512))


def words_of(line: str) -> list[str]:
    """As a shell splits it: a backslash joins lines."""
    return shlex.split(line.replace("\\\n", ""))


def check_trtexec(line: str) -> dict[str, list[str]]:
    """Every option is one of 11.x with a value of its form; the words of each option."""
    program, *words = words_of(line)
    assert program == "trtexec"
    found: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        assert name not in GONE_IN_11
        assert name in TRTEXEC, f"{name} is not an option of trtexec ({TRTEXEC_SOURCE})"
        form = TRTEXEC[name]
        assert (form is None) == (not equals)
        assert form is None or re.fullmatch(form, value), f"{word} is not of the form {form}"
        found.setdefault(name, []).append(value)
    return found


def test_trtexec_build(profiles: list[Profile]) -> None:
    line = commands.script(
        commands.trtexec_build(
            Path("a b/m.onnx"), Path("m.plan"), profiles, plugin=Path("lib.so"), timing_cache=Path("t.cache"), workspace_mib=512, level=3
        )
    )
    found = check_trtexec(line)
    assert found["--onnx"] == ["a b/m.onnx"]
    assert found["--dynamicPlugins"] == ["lib.so"]
    assert found["--profile"] == ["0", "1", "2"]
    words = [word.partition("=")[0] for word in words_of(line)]
    # trtexec reads the three shapes right behind each --profile, and looks no further.
    for at in (i for i, word in enumerate(words) if word == "--profile"):
        assert words[at + 1 : at + 4] == ["--minShapes", "--optShapes", "--maxShapes"]
    named = dict(item.rsplit(":", 1) for item in found["--maxShapes"][1].split(","))
    assert named["past_key_values.5.value"] == "2x2x511x64"
    assert len(named) == 15


def test_trtexec_run(profiles: list[Profile]) -> None:
    found = check_trtexec(commands.script(commands.trtexec_run(Path("m.plan"), profiles[2], 2, plugin=Path("lib.so"))))
    assert found["--useProfile"] == ["2"]
    assert found["--shapes"][0].startswith("input_ids:1x1,")


def parsed_by_polygraphy(tool: object, line: str) -> object:
    """Polygraphy's own reading of a command line: option values of its argument groups."""
    import argparse

    from polygraphy.logger import G_LOGGER

    program, name, *words = words_of(line)
    assert program == "polygraphy"
    parser = argparse.ArgumentParser()
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        tool.setup_parser(parser.add_subparsers())  # type: ignore[attr-defined]
        return parser.parse_args([name, *words])


def test_polygraphy_convert(profiles: list[Profile], monkeypatch: pytest.MonkeyPatch) -> None:
    from polygraphy import config
    from polygraphy.tools.args.util.util import parse_meta
    from polygraphy.tools.convert import Convert

    monkeypatch.setattr(config, "USE_TENSORRT_RTX", True)  # --compute-capabilities exists then alone
    line = commands.script(
        commands.polygraphy_build(
            Path("m.onnx"),
            Path("m.plan"),
            profiles,
            plugin=Path("lib.so"),
            timing_cache=Path("t.cache"),
            workspace_mib=512,
            level=3,
            capabilities=[(8, 6), (12, 0)],
        )
    )
    args = parsed_by_polygraphy(Convert(), line)
    assert args.model_file == "m.onnx"
    assert args.convert_to == "trt"
    assert args.plugins == ["lib.so"]
    assert args.load_timing_cache == args.save_timing_cache == "t.cache"  # type: ignore[attr-defined]
    assert args.compute_capabilities == ["8.6", "12.0"]
    assert args.memory_pool_limit == ["workspace:512M"]
    for at, profile in enumerate(profiles):
        for given, shapes in (
            (args.trt_min_shapes[at], profile.least),  # type: ignore[attr-defined]
            (args.trt_opt_shapes[at], profile.usual),  # type: ignore[attr-defined]
            (args.trt_max_shapes[at], profile.most),  # type: ignore[attr-defined]
        ):
            read = {name: tuple(shape) for name, (_, shape) in parse_meta(given, includes_dtype=False).items()}
            assert read == shapes


def test_polygraphy_run() -> None:
    from polygraphy.tools.run import Run

    line = commands.script(commands.polygraphy_run(Path("m.plan"), plugin=Path("lib.so"), inputs="i.json", reference="o.json", profile=1))
    args = parsed_by_polygraphy(Run(), line)
    assert args.runners == ["trt"]
    assert args.model_type == "engine"
    assert args.plugins == ["lib.so"]
    assert str(args.optimization_profile) == "1"
    assert args.load_outputs_paths == ["o.json"]


def test_an_option_that_polygraphy_does_not_have_is_noticed() -> None:
    from polygraphy.tools.run import Run

    with pytest.raises(SystemExit):
        parsed_by_polygraphy(Run(), "polygraphy run m.plan --trt --no-such-option 3")
