// The TensorRT libraries of this process, reached without linking to any of them: their registries and their logger.
//
// Two interfaces that a plugin calls (rather than implements) have changed their virtual tables between TensorRT 10 and 11: IPluginRegistry lost its V1
// methods, ILoggerFinder and ILogger became versioned interfaces. Each object is therefore called through the table of the library that made it, whatever
// headers this file was compiled with.
#pragma once

#include "NvInferRuntime.h"

#include <string>

namespace sample_attention::tensorrt {

// Registers `creator` with every TensorRT (libnvinfer, its lean and dispatch runtimes, TensorRT-RTX) that is already in the process: a caller that only dlopens
// this library (trtexec --staticPlugins, polygraphy --plugins, Triton) then finds it. `creator` must live as long as the process.
void register_creator(nvinfer1::IPluginCreatorInterface &creator) noexcept;

// Takes back what register_creator did, in the TensorRT that gave the last logger finder: it is about to register the creator itself and refuses a second one.
void hand_over(nvinfer1::IPluginCreatorInterface &creator) noexcept;

void set_logger_finder(nvinfer1::ILoggerFinder *finder) noexcept;

// One line to the logger of the engine or builder that is calling, else to its library's own, else (warnings and errors) to stderr.
void log(nvinfer1::ILogger::Severity severity, const std::string &text) noexcept;

}  // namespace sample_attention::tensorrt
