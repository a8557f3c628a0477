# shellcheck shell=bash disable=SC2154
# For the examples' scripts, which source it after setting: python; here, the folder of their configurations; smoke, yes or no;
# launcher, what starts the ranks (empty: one); shared, the key=value that all their commands get.

stage() { # stage COMMAND CONFIG key=value... [--smoke key=value...]: one command; what follows --smoke is for the short form only
  local command=$1 config=$2 words=()
  shift 2
  while [ $# -gt 0 ] && [ "$1" != --smoke ]; do words+=("$1") && shift; done
  if [ "$smoke" = yes ]; then words+=("${@:2}"); fi
  "$python" ${launcher[@]+"${launcher[@]}"} -m megarlhf "$command" --config "$here/$config" "${shared[@]}" "${words[@]}"
}
