#!/usr/bin/env bash
# PPO-ptx with a 1.3B policy and 6B reward and value models: one node of 8 GPUs.
# Environment variables and the ways to start it: at the top of launcher/start.sh, or with --help.
#
#   bash launcher/ppo_1.3b.sh [--dry-run] [key=value ...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
start_stage ppo examples/1.3b_single_node/ppo.yaml 1 "$@"
