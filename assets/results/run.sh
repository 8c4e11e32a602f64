#!/usr/bin/env bash
# run.sh: all runs behind the results, with their samples and numbers. In the project's top folder:
#
#     DATA=cifar10 LITE0=tf_efficientnet_lite0.pth LITE2=tf_efficientnet_lite2.pth \
#       bash assets/results/run.sh
#
# It may be stopped and started again: a run with a checkpoint goes on from it. (A run that was
# stopped before its first checkpoint has left a folder that must be removed first.)
set -euo pipefail
DATA=${DATA:?a folder with train/CLASS/IMAGE and test/CLASS/IMAGE}
LITE0=${LITE0:?a file with the weights of tf_efficientnet_lite0, which gives the targets}
LITE2=${LITE2:?a file with the weights of tf_efficientnet_lite2, which judges}
JUDGE=${JUDGE:-runs/judge.pt}  # of judge.py; trained if it is not there
STEPS=${STEPS:-4000}
SEEDS=${SEEDS:-0 1}
ARMS=${ARMS:-vanilla repa2 repa4 repa6 control6}
BEST=${BEST:-repa6}  # the arm whose layers are looked at beside vanilla's and the control's
results=assets/results
distances=$results/distances.csv

lite0=(--encoder tf_efficientnet_lite0 --encoder-weights "$LITE0")
lite2=(--encoder tf_efficientnet_lite2 --encoder-weights "$LITE2" --grid-size 8)
common=(--data "$DATA" --model SiT-Ti/4 --projector-dim 512 --batch-size 64 --learning-rate 1e-3
  --eval-every 1000 --device cpu "${lite0[@]}" --cache-targets --max-train-steps "$STEPS")

# The control: within a batch each image gets its neighbour's targets. Everything else is the same.
control=$(mktemp -d)
trap 'rm -r "$control"' EXIT
line='z = torch.where(flip\[:, None, None\], cached_flipped\[index\], cached\[index\])'
sed "s/$line/&.roll(1, 0)/" repa_mini.py > "$control/repa_mini.py"
if cmp -s repa_mini.py "$control/repa_mini.py"; then
  echo "repa_mini.py has no line '$line': the control needs it" >&2
  exit 1
fi

field() {  # FILE NUMBERS: columns of a CSV's last row
  tail -n 1 "$1" | tr -d '\r' | cut -d, -f"$2"
}

# The judge, and how it finds real images: no sampler can be expected to do better.
mkdir -p runs
judge="python $results/judge.py"
[ -f "$JUDGE" ] || $judge train --data "$DATA" --output "$JUDGE"
[ -f $distances ] || echo run,step,lite2,judge,accuracy > $distances
$judge score --judge "$JUDGE" --data "$DATA" --samples train --name train --output runs/judge.csv
echo "train,,,$(field runs/judge.csv 4,5)" >> $distances

# What a prediction that has seen no image reaches, to read the alignment by.
python $results/constant.py "${common[@]}"

for seed in $SEEDS; do
  for arm in $ARMS; do
    run=$arm-$seed
    folder=runs/$run
    program=repa_mini.py
    options=(--encoder-depth "${arm: -1}")  # repa2: block 2
    if [ "$arm" = vanilla ]; then options=(--proj-coeff 0); fi
    if [ "$arm" = control6 ]; then program=$control/repa_mini.py; fi

    if [ -f "$folder/checkpoint.pt" ]; then
      python "$program" --resume "$folder" --max-train-steps "$STEPS"
    else
      python "$program" "${common[@]}" "${options[@]}" --seed "$seed" --output-dir "$folder"
    fi
    cp "$folder/metrics.csv" "$results/$run.csv"

    # Both distances of the same samples; fd.csv, which does not name the run, is in its folder.
    python sample.py --ckpt "$folder/checkpoint.pt" --fd --data "$DATA" "${lite2[@]}" --device cpu \
      --num-samples 2000 --num-steps 25 --npz "$folder/samples.npz" --output "$folder/fd.csv"
    $judge score --judge "$JUDGE" --data "$DATA" --samples "$folder/samples.npz" \
      --name "$run" --step "$STEPS" --output "$folder/judge.csv"
    echo "$run,$(field "$folder/fd.csv" 1,10),$(field "$folder/judge.csv" 4,5)" >> $distances

    case $arm in
      vanilla | "$BEST" | control6)
        python sample.py --ckpt "$folder/checkpoint.pt" --cknna --data "$DATA" "${lite0[@]}" \
          --device cpu --output "$results/cknna-$run.csv" ;;
    esac
  done
done
echo "now: pip install matplotlib && python $results/figures.py"
