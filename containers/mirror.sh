#!/usr/bin/env bash
# Print the Debian mirror that this machine uses, from its apt sources in either of apt's formats. Where they name none,
# print the public mirror.
set -eu
shopt -s nullglob

# awk reads from cat, because Debian's awk stops at the first file that is missing, and newer systems have no
# sources.list.
cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list 2>/dev/null | awk '
    $1 == "URIs:" && /debian/ { mirror = $2 }
    $1 == "deb" { for (i = 2; i <= NF; i++) if ($i ~ /:\/\/.*debian/) mirror = $i }
    mirror { exit }
    END { print mirror ? mirror : "http://deb.debian.org/debian" }'
