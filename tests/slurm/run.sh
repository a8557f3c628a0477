#!/usr/bin/env bash
# Runs launcher/slurm/many_nodes.sbatch on a real Slurm: a tiny reward model on two nodes of two ranks, over gloo. Once to its end,
# once stopped by SIGUSR1, requeued by itself and gone on to its end, once with a wrong key, which must not be requeued; once with
# one task per node, each of which starts torchrun; once as the second line of a recipe, stopped and requeued; and once with all that
# runs on a node killed, its slurmd too, and the node back later.
#
#   bash tests/slurm/run.sh [FOLDER]    logs and the run's files go there; a temporary folder, removed if all is well, when left out
#
# Needs Slurm and munge (Debian: slurm-wlm, munge; at least 21.08) and MEGARLHF_PYTHON or the .venv of tests/run.sh. Starts a
# controller and two nodes on this machine as the present user, on ports 17000 to 17002, and stops them at the end. Exit status 77:
# no Slurm here.
set -euo pipefail
cd "$(dirname "$0")/../.."
for program in munged slurmctld slurmd sbatch srun scontrol; do
  PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || { echo "tests/slurm: left out, there is no $program here"; exit 77; }
done
export PATH=$PATH:/usr/sbin
python=$(bash tests/install.sh)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd)
started=()
good=no

