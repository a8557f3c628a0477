#!/usr/bin/env bash
# PPO-ptx with 6B policy, reward and value models: 4 nodes of 8 GPUs.
# Environment variables and the ways to start it: at the top of launcher/start.sh, or with --help.
#
#   bash launcher/ppo_6b.sh [--dry-run] [key=value ...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
start_stage ppo examples/6b/ppo.yaml 4 "$@"
