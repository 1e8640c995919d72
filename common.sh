# shellcheck shell=sh
# Sourced by the run_*.sh scripts: the variables they share, the Python environment, and how a program is launched.

cd "$(dirname "$0")" || exit 1

DATA_SET=${DATA_SET:-digits}  # digits (embedded), imagenet, cifar10, cifar100, folder, or a name of timm's
DATA_PATH=${DATA_PATH:-}      # the folder that holds train/ and val/; not needed for digits
OUTPUT=${OUTPUT:-output}      # stages read and write OUTPUT/{pretrained,reparamed,peelable,peeled}/NAME
DEVICE=${DEVICE:-auto}        # cpu, cuda, or auto: CUDA if there is one
GPUS=${GPUS:-1}               # processes on this machine (with DEVICE=cpu: CPU processes)
NODES=${NODES:-1}             # machines; with more than one set NODE_RANK and MASTER_ADDR too
SEED=${SEED:-0}
PROXY_SAMPLES=${PROXY_SAMPLES:-1024}
EXTRA=${EXTRA:-}              # further flags for the program, as they are

if [ "$DATA_SET" = digits ]; then
    # 8x8 grey images: a small ViT of timm's, 17 tokens, without the parts of DeiT's augmentation that suit photographs.
    MODEL=${MODEL:-vit_tiny_patch16_224}
    MODEL_KWARGS=${MODEL_KWARGS:-img_size=8 patch_size=2 in_chans=1 embed_dim=16 depth=8 num_heads=2}
    NAME=${NAME:-digits}
    BATCH_SIZE=${BATCH_SIZE:-64}
    WORKERS=${WORKERS:-1}
    EVAL_EVERY=${EVAL_EVERY:-10} # epochs
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # matrices this small are slower on several threads
    PREPROCESSING=${PREPROCESSING:---crop-pct 1}
    AUGMENTATION=${AUGMENTATION:---aa none --color-jitter 0 --hflip 0 --scale 0.7 1 --reprob 0 --mixup 0 --cutmix 0 --repeated-aug 0}
else
    # DeiT's recipe is what the programs do when not told otherwise.
    MODEL=${MODEL:-vit_small}     # any timm ViT or Swin; vit_tiny, vit_small, vit_base mean the DeiT ones
    MODEL_KWARGS=${MODEL_KWARGS:-}
    NAME=${NAME:-$MODEL}
    BATCH_SIZE=${BATCH_SIZE:-128} # images a process and step
    WORKERS=${WORKERS:-8}
    EVAL_EVERY=${EVAL_EVERY:-1}   # epochs
    PREPROCESSING=${PREPROCESSING:-}
    AUGMENTATION=${AUGMENTATION:-}
fi

# Makes the virtual environment (unless one is active) and installs the requirements file named, once.
prepare() {
    requirements=$1
    environment=${VIRTUAL_ENV:-.venv}
    PYTHON=$environment/bin/python
    if [ ! -x "$PYTHON" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed" >&2; exit 2; }
        python3 -m venv "$environment" || exit 2
    fi
    stamp=$environment/installed-$requirements
    if ! cat requirements*.txt | cmp -s - "$stamp"; then
        echo "installing $requirements into $environment"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" || exit 2
        cat requirements*.txt > "$stamp"
    fi
}

# launch PROGRAM ARGUMENTS...: the program with the shared flags, under torchrun where there are several processes.
launch() {
    program=$1
    shift
    set -- "$program" "$@" --model "$MODEL" --data-set "$DATA_SET" --batch-size "$BATCH_SIZE" --workers "$WORKERS" \
        --proxy-samples "$PROXY_SAMPLES" --device "$DEVICE" --seed "$SEED"
    [ -z "$DATA_PATH" ] || set -- "$@" --data-path "$DATA_PATH"
    # shellcheck disable=SC2086 # these hold several words each
    set -- "$@" $PREPROCESSING ${MODEL_KWARGS:+--model-kwargs $MODEL_KWARGS} $EXTRA
    if [ "$NODES" -gt 1 ]; then
        "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" \
            --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@"
    elif [ "$GPUS" -gt 1 ]; then
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS" "$@"
    else
        "$PYTHON" "$@"
    fi
}

# newest FOLDER: its checkpoint of the last epoch, if it has one.
newest() {
    last=-1
    for file in "$1"/checkpoint_*.pth; do
        epoch=${file##*/checkpoint_}
        epoch=${epoch%.pth}
        if [ -f "$file" ] && [ "$epoch" -gt "$last" ]; then last=$epoch; fi
    done
    [ "$last" -lt 0 ] || echo "$1/checkpoint_$last.pth"
}
