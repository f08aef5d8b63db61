#!/usr/bin/env bash
# Half an hour on one GPU: correctness, then the speed of training by settings, masks, optimizers. One block per call:
#     OUT=results bash docs/experiments/gpu_half_hour.sh 0        # then 1 2 3 4 5, each below ten minutes
# Writes JSON into $OUT, one file per command. Compare figures of one GPU only: "device" in each file names it.
set -euo pipefail
: "${OUT:?set OUT to a folder for the results}"
mkdir -p "$OUT"

speed() { # name, options of `maskvr benchmark training-speed`
    local name=$1
    shift
    python -m maskvr_ds.cli benchmark training-speed --output "$OUT/$name.json" "$@" || echo "$name failed" >&2
}

case ${1:?block 0 to 5} in
0) # correctness
    python -m pytest tests/gpu -q -x -k "masks or resumed or flash" ;;
1) # settings: ZeRO, fused LAMB, compiled layers, at the baseline's micro-batch
    speed base_zero1 --micro-size 256 --steps 40
    speed base_zero2 --micro-size 256 --steps 40 --deepspeed zero2_bf16
    speed base_fused --micro-size 256 --steps 40 --set optimizer.fused=true
    speed base_fused_layers --micro-size 256 --steps 40 --set optimizer.fused=true --compile layers
    speed base_accumulation --micro-size 256 --accumulation 4 --steps 20 --set optimizer.fused=true ;;
2) # micro-batches
    speed base_sizes --micro-size 128 512 1024 --steps 30 --set optimizer.fused=true
    speed large_sizes --preset bert-large --micro-size 128 256 512 --steps 20 --set optimizer.fused=true
    speed large_512 --preset bert-large --sequence-length 512 --micro-size 64 --steps 20 --set optimizer.fused=true ;;
3) # compiled layers at the sizes that matter
    speed large_layers --preset bert-large --micro-size 256 512 --steps 20 --set optimizer.fused=true --compile layers
    speed large_512_layers --preset bert-large --sequence-length 512 --micro-size 64 --accumulation 4 --steps 12 \
        --set optimizer.fused=true --compile layers ;;
4) # masks and MAPNet
    python -m maskvr_ds.cli benchmark strategy-cost --micro-size 256 --rounds 15 --output "$OUT/masks.json"
    speed base_mapnet --micro-size 256 --steps 30 --set optimizer.fused=true --set masking.strategy=mapnet ;;
5) # optimizers
    python -m maskvr_ds.cli benchmark optimizer-step-time --output "$OUT/lamb_base.json"
    python -m maskvr_ds.cli benchmark optimizer-step-time --preset bert-large --output "$OUT/lamb_large.json" ;;
*)
    echo "block $1: 0 to 5 expected" >&2
    exit 1 ;;
esac
