#!/bin/bash
# One Slurm node in namespaces of its own: slurm_host.sh FOLDER STEPS_BEFORE_NOTICE STEPS_BEFORE_PREEMPTION
# FOLDER has etc/slurm.conf, rendered/slurm.sh and, once training, run/metrics.csv. The end of this script ends all of it.
set -euo pipefail
folder=$1 first=$2 second=$3
export SLURM_CONF=$folder/etc/slurm.conf
# Slurm and Ray ask for the address of a name, and skip loopback.
ip link set lo up
ip link add slurm0 type veth peer name slurm1
ip address add 10.77.0.1/24 dev slurm0
ip link set slurm0 up
ip link set slurm1 up
hostname node1
printf '127.0.0.1 localhost\n10.77.0.1 node1\n' > "$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
mkdir --mode=700 "$folder/munge" "$folder/state" "$folder/spool"
head -c 128 /dev/urandom > "$folder/munge/key"
chmod 400 "$folder/munge/key"
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
slurmctld -D > "$folder/slurmctld.log" 2>&1 &
slurmd -D > "$folder/slurmd.log" 2>&1 &

rows() { if [ -e "$folder/run/metrics.csv" ]; then wc -l < "$folder/run/metrics.csv"; else echo 0; fi; }
until_true() { # SECONDS COMMAND...: wait until the command succeeds
    local seconds=$1 deadline=$((SECONDS + $1))
    shift
    while [ "$SECONDS" -lt "$deadline" ]; do
        if "$@"; then return; fi
        sleep 0.5
    done
    echo "slurm_host: not within $seconds s: $*" >&2
    timeout 5 scontrol show job >&2 || true
    tail -n 5 "$folder"/slurm*.log >&2
    exit 1
}
trained() { [ "$(rows)" -gt "$1" ]; }
restarted() { scontrol show job "$job" | grep -q " Restarts=$1 "; }
in_state() { [[ " $* " == *" $(squeue --noheader --format=%T --states=all --job="$job") "* ]]; }
idle() { timeout 5 sinfo --noheader --format=%T 2> /dev/null | grep -q idle; }

until_true 60 idle
cd "$folder/rendered"
job=$(sbatch --parsable --partition=low slurm.sh)
until_true 120 trained "$first"
echo "notice at $(rows)"
scancel --batch --signal=USR1 "$job" # As Slurm does before the time limit.
until_true 60 restarted 1
until_true 120 in_state RUNNING
until_true 120 trained "$second"
echo "preemption at $(rows)"
sbatch --quiet --partition=high --exclusive --output=/dev/null --wrap="sleep 1"
until_true 60 restarted 2
until_true 300 in_state COMPLETED FAILED CANCELLED TIMEOUT
echo "ended $(squeue --noheader --format=%T --states=all --job="$job")"
