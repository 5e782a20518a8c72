#!/usr/bin/env bash
# Builds the extension, then tests, measures and sanitizes it on this machine's GPU, without a
# network. Leaves at most 8 small files in OUT, written while it runs.
#
#   bash benchmarks/gpu.sh OUT [--dry] [build] [test] [ops] [model] [more] [sanitize] [compile]
#
# Without names all phases run, in this order, the most important rows first, within BUDGET seconds
# (default 470): every command has a share of what the build leaves, and what one does not need is
# shared by the later ones. With names each command has its full limit, all together BUDGET. What is
# cut is named; a second call may then name its phase. Only a build that fails stops the next.
# The exit status is the sum of the phases that failed: build 1, test 2, ops 4, model 8, more 16,
# sanitize 32, compile 64. --dry tries the script on a machine without a GPU: CPU kernels, tiny
# sizes, six times as long limits.
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
SHARED=
[ ${#PHASES[@]} -gt 0 ] || { SHARED=1 PHASES=("${ALL[@]}"); }
# A trial is there to see every step run, however slow the machine.
PATIENCE=${DRY:+6}
PATIENCE=${PATIENCE:-1}
# The tables and the picture at the end take the last seconds.
DEADLINE=$((SECONDS + PATIENCE * (${BUDGET:-470} - 20)))

SUITE=("$PYTHON" -m benchmarks --device cuda --seconds 0.05 --output "$OUT")
[ -z "$DRY" ] || SUITE=("$PYTHON" -m benchmarks --device cpu --quick --output "$OUT")
OURS=("ours: empirical, filters" "ours: logits, without u" "ours: empirical, gates, keeping .grad")
FOCUS=(--for-targets)
[ -z "$DRY" ] || FOCUS=()  # no target is about tiny sizes
RIVALS=(vmap Opacus BackPACK "Torch-Pruning Hessian")
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

PLANNING=  # set: limited only adds up the shares
PLANNED=0  # the shares of all commands to come

# limited SECONDS SHARE COMMAND...: output to the terminal and the log; 124 is "out of time". Runs
# for SECONDS at most, or in a run of all phases for SHARE of PLANNED parts of the time left.
# An argument WITHIN becomes the seconds that the command should end in by itself.
limited() {
  local limit=$((PATIENCE * $1)) share=$2 left=$((DEADLINE - SECONDS))
  shift 2
  if [ -n "$PLANNING" ]; then
    PLANNED=$((PLANNED + share))
    return
  fi
  if [ -n "$SHARED" ] && [ "$PLANNED" -gt 0 ]; then
    limit=$((left * share / PLANNED))
    PLANNED=$((PLANNED - share))
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  local within=$((limit > 40 ? limit - 20 : limit / 2))
  set -- "${@/#WITHIN/$within}"
  if [ "$limit" -lt 8 ]; then
    echo "out of time, not run: $*" | tee -a "$LOG"
    return 124
  fi
  echo "+ [$limit s] $*" | tee -a "$LOG"
  timeout --signal="${SIGNAL:-TERM}" --kill-after=8 "$limit" "$@" 2>&1 | tee -a "$LOG"
}

# plan PHASE...: the shares of these phases' commands.
plan() {
  local phase
  PLANNING=1 PLANNED=0
  for phase in "$@"; do "run_$phase"; done
  PLANNING=
}

run_build() {
  if [ -n "$DRY" ]; then
    limited 300 0 env CCP_CUDA=0 "$PYTHON" setup.py build_ext --inplace
    return
  fi
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1) || return 1
  limited 250 0 env CCP_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$arch}" \
    "$PYTHON" setup.py build_ext --inplace
}

run_test() {
  if [ -n "$DRY" ]; then
    limited 120 95 "$PYTHON" -m pytest -q -m gpu
    return
  fi
  # Interrupted, pytest still says what failed so far.
  SIGNAL=INT limited 150 95 "$PYTHON" -m pytest -q -m gpu -rs --maxfail=30 --durations=15
}

run_ops() {
  limited 150 50 "${SUITE[@]}" weighted_grams_ channel_dot --compile none --within WITHIN --add
}

