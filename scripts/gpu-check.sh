#!/usr/bin/env bash
# One visit to a GPU: are all kernels right there, and how fast are they beside what PyTorch has? Needs one `latentc` binary, this
# checkout's scripts and tests/cases, and Python 3; PyTorch for the peers.
#
#   TARGET   cuda (default), or wgpu for a dry run
#   SIZES    real (default on cuda), or small: models and sizes that lavapipe can do
#   LATENTC  the binary; target/release/latentc if not given
#   OUT      a folder for all results; target/gpu-check if not given
#   PYTHON   python3 if not given; for the peers, one that has torch
#   ITEM     seconds that one measurement may take; 60 if not given
#   LIMIT    seconds for all of it: what would begin later is left out, and said to be; 470 if not given
#   ONLY     steps to do, of: check eval sanitize bench peers table; all if not given
#
# No step's failure stops the others. Ends with a line for each; exits with 1 if one failed, with 2 if one could not be run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

target=${TARGET:-cuda}
sizes=${SIZES:-$([[ $target == cuda ]] && echo real || echo small)}
latentc=${LATENTC:-target/release/latentc}
out=${OUT:-target/gpu-check}
python=${PYTHON:-python3}
item=${ITEM:-60}
limit=${LIMIT:-470}
only=${ONLY:-check eval sanitize bench peers table}
case_=tests/cases/tiny

[[ $target == cuda || $target == wgpu ]] || { echo "TARGET=$target: cuda or wgpu" >&2; exit 1; }
[[ $sizes == real || $sizes == small ]] || { echo "SIZES=$sizes: real or small" >&2; exit 1; }
[[ -x $latentc ]] || { echo "LATENTC=$latentc: no such program; cargo build --release -p latentc makes one" >&2; exit 1; }
mkdir -p "$out/check" "$out/eval" "$out/bench" || exit 1
rm -f "$out"/check/*.json "$out"/bench/*.json "$out"/peers.json "$out"/summary.txt

start=$SECONDS until=$limit
failed=0 missing=0
note() { printf '%-8s %4ds  %s\n' "$1" $((SECONDS - start)) "$2" | tee -a "$out/summary.txt"; }
# Runs a command with a time limit, its output in a log, and notes what came of it.
try() {
  local name=$1 seconds=$2 log left=$((until - (SECONDS - start)))
  shift 2
  if ((left < 5)); then
    missing=1
    note LEFT "$name: no time was left"
    return 1
  fi
  seconds=$((seconds < left ? seconds : left))
  log=$out/log.${name//[^A-Za-z0-9_.-]/_}.txt
  timeout "$seconds" "$@" >"$log" 2>&1
  local code=$?
  case $code in
    0) note ok "$name" ;;
    124) failed=1; note LATE "$name: more than $seconds s" ;;
    *) failed=1; note FAILED "$name: $(grep -v '^\s*$' "$log" | tail -n 1 | cut -c1-300)" ;;
  esac
  return $code
}
wants() { [[ " $only " == *" $1 "* ]]; }

if [[ $target == cuda ]] && wants check; then
  nvidia-smi -q -d CLOCK,POWER,ECC >"$out/gpu.txt" 2>&1 || note note "nvidia-smi does not run"
fi

# 1. Every kernel against the interpreter, then whole models against another implementation's figures.
if wants check; then
  models=("$case_" tests/cases/tiny-llama)
  [[ $sizes == real ]] && models+=(deepseek-v2-lite deepseek-v2 deepseek-67b bench-moe-0.3b)
  [[ $sizes == small ]] && graphs=(--graph decode) || graphs=()
  for model in "${models[@]}"; do
    name=$(basename "$model")
    try "check $name" 90 sh -c '"$@" >"$0"' "$out/check/$name.json" \
      "$latentc" check "$model" --target "$target" --json "${graphs[@]}"
  done
  # What reads weights in codes.
  if [[ $sizes == real ]]; then
    try "check bench-moe-0.3b.int8" 90 sh -c '"$@" >"$0"' "$out/check/bench-moe-0.3b.int8.json" \
      "$latentc" check bench-moe-0.3b --target "$target" --json --weights int8
  fi
  # What training runs besides.
  models=("$case_")
  [[ $sizes == real ]] && models+=(deepseek-v2-lite)
  for model in "${models[@]}"; do
    name=$(basename "$model").gradient
    try "check $name" 90 sh -c '"$@" >"$0"' "$out/check/$name.json" \
      "$latentc" check "$model" --target "$target" --json --graph gradient
  done
fi
if wants eval; then
  want=$case_/expect.safetensors
  evaluate=("$latentc" eval "$case_" --inputs "$want")
  for graph in prefill decode; do
    read -ra how <<<"$([[ $graph == decode ]] && echo '--graph decode --prefill 3')"
    try "eval $graph" 60 "${evaluate[@]}" --target "$target" "${how[@]}" --out "$out/eval/$graph.safetensors" &&
      try "eval $graph is right" 20 "$python" scripts/gpu_table.py same "$out/eval/$graph.safetensors" "$want" \
        --as logits=prefill_logits --tolerance 2e-4
  done
  step=(--grad --adamw-step)
  try "train step" 120 "${evaluate[@]}" --target "$target" "${step[@]}" --out "$out/eval/step.safetensors" &&
    try "train step on the host" 60 "${evaluate[@]}" --target host "${step[@]}" --out "$out/eval/host.safetensors" &&
    try "train steps agree" 20 "$python" scripts/gpu_table.py same "$out/eval/step.safetensors" \
      "$out/eval/host.safetensors" --tolerance 2e-3
  # Greedy tokens, twice: launches that overlap may not depend on who is first. Of real widths: no kernel of the small case begins early.
  model=$case_ made=
  if [[ $sizes == real ]]; then
    made=$(mktemp -d) && model=$made/model && try "init" 60 "$latentc" init bench-moe-0.3b -o "$model"
  fi
  goes_on() {
    try "tokens, $1" 60 sh -c '"$@" >"$0"' "$out/eval/tokens.$1.txt" "$latentc" run "$model" --target "$2" \
      --prompt-ids "$(seq -s, 5 36)" --steps 48 --ignore-eos
  }
  goes_on host host && goes_on once "$target" && goes_on again "$target" &&
    try "tokens agree" 5 cmp "$out/eval/tokens.once.txt" "$out/eval/tokens.host.txt" &&
    try "tokens agree again" 5 cmp "$out/eval/tokens.once.txt" "$out/eval/tokens.again.txt"
  [[ -z $made ]] || rm -rf "$made"
fi

# 2. NVIDIA's own checks of memory and races, on the small case.
if wants sanitize && [[ $target == cuda ]]; then
  sanitizer=$(command -v compute-sanitizer || ls -d "${CUDA_PATH:-/usr/local/cuda}"/bin/compute-sanitizer \
    "${CUDA_PATH:-/usr/local/cuda}"/compute-sanitizer/compute-sanitizer /usr/local/cuda*/bin/compute-sanitizer \
    2>/dev/null | head -n 1)
  if [[ -z $sanitizer ]]; then
    missing=1
    note MISSING "compute-sanitizer is neither on the path nor in CUDA's folder: NEITHER MEMORY NOR RACES WERE CHECKED"
  else
    for tool in memcheck racecheck; do
      try "$tool" 75 "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$latentc" run "$case_" --target cuda --prompt-ids 1,2,3 --steps 2
    done
  fi
