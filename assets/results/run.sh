#!/usr/bin/env bash
# run.sh: the runs behind the results, with their numbers. In the project's top folder:
#
#     DATA=cifar10_jpeg LITE0=tf_efficientnet_lite0.pth LITE2=tf_efficientnet_lite2.pth \
#       bash assets/results/run.sh
#
# It may be stopped and started again: what is finished is not made a second time. RUNS names other
# runs, ARM-SEED each, and STEPS their length, for example RUNS="control2-0 random2-0". With
# LONG="8000 16000 32000", seed 0 of vanilla and REPA, and REPA that stops at step STEPS, go on
# afterwards and are judged at these steps. On a CPU without bfloat16 instructions (avx512_bf16 or
# amx_bf16 in /proc/cpuinfo), DTYPE=float32 is many times as fast. Two more variables, SAMPLES and
# EPOCHS, make the judges quicker: for trying out the script.
set -euo pipefail
DATA=${DATA:?a folder with train/CLASS/IMAGE and test/CLASS/IMAGE}
LITE0=${LITE0:?a file with the weights of tf_efficientnet_lite0, which gives the targets}
LITE2=${LITE2:?a file with the weights of tf_efficientnet_lite2, one of the judges}
RUNS=${RUNS:-$(echo {vanilla,repa2,control2,random2}-{0,1,2})}
STEPS=${STEPS:-4000}
DTYPE=${DTYPE:-bfloat16}
SAMPLES=${SAMPLES:-5000}
EPOCHS=${EPOCHS:-8}
export OMP_NUM_THREADS=1  # one core a run: several may run at once, with different RUNS
export TIMM_FUSED_ATTN=0  # torch 2.14's fused attention is slow on a CPU, backwards in bfloat16
results=assets/results
mkdir -p runs

train() {  # RUN
  local folder=runs/$1 arm=${1%-*} seed=${1##*-} weights=$LITE0 control=""
  local options=(--encoder-depth "${arm: -1}")
  if [ "$arm" = vanilla ]; then options=(--proj-coeff 0); fi
  if [[ $arm == random* ]]; then weights=random; fi
  if [[ $arm == control* ]]; then control=1; fi
  if [ -f "$folder/checkpoint.pt" ]; then
    CONTROL=$control python $results/arm.py --resume "$folder" --max-train-steps "$STEPS"
  else
    CONTROL=$control python $results/arm.py --data "$DATA" --model SiT-Ti/4 --batch-size 64 \
      --learning-rate 1e-3 --eval-every 500 --device cpu --dtype "$DTYPE" --compile \
      --encoder tf_efficientnet_lite0 --encoder-weights "$weights" --cache-targets \
      "${options[@]}" --seed "$seed" --output-dir "$folder" --max-train-steps "$STEPS"
  fi
  cp "$folder/metrics.csv" "$results/$1.csv"
}

judge() {  # RUN or floor, STEP
  if ! grep -qs "^$(basename "$1"),$2," $results/distances.csv; then
    python $results/judge.py score --data "$DATA" --judges runs/labels.pt runs/rotations.pt \
      --kin "$LITE2" --output $results/distances.csv --samples "$SAMPLES" --dtype "$DTYPE" \
      --runs "$1"
  fi
}

for task in labels rotations; do
  if [ ! -f runs/$task.pt ]; then
    python $results/judge.py train --data "$DATA" --task $task --judge runs/$task.pt \
      --epochs "$EPOCHS" --dtype "$DTYPE"
  fi
done
judge floor 0
for run in $RUNS; do
  train "$run"
  if [ ! -f "$results/losses-$run.csv" ]; then
    python sample.py --ckpt "runs/$run" --device cpu --losses --output "$results/losses-$run.csv"
  fi
  judge "runs/$run" "$STEPS"
done
if [ -n "${LONG:-}" ]; then
  for arm in vanilla repa2 stop; do  # each goes on from a copy of its run of STEPS steps
    folder=runs/long-$arm start=runs/${arm/stop/repa2}-0 options=()
    if [ $arm = stop ]; then options=(--repa-stop-step "$STEPS"); fi
    if [ ! -d "$folder" ]; then cp -r "$start" "$folder"; fi
    for step in $LONG; do
      python $results/arm.py --resume "$folder" --max-train-steps $step --eval-every 1000 \
        "${options[@]}"
      cp "$folder/metrics.csv" $results/long-$arm.csv
      judge "$folder" $step
    done
  done
fi
python $results/constant.py --data "$DATA" --encoder tf_efficientnet_lite0 \
  --encoder-weights "$LITE0"
echo "now: pip install matplotlib && python $results/figures.py"
