#!/usr/bin/env bash
# Runs the core tests (kernels, model, collectives, engine, resume) with other versions than constraints.txt names:
#
#     tests/other_versions.sh TORCH TRANSFORMERS [PYTEST ARGUMENT ...]
#     PYTHON=python3.12 tests/other_versions.sh 2.9.1 4.57.6 -x
#
# The first run makes an environment under build/versions; for Linux on x86_64, PyPI has most versions of torch for CUDA
# only, which take 5 to 7 GB. Remove the folder afterwards. The other packages are those of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $# -ge 2 ]] || { sed -n '2,8p' "$0" >&2; exit 2; }
torch=$1 transformers=$2
shift 2
python=${PYTHON:-python3}
name=$("$python" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')
folder=build/versions/$name-torch$torch-transformers$transformers

if [[ ! -e $folder/.ready ]]; then
    "$python" -m venv "$folder"
    # transformers decides about these three; torchcodec and FFCV belong to one version of torch.
    grep -vE '^(torch|torchcodec|transformers|tokenizers|huggingface_hub|ffcv|fastargs|pytorch-pfn-extras)==' \
        constraints.txt >"$folder/constraints.txt"
    "$folder/bin/python" -m pip install -qq --disable-pip-version-check -c "$folder/constraints.txt" \
        -e '.[lora,siglip]' beartype hypothesis pytest pytest-xdist setuptools \
        "torch==$torch" "transformers==$transformers"
    touch "$folder/.ready"
fi

training=(config schedule versions local_device tokenizer towers model objective frozen gradient_cache step exchange
    global_batch engine engine_forms checkpoint universal kill export)
files=(tests/similarity tests/cluster/test_host_limits.py)
for file in "${training[@]}"; do
    files+=("tests/training/test_$file.py")
done
"$folder/bin/python" -c 'import sys, torch, transformers
print("Python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)'
exec "$folder/bin/python" -m pytest -q -p no:cacheprovider "$@" "${files[@]}"
