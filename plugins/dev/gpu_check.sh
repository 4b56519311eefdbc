#!/usr/bin/env bash
# Everything that needs the device, in one run: correctness, a memory and race check on small cases, then the table of times. From the repository root:
#   SA_EXPORT_KERNELS=<library> plugins/dev/gpu_check.sh [parts of measure.py]
# Warps hand shared memory over with one lane's arrival after __syncwarp. racecheck counts that as an arrival of lane 0 alone and reports the accesses of the other
# lanes, so it is given a library whose lanes all arrive: the same kernels, slower.
set -uo pipefail
: "${SA_EXPORT_KERNELS:?set it to the path of libsample_attention_kernels.so}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0
timeout 240 python3 -m pytest tests/kernels -m gpu -q --tb=short --maxfail=10 -p no:cacheprovider || status=1
if command -v compute-sanitizer >/dev/null; then
  timeout 90 compute-sanitizer --tool memcheck --error-exitcode 9 python3 plugins/dev/small_cases.py 2>&1 | tail -4 || status=1
  if [ -n "${SA_RACECHECK_KERNELS:-}" ]; then
    SA_EXPORT_KERNELS=$SA_RACECHECK_KERNELS timeout 90 compute-sanitizer --tool racecheck --error-exitcode 9 python3 plugins/dev/small_cases.py 2>&1 | tail -4 || status=1
  else
    echo "racecheck: not run; set SA_RACECHECK_KERNELS to a library built with -DCMAKE_CUDA_FLAGS=-DSA_EVERY_LANE_ARRIVES"
  fi
fi
timeout 240 python3 plugins/dev/measure.py "$@" || status=1
exit $status
