#!/usr/bin/env bash
# A real MONAI Label server with a bundle of one's own: infer, train, infer with the new weights.
#
#     tests/hosts/monai_label.sh BUNDLE DATASET [PYTHON]
#
# BUNDLE is what `python -m scripts package` made, DATASET the Decathlon folder that it was trained on, PYTHON that of an
# environment with MONAI Label, see docs/how-to/monai-label.md. Everything is written to a folder of its own.
set -euo pipefail
bundle=$(realpath "$1") dataset=$(realpath "$2") python=${3:-python}
name=$(basename "$bundle") port=${PORT:-8123} work=$(mktemp -d)
here=$(dirname "$(realpath "$0")")
cd "$work"
"$python" -W ignore -m monailabel.main apps --download --name monaibundle --output apps > apps.log 2>&1
mkdir -p apps/monaibundle/model studies
cp -r "$bundle" apps/monaibundle/model/
cp "$dataset"/imagesTr/*.nii.gz studies/
"$python" -W ignore -m monailabel.main start_server --app apps/monaibundle --studies studies --conf models "$name" \
    --conf zoo_source ngc --conf sam2 false -i 127.0.0.1 -p "$port" > server.log 2>&1 &
server=$!
trap 'kill $server; echo "the server wrote $work/server.log"' EXIT
"$python" -W ignore "$here/monai_label_client.py" "http://127.0.0.1:$port" "$name" "$dataset" \
    "$work/apps/monaibundle/model/$name"
