"""The scripts that make, stamp and use a node's own copy of a home, in helper containers.

A copy is not forced to the disk, which may take as long as anybody's writing on that node. So it is good until the node
starts anew: its stamp, written last, tells the snapshot and since when the node is up. What a power cut left of a copy
is never taken for whole.
"""

STAMP_NAME = ".complete"
NO_COPY = 3
"""How `FILL` ends where the copy is not to be used; its last line says why."""
OUT_OF_TIME = 124
"""How `COPY_PAUSED` ends after MOST_S seconds."""

_TOOLS = r"""
set -eu
count_entries() { find "$1" ! -type s -print0 | tr -dc '\0' | wc -c; }
boot_id() { cat /proc/sys/kernel/random/boot_id; }
leave_stamp() { printf '%s %s' "$STAMP" "$(boot_id)" > "/to/$STAMP_NAME"; }
"""

# The number of entries is printed first: it is what the archive of the same directory is compared with.
COPY = (
    _TOOLS
    + r"""
rm -rf "/to/$STAMP_NAME" /to/home "/to/$HOME_NAME"
count_entries /from
mkdir "/to/$HOME_NAME"
cp -a /from/. "/to/$HOME_NAME/"
leave_stamp
"""
)

# The same in three: what can be done before and after is not done while the container is paused.
CLEAR = 'rm -rf "/to/$STAMP_NAME" /to/home "/to/$HOME_NAME" && mkdir "/to/$HOME_NAME"'
COPY_PAUSED = 'timeout "$MOST_S" cp -a /from/. "/to/$HOME_NAME/"'
STAMP_COPIED = (
    _TOOLS
    + r"""
count_entries "/to/$HOME_NAME"
leave_stamp
"""
)

FILL = (
    _TOOLS
    + r"""
[ -f "/from/$STAMP_NAME" ] || { echo "The node has no complete copy of the snapshot."; exit 3; }
stamp=; boot=
read -r stamp boot < "/from/$STAMP_NAME" || true
[ "$stamp" = "$STAMP" ] || { echo "The node's copy is not of this snapshot."; exit 3; }
[ "$boot" = "$(boot_id)" ] || { echo "The node was started anew after its copy was made."; exit 3; }
entries=$(count_entries "/from/$HOME_NAME")
[ "$entries" = "$ENTRIES" ] || { echo "The node's copy has $entries entries, the snapshot $ENTRIES."; exit 3; }
find /to -mindepth 1 -delete
cp -a "/from/$HOME_NAME/." /to/
find /to \( -name SingletonLock -o -name SingletonCookie -o -name SingletonSocket \) ! -type d -delete
printf %s "$MARK" > "/to/$MARK_NAME"
"""
)
