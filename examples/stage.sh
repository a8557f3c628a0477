# shellcheck shell=bash disable=SC2154
# For the examples' scripts, which source it after setting: python; here, the folder of their configurations; smoke, yes or no;
# launcher, what starts the ranks (empty: one); shared, the key=value that all their commands get.

words_of() { # words_of COMMAND CONFIG key=value... [--smoke key=value...]: sets words, a command's; what follows --smoke is for the short form
  words=("$1" --config "$here/$2" "${shared[@]}")
  shift 2
  while [ $# -gt 0 ] && [ "$1" != --smoke ]; do words+=("$1") && shift; done
  if [ "$smoke" = yes ]; then words+=("${@:2}"); fi
}

stage() { # stage COMMAND CONFIG key=value... [--smoke key=value...]: one command
  words_of "$@"
  "$python" ${launcher[@]+"${launcher[@]}"} -m megarlhf "${words[@]}"
}

recipe=()
line() { # line COMMAND CONFIG key=value... [--smoke key=value...]: the same, to be run by the next run_recipe
  words_of "$@"
  recipe+=("$(printf '%q ' "${words[@]}")")
}

run_recipe() { # run_recipe FILE: the lines up to now one after another in one program, by a recipe that is written to FILE
  printf '%s\n' "${recipe[@]}" >"$1"
  recipe=()
  "$python" ${launcher[@]+"${launcher[@]}"} -m megarlhf recipe "$1"
}
