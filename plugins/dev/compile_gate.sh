#!/bin/sh
# Runs the compiler command it is given and keeps what it said beside the object file, as <object>.log (resources.py reads it). Fails when ptxas reports that it
# serialised wgmma (C7510 and its siblings): it says so as information only, and such a kernel is right but several times slower.
output=$("$@" 2>&1)
status=$?
[ -z "$output" ] || printf '%s\n' "$output"
previous=
for argument in "$@"; do
  [ "$previous" != "-o" ] || printf '%s\n' "$output" >"$argument.log"
  previous=$argument
done
case "$output" in
*"wgmma.mma_async instructions are serialized"*)
  echo "error: ptxas serialised wgmma (see the C75xx line above); keep accumulators out of other instructions between issue and wait." >&2
  exit 1
  ;;
esac
exit $status
