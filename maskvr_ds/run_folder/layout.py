"""File names of a run's directory and of its checkpoints. Loads no torch.

RUN/
    config.yaml               resolved configuration
    origin.json               checkpoint of another run that this one was resumed from: path and SHA-256
    launches.jsonl            one line per start of the ranks: command, devices, versions, corpora
    owner.json                fencing record: the job that may write to the run
    metrics.jsonl             one line per step, plus events
    trust_ratios.jsonl        trust ratio of every tensor, every `monitor.histogram_every` steps
    loss.png                  plot of metrics.jsonl
    mask_costs.json           masking.strategy auto: seconds of a step per candidate, of every phase
    tensorboard/, csv/        DeepSpeed's monitors; wandb_run_id: the run's id at Weights & Biases
    rollbacks.json            rollbacks after divergence, with the batches skipped since
    *.damaged-*, damaged-*    copies of metrics.jsonl and rollbacks.json from before damage in them was passed by
    stop_requested            created by anyone: asks the run to save and stop; a launcher's names the owner it asks
    stopped.json              {"step": n, "owner": token}: saved and stopped on request
    completed.json            {"step": n, "owner": token}: trained to its last step
    heartbeats/JOB/rank-*     heartbeats of the ranks
    slurm/, logs/             job scripts and logs of `python -m cluster slurm` and `launch`
    checkpoints/
        latest                name of the newest checkpoint, for people and scripts; a resume does not read it
        best                  name of the one with the lowest held-out loss (checkpoint.keep_best), likewise
        step-00000100/        complete once checkpoint.json, written last, exists
            checkpoint.json       state; size and SHA-256 of every other file
            weights.safetensors   fp32 weights, for export and evaluation
            probe.safetensors     a few rows and the engine's logits on them, which an export must reproduce
            mapnet.safetensors    mask proposal network, its optimizer and gate
            bert/                 the model's config.json, tokenizer
            *.pt                  DeepSpeed's own files
        not-of-this-run-*     had the name of a new checkpoint, and was none of this run
        .saving-OWNER-N, .deleting-*, .universal, .converting-*  work in progress; a kill may leave them behind
"""

CONFIG = "config.yaml"
ORIGIN = "origin.json"
OWNER = "owner.json"
LAUNCHES = "launches.jsonl"
METRICS = "metrics.jsonl"
TRUST_RATIOS = "trust_ratios.jsonl"
LOSS_PLOT = "loss.png"
MASK_COSTS = "mask_costs.json"
TENSORBOARD, CSV = "tensorboard", "csv"
WANDB_ID = "wandb_run_id"
ROLLBACKS = "rollbacks.json"
STOP_REQUEST = "stop_requested"
# Also {"requested": true} if STOP_REQUEST asked for it.
STOPPED = "stopped.json"
COMPLETED = "completed.json"
HEARTBEATS = "heartbeats"
JOBS = "slurm"
# In JOBS: Slurm's id of the job that was submitted last, and of the one that started last.
SUBMITTED, ATTEMPT = "submitted", "attempt"
LOGS = "logs"

CHECKPOINTS = "checkpoints"
LATEST = "latest"
BEST = "best"
MANIFEST = "checkpoint.json"
WEIGHTS = "weights.safetensors"
PROBE = "probe.safetensors"
MAPNET_STATE = "mapnet.safetensors"
BERT = "bert"
SAVING = ".saving"
DELETING = ".deleting-"
# Made by a conversion to another number of ranks or ZeRO stage.
UNIVERSAL = ".universal"
CONVERTING = ".converting"
