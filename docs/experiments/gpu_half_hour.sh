#!/usr/bin/env bash
# Half an hour on one GPU: correctness, then the speed of training by settings, masks, optimizers. One block per call:
#     OUT=results/0 bash docs/experiments/gpu_half_hour.sh 0        # then 1 2 3 4 5, each below ten minutes
#     python docs/experiments/gpu_half_hour_report.py results/*/*.json
# Writes at most eight files into $OUT, JSON but for logs. Compare figures of one GPU only: "device" in each names it.
#
# BASELINE=FOLDER: an earlier version of the repository, which block 1 measures too:
#     mkdir baseline && git archive acf4fb5 | tar -x -C baseline
# WHEELS=FOLDER: wheels that a machine without network installs first. On a machine with one, for Python 3.12 and a
# machine that has torch and transformers:
#     OUT=wheels bash docs/experiments/gpu_half_hour.sh wheels
# SMALL=1: the same commands with a tiny model, to try them on a CPU.
set -euo pipefail
: "${OUT:?set OUT to a folder for the results}"
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
PYTHON=${PYTHON:-python3}
failed=()

if [[ -n ${WHEELS:-} && $1 != wheels ]]; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

base=bert-base large=bert-large fused=(--set optimizer.fused=true)
rows=(256 128 512 1024) large_rows=(256 128 512) long=512 long_rows=64 rounds=40 steps=40
real=(model.preset=bert-large optimizer.fused=true) batch=65536 real_rows=256
if [[ -n ${SMALL:-} ]]; then
    base=bert-tiny large=bert-tiny fused=(--set optimizer.fused=false)
    rows=(4 2 8 16) large_rows=(4 2 8) long=64 long_rows=4 rounds=2 steps=5
    real=(model.preset=bert-tiny optimizer.fused=false) batch=64 real_rows=8
fi

run() { # name, command: failures are reported at the end, after the other commands of the block
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee -a "$OUT/log.txt" || failed+=("$name")
}
maskvr() { "$PYTHON" -m maskvr_ds.cli "$@"; }
speed() { # name, options of `maskvr benchmark training-speed`
    run "$1" maskvr benchmark training-speed --output "$OUT/$1.json" --steps "$steps" "${@:2}"
}
baseline() { (cd "$BASELINE" && "$PYTHON" -m maskvr_ds.cli "$@"); }

case ${1:?block 0 to 5} in
0) # correctness: all tests for GPUs
    run tests "$PYTHON" -m pytest tests/gpu -q -s -p no:cacheprovider ;;
1) # one by one: an earlier version, ZeRO, fused LAMB, compiled layers
    if [[ -n ${BASELINE:-} ]]; then
        run base_before baseline benchmark train --preset $base --micro-size "${rows[0]}" --steps "$steps" \
            --output "$OUT/base_before.json"
    fi
    speed base_zero1 --preset $base --micro-size "${rows[0]}"
    speed base_zero2 --preset $base --micro-size "${rows[0]}" --deepspeed zero2_bf16
    speed base_fused --preset $base --micro-size "${rows[0]}" "${fused[@]}"
    speed base_layers --preset $base --micro-size "${rows[0]}" "${fused[@]}" --compile layers
    speed base_model --preset $base --micro-size "${rows[0]}" "${fused[@]}" --compile model ;;
2) # BERT-large, eager and compiled
    speed large_128 --preset $large --micro-size "${large_rows[@]:0:1}" "${fused[@]}"
    speed large_128_layers --preset $large --micro-size "${large_rows[@]:0:1}" --accumulation 4 "${fused[@]}" \
        --compile layers
    speed large_512 --preset $large --sequence-length $long --micro-size $long_rows "${fused[@]}"
    speed large_512_layers --preset $large --sequence-length $long --micro-size $long_rows --accumulation 4 \
        "${fused[@]}" --compile layers ;;
3) # masks, optimizers, single products
    run masks_128 maskvr benchmark strategy-cost --preset $base --micro-size "${rows[0]}" --rounds $rounds \
        --output "$OUT/masks_128.json"
    run masks_512 maskvr benchmark strategy-cost --preset $base --sequence-length $long --micro-size $long_rows \
        --rounds $rounds --output "$OUT/masks_512.json"
    # Peers are compiled at first use; a builder may not parse the architecture "9.0a" of an environment.
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch
print("%d.%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")')
    export TORCH_CUDA_ARCH_LIST
    run lamb_base maskvr benchmark optimizer-step-time --preset $base --rounds $rounds --output "$OUT/lamb_base.json"
    run lamb_base_fused maskvr benchmark optimizer-step-time --preset $base --rounds $rounds "${fused[@]}" \
        --output "$OUT/lamb_base_fused.json"
    run lamb_large_fused maskvr benchmark optimizer-step-time --preset $large --rounds $rounds "${fused[@]}" \
        --output "$OUT/lamb_large_fused.json"
    run products "$PYTHON" docs/experiments/gpu_products.py --output "$OUT/products.json" ${SMALL:+--small} ;;
4) # micro-batches; MAPNet and exact sampling in the training command
    speed base_sizes --preset $base --micro-size "${rows[@]:1}" "${fused[@]}"
    speed large_sizes --preset $large --micro-size "${large_rows[@]:1}" "${fused[@]}"
    speed base_mapnet --preset $base --micro-size "${rows[0]}" "${fused[@]}" --set masking.strategy=mapnet ;;
5) # two real steps of bert_large_64k_32k: 65,536 sequences each
    scratch=$(mktemp -d)
    "$PYTHON" - "$scratch" $batch <<'P'
import sys
from pathlib import Path

from maskvr_ds.benchmarks.corpus import make_corpus

make_corpus(Path(sys.argv[1]) / "corpus", rows=2 * int(sys.argv[2]), sequence_length=128)
P
    cat >"$scratch/real.yaml" <<Y
base: bert_large_64k_32k
output_dir: $scratch/run
phases:
  - name: length_128
    data: {path: $scratch/corpus}
    batch: {global_size: $batch, micro_size: $real_rows}
    optimizer: {lr: 6.0e-3}
    training: {steps: 2}
Y
    run real_batch maskvr train --config "$scratch/real.yaml" --num-gpus 1 --set evaluation.every_steps=0 \
        --set checkpoint.every_steps=0 --set "${real[0]}" --set "${real[1]}"
    cp "$scratch/run/metrics.jsonl" "$OUT/real_batch.jsonl" ;;
wheels) # what such a machine lacks, at the versions of constraints.txt
    pip() { "$PYTHON" -m pip "$@" -q --no-deps -c constraints.txt; }
    pip download --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$OUT" \
        pydantic pydantic_core annotated-types typing-inspection typing_extensions zstandard hjson
    # There is no wheel; its build needs torch, but no GPU.
    DS_BUILD_OPS=0 pip wheel --no-build-isolation -w "$OUT" deepspeed ;;
*)
    echo "block $1: 0 to 5, or wheels, expected" >&2
    exit 1 ;;
esac
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
