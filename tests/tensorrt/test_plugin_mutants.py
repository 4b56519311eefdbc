"""Bugs seeded into a copy of the plugin: the conformance driver must catch each one, or its silence about the real plugin means nothing.

Three run always; SA_ALL_MUTANTS=1 runs all of them (a minute or two).
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.tensorrt import plugin_build

ALWAYS = ("a field is not serialised", "a clone shares pointers", "the workspace is that of the best shape")

# name: file, text, its replacement
MUTANTS = {
    "the build capability is the runtime's": (
        "plugin.cpp", "return static_cast<nvinfer1::IPluginV3OneBuild *>(this);", "return static_cast<nvinfer1::IPluginV3OneRuntime *>(this);",
    ),
    "two contexts are one object": ("plugin.cpp", "auto *attached = new Plugin(*this);", "auto *attached = this;"),
    "a clone shares pointers": (
        "plugin.cpp", ": Plugin(other.name_, other.parameters_) {",
        ": name_(other.name_), parameters_(other.parameters_), text_(other.text_), fields_(other.fields_) {",
    ),
    "a field is not serialised": ("parameters.cpp", '      field_of("certificate", parameters.certificate),\n', ""),
    "a list is serialised short": ("parameters.cpp", "static_cast<int32_t>(v.size())}; }\nPluginField field_of(const char *name, const Integer", "1}; }\nPluginField field_of(const char *name, const Integer"),
    "the timing cache id leaves an attribute out": (
        "parameters.cpp", 'out += std::string(#name "=")', 'if (std::strcmp(#name, "sink") != 0) out += std::string(#name "=")',
    ),
    "the timing cache id rounds": ("parameters.cpp", '"%.9g"', '"%.1g"'),
    "an attribute may be missing": ("parameters.cpp", "if (!given) return", "if (false) return"),
    "64 bits are cut to 32": ("parameters.cpp", "if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())", "if (false)"),
    "the workspace is that of the best shape": (
        "plugin.cpp", "i <= kKeyMask; ++i) largest[i] = inputs[i].max;", "i <= kKeyMask; ++i) largest[i] = inputs[i].opt;",
    ),
    "formats are decided by what is not set yet": (
        "plugin.cpp", "return tensor.type == tensors[kQuery].desc.type;", "return tensor.type == tensors[input_count + output_count - 1].desc.type;",
    ),
    "every format is taken": ("plugin.cpp", "  if (tensor.format != TensorFormat::kLINEAR) return false;\n", ""),
    "the output is declared float32": (
        "plugin.cpp", "outputs[kOutput] = inputs[kQuery];\n  if (output_count > kCertificate) outputs", "outputs[kOutput] = DataType::kFLOAT;\n  if (output_count > kCertificate) outputs",
    ),
    "the output has the query's width": ("plugin.cpp", "  outputs[kOutput].d[3] = inputs[kValue].d[3];\n", ""),
    "heads need not divide": ("call.cpp", "e.heads % e.kv_heads != 0", "false"),
    "more rows than keys are taken": ("call.cpp", "e.queries > e.keys", "false"),
    "value heads are query heads": ("plugin.cpp", "contiguous(inputs[kValue], extents.kv_heads,", "contiguous(inputs[kValue], extents.heads,"),
    "value rows have the query's width": ("plugin.cpp", "extents.keys, extents.value_dim);", "extents.keys, extents.head_dim);"),
    "the key mask is seen only by the first shape": ("plugin.cpp", "  if (!why.empty()) return refuse(why);\n  input_count_ = input_count;\n  return kOk;\n} catch (const std::exception &error) {\n  return refuse(error.what());\n}\n\nint32_t Plugin::enqueue", "  if (!why.empty()) return refuse(why);\n  if (input_count_ == 0) input_count_ = input_count;\n  return kOk;\n} catch (const std::exception &error) {\n  return refuse(error.what());\n}\n\nint32_t Plugin::enqueue"),
    "thresholds a head are not passed": ("plugin.cpp", "call.host_alpha = parameters_.alpha.data();", "{}"),
    "alpha and alpha_slash are mixed up": ("plugin.cpp", "call.host_alpha_slash = parameters_.alpha_slash.data();", "call.host_alpha_slash = parameters_.alpha.data();"),
    "the soft-cap is lost": ("call.cpp", "  problem->softcap = p.softcap;\n", ""),
    "the budget is lost": ("call.cpp", "problem->max_density = p.max_density;", "problem->max_density = 1;"),
    "an attribute goes to another": ("call.cpp", "problem->sink = p.sink;", "problem->sink = p.window;"),
    "the certificate overwrites the output": ("plugin.cpp", "outputs[kCertificate]);\n  if (parameters_.alpha.size", "outputs[kOutput]);\n  if (parameters_.alpha.size"),
    "a line is logged for every shape": ("plugin.cpp", "if (!path_told_) {", "if (true) {"),
    "a failed launch is a success": ("plugin.cpp", "return status.ok() ? kOk : refuse(status.text);", "return status.ok() ? kOk : kOk;"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_driver_catches(name, tmp_path, shared_folder, headers):
    if name not in ALWAYS and os.environ.get("SA_ALL_MUTANTS") != "1":
        pytest.skip("not one of the three mutants that always run: set SA_ALL_MUTANTS=1 to run all")
    file, text, replacement = MUTANTS[name]
    flags = plugin_build.SANITIZE
    driver = plugin_build.once(shared_folder, "driver_sanitized", lambda folder: plugin_build.build_driver(folder, headers, flags))
    plugin_build.once(shared_folder, "plugin_sanitized", lambda folder: plugin_build.build_plugin(folder, headers, flags))

    source = tmp_path / "tensorrt"
    shutil.copytree(plugin_build.PLUGIN, source)
    original = (source / file).read_text()
    assert original.count(text) == 1, f"the seeded bug no longer fits the source: {original.count(text)} places in {file}"
    (source / file).write_text(original.replace(text, replacement))
    library = plugin_build.rebuild_plugin(tmp_path / "build", shared_folder / "plugin_sanitized", headers, flags, source, file)
    done = subprocess.run([driver, library], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0, done.stdout[-2000:]
    # By a failed check or by a crash that a sanitizer explains, not by a driver that could not start.
    assert "FAILED " in done.stdout or "Sanitizer" in done.stderr or "runtime error" in done.stderr or done.returncode < 0
    assert "FAILED to open" not in done.stdout
