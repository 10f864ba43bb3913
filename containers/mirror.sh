#!/usr/bin/env bash
# Print the Debian mirror this machine uses, from its apt sources in either of apt's formats; the public one
# where there is none.
set -eu
shopt -s nullglob

# Fed by cat: Debian's own awk gives up at the first file that is missing, and newer systems have no sources.list.
cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list 2>/dev/null | awk '
    $1 == "URIs:" && /debian/ { found = $2 }
    $1 == "deb" { for (i = 2; i <= NF; i++) if ($i ~ /:\/\/.*debian/) found = $i }
    found { exit }
    END { print found ? found : "http://deb.debian.org/debian" }'
