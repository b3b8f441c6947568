#!/usr/bin/env bash
# The three stages as a story, on a laptop, to be read top to bottom. `make demo` does the same in one command.
#
#     launch/cpu_demo.sh [WORKDIR]
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=${1:-runs/demo}
make .venv
jaxstages() { .venv/bin/jaxstages "$@"; }

# 1. What is there to learn? The recipe names the data of each stage; `prepare` tokenizes and packs it, once.
jaxstages prepare --config=configs/demo.py --workdir="$workdir"

# 2. Look before you train: green (or in ⟦brackets⟧) is what the model will be trained to say.
jaxstages inspect --workdir="$workdir" --stage=pretrain
jaxstages inspect --workdir="$workdir" --stage=finetune
jaxstages inspect --workdir="$workdir" --stage=instruct

# 3. Rough sketch: raw text, no labels. The model learns words, grammar, and who lives where.
jaxstages pretrain --workdir="$workdir"
jaxstages generate --workdir="$workdir" --stage=pretrain --prompt="Anna lives in"

# 4. Detail: labelled pairs. It starts from the best checkpoint of step 3 and learns to translate.
jaxstages finetune --workdir="$workdir"
jaxstages generate --workdir="$workdir" --stage=finetune --prompt="The old cat sleeps in the garden."

# 5. Finish: follow instructions. It starts from the best checkpoint of step 4.
jaxstages instruct --workdir="$workdir"
jaxstages generate --workdir="$workdir" --stage=instruct --prompt="Where does Anna live?"

# 6. What did each stage teach, and what did it make the model forget?
jaxstages evaluate --workdir="$workdir"
