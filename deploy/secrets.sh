#!/bin/sh
# Makes the secrets of compose.yaml, once: what is there stays.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets
random() { od -An -tx1 -N32 /dev/urandom | tr -d ' \n'; }
[ -s secrets/database_password ] || random > secrets/database_password
[ -s secrets/database_url ] || printf 'postgresql://nas:%s@database/nas' "$(cat secrets/database_password)" > secrets/database_url
[ -s secrets/ray_token ] || random > secrets/ray_token
# The containers' user is not this one: the files are for reading by them, their folder for nobody else on this machine.
chmod 0444 secrets/database_password secrets/database_url secrets/ray_token