fi

# 3. Measurements, each with a time limit of its own: layers and models first, then single operations. The last third of
# the time is kept for the peers.
until=$((limit * 2 / 3))
measure() {
  local name=$1
  shift
  try "bench $name" "$item" "$latentc" bench "$@" --target "$target" -o "$out/bench/$name.json"
}
if wants bench; then
  if [[ $sizes == small ]]; then
    measure tiny.whole.decode.b1.s64 "$case_" --context 64 --quick --repeat 2
    measure tiny.whole.prefill.t40 "$case_" --graph prefill --tokens 40 --quick --repeat 1
    measure op.latent-attention.b1.s64 scripts/ops/latent-attention.ir --size b=1 --size s=64 --quick --repeat 1 --kernels
  else
    lite=(deepseek-v2-lite --dtype bf16) v2=(deepseek-v2 --dtype bf16)
    measure lite.layer.decode.b1.s4096 "${lite[@]}" --layers 1 --context 4096
    measure lite.layer.decode.b16.s4096 "${lite[@]}" --layers 1 --batch 16 --context 4096
    measure lite.layer.decode.b128.s1024 "${lite[@]}" --layers 1 --batch 128 --context 1024 --repeat 9
    measure lite.layer.prefill.t2048 "${lite[@]}" --layers 1 --graph prefill --tokens 2048 --repeat 7
    measure lite.layer.gradient.t2048 "${lite[@]}" --layers 1 --graph gradient --tokens 2048 --repeat 5
    measure lite.whole.decode.b1.s1024 "${lite[@]}" --context 1024 --whole
    measure lite.whole.prefill.t2048 "${lite[@]}" --graph prefill --tokens 2048 --whole --repeat 5
    measure v2.layer.decode.b1.s65536 "${v2[@]}" --layers 1 --context 65536
    measure v2.layer.decode.b16.s16384 "${v2[@]}" --layers 1 --batch 16 --context 16384 --repeat 9
    measure v2.layer.prefill.t4096 "${v2[@]}" --layers 1 --graph prefill --tokens 4096 --repeat 3
    operation() { measure "op.$1.$2" "scripts/ops/$1.ir" --kernels --repeat "$3" "${@:4}"; }
    for s in 1024 16384 65536; do operation latent-attention "b1.s$s" 15 --size b=1 --size "s=$s"; done
    operation latent-attention b16.s16384 9 --size b=16 --size s=16384
    operation latent-attention b128.s4096 9 --size b=128 --size s=4096
    for t in 1 16 128 1024 4096 16384; do operation product "t$t" 9 --size "t=$t"; done
    for t in 1 16 128 1024 4096; do
      operation experts-v2 "t$t" 5 --size "t=$t"
      operation experts-lite "t$t" 5 --size "t=$t"
    done
    operation experts-gradient-lite t2048 5 --size t=2048
    operation embedding-gradient-lite t2048 5 --size t=2048
    operation experts-v2 t128.skewed 5 --size t=128 --skew 1
    operation experts-v2 t1024.skewed 5 --size t=1024 --skew 1
    for t in 512 2048 4096 16384; do operation prefill-attention "t$t" 3 --size "t=$t" --size "s=$t"; done
  fi
fi
until=$limit

# 4. The same in PyTorch, and all of it in one table.
if wants peers; then
  if ! "$python" -c 'import torch' 2>/dev/null; then
    missing=1
    note MISSING "$python has no torch: NOTHING WAS COMPARED"
  else
    try peers 150 "$python" scripts/gpu_peers.py "$out/bench" -o "$out/peers.json" --seconds 130
  fi
fi
if wants table; then
  try table 20 "$python" scripts/gpu_table.py table "$out" -o "$out/table.md" && cat "$out/table.md"
fi

echo
cat "$out/summary.txt"
[[ $failed == 1 ]] && exit 1
[[ $missing == 1 ]] && exit 2
exit 0
