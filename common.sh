# shellcheck shell=sh
# Sourced by the run_*.sh scripts, which set `here`, the folder of the scripts: the variables they share, the Python
# environment, and how a program is launched. Relative paths are those of the folder that a script is started in.

DATA_SET=${DATA_SET:-digits}  # digits (embedded), imagenet, cifar10, cifar100, folder, images (without labels), or a name of timm's
DATA_PATH=${DATA_PATH:-}      # the folder that holds train/ and val/, or the images; not needed for digits
OUTPUT=${OUTPUT:-output}      # stages read and write OUTPUT/{pretrained,reparamed,peelable,peeled}/NAME
DEVICE=${DEVICE:-auto}        # cpu, cuda, or auto: CUDA if there is one
GPUS=${GPUS:-1}               # processes on this machine (with DEVICE=cpu: CPU processes)
NODES=${NODES:-1}             # machines; with more than one, set NODE_RANK and MASTER_ADDR too
SEED=${SEED:-0}
PROXY_SAMPLES=${PROXY_SAMPLES:-1024}
RECIPE=${RECIPE:-paper}       # how run_train.sh and run_train_peeled.sh train: paper, or best, which has a teacher
case $RECIPE in paper | best) ;; *) echo "RECIPE is $RECIPE: give paper or best" >&2; exit 2 ;; esac
# Weights that these scripts write say of which model they are and how images are prepared. For other weights:
MODEL=${MODEL:-}                 # any timm ViT or Swin; vit_tiny, vit_small, vit_base mean the DeiT models
MODEL_KWARGS=${MODEL_KWARGS:-}   # arguments of timm's model, such as "img_size=98 patch_size=14"
PREPROCESSING=${PREPROCESSING:-} # such as "--crop-pct 1 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
EXTRA=${EXTRA:-}                 # further flags for the program, as they are
PYTHON=${PYTHON:-}               # a Python that has what requirements.txt names, such as "python" in a container
WORKERS=${WORKERS:-}             # data loading processes per process; by default as many as there are cores, up to 8

if [ "$DATA_SET" = digits ]; then
    NAME=${NAME:-digits}
    BATCH_SIZE=${BATCH_SIZE:-64}
    WORKERS=${WORKERS:-1}
    EVAL_EVERY=${EVAL_EVERY:-10} # epochs
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # matrices this small are slower on several threads
    # 8x8 grey images: without the parts of DeiT's augmentation that are made for photographs
    AUGMENTATION=${AUGMENTATION:---aa none --color-jitter 0 --hflip 0 --scale 0.7 1 --reprob 0 --mixup 0 --cutmix 0 --repeated-aug 0}
else
    NAME=${NAME:-${MODEL:-vit_small}}
    BATCH_SIZE=${BATCH_SIZE:-128} # images per process and step
    EVAL_EVERY=${EVAL_EVERY:-1}   # epochs
    AUGMENTATION=${AUGMENTATION:-} # DeiT's is the default of the programs
fi

# use_trained: unless CHECKPOINT is set, takes the super-network of run_train.sh, which runs first for the digits. After
# RECIPE=best, and for the digits, whose short runs end with a high learning rate, its averaged weights (WEIGHTS= for the raw ones).
use_trained() {
    [ -z "${CHECKPOINT:-}" ] || return 0
    CHECKPOINT=$OUTPUT/peelable/$NAME
    has_checkpoint "$CHECKPOINT" || [ "$DATA_SET" = digits ] || { echo "no checkpoint in $CHECKPOINT: run run_train.sh first" >&2; exit 2; }
    has_checkpoint "$CHECKPOINT" || run_script run_train.sh
    [ "$DATA_SET" != digits ] && [ "$RECIPE" = paper ] || WEIGHTS=${WEIGHTS---eval-ema}
}

# teach_by_itself: for RECIPE=best, sets TEACHER to the flags by which the whole network, as it is at the start, teaches.
# ALPHA is its share of the loss (1 uses no labels), TOKENS the weight of its tokens after four of its blocks.
teach_by_itself() {
    case $DATA_SET in
    digits) ALPHA=${ALPHA:-0.75} TOKENS=${TOKENS:-0} ;;
    images) ALPHA=${ALPHA:-1} TOKENS=${TOKENS:-4} ;;
    *) ALPHA=${ALPHA:-0.5} TOKENS=${TOKENS:-1} ;;
    esac
    TEACHER="--teacher-model self --distillation-type soft --distillation-alpha $ALPHA --distillation-tokens $TOKENS --sched-on-updates"
    [ "$DATA_SET" != digits ] || return 0
    TEACHER="$TEACHER --freeze-embedding"
    # crops and flips alone, as measured on the ViT-S of docs/RESULTS.md
    AUGMENTATION=${AUGMENTATION:---aa none --color-jitter 0 --scale 0.6 1 --reprob 0 --mixup 0 --cutmix 0 --repeated-aug 0}
}

# prepare FILE: makes the virtual environment (unless one is active, or PYTHON is set) and installs FILE into it, once.
prepare() {
    requirements=$1
    [ -z "$PYTHON" ] || return 0
    environment=${VIRTUAL_ENV:-$here/.venv}
    PYTHON=$environment/bin/python
    stamp=$environment/installed-$requirements
    if cat "$here"/requirements*.txt | cmp -s - "$stamp"; then return 0; fi
    if [ -z "${VIRTUAL_ENV:-}" ] && ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed" >&2; exit 2; }
        rm -rf "$environment" # what an attempt that was cut short has left
        python3 -m venv "$environment" || { rm -rf "$environment"; exit 2; }
    fi
    echo "installing $requirements into $environment"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$here/$requirements" || exit 2
    cat "$here"/requirements*.txt > "$stamp"
}

# run_script NAME VARIABLE=VALUE...: runs another script of this folder. A signal that asks to stop is passed on to it, and
# ends this script when the other has ended.
run_script() {
    script=$1
    shift
    stopped=
    env "$@" sh "$here/$script" &
    child=$!
    trap 'stopped=yes; kill -TERM "$child" 2>/dev/null' TERM INT USR1 HUP
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do
        status=0
        wait "$child" || status=$?
    done
    trap - TERM INT USR1 HUP
    if [ -n "$stopped" ] || [ "$status" -ne 0 ]; then exit "$status"; fi
}

# launch PROGRAM ARGUMENTS...: ends the script as the program with the shared flags, under torchrun where there are several
# processes. Signals reach the program, since it takes the place of the shell.
launch() {
    program=$here/$1
    shift
    set -- "$program" "$@" --data-set "$DATA_SET" --batch-size "$BATCH_SIZE" \
        --proxy-samples "$PROXY_SAMPLES" --device "$DEVICE" --seed "$SEED"
    [ -z "$WORKERS" ] || set -- "$@" --workers "$WORKERS"
    [ -z "$DATA_PATH" ] || set -- "$@" --data-path "$DATA_PATH"
    [ -z "$MODEL" ] || set -- "$@" --model "$MODEL"
    # shellcheck disable=SC2086 # these hold several words each
    set -- "$@" $PREPROCESSING ${MODEL_KWARGS:+--model-kwargs $MODEL_KWARGS} $EXTRA
    if [ "$NODES" -gt 1 ]; then
        exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" \
            --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@"
    elif [ "$GPUS" -gt 1 ]; then
        exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS" "$@"
    fi
    exec "$PYTHON" "$@"
}

# has_checkpoint FOLDER: whether a training stage has saved one there.
has_checkpoint() {
    for file in "$1"/checkpoint_*.pth; do [ -f "$file" ] && return 0; done
    return 1
}
