#!/usr/bin/env bash
# The 6B reward model, which serves every policy size: one node of 8 GPUs.
# Environment variables and the ways to start it: at the top of launcher/start.sh, or with --help.
#
#   bash launcher/reward_6b.sh [--dry-run] [key=value ...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
start_stage reward examples/6b/reward.yaml 1 "$@"