run_model() {
  local failed=0
  local network=resnet50
  [ -z "$DRY" ] || network=resnet56
  local statistics=("$PYTHON" -m benchmarks.statistics_cost --network $network --output "$OUT")
  local size=(--device cuda --rounds 9) measured=$OUT/statistics_${network}_bfloat16.json
  [ -z "$DRY" ] || size=(--device cpu --batch-size 2 --image-size 8 --rounds 3)
  local training=(--channels-last --autocast)
  limited 70 35 "${statistics[@]}" "${size[@]}" --seconds 4 "${training[@]}" --tag _bfloat16 \
    --methods "${OURS[@]}" || failed=1
  # A rival that does not run like this is named, with its reason.
  limited 120 30 "${statistics[@]}" "${size[@]}" --seconds 3 "${training[@]}" \
    --tag _bfloat16_rivals --give-up-after 40 --methods "${OURS[@]}" "${RIVALS[@]}" || failed=1
  [ -n "$DRY" ] || size+=(--batch-size 64)
  limited 100 25 "${statistics[@]}" "${size[@]}" --seconds 3 --tag _rivals --give-up-after 40 \
    --methods "${OURS[@]}" "${RIVALS[@]}" || failed=1
  size=(--device cuda)
  [ -z "$DRY" ] || size=(--device cpu --quick)
  [ -n "$PLANNING" ] || [ ! -f "$measured" ] || size+=(--statistics "$measured")
  limited 60 15 "$PYTHON" -m benchmarks.scaling "${size[@]}" --output "$OUT" || failed=1
  return $failed
}

run_more() {
  local chosen=(map_similarity patch_gram_ channel_moments weighted_gram_)
  [ -z "$SHARED" ] || chosen=(map_similarity patch_gram_ "${FOCUS[@]}")
  limited 200 45 "${SUITE[@]}" "${chosen[@]}" --compile none --within WITHIN --add
}

run_sanitize() {
  local failed=0 ran=0 tools=(memcheck racecheck initcheck) tool begin reason
  if [ -n "$DRY" ]; then
    limited 60 40 "$PYTHON" -m benchmarks.check
    return
  fi
  local sanitizer
  if ! sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer); then
    [ -n "$PLANNING" ] || NOT_RUN="compute-sanitizer was not found"
    return 0
  fi
  [ -n "$SHARED" ] || tools+=(synccheck)
  for tool in "${tools[@]}"; do
    begin=$(($(wc -l <"$LOG") + 1))
    # Only this project's kernels; every allocation its own, so that its ends are seen.
    limited 75 25 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
      --kernel-name kns=ccp --error-exitcode 1 --print-limit 10 \
      "$PYTHON" -m benchmarks.check --device cuda && ran=1 && continue
    # Some machines let no tool at the GPU: that is no finding, and the other tools need no try.
    reason=$(tail -n "+$begin" "$LOG" | grep -i 'device not supported')
    if [ -n "$reason" ] && [ "$ran" = 0 ]; then
      reason=${reason%%$'\n'*}
      NOT_RUN="$tool: ${reason#========= }"
      return 0
    fi
    ran=1 failed=1
  done
  return $failed
}

# Every case of these beside torch.compile, instead of the rows without it; weighted_grams_ last,
# whose 53 products take the longest to tune.
run_compile() {
  local failed=0 tuned=(--compile all --within WITHIN --add)
  limited 150 12 "${SUITE[@]}" channel_dot --shapes resnet50 --compile-seconds 25 \
    "${tuned[@]}" || failed=1
  limited 200 13 "${SUITE[@]}" map_similarity patch_gram_ weighted_grams_ --shapes resnet50 \
    "${FOCUS[@]}" --compile-seconds 50 "${tuned[@]}" || failed=1
  return $failed
}

: >>"$LOG"
status=0
failures=()
left_out=()
for index in "${!PHASES[@]}"; do
  phase=${PHASES[index]}
  bit=1
  for other in "${ALL[@]}"; do
    [ "$other" != "$phase" ] || break
    bit=$((2 * bit))
  done
  echo "== $phase" | tee -a "$LOG"
  begin=$SECONDS
  [ "$phase" = build ] || [ -z "$SHARED" ] || plan "${PHASES[@]:index}"
  NOT_RUN=
  if ! "run_$phase"; then
    result="FAILED"
    status=$((status | bit))
    failures+=("$phase")
  elif [ -n "$NOT_RUN" ]; then
    result="not run: $NOT_RUN"
    left_out+=("$phase")
  else
    result=ok
  fi
  echo "== $phase: $result, $((SECONDS - begin)) s" | tee -a "$LOG"
  [ "$phase" != build ] || [ "$status" = 0 ] || break
done
# Again from the rows, since a run that is cut draws nothing.
if [ -f "$OUT/operators.json" ]; then
  "$PYTHON" -m benchmarks.plot "$OUT/operators.json" 2>&1 | tee -a "$LOG"
fi
"$PYTHON" -m benchmarks.targets "$OUT" 2>&1 | tee -a "$LOG"
echo "failed: ${failures[*]:-nothing}; not run: ${left_out[*]:-nothing};" \
  "files: $(ls "$OUT" | tr '\n' ' ')" | tee -a "$LOG"
exit $status
