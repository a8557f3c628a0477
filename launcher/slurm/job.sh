# shellcheck shell=bash
# What the sbatch scripts beside this file share. They are submitted from the project's folder, with a launcher and its words:
#
#   sbatch [--nodes=N --account=... --partition=...] launcher/slurm/many_nodes.sbatch launcher/ppo_175b.sh [key=value ...]
#   bash launcher/slurm/many_nodes.sbatch launcher/ppo_175b.sh --dry-run      prints what the job would do
#
# One task per GPU: the tasks are the ranks, so that signals and the exit status are the program's own (torchrun would be
# killed by SIGUSR1, and ends with 1 whatever its ranks end with).
#
# A job ends before its run. --signal=USR1@SECONDS in an sbatch script sends SIGUSR1 to all ranks that long before the time
# limit (up to a minute earlier); preemption and scancel send SIGTERM. The program then ends its step, saves everything and exits
# with 75, and `run_job` puts the same job into the queue again, where it goes on from what was saved. So SECONDS must hold one
# step (PPO: an iteration), an evaluation and a save; and after a preemption the partition's GraceTime must.
#
# Environment variables, besides those at the top of launcher/start.sh:
#   MEGARLHF_HOME  the project's folder, on a file system that all nodes share; where sbatch was called when not set
#   MASTER_ADDR, MASTER_PORT  in place of the job's first node and a port made from the job's number
#   IMAGE, MOUNTS  of the container scripts
# What NCCL has to know of one cluster's network cannot be set here for all; export it before sbatch where it is needed:
#   NCCL_SOCKET_IFNAME=ens     interfaces for NCCL's bootstrap, where nodes have several and the first leads nowhere
#   NCCL_IB_HCA=mlx5           InfiniBand devices to use, where some are for storage
#   NCCL_IB_GID_INDEX=3        RoCE networks: the address type that is routed
#   FI_PROVIDER=efa            AWS: with the aws-ofi-nccl plugin on LD_LIBRARY_PATH
#   NCCL_NET_GDR_LEVEL=PHB     GPUs and network cards that talk across the CPU's bridges, where the topology allows it

SECONDS_TO_LEAVE=300 # the last ranks may still write when the first has ended; what hangs longer than that is ended by srun

is_dry_run() { # is_dry_run WORD...: whether one of the words says so
  local word
  for word; do if [ "$word" = --dry-run ]; then return 0; fi; done
  return 1
}

from_header() { # from_header OPTION: its value in the #SBATCH lines, for a dry run outside a job
  sed -n "s/^#SBATCH --$1=//p" "$0"
}

first_node() { # prints the address by which Slurm itself reaches the job's first node
  local name address
  name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  address=$(scontrol --oneliner show node "$name" | tr ' ' '\n' | sed -n 's/^NodeAddr=//p')
  echo "${address:-$name}"
}

prepare_job() { # prepare_job LAUNCHER WORD...: what runs, and where its ranks meet
  job_words=("$@")
  if [ $# -eq 0 ]; then
    echo "usage: sbatch $0 launcher/STAGE_SIZE.sh [--dry-run] [key=value ...]" >&2
    exit 2
  fi
  if [ ! -f "$1" ]; then
    echo "$0: there is no launcher $1 in $PWD: the first word is one of launcher/STAGE_SIZE.sh" >&2
    exit 2
  fi
  if [ -z "${SLURM_JOB_ID:-}" ] && ! is_dry_run "$@"; then
    echo "$0: this is a batch script: submit it with sbatch, or see what it does with --dry-run" >&2
    exit 2
  fi
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    SLURM_NNODES=$(from_header nodes)
    SLURM_NTASKS=$((SLURM_NNODES * $(from_header ntasks-per-node)))
    : "${MASTER_ADDR:=FIRST_NODE}"
  fi
  : "${MASTER_ADDR:=$(first_node)}" "${MASTER_PORT:=$((20000 + ${SLURM_JOB_ID:-0} % 10000))}" # two jobs may share a node
  export MASTER_ADDR MASTER_PORT
}

show_job() { # show_job SRUN WORD...: the step's command, and what the first of its tasks becomes
  local word shown=()
  for word; do if [ "$word" != --dry-run ]; then shown+=("$word"); fi; done
  printf 'export MASTER_ADDR=%q MASTER_PORT=%q\n' "$MASTER_ADDR" "$MASTER_PORT"
  printf -v word ' %q' "${shown[@]}" && echo "${word# }"
  echo "# rank 0 of $SLURM_NTASKS:"
  env -u RANK -u LOCAL_RANK SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 \
    SLURM_STEP_NUM_TASKS="$SLURM_NTASKS" SLURM_STEP_NUM_NODES="$SLURM_NNODES" bash "${job_words[@]}"
}

run_job() { # run_job [SRUN OPTION...] [CONTAINER COMMAND...] bash LAUNCHER WORD...: in every task; then the queue again or the end
  local status=0
  local step=(srun --label --kill-on-bad-exit=0 --wait="$SECONDS_TO_LEAVE" "$@")
  if is_dry_run "$@"; then
    show_job "${step[@]}"
    return
  fi
  trap 'echo "job $SLURM_JOB_ID: SIGTERM; the ranks save and end"' TERM # this shell has to outlive them
  "${step[@]}" || status=$?
  if [ "$status" -eq 75 ]; then
    again "stopped with everything saved"
  elif [ "$status" -ne 0 ] && [ "$status" -ne 2 ] && ! all_nodes_answer; then
    again "a node of it does not answer"
  fi
  exit "$status"
}

all_nodes_answer() { # the ranks of a lost node fail the others' within seconds, long before Slurm itself gives the node up
  timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --gpus-per-node=0 true
}

again() { # again REASON: the same job, in the queue
  echo "job $SLURM_JOB_ID: $1; it goes into the queue again"
  scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID: it could not be requeued; submit it again to go on" >&2
}
