#!/bin/sh
# Runs the compiler command it is given. Fails when ptxas reports that it serialised wgmma (C7510 and its siblings): it says so as information only, and such a
# kernel is right but several times slower.
output=$("$@" 2>&1)
status=$?
[ -z "$output" ] || printf '%s\n' "$output"
case "$output" in
*"wgmma.mma_async instructions are serialized"*)
  echo "error: ptxas serialised wgmma (see the C75xx line above); keep accumulators out of other instructions between issue and wait." >&2
  exit 1
  ;;
esac
exit $status
