#!/usr/bin/env bash
# Trains a tiny LLaVA to read handwritten digits, merges it, and shows its answers before and after:
# ./scripts/quickstart.sh [OUTPUT_DIR [FLAGS OF THE TRAINING]]. With QUICKSTART_PYTHON=PYTHON that interpreter is used and
# nothing is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-outputs/quickstart}"
shift $(($# > 0))
if [ -n "${QUICKSTART_PYTHON:-}" ]; then
  PATH="$(dirname "$QUICKSTART_PYTHON"):$PATH"
else
  ./scripts/setup.sh quickstart
  source .venv/bin/activate
fi
# On shared cores threads that spin while they wait make everything several times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
say() { printf '\n== %s\n' "$*"; }
SECONDS=0

say "Pictures of handwritten digits"
rm -rf "$out/digits" "$out/lora" "$out/merged"
python scripts/make_digits.py --output "$out/digits"

say "What the model answers before training"
python scripts/quickstart_report.py answer --model data/tiny-llava --data "$out/digits" --output "$out/before.json"

say "Training"
deepspeed --num_gpus 1 train.py --config quickstart.yaml \
  --data_path "$out/digits/train.json" --image_folder "$out/digits" --output_dir "$out/lora" "$@"

say "Merging"
llava-ft merge --model-path "$out/lora" --save-model-path "$out/merged"

say "What the merged model answers"
python scripts/quickstart_report.py answer --model "$out/merged" --data "$out/digits" --output "$out/after.json"
python scripts/quickstart_report.py compare --before "$out/before.json" --after "$out/after.json" \
  --data "$out/digits" --run "$out/lora" --output "$out"
echo "Took $SECONDS seconds."
