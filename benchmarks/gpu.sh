#!/usr/bin/env bash
# Builds the extension, then tests, measures and sanitizes it on this machine's GPU, without a
# network. Leaves at most 8 small files in OUT, written while it runs.
#
#   bash benchmarks/gpu.sh OUT [--dry] [build] [test] [ops] [model] [more] [sanitize] [compile]
#
# Without names all phases run, in this order, the most important rows first, within BUDGET seconds
# (default 470): every command has a share of what the build leaves, and what one does not need is
# shared by the later ones. With names each command has its full limit, all together BUDGET. What is
# cut is named; a second call may then name its phase. What the machine lacks is named first. Only a
# build that fails stops the next phases, and a machine on which none could run.
# The exit status is the sum of the phases that failed: build 1, test 2, ops 4, model 8, more 16,
# sanitize 32, compile 64; or 255: nothing was run. A sanitizer that the time stops has not failed.
# --dry tries the script on a machine without a GPU: CPU kernels, tiny sizes, six times as long
# limits.
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
# The table and the picture at the end take the last seconds, a command that must be killed some.
DEADLINE=$((SECONDS + PATIENCE * (${BUDGET:-470} - 41)))

SUITE=("$PYTHON" -m benchmarks --device cuda --seconds 0.05 --output "$OUT")
[ -z "$DRY" ] || SUITE=("$PYTHON" -m benchmarks --device cpu --quick --output "$OUT")
OURS=("ours: empirical, filters" "ours: logits, without u" "ours: empirical, gates, keeping .grad")
FOCUS=(--for-targets)
REST=(--beyond-targets)
[ -z "$DRY" ] || FOCUS=() REST=()  # no target is about tiny sizes
RIVALS=(vmap Opacus BackPACK "Torch-Pruning Hessian")
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

PLANNING=  # set: limited only adds up the shares
PLANNED=0  # the shares of all commands to come

# say WORDS...: to the terminal and the log.
say() { echo "$*" | tee -a "$LOG"; }

# run_for SECONDS COMMAND...: output to the terminal and the log; 124 or 137, if it is stopped.
run_for() {
  local limit=$1 begin=$SECONDS code=0
  shift
  timeout --signal="${SIGNAL:-TERM}" --kill-after=8 "$limit" "$@" 2>&1 | tee -a "$LOG" || code=$?
  ! stopped $code || say "stopped after $((SECONDS - begin)) s: $*"
  return $code
}

# stopped CODE: whether this exit status is that of a command that its time did not suffice for.
stopped() { [ "$1" = 124 ] || [ "$1" = 137 ]; }

# limited SECONDS SHARE COMMAND...: like run_for, SECONDS at most, or in a run of all phases SHARE
# of PLANNED parts of the time left. Not run at all where too little is left: 124.
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
    say "out of time, not run: $*"
    return 124
  fi
  say "+ [$limit s] $*"
  run_for "$limit" "$@"
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
    limited 120 75 "$PYTHON" -m pytest -q -m gpu
    return
  fi
  # Interrupted, pytest still says what failed so far.
  SIGNAL=INT limited 150 75 "$PYTHON" -m pytest -q -m gpu -rs --maxfail=30 --durations=15
}

run_ops() {
  limited 150 45 "${SUITE[@]}" weighted_grams_ channel_dot --compile none --within WITHIN --add
}

run_model() {
  local failed=0
  local network=resnet50
  [ -z "$DRY" ] || network=resnet56
  local statistics=("$PYTHON" -m benchmarks.statistics_cost --network $network --output "$OUT")
  local size=(--device cuda --rounds 9) measured=$OUT/statistics_${network}_bfloat16.json
  [ -z "$DRY" ] || size=(--device cpu --batch-size 2 --image-size 8 --rounds 3)
  local training=(--channels-last --autocast)
  limited 70 30 "${statistics[@]}" "${size[@]}" --seconds 4 "${training[@]}" --tag _bfloat16 \
    --methods "${OURS[@]}" || failed=1
  # A rival that does not run like this is named, with its reason.
  limited 120 25 "${statistics[@]}" "${size[@]}" --seconds 3 "${training[@]}" \
    --tag _bfloat16_rivals --give-up-after 40 --methods "${OURS[@]}" "${RIVALS[@]}" || failed=1
  [ -n "$DRY" ] || size+=(--batch-size 64)
  limited 100 20 "${statistics[@]}" "${size[@]}" --seconds 3 --tag _rivals --give-up-after 40 \
    --methods "${OURS[@]}" "${RIVALS[@]}" || failed=1
  size=(--device cuda)
  [ -z "$DRY" ] || size=(--device cpu --quick)
  [ -n "$PLANNING" ] || [ ! -f "$measured" ] || size+=(--statistics "$measured")
  limited 60 12 "$PYTHON" -m benchmarks.scaling "${size[@]}" --output "$OUT" || failed=1
  return $failed
}

