#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Prunes and finetunes trained models with masks, scene after scene, as MaskGaussian's run_prune_finetune.sh.
#
#   launch/run_prune_finetune.sh DATA MODELS OUT [SCENE ...] [-- FLAGS OF train.py]
#
# DATA/SCENE is a data set, MODELS/SCENE its trained model: chkpnt30000.pth if there is one, else the ply of iteration
# 30000. Without SCENE, every folder of MODELS. Results go to OUT/SCENE; a scene with results.json is left alone.
# Several processes a scene: NPROC=4 launch/run_prune_finetune.sh ...
set -eu

if [ $# -lt 3 ]; then
    sed -n '5,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
data=$1 models=$2 out=$3
shift 3
scenes=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    scenes="$scenes $1"
    shift
done
[ $# -eq 0 ] || shift
[ -n "$scenes" ] || scenes=$(cd "$models" && ls -d -- */ | tr -d /)

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
train() {
    if [ "${NPROC:-1}" -gt 1 ]; then
        "$python" -m torch.distributed.run --standalone --nproc-per-node="$NPROC" "$root/train.py" "$@"
    else
        "$python" "$root/train.py" "$@"
    fi
}

failed=
for scene in $scenes; do
    [ ! -e "$out/$scene/results.json" ] || continue
    flag=--start_checkpoint model=$models/$scene/chkpnt30000.pth
    if [ ! -e "$model" ]; then
        flag=--start_pointcloud model=$models/$scene/point_cloud/iteration_30000/point_cloud.ply
    fi
    train -s "$data/$scene" -m "$out/$scene" --eval --prune_finetune "$flag" "$model" --render_and_evaluate "$@" ||
        failed="$failed $scene"
done
if [ -n "$failed" ]; then
    echo "failed:$failed (see train.log in their folders below $out)" >&2
    exit 1
fi
