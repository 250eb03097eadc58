#!/bin/sh
# Back up, or restore, the database of a running or stopped service:
#   backup.sh save FILE       consistent, while the service runs
#   backup.sh restore FILE    into an empty place, while no service runs
# NAS_DATABASE_URL says which (sqlite:///FILE or postgresql://...; PostgreSQL needs its client programs). Files under NAS_DATA are copied apart
# (rsync, a snapshot), after the database: what it names then exists, and a student that is gone is trained again.
set -eu
usage() { sed -n 2,6p "$0" >&2; exit 2; }
[ $# -eq 2 ] || usage
url=${NAS_DATABASE_URL:-sqlite:///${NAS_DATA:-nas-data}/nas.db}
case "$url" in
    sqlite:///*)
        database=${url#sqlite:///}
        case "$1" in
            save)
                [ ! -e "$2" ] || { echo "backup.sh: $2 exists" >&2; exit 1; }
                "${PYTHON:-python3}" - "$database" "$2.part" <<'PYTHON'
import sqlite3, sys
source, target = (sqlite3.connect(name) for name in sys.argv[1:])
source.backup(target)
assert target.execute("PRAGMA integrity_check").fetchone() == ("ok",)
PYTHON
                mv "$2.part" "$2" ;;
            restore)
                # A log of another database would be played into the restored one.
                for file in "$database" "$database-wal" "$database-shm"; do
                    [ ! -e "$file" ] || { echo "backup.sh: $file exists; move $database and its -wal and -shm away first" >&2; exit 1; }
                done
                cp "$2" "$database.part" && mv "$database.part" "$database" ;;
            *) usage ;;
        esac ;;
    postgresql*)
        url="postgresql:${url#postgresql*:}"
        case "$1" in
            save) pg_dump --format=custom --no-owner --file="$2.part" --dbname="$url" && mv "$2.part" "$2" ;;
            restore) pg_restore --exit-on-error --single-transaction --no-owner --dbname="$url" "$2" ;;
            *) usage ;;
        esac ;;
    *) echo "backup.sh: NAS_DATABASE_URL: expected sqlite:///FILE or postgresql://..." >&2; exit 2 ;;
esac
