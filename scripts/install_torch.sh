#!/bin/sh
# Install the CPU build of torch into the environment whose python is $1, at version $2.
#
# Three places in turn, because PyPI's Linux wheel is the CUDA build (several gigabytes): an index or
# wheel folder that pip is already configured with, PyTorch's own CPU index ($TORCH_INDEX), and PyPI.
set -eu
python=$1
version=$2
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

if "$python" -c "import sys, torch; sys.exit(torch.__version__.split('+')[0] != '$version')" 2>/dev/null; then
    exit 0
fi
if [ "$(uname -s)" = Linux ]; then
    "$python" -m pip install -q "torch==$version+cpu" && exit 0
    "$python" -m pip install -q --retries 1 --timeout 15 --extra-index-url "$index" "torch==$version+cpu" && exit 0
fi
exec "$python" -m pip install -q "torch==$version"
