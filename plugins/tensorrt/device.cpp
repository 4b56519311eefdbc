#include "device.h"

#include <cstdio>

namespace sample_attention::tensorrt {

Status current_capability(int *capability) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  Status status;
  if (error != cudaSuccess) {
    status.code = SA_CUDA_ERROR;
    std::snprintf(status.text, sizeof(status.text), "Reading the current device failed: %s.", cudaGetErrorString(error));
  }
  *capability = 10 * major + minor;
  return status;
}

}  // namespace sample_attention::tensorrt
