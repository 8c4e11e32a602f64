#!/usr/bin/env bash
# run.sh: all runs behind the results, with their samples and numbers. In the project's top folder:
#
#     DATA=cifar10 LITE0=tf_efficientnet_lite0.pth LITE2=tf_efficientnet_lite2.pth \
#       bash assets/results/run.sh
#
# It may be stopped and started again: what is there is not made a second time. (A run that was
# stopped before its first checkpoint has left a folder that must be removed first.)
set -euo pipefail
DATA=${DATA:?a folder with train/CLASS/IMAGE and test/CLASS/IMAGE}
LITE0=${LITE0:?a file with the weights of tf_efficientnet_lite0, which gives the targets}
LITE2=${LITE2:?a file with the weights of tf_efficientnet_lite2, a judge}
RUNS=${RUNS:-vanilla-0:8000 repa2-0:2000 repa6-0:4000 repa4-0:8000 control4-0:8000
  vanilla-1:4000 repa4-1:2000 control4-1:2000}  # to which step
export OMP_NUM_THREADS=1  # one core a run: several may run at once, with different RUNS
export TIMM_FUSED_ATTN=0  # torch 2.14's fused attention is slow on a CPU, backwards in bfloat16
results=assets/results
common=(--data "$DATA" --model SiT-Ti/4 --projector-dim 512 --batch-size 64 --learning-rate 1e-3
  --eval-every 500 --checkpointing-steps 2000 --device cpu --dtype bfloat16 --compile
  --encoder tf_efficientnet_lite0 --encoder-weights "$LITE0" --cache-targets)
mkdir -p runs

train() {  # RUN STEP: on to that step. repa4-0 is aligned at block 4, with seed 0
  local folder=runs/$1 arm=${1%-*} seed=${1##*-}
  local options=(--encoder-depth "${arm: -1}")
  local control=""
  if [ "$arm" = vanilla ]; then options=(--proj-coeff 0); fi
  if [[ $arm == control* ]]; then control=1; fi
  if [ -f "$folder/checkpoint-$2.pt" ]; then return; fi
  if [ -f "$folder/checkpoint.pt" ]; then
    CONTROL=$control python $results/arm.py --resume "$folder" --max-train-steps "$2"
  else
    CONTROL=$control python $results/arm.py "${common[@]}" "${options[@]}" \
      --seed "$seed" --output-dir "$folder" --max-train-steps "$2"
  fi
  cp "$folder/checkpoint.pt" "$folder/checkpoint-$2.pt"
  cp "$folder/metrics.csv" "$results/$1.csv"
}

samples() {  # RUN STEP: 2,000 of them, 200 a class
  if [ -f "runs/$1-$2.npz" ]; then return; fi
  python sample.py --ckpt "runs/$1/checkpoint-$2.pt" --num-samples 2000 --num-steps 25 \
    --batch-size 250 --device cpu --dtype bfloat16 --compile --npz "runs/$1-$2.npz"
  python $results/judge.py score --data "$DATA" --judge runs/judge.pt --lite2 "$LITE2" \
    --output $results/distances.csv --samples "runs/$1-$2.npz"
}

# The judge, and the least distance: of 2,000 real images. And what a prediction reaches that has
# seen no image, to read the alignment by.
if [ ! -f runs/judge.pt ]; then
  python $results/judge.py train --data "$DATA" --judge runs/judge.pt
  python $results/judge.py score --data "$DATA" --judge runs/judge.pt --lite2 "$LITE2" \
    --output $results/distances.csv --samples train
  python $results/constant.py "${common[@]}" --dtype float32
fi

for item in $RUNS; do
  run=${item%:*}
  for step in 2000 4000 8000; do
    if [ "$step" -le "${item#*:}" ]; then
      train "$run" "$step"
      samples "$run" "$step"
    fi
  done
  python sample.py --ckpt "runs/$run/checkpoint.pt" --num-samples 80 --cfg-scale 2 --device cpu \
    --output "runs/$run-grid.png"
  python sample.py --ckpt "runs/$run/checkpoint.pt" --cknna --data "$DATA" --device cpu \
    --encoder tf_efficientnet_lite0 --encoder-weights "$LITE0" --output "$results/cknna-$run.csv"
done
echo "now: pip install matplotlib && python $results/figures.py"
