#!/bin/sh
# Compiler launcher: runs the given nvcc command and keeps its diagnostics (the report of ptxas -v) in OBJECT.ptxas.
object=
previous=
for argument in "$@"; do
  [ "$previous" = "-o" ] && object=$argument
  previous=$argument
done
if [ -z "$object" ]; then
  exec "$@"
fi
"$@" 2>"$object.ptxas"
status=$?
# The report itself is long; everything that is not part of it is for people.
if [ "$status" -eq 0 ]; then
  grep -v -e '^ptxas info  *: \(Compil\|Function\|Used\|[0-9]\)' -e 'bytes stack frame' "$object.ptxas" >&2
else
  cat "$object.ptxas" >&2
  rm -f "$object.ptxas"
fi
exit "$status"
