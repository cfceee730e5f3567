#!/usr/bin/env bash
# Run a launch of one run, and again where it crashed:
#
#   recipes/supervise.sh recipes/marco_mini/sft.sh output_dir=/runs/mini model.path=... [overrides]
#
#   MAX_RESTARTS=3      crashes that may follow each other without a checkpoint in between
#   RESTART_SECONDS=10  before the launch after a crash
#   RETRY_SECONDS=60    before the launch after status 75 (servers were away, or its time was up), which
#                       is no crash; none: end with 75, for a queue that runs this again
#
# SIGTERM and SIGINT have the run save and end, and this with it; SIGUSR1 has it save and go on. If
# this is killed, the launch ends as by SIGTERM. Exit status:
#
#   0    finished                   143  told to end; 75: try again later (RETRY_SECONDS=none)
#   2    refused, as it would be again (126, 127: a command that cannot be run)
#   else that of the last launch, after one crash too many
#
# What a launch prints is also in <output_dir>/logs/attempt_001/node_0.log, and so on; the link `latest`
# leads to the last attempt. On several nodes each supervises its own launch (NODE_RANK).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

log=/dev/null
say() { echo "supervise: $*" | tee -ap "$log" >&2; }

directory=""
for word in "$@"; do
  case $word in
    output_dir=*) directory=${word#*=} ;;
    resume=auto) ;;
    resume=*)
      say "$word would begin there again after each crash: leave it out, and launch it once without supervision"
      exit 2
      ;;
  esac
done
if [ -z "$directory" ]; then
  say "usage: recipes/supervise.sh <command> output_dir=<directory> [overrides]; the progress of a run is" \
    "looked up in its directory"
  exit 2
fi

saved_step() { # of the newest checkpoint; 0: there is none
  local newest=0 manifest step
  for manifest in "$directory"/checkpoints/step_*/manifest.json; do
    step=${manifest%/manifest.json}
    step=${step##*/step_}
    if [ -e "$manifest" ] && [[ $step =~ ^[0-9]+$ ]] && ((10#$step > newest)); then newest=$((10#$step)); fi
  done
  echo "$newest"
}

open_attempt() { # sets what belongs to the next one
  number=1
  while [ -e "$(printf '%s/logs/attempt_%03d/node_%d.log' "$directory" "$number" "${NODE_RANK:-0}")" ]; do
    number=$((number + 1))
  done
  attempt=$directory/logs/$(printf 'attempt_%03d' "$number")
  mkdir -p "$attempt"
  log=$attempt/node_${NODE_RANK:-0}.log
  : >"$log"
  ln -sfn "${attempt##*/}" "$directory/logs/latest"
  mark=MARCO_TRAIN_ATTEMPT=$(hostname).$$.$number
}

reason() { # status: what the run has said of this attempt's end, if it could
  local file=$directory/exit_status.json said=""
  if [ "$file" -nt "$attempt" ]; then said=$(sed -n 's/^  "reason": "\(.*\)",$/\1/p' "$file"); fi
  if [ -n "$said" ]; then echo "$said"
  elif [ "$1" -gt 128 ]; then echo "signal $(kill -l "$1")"
  else echo "no rank could say why: see $log"
  fi
}

# Ranks are in sessions of their own, and outlive a torchrun that is killed: they are known by what
# they have inherited.
left_behind() { grep -lzsxF "$mark" /proc/[0-9]*/environ | cut -d / -f 3 || true; }
end_attempt() { # kill what is left of it
  local left tries
  for ((tries = 0; tries < 100; tries++)); do
    left=$(left_behind)
    if [ -z "$left" ]; then return; fi
    kill -KILL $left 2>/dev/null || true
    sleep 0.1
  done
  say "processes that cannot be killed are left on $(hostname), so nothing is launched beside them:" $left
  exit 1
}

told="" launch="" sleeper=""
end() {
  told=$1
  kill -TERM $launch $sleeper 2>/dev/null || true
}
save() { # a process that does not listen yet would end; the lock is made by one that does
  if [ -n "$launch" ] && [ "$directory/run.lock" -nt "$attempt" ]; then
    kill -USR1 "$launch" 2>/dev/null || true
  else
    say "nothing is saved for SIGUSR1, as the run has not begun"
  fi
}
trap 'end SIGTERM' TERM
trap 'end SIGINT' INT
trap save USR1
trap 'if [ -n "$launch" ]; then end_attempt; fi' EXIT

run_attempt() { # the command, to its end; sets `status`
  local recorder output
  # A full disk, a closed terminal or a signal to all ends neither this process nor what it reads.
  exec {output}> >(trap '' TERM INT HUP USR1; exec tee -ap "$log")
  recorder=$!
  env "$mark" setpriv --pdeathsig TERM setsid "$@" >&"$output" 2>&1 {output}>&- &
  launch=$!
  exec {output}>&-
  if [ -n "$told" ]; then end "$told"; fi # meanwhile
  wait "$launch" || true
  while kill -0 "$launch" 2>/dev/null; do wait "$launch" || true; done # a signal ends a wait
  wait "$launch" && status=0 || status=$? # which is remembered
  end_attempt
  launch=""
  wait "$recorder" || true
}

pause() { # seconds, or until told to end
  sleep "$1" &
  sleeper=$!
  if [ -n "$told" ]; then end "$told"; fi # meanwhile
  wait "$sleeper" || true
  kill "$sleeper" 2>/dev/null || true # a signal to save ended the wait
  sleeper=""
}

crashes=0 story=""
while true; do
  before=$(saved_step)
  open_attempt
  run_attempt "$@"
  step=$(saved_step)
  why=$(reason "$status")
  ended="attempt $number ended with status $status ($why), saved up to step $step"
  if [ "$status" -eq 0 ]; then exit 0; fi
  case $status in
    2 | 126 | 127)
      say "$ended; it would be so again, and is not launched again"
      exit "$status"
      ;;
  esac
  if [ "$status" -eq 143 ] || [ -n "$told" ]; then
    say "$ended; told to end${told:+ by $told}"
    exit 143
  fi
  if [ "$status" -eq 75 ]; then
    if [ "${RETRY_SECONDS:-60}" = none ]; then say "$ended; to be launched again later"; exit 75; fi
    say "$ended; launched again in ${RETRY_SECONDS:-60} s"
    pause "${RETRY_SECONDS:-60}"
  else
    if [ "$step" -gt "$before" ]; then crashes=0 story=""; fi
    crashes=$((crashes + 1))
    story+="${story:+; }$ended"
    if [ "$crashes" -gt "${MAX_RESTARTS:-3}" ]; then
      say "gives up after $crashes crashes without progress (MAX_RESTARTS=${MAX_RESTARTS:-3}): $story"
      exit "$status"
    fi
    say "$ended; crash $crashes without progress, launched again in ${RESTART_SECONDS:-10} s"
    pause "${RESTART_SECONDS:-10}"
  fi
  if [ -n "$told" ]; then say "told to end by $told, saved up to step $step"; exit 143; fi
done
