#!/usr/bin/env bash
# PPO-ptx with a 175B policy and 6B reward and value models: 16 nodes of 8 GPUs.
# Environment variables and the ways to start it: at the top of launcher/start.sh, or with --help.
#
#   bash launcher/ppo_175b.sh [--dry-run] [key=value ...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
start_stage ppo examples/175b/ppo.yaml 16 "$@"
