#!/usr/bin/env bash
# SFT baseline at 1.3B: one node of 8 GPUs. The model that PPO starts from: CONFIG=examples/1.3b_single_node/ppo_init.yaml.
# Environment variables and the ways to start it: at the top of launcher/start.sh, or with --help.
#
#   bash launcher/sft_1.3b.sh [--dry-run] [key=value ...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
start_stage sft examples/1.3b_single_node/sft.yaml 1 "$@"
