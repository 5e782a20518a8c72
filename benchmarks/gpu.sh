#!/usr/bin/env bash
# Builds the extension, then tests, measures and sanitizes it on this machine's GPU, without a
# network. Leaves at most 6 small files in OUT, written while it runs.
#
#   bash benchmarks/gpu.sh OUT [--dry] [build] [test] [ops] [model] [more] [sanitize] [compile]
#
# Without names all phases run, in this order, the most important rows first. Each has its own time
# limit; all together have BUDGET seconds (default 560), after which what is left is named and not
# run: a second call may then name it. Only a build that fails stops the next. The exit status is
# the sum of the phases that failed: build 1, test 2, ops 4, model 8, more 16, sanitize 32,
# compile 64. --dry tries the script on a machine without a GPU: CPU kernels, tiny sizes, six
# times as long limits.
# CCP_COMMIT names the commit where the copy of the sources has no history.
set -uo pipefail

OUT=${1:?usage: bash benchmarks/gpu.sh OUT [--dry] [phase...]}
shift
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LOG=$OUT/gpu.log
DRY=
ALL=(build test ops model more sanitize compile)
PHASES=()
for word in "$@"; do
  case $word in
    --dry) DRY=1 ;;
    build | test | ops | model | more | sanitize | compile) PHASES+=("$word") ;;
    *) echo "unknown phase '$word': ${ALL[*]} exist" >&2; exit 255 ;;
  esac
done
[ ${#PHASES[@]} -gt 0 ] || PHASES=("${ALL[@]}")
# A trial is there to see every step run, however slow the machine.
PATIENCE=${DRY:+6}
PATIENCE=${PATIENCE:-1}
DEADLINE=$((SECONDS + PATIENCE * ${BUDGET:-560}))

SUITE=("$PYTHON" -m benchmarks --device cuda --seconds 0.05 --output "$OUT")
[ -z "$DRY" ] || SUITE=("$PYTHON" -m benchmarks --device cpu --quick --output "$OUT")
OURS=("ours: empirical, filters" "ours: logits, without u" "ours: empirical, gates, keeping .grad")
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# limited SECONDS COMMAND...: output to the terminal and the log; 124 is "out of time".
limited() {
  local seconds=$((PATIENCE * $1)) left=$((DEADLINE - SECONDS))
  shift
  if [ "$left" -lt 10 ]; then
    echo "out of time, not run: $*" | tee -a "$LOG"
    return 124
  fi
  echo "+ $*" | tee -a "$LOG"
  timeout --signal="${SIGNAL:-TERM}" --kill-after=8 $((left < seconds ? left : seconds)) \
    "$@" 2>&1 | tee -a "$LOG"
}

build() {
  if [ -n "$DRY" ]; then
    limited 300 env CCP_CUDA=0 "$PYTHON" setup.py build_ext --inplace
    return
  fi
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1) || return 1
  limited 250 env CCP_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$arch}" \
    "$PYTHON" setup.py build_ext --inplace
}

run_tests() {
  if [ -n "$DRY" ]; then
    limited 120 "$PYTHON" -m pytest -q -m gpu
    return
  fi
  # Interrupted, pytest still says what failed so far.
  SIGNAL=INT limited 150 "$PYTHON" -m pytest -q -m gpu -rs --maxfail=30 --durations=15
}

ops() {
  limited 150 "${SUITE[@]}" channel_dot weighted_grams_ --compile none --budget 60 --add
}

more() {
  limited 200 "${SUITE[@]}" map_similarity patch_gram_ channel_moments weighted_gram_ --compile none \
    --budget 60 --add
}

compile() {
  limited 180 "${SUITE[@]}" channel_dot --shapes resnet50 --compile all --compile-seconds 25 \
    --budget 150 --add
}

model() {
  local failed=0
  local network=resnet50
  [ -z "$DRY" ] || network=resnet56
  local statistics=("$PYTHON" -m benchmarks.statistics_cost --network $network --output "$OUT")
  local size=(--device cuda --rounds 9) measured=$OUT/statistics_${network}_bfloat16.json
  [ -z "$DRY" ] || size=(--device cpu --batch-size 2 --rounds 3)
  limited 70 "${statistics[@]}" "${size[@]}" --seconds 4 --channels-last --autocast \
    --tag _bfloat16 --methods "${OURS[@]}" || failed=1
  [ -n "$DRY" ] || size+=(--batch-size 64)
  limited 100 "${statistics[@]}" "${size[@]}" --seconds 3 --tag _rivals \
    --methods "${OURS[@]}" vmap Opacus BackPACK || failed=1
  size=(--device cuda)
  [ -z "$DRY" ] || size=(--device cpu --quick)
  [ ! -f "$measured" ] || size+=(--statistics "$measured")
  limited 40 "$PYTHON" -m benchmarks.scaling "${size[@]}" --output "$OUT" || failed=1
  return $failed
}

sanitize() {
  local failed=0 tool
  if [ -n "$DRY" ]; then
    limited 60 "$PYTHON" -m benchmarks.check
    return
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    # Only this project's kernels; every allocation its own, so that its ends are seen.
    limited 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --kernel-name kns=ccp --error-exitcode 1 --print-limit 10 \
      "$PYTHON" -m benchmarks.check --device cuda || failed=1
  done
  return $failed
}

: >>"$LOG"
status=0
failures=()
for phase in "${PHASES[@]}"; do
  case $phase in
    build) bit=1 run=build ;;
    test) bit=2 run=run_tests ;;
    ops) bit=4 run=ops ;;
    model) bit=8 run=model ;;
    more) bit=16 run=more ;;
    sanitize) bit=32 run=sanitize ;;
    compile) bit=64 run=compile ;;
  esac
  echo "== $phase" | tee -a "$LOG"
  begin=$SECONDS
  if $run; then
    result=ok
  else
    result="FAILED ($?)"
    status=$((status | bit))
    failures+=("$phase")
  fi
  echo "== $phase: $result, $((SECONDS - begin)) s" | tee -a "$LOG"
  [ "$phase" != build ] || [ "$status" = 0 ] || break
done
"$PYTHON" -m benchmarks.targets "$OUT" 2>&1 | tee -a "$LOG"
echo "failed: ${failures[*]:-nothing}; files: $(ls "$OUT" | tr '\n' ' ')" | tee -a "$LOG"
exit $status
