# shellcheck shell=bash
# How a run is started, on every node or in every rank. Sourced by the scripts beside it, each of which names a stage, a
# configuration and a number of nodes:
#
#   bash launcher/ppo_175b.sh [key=value ...]                      on each node: starts torchrun there
#   torchrun --no-python ... launcher/ppo_175b.sh [key=value ...]  each rank becomes the program
#   srun [...] bash launcher/ppo_175b.sh [key=value ...]           one task per GPU: each task becomes a rank;
#                                                                  one task per node: each starts torchrun there
#
# key=value replaces a value of the configuration, --fresh refuses a run folder that is not empty, --help prints this text.
# --dry-run prints the exact environment and command and starts nothing; what it had to assume, and on how many GPUs the run fits
# and for how long it goes (megarlhf plan), it says on stderr.
#
# Environment variables:
#   CONFIG         the run's YAML in place of the script's own
#   PYTHON         the interpreter; python3 when not set
#   NNODES         nodes of the run; what the script is for when not set. Under srun the step's
#   NODE_RANK      this node's number, 0 .. NNODES - 1; needed with several nodes. Under srun the step's
#   MASTER_ADDR    address of node 0; needed with several nodes
#   MASTER_PORT    a free port of node 0; 29500 when not set
#   GPUS_PER_NODE  ranks of each node; when not set, as many as CUDA_VISIBLE_DEVICES, Slurm or nvidia-smi name. Without
#                  GPUs the program runs on the CPU with that many ranks
#   PLAN_FOR       the kind of GPU that --dry-run plans for: a100-40gb, a100-80gb, h100-80gb or h200; h100-80gb when not set,
#                  "none" leaves the plan out
# Those that the function `settings` below sets, each with its reason, stay as they are where they are set already.
#
# Exit status: the program's (0 done, 75 stopped by a signal with everything saved: start it again); torchrun has 1 for both 75
# and failures. 2: something of the above is missing or makes no sense.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() { # refuse SENTENCE: end for what the user set wrong
  echo "launcher/$(basename "$0"): $*" >&2
  exit 2
}

set_default() { # set_default NAME VALUE: an exported variable, unless the user has chosen
  if [ -z "${!1+set}" ]; then export "$1=$2"; fi
  exported+=("$1")
}

settings() {
  set_default OMP_NUM_THREADS 1 # else every rank takes all cores of the node
  set_default CUDA_DEVICE_MAX_CONNECTIONS 1 # kernels start in the order of their launch: tensor-parallel communication overlaps
  set_default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True # rows have many lengths: fixed segments would fragment
  set_default TORCH_ELASTIC_SHUTDOWN_TIMEOUT 1800 # torchrun kills 30 s after SIGTERM by default, in the midst of a save
  set_default NCCL_DEBUG WARN # says why a connection could not be made; the default says nothing
  set_default NCCL_GRAPH_REGISTER 0 # with expandable segments NCCL would take wrong addresses into CUDA graphs (sampling.cuda_graphs)
  set_default NCCL_NVLS_ENABLE 0 # NVLink SHARP's buffers, once per communicator: four models have dozens of these
  set_default NCCL_IB_TIMEOUT 22 # about a minute (4 us * 2^22, several tries): a link that flaps does not end the run
  if [ -d "$repository/megarlhf" ]; then # the program of this checkout, whatever is installed
    export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
    exported+=(PYTHONPATH)
  fi
}

require_number() { # require_number NAME LEAST MOST: a variable that must be a whole number from LEAST to MOST
  case ${!1} in
    '' | *[!0-9]* | ??????????*) refuse "$1 is '${!1}'; it must be a whole number" ;;
  esac
  if [ "${!1}" -lt "$2" ] || [ "${!1}" -gt "$3" ]; then refuse "$1 is ${!1}; it must be from $2 to $3"; fi
}

require_all() { # require_all REASON NAME...: variables that belong together
  local reason=$1 name
  shift
  for name; do
    if [ -z "${!name:-}" ]; then refuse "$name is not set: $reason"; fi
  done
}

assume_or_refuse() { # assume_or_refuse NAME VALUE SENTENCE: a dry run goes on without a variable that a run needs
  if [ -n "${!1:-}" ]; then return; fi
  if [ "$dry_run" = no ]; then refuse "$1 is not set: $3"; fi
  echo "launcher/$(basename "$0"): dry run: $1=$2 is assumed; $3" >&2
  export "$1=$2"
}

