#!/usr/bin/env bash
# run.sh: the runs behind the results, with their samples and numbers. In the project's top folder:
#
#     DATA=cifar10_jpeg LITE0=tf_efficientnet_lite0.pth bash assets/results/run.sh
#
# It may be stopped and started again: what is finished is not made a second time. RUNS names other
# runs, ARM-SEED each, for example RUNS="control2-0 random2-0".
set -euo pipefail
DATA=${DATA:?a folder with train/CLASS/IMAGE and test/CLASS/IMAGE}
LITE0=${LITE0:?a file with the weights of tf_efficientnet_lite0, which gives the targets}
RUNS=${RUNS:-vanilla-0 repa2-0 vanilla-1 repa2-1 vanilla-2 repa2-2}
STEPS=${STEPS:-4000}
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
      --learning-rate 1e-3 --eval-every 500 --device cpu --dtype bfloat16 --compile \
      --encoder tf_efficientnet_lite0 --encoder-weights "$weights" --cache-targets \
      "${options[@]}" --seed "$seed" --output-dir "$folder" --max-train-steps "$STEPS"
  fi
  cp "$folder/metrics.csv" "$results/$1.csv"
}

for task in labels rotations; do
  if [ ! -f runs/$task.pt ]; then
    python $results/judge.py train --data "$DATA" --task $task --judge runs/$task.pt
  fi
done
for run in $RUNS; do
  train "$run"
  if [ ! -f "$results/losses-$run.csv" ]; then
    python sample.py --ckpt "runs/$run" --device cpu --losses --output "$results/losses-$run.csv"
  fi
  if [ ! -f "runs/$run-$STEPS.npz" ]; then
    python sample.py --ckpt "runs/$run" --device cpu --dtype bfloat16 --num-samples 2000 \
      --num-steps 25 --batch-size 250 --npz "runs/$run-$STEPS.npz"
    python $results/judge.py score --data "$DATA" --judges runs/labels.pt runs/rotations.pt \
      --output $results/distances.csv --samples "runs/$run-$STEPS.npz"
  fi
done
python $results/constant.py --data "$DATA" --encoder tf_efficientnet_lite0 \
  --encoder-weights "$LITE0"
echo "now: pip install matplotlib && python $results/figures.py"
