#!/usr/bin/env bash
# From nothing to a trained latent space on sample data: two ranks, ZeRO-2, 2 CPU cores, minutes.
#
#   ./launch/quickstart.sh                     results in runs/quickstart
#   RUN=runs/other SEED=1 ./launch/quickstart.sh
#   CONFIG=cdpvae/configs/description.json RUN=runs/description ./launch/quickstart.sh
#
# Needs Python 3.11+ and a C++ compiler. Run again, it reuses what is there; interrupted, it
# continues at the last checkpoint. Sizes suit the small backbone; loss, collapse control and
# augmentation are those of CONFIG.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

run=${RUN:-runs/quickstart}
seed=${SEED:-0}
config=${CONFIG:-cdpvae/configs/recommended.json}
ranks=${RANKS:-2}
shared=${SHARED:-$run}

command -v c++ >/dev/null || command -v g++ >/dev/null \
    || fail "a C++ compiler is needed (DeepSpeed builds a small operation): install g++"
make_environment test
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
launch=$(launcher_for "$ranks")
mkdir -p "$run" "$shared"

step() { printf '\n== %s\n' "$*"; }

# The newest complete checkpoint of a training directory, or nothing.
newest() { [ -f "$1/latest" ] && echo "$1/$(cat "$1/latest")" || true; }

# train_until STEPS DIRECTORY FLAGS...: start, continue, or find it done.
train_until() {
    local steps=$1 directory=$2 resume=()
    shift 2
    if [ -d "$directory/checkpoint-$steps" ]; then
        echo "reusing $directory/checkpoint-$steps"
        return
    fi
    [ -z "$(newest "$directory")" ] || resume=(--resume latest)
    # shellcheck disable=SC2086
    $launch cdpvae.train --config "$config" --output-dir "$directory" --max-steps "$steps" \
        --backbone "$shared/backbone" --processed-dir "$shared/processed" --seed "$seed" \
        "${sizes[@]}" "$@" "${resume[@]}"
}

# What the small backbone and 2 cores ask for; everything else is CONFIG's.
sizes=(
    --precision fp32 --num-threads 1 --no-gradient-checkpointing
    --per-device-batch-size $((64 / ranks)) --gradient-accumulation-steps 1
    --learning-rate 1e-3 --eta-min 1e-4
    --num-soft-tokens 8 --vae-hidden-dim 256 --pooling-heads 6 --lora-r 16
    --save-steps 300 --keep-checkpoints 2 --logging-steps 50 --eval-steps 300
    --eval-rows 256 --sample-max-length 48
)
train_steps=${STEPS:-900}
baseline_steps=${BASELINE_STEPS:-150}

step "sample data"
[ -f "$shared/data/pairs.jsonl" ] \
    || python -m cdpvae.sample_data --output "$shared/data"

step "backbone: a tokenizer and a small Llama, trained as a language model on the same text"
[ -f "$shared/backbone/training.json" ] || OMP_NUM_THREADS=2 python -m cdpvae.tiny_backbone \
    --input "$shared/data/pairs.jsonl" --output "$shared/backbone"

step "preprocessing"
# The sample pairs are a few templates with words filled in, so most are near-duplicates of another
# by construction, and what tells them apart is what the model is to learn: only equal ones go.
python -m cdpvae.preprocess --input "$shared/data/pairs.jsonl" --tokenizer "$shared/backbone" \
    --processed-dir "$shared/processed" --deduplication exact

step "training on $ranks ranks with ZeRO-2: $config"
train_until "$train_steps" "$run/model"

step "baseline: the same decoder without z"
train_until "$baseline_steps" "$shared/baseline" --latent none --word-dropout 0

checkpoint=$run/model/checkpoint-$train_steps
baseline=$shared/baseline/checkpoint-$baseline_steps

step "evaluation on attribute combinations held out of training"
export OMP_NUM_THREADS=2
python -m cdpvae.evaluate_reconstruction --checkpoint "$checkpoint" --baseline "$baseline" \
    --num-samples 400 --show 2 --num-rows 1000 --max-length 48 \
    --output "$run/results/reconstruction.json"

step "latent space"
python -m cdpvae.check_latents --checkpoint "$checkpoint" --baseline "$baseline" \
    --output "$run/results"

step "everything about the latent space, on one page"
python -m cdpvae.evaluate --checkpoint "$checkpoint" --baseline "$baseline" --num-rows 1000 \
    --iw-rows 50 --iw-samples 50 --dimension-rows 50 --max-length 48 --output "$run/results"

step "a walk between two instructions"
python -m cdpvae.generate --checkpoint "$checkpoint" --interpolate --num-steps 5 --max-length 48 \
    --text \
    "Explain why the old sailor took a brown horse and some hot soup to the river bank on a rainy morning." \
    "Explain why the gentle nurse took a fat goose and some ripe apples to the castle gate on a snowy night."

step "result"
python -m cdpvae.sample_report --reconstruction "$run/results/reconstruction.json" \
    --latents "$run/results/latents.json" --attributes "$shared/data/attributes.json" \
    --output "$run/results/report.json" ${STRICT:+--strict}
cat <<END

Where to look next
  curves        .venv/bin/tensorboard --logdir $run/model/logs
  evaluation    $run/results/evaluation.html
  latents       $run/results/latents.png
  texts         $run/results/reconstruction.json
  write         .venv/bin/python -m cdpvae.generate --checkpoint $checkpoint --samples 5
  settings      .venv/bin/python -m cdpvae.train --help
END