count_gpus() { # sets GPUS_PER_NODE, where it is not, to the number of GPUs that this process may use, if there are any
  if [ -n "${GPUS_PER_NODE:-}" ]; then return; fi
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    GPUS_PER_NODE=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
  elif [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    GPUS_PER_NODE=$SLURM_GPUS_ON_NODE
  elif command -v nvidia-smi >/dev/null; then
    GPUS_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ') || GPUS_PER_NODE=
  fi
}

use_torchrun() { # puts torchrun for this node before the program
  local nodes=$1
  set_default NNODES "$nodes"
  require_number NNODES 1 100000
  assume_or_refuse GPUS_PER_NODE 8 "no GPU was found here; set it to the number of ranks that each node starts"
  require_number GPUS_PER_NODE 1 1000
  plan_nodes=$NNODES plan_gpus=$GPUS_PER_NODE
  local torchrun=("$PYTHON" -m torch.distributed.run --nproc_per_node "$GPUS_PER_NODE")
  if [ "$NNODES" -eq 1 ]; then
    command=("${torchrun[@]}" --standalone "${command[@]:1}")
    return
  fi
  assume_or_refuse NODE_RANK 0 "the run has $NNODES nodes (NNODES; this script is for $nodes): start it on each with its own NODE_RANK"
  assume_or_refuse MASTER_ADDR FIRST_NODE "the run has $NNODES nodes: set it to the address of node 0 on all of them"
  set_default MASTER_PORT 29500
  require_number NODE_RANK 0 100000
  require_number MASTER_PORT 1 65535
  if [ "$NODE_RANK" -ge "$NNODES" ]; then refuse "NODE_RANK is $NODE_RANK and NNODES is $NNODES: nodes count from 0 to NNODES - 1"; fi
  torchrun+=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
  command=("${torchrun[@]}" "${command[@]:1}")
}

choose_way() { # from the environment: this process is a rank already, or starts torchrun for its node
  local nodes=$1 in_step=no step_nodes=${SLURM_STEP_NUM_NODES:-1} step_tasks=${SLURM_STEP_NUM_TASKS:-1}
  if [ -n "${SLURM_STEP_ID:-}" ] && [ -n "${SLURM_PROCID:-}" ]; then in_step=yes; fi
  count_gpus
  if [ -n "${LOCAL_RANK:-}" ] || [ -n "${RANK:-}" ]; then
    require_all "torchrun sets it for each rank. RANK and LOCAL_RANK are the ranks' own: a node has NODE_RANK" \
      RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
  elif [ $in_step = yes ] && { [ "$step_tasks" != "$step_nodes" ] || [ "${GPUS_PER_NODE:-}" = 1 ]; }; then
    if [ "${SLURM_PROCID}" = 0 ]; then plan_nodes=$step_nodes plan_gpus=$((step_tasks / step_nodes)); fi
    if [ "$step_tasks" = 1 ]; then return; fi
    require_all "srun's tasks find one another there; export it before srun, as launcher/slurm/job.sh does" MASTER_ADDR MASTER_PORT
  elif [ $in_step = yes ]; then
    export NNODES=$step_nodes NODE_RANK=${SLURM_NODEID:-0}
    use_torchrun "$nodes"
  elif [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_NNODES:-1}" -gt 1 ] && [ -z "${NODE_RANK:-}" ]; then
    refuse "this is one process of job $SLURM_JOB_ID with $SLURM_NNODES nodes: start it on all of them with srun bash $0"
  else
    if [ -n "${SLURM_JOB_ID:-}" ]; then set_default NNODES "${SLURM_NNODES:-1}"; fi
    use_torchrun "$nodes"
  fi
}

show_plan() { # show_plan CONFIG KEY=VALUE...: what the run needs, on the nodes of torchrun or of the step; torchrun's ranks do not know them
  local config=$1
  shift
  if [ "${PLAN_FOR:=h100-80gb}" = none ] || [ -z "$plan_nodes" ]; then return; fi
  "$PYTHON" -m megarlhf plan --config "$config" --nodes "$plan_nodes" --gpus-per-node "$plan_gpus" --gpu "$PLAN_FOR" "$@" >&2 || true
}

start_stage() { # start_stage STAGE CONFIG NODES WORD...: become the program, or torchrun
  local stage=$1 config=${CONFIG:-$repository/$2} nodes=$3 dry_run=no word name exported=() keys=() plan_nodes='' plan_gpus=''
  shift 3
  : "${PYTHON:=python3}"
  local command=("$PYTHON" -m megarlhf "$stage" --config "$config")
  for word; do
    case $word in
      --dry-run) dry_run=yes ;;
      --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
      -*) command+=("$word") ;;
      *) command+=("$word") keys+=("$word") ;;
    esac
  done
  if [ ! -f "$config" ]; then refuse "there is no configuration $config (CONFIG names another than the script's own)"; fi
  if ! command -v "$PYTHON" >/dev/null; then refuse "there is no interpreter $PYTHON: set PYTHON to the one of megarlhf's environment"; fi
  case ${PLAN_FOR:-none} in
    a100-40gb | a100-80gb | h100-80gb | h200 | none) ;;
    *) refuse "PLAN_FOR is '$PLAN_FOR'; it must be a100-40gb, a100-80gb, h100-80gb, h200 or none" ;;
  esac
  choose_way "$nodes"
  settings
  if [ "$dry_run" = no ] && ! "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' >/dev/null 2>&1; then
    refuse "$PYTHON has no torch: set PYTHON to the interpreter of megarlhf's environment"
  fi
  if [ "$dry_run" = yes ]; then
    for name in "${exported[@]}"; do printf 'export %s=%q\n' "$name" "${!name}"; done
    printf -v word ' %q' "${command[@]}" && echo "${word# }"
    show_plan "$config" "${keys[@]}"
    exit 0
  fi
  exec "${command[@]}"
}