stop() { # the cluster, however this script ends; it was started by it and has no other jobs
  [ ${#started[@]} -eq 0 ] || scancel --user="$(id -un)" 2>/dev/null || true
  for pid in $(printf '%s\n' "${started[@]}" | tac); do kill "$pid" 2>/dev/null || true; done
  wait
  if [ "$good" = yes ] && [ -z "${given:-}" ]; then rm -rf "$folder"; else echo "tests/slurm: logs are in $folder"; fi
}
given=${1:-}
trap stop EXIT

start() { # start LOG COMMAND...: a daemon in the foreground, so that its number is known
  local log=$1
  shift
  "$@" >"$folder/$log.out" 2>&1 &
  started+=($!)
}

wait_for() { # wait_for SECONDS WHAT COMMAND...: until the command succeeds
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ $SECONDS -ge $end ]; then
      echo "tests/slurm: FAILED: waited in vain for $what"
      squeue 2>/dev/null || true
      tail -n 20 "$folder"/*.log "$folder"/*.out 2>/dev/null || true
      exit 1
    fi
    sleep 0.5
  done
}

start_cluster() {
  mkdir -p "$folder/munge" "$folder/state"
  chmod 700 "$folder" "$folder/munge"
  head -c 1024 /dev/urandom >"$folder/munge/key" && chmod 600 "$folder/munge/key"
  sed "s|FOLDER|$folder|; s|HOSTNAME|$(hostname -s)|; s|USER|$(id -un)|" tests/slurm/slurm.conf >"$folder/slurm.conf"
  touch "$folder/gpu0" "$folder/gpu1" # in the place of device files, which Slurm wants to see
  echo "NodeName=n[1-2] Name=gpu File=$folder/gpu[0-1]" >"$folder/gres.conf"
  export SLURM_CONF=$folder/slurm.conf
  start munged munged --foreground --force --socket="$folder/munge/socket" --key-file="$folder/munge/key" \
    --log-file="$folder/munge/log" --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed"
  wait_for 20 "munge's socket" test -S "$folder/munge/socket"
  start slurmctld slurmctld -D
  start slurmd1 slurmd -D -N n1
  start slurmd2 slurmd -D -N n2
  second=${started[-1]}
  wait_for 60 "both nodes" both_idle
}

both_idle() { [ "$(sinfo --noheader --format=%t%D)" = idle2 ]; }

field() { scontrol --oneliner show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p"; }

num_steps() { # num_steps RUN: how many steps a run has logged
  if [ -f "$folder/runs/$1/metrics.jsonl" ]; then wc -l <"$folder/runs/$1/metrics.jsonl"; else echo 0; fi
}

has_steps() { [ "$(num_steps "$1")" -ge "$2" ]; }

words() { # words RUN EPOCHS: what every run is started with
  echo "launcher/reward_175b.sh run.dir=$folder/runs/$1 epochs=$2 run.threads=1 run.timeout_minutes=2 parallel.tp=2"
}

submit() { # submit RUN EPOCHS [WORD...]: prints the job's number
  read -ra words <<<"$(words "$1" "$2")"
  sbatch --parsable --nodes=2 --ntasks-per-node=2 --cpus-per-task=1 --gpus-per-node="${gpus:-2}" --output="$folder/$1.log" \
    launcher/slurm/many_nodes.sbatch "${words[@]}" "${@:3}"
}

ends() { # ends STATE EXITCODE RESTARTS JOB RUN: wait for the end of a job, which must be this one
  local found
  wait_for 240 "the end of $5" sh -c "scontrol --oneliner show job $4 | grep -Eq 'JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT) '"
  found="$(field "$4" JobState) $(field "$4" ExitCode) $(field "$4" Restarts)"
  [ "$found" = "$1 $2 $3" ] && return
  echo "tests/slurm: FAILED: $5 ended as $found, and not as $1 $2 $3"
  tail -n 40 "$folder/$5.log"
  exit 1
}

"$python" -c 'import sys; from pathlib import Path; from tests.distributed.recipe import make_recipe; make_recipe(Path(sys.argv[1]))' \
  "$(mkdir -p "$folder/data" && echo "$folder/data")"
start_cluster
echo "tests/slurm: $(slurmctld -V): two nodes are up"

export CONFIG=$folder/data/reward.yaml PYTHON=$python OMP_NUM_THREADS=1

job=$(submit whole 1)
ends COMPLETED 0:0 0 "$job" whole
echo "tests/slurm: to the end: passed, $(num_steps whole) steps"

job=$(submit wrong 1 run.sed=3)
ends FAILED 2:0 0 "$job" wrong
[ "$(grep -c "run.sed: unknown key" "$folder/wrong.log")" = 1 ]
echo "tests/slurm: a wrong key ends the job: passed"

job=$(sbatch --parsable --nodes=2 --ntasks-per-node=1 --cpus-per-task=2 --gpus-per-node=2 --output="$folder/torchrun.log" \
  --wrap="MASTER_ADDR=127.0.0.1 MASTER_PORT=29517 srun bash $(words torchrun 1)")
ends COMPLETED 0:0 0 "$job" torchrun
same="import json, sys; a, b = ([json.loads(line)['reward/loss'] for line in open(f)] for f in sys.argv[1:]); sys.exit(a != b)"
"$python" -c "$same" "$folder/runs/whole/metrics.jsonl" "$folder/runs/torchrun/metrics.jsonl"
echo "tests/slurm: one torchrun per node: passed, the same losses"

job=$(submit requeued 40)
wait_for 120 "the first steps" has_steps requeued 5
scancel --signal=USR1 "$job" # to the ranks and not to the batch script, as --signal=USR1@SECONDS does
wait_for 120 "the job in the queue again" sh -c "scontrol --oneliner show job $job | grep -q ' Restarts=1 '"
before=$(num_steps requeued)
ends COMPLETED 0:0 1 "$job" requeued
after=$(num_steps requeued)
grep -q "it goes into the queue again" "$folder/requeued.log"
[ "$before" -lt "$after" ]
echo "tests/slurm: stopped by a signal after step $before, requeued, to the end: passed, $after steps"

{ # as docs/launching.md has it
  echo "source launcher/start.sh && settings"
  echo "exec \"\${PYTHON:-python3}\" -m megarlhf recipe $folder/recipe.txt \"\$@\""
} >"$folder/recipe.sh"
for line in "first epochs=1" "second epochs=40"; do
  echo "reward --config $CONFIG run.threads=1 run.timeout_minutes=2 parallel.tp=2 run.dir=$folder/runs/$line"
done >"$folder/recipe.txt"
job=$(sbatch --parsable --nodes=2 --ntasks-per-node=2 --cpus-per-task=1 --gpus-per-node=2 --output="$folder/recipe.log" \
  launcher/slurm/many_nodes.sbatch "$folder/recipe.sh")
wait_for 120 "the first steps of the second run" has_steps second 5
scancel --signal=USR1 "$job"
wait_for 120 "the recipe in the queue again" sh -c "scontrol --oneliner show job $job | grep -q ' Restarts=1 '"
ends COMPLETED 0:0 1 "$job" recipe
"$python" -c "$same" "$folder/runs/whole/metrics.jsonl" "$folder/runs/first/metrics.jsonl"
[ "$(num_steps second)" = "$after" ]
echo "tests/slurm: a recipe stopped in its second run, requeued, to the end: passed"

job=$(gpus=0 submit lost 40 run.save_every=2) # Slurm 22.05 loses a job's GPUs when one of its nodes goes down, and then has none for it in the queue
wait_for 120 "the first steps" has_steps lost 5
for pid in $(grep -lsz "^SLURMD_NODENAME=n2" /proc/[0-9]*/environ | cut -d / -f 3) "$second"; do kill -KILL "$pid" || true; done
wait_for 60 "the lost node to be down" sh -c "sinfo --noheader --nodes=n2 --format=%t | grep -q down"
lost=$(num_steps lost)
start slurmd2 slurmd -D -N n2
ends COMPLETED 0:0 1 "$job" lost
grep -q "a node of it does not answer; it goes into the queue again" "$folder/lost.log"
grep -q "going on from .*/step_" "$folder/lost.log"
[ "$lost" -lt "$(num_steps lost)" ]
echo "tests/slurm: a node lost after step $lost, requeued, to the end when it is back: passed, $(num_steps lost) steps"
good=yes
