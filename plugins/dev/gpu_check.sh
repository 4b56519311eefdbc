#!/usr/bin/env bash
# Everything that needs the device, in one run: correctness, a memory and race check on small cases, then the table of times. From the repository root:
#   SA_EXPORT_KERNELS=<library> plugins/dev/gpu_check.sh [parts of measure.py]
set -uo pipefail
: "${SA_EXPORT_KERNELS:?set it to the path of libsample_attention_kernels.so}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0
timeout 240 python3 -m pytest tests/kernels -m gpu -q --tb=short --maxfail=10 -p no:cacheprovider || status=1
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 9 python3 plugins/dev/small_cases.py 2>&1 | tail -4 || status=1
  done
fi
timeout 240 python3 plugins/dev/measure.py "$@" || status=1
exit $status
