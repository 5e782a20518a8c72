#!/usr/bin/env bash
# Builds the extension, then tests, sanitizes and measures it on this machine's GPU, without a
# network and in about 8 minutes. Leaves at most 8 small files in OUT.
#
#   bash benchmarks/gpu.sh OUT [--dry] [build] [test] [sanitize] [ops] [model]
#
# Without names all phases run. Each has its own time limit, and only a build that fails stops the
# next. The exit status is the sum of those that failed: build 1, test 2, sanitize 4, ops 8,
# model 16. --dry tries the script on a machine without a GPU: CPU kernels, tiny sizes.
set -uo pipefail

OUT=${1:?usage: bash benchmarks/gpu.sh OUT [--dry] [phase...]}
shift
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LOG=$OUT/gpu.log
DRY=
PHASES=()
for word in "$@"; do
  case $word in
    --dry) DRY=1 ;;
    build | test | sanitize | ops | model) PHASES+=("$word") ;;
    *) echo "unknown phase '$word': build, test, sanitize, ops and model exist" >&2; exit 64 ;;
  esac
done
[ ${#PHASES[@]} -gt 0 ] || PHASES=(build test sanitize ops model)

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
DEVICE=cuda
[ -z "$DRY" ] || DEVICE=cpu

# limited SECONDS COMMAND...: output to the terminal and the log; 124 is "out of time".
limited() {
  local seconds=$1
  shift
  echo "+ $*" | tee -a "$LOG"
  timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$LOG"
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
  limited 120 "$PYTHON" -m pytest -q -m gpu -rs --maxfail=30 --durations=15
}

sanitize() {
  local failed=0 tool
  if [ -n "$DRY" ]; then
    limited 60 "$PYTHON" -m benchmarks.check
    return
  fi
  for tool in memcheck racecheck initcheck; do
    # Only this project's kernels, except where writes of others must be seen; every allocation its
    # own, so that its ends are seen.
    local kernels=(--kernel-name kns=ccp)
    [ "$tool" != initcheck ] || kernels=()
    limited 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      "${kernels[@]}" --error-exitcode 1 --print-limit 10 \
      "$PYTHON" -m benchmarks.check --device cuda || failed=1
  done
  return $failed
}

ops() {
  if [ -n "$DRY" ]; then
    limited 120 "$PYTHON" -m benchmarks --device cpu --quick --output "$OUT"
    return
  fi
  # torch.compile takes minutes of its own: python -m benchmarks --compile some.
  limited 200 "$PYTHON" -m benchmarks --device cuda --seconds 0.05 --compile none --output "$OUT"
}

model() {
  local failed=0 statistics=("$PYTHON" -m benchmarks.statistics_cost --device "$DEVICE" --output "$OUT")
  if [ -n "$DRY" ]; then
    limited 200 "${statistics[@]}" --network resnet50 --image-size 32 --batch-size 2 --rounds 3 \
      --seconds 1 --methods vmap "ours: logits, without u" || failed=1
    limited 60 "$PYTHON" -m benchmarks.scaling --quick --device cpu --output "$OUT" || failed=1
    return $failed
  fi
  local plain="forward and backward" ours="ours: logits, without u"
  limited 80 "${statistics[@]}" --network resnet50 --batch-size 64 --seconds 3 --tag _rivals || failed=1
  limited 40 "${statistics[@]}" --network resnet50 --seconds 2 --rounds 5 --methods "$plain" "$ours" || failed=1
  limited 40 "${statistics[@]}" --network resnet50 --seconds 2 --rounds 5 --channels-last --autocast \
    --tag _bfloat16 --methods "$plain" "$ours" || failed=1
  limited 30 "$PYTHON" -m benchmarks.scaling --device cuda --output "$OUT" || failed=1
  return $failed
}

: >>"$LOG"
status=0
failures=()
for phase in "${PHASES[@]}"; do
  case $phase in
    build) bit=1 run=build ;;
    test) bit=2 run=run_tests ;;
    sanitize) bit=4 run=sanitize ;;
    ops) bit=8 run=ops ;;
    model) bit=16 run=model ;;
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
echo "failed: ${failures[*]:-nothing}; files: $(ls "$OUT" | tr '\n' ' ')" | tee -a "$LOG"
exit $status
