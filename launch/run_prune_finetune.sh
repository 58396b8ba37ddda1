#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Prunes and finetunes trained models with masks, scene after scene, as MaskGaussian's run_prune_finetune.sh.
#
#   launch/run_prune_finetune.sh DATA MODELS OUT [SCENE ...] [-- FLAGS OF train.py]
#
# DATA/SCENE is a data set, MODELS/SCENE its trained model, of which the newest iteration is taken: chkpntN.pth, or the
# ply of iteration N if it is newer. Without SCENE, every folder of MODELS. Results go to OUT/SCENE; a scene with
# results.json is left alone. Several processes a scene: NPROC=4 launch/run_prune_finetune.sh ...
set -eu

if [ $# -lt 3 ]; then
    sed -n '5,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
data=$1 models=$2 out=$3
shift 3

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
failed=

fail() { # SCENE REASON
    echo "$1: $2" >&2
    failed="$failed
  $1: $2"
}

newest() { # PREFIX SUFFIX: the largest N of the files PREFIXNSUFFIX, -1 if there is none
    largest=-1
    for file in "$1"*"$2"; do
        number=${file#"$1"}
        number=${number%"$2"}
        case $number in '' | *[!0-9]*) continue ;; esac
        [ "$number" -le "$largest" ] || largest=$number
    done
    echo "$largest"
}

train() { # FLAGS
    if [ "${NPROC:-1}" -gt 1 ]; then
        "$python" -m torch.distributed.run --standalone --nproc-per-node="$NPROC" "$root/train.py" "$@"
    else
        "$python" "$root/train.py" "$@"
    fi
}

finetune() { # SCENE [OTHER SCENES] [-- FLAGS]
    scene=$1 model=$models/$1 log=$out/$1/train.log
    while [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done
    [ $# -eq 0 ] || shift
    if [ -e "$out/$scene/results.json" ]; then
        echo "$scene: $out/$scene has results.json already and is left alone"
        return
    fi
    flag=--start_checkpoint iteration=$(newest "$model/chkpnt" .pth) file=
    ply=$(newest "$model/point_cloud/iteration_" /point_cloud.ply)
    if [ "$ply" -gt "$iteration" ]; then
        flag=--start_pointcloud iteration=$ply file=$model/point_cloud/iteration_$ply/point_cloud.ply
    elif [ "$iteration" -ge 0 ]; then
        file=$model/chkpnt$iteration.pth
    else
        fail "$scene" "there is neither chkpntN.pth nor point_cloud/iteration_N/point_cloud.ply in $model; train it first"
        return
    fi
    echo "$scene: pruning and finetuning iteration $iteration, $file"
    before=$(cksum "$log" 2>/dev/null || :)
    train -s "$data/$scene" -m "$out/$scene" --eval --prune_finetune "$flag" "$file" --render_and_evaluate "$@" && return
    if [ "$(cksum "$log" 2>/dev/null || :)" != "$before" ]; then
        fail "$scene" "see $log"
    else # train.py ended before it had a folder
        fail "$scene" "what train.py said stands above"
    fi
}

if [ $# -gt 0 ] && [ "$1" != -- ]; then
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        finetune "$@"
        shift
    done
else
    for folder in "$models"/*/; do
        if [ ! -d "$folder" ]; then
            echo "error: there is no folder of a model in $models; give the folder that holds those of all scenes" >&2
            exit 2
        fi
        finetune "$(basename -- "$folder")" "$@"
    done
fi
if [ -n "$failed" ]; then
    echo "failed:$failed" >&2
    exit 1
fi