# What targets are about, then all other cases.
run_more() {
  local failed=0 untuned=(--compile none --within WITHIN --add)
  limited 150 40 "${SUITE[@]}" map_similarity patch_gram_ "${FOCUS[@]}" "${untuned[@]}" || failed=1
  limited 120 20 "${SUITE[@]}" map_similarity weighted_gram_ channel_moments patch_gram_ \
    "${REST[@]}" "${untuned[@]}" || failed=1
  return $failed
}

# sanitized TOOL SHARE: the check of all kernels under a tool of compute-sanitizer. Only this
# project's kernels; every allocation its own, so that its ends are seen.
sanitized() {
  limited 90 "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" \
    --kernel-name kns=ccp --error-exitcode 1 --print-limit 10 \
    "$PYTHON" -m benchmarks.check --device cuda
}

# logged LINE PATTERN: the first line of the log, from LINE on, with a message of compute-sanitizer
# like that.
logged() { grep -m 1 -iE "^=+ .*($2)" < <(tail -n "+$1" "$LOG"); }

FINDING='invalid|misaligned|uninitialized|race reported|barrier error|program hit'

# The first tools have the largest shares, of which they leave to the others what they do not need.
run_sanitize() {
  local failed=0 ran=0 unfinished=() each begin code reason
  local tools=(memcheck:60 racecheck:50 initcheck:40)
  [ -n "$SHARED" ] || tools+=(synccheck:0)
  if [ -n "$DRY" ]; then
    limited 60 40 "$PYTHON" -m benchmarks.check
    return
  fi
  if ! command -v compute-sanitizer >/dev/null; then
    [ -n "$PLANNING" ] || NOT_DONE="not run: compute-sanitizer was not found"
    return 0
  fi
  for each in "${tools[@]}"; do
    begin=$(($(wc -l <"$LOG") + 1))
    sanitized "${each%:*}" "${each#*:}" && ran=1 && continue
    code=$?
    # Some machines let no tool at the GPU: that is no finding, and the other tools need no try.
    if [ "$ran" = 0 ] && reason=$(logged "$begin" 'device not supported'); then
      NOT_DONE="not run: ${each%:*}: ${reason#========= }"
      return 0
    fi
    ran=1
    if stopped $code && ! logged "$begin" "$FINDING" >/dev/null; then
      unfinished+=("${each%:*}")
    else
      failed=1
    fi
  done
  [ ${#unfinished[@]} = 0 ] || NOT_DONE="not finished: ${unfinished[*]}"
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
run_for $((60 * PATIENCE)) "$PYTHON" -m benchmarks.needs ${DRY:+--dry}
[ $? != 3 ] || { say "nothing was run"; exit 255; }
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
  say "== $phase"
  begin=$SECONDS
  [ "$phase" = build ] || [ -z "$SHARED" ] || plan "${PHASES[@]:index}"
  NOT_DONE=  # what of the phase was not run or not finished, where that is no failure
  if ! "run_$phase"; then
    result="FAILED${NOT_DONE:+, $NOT_DONE}"
    status=$((status | bit))
    failures+=("$phase")
  elif [ -n "$NOT_DONE" ]; then
    result=$NOT_DONE
    left_out+=("$phase")
  else
    result=ok
  fi
  say "== $phase: $result, $((SECONDS - begin)) s"
  [ "$phase" != build ] || [ "$status" = 0 ] || break
done
# The picture again from the rows, since a run that is cut draws nothing.
run_for $((25 * PATIENCE)) "$PYTHON" -m benchmarks.targets "$OUT"
[ ! -f "$OUT/operators.json" ] ||
  run_for $((6 * PATIENCE)) "$PYTHON" -m benchmarks.plot "$OUT/operators.json"
say "failed: ${failures[*]:-nothing}; not run or not finished: ${left_out[*]:-nothing};" \
  "files: $(ls "$OUT" | tr '\n' ' ')"
exit $status
