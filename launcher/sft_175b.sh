#!/usr/bin/env bash
# SFT baseline at 175B: 8 nodes of 8 GPUs. The model that PPO starts from: CONFIG=examples/175b/ppo_init.yaml.
# Environment variables and the ways to start it: at the top of launcher/start.sh, or with --help.
#
#   bash launcher/sft_175b.sh [--dry-run] [key=value ...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
start_stage sft examples/175b/sft.yaml 8 "$@"
