# shellcheck shell=bash
# What the test clusters put on the machine: Debian packages, Apptainer, a newer Slurm, an ordinary user, a
# login-node venv. Sourced by up.sh. Each function does nothing when its work is already done.

PACKAGES=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins slurmdbd slurm-wlm-mysql-plugin munge
    mariadb-server patchelf uidmap squashfuse fuse3 fuse2fs fuse-overlayfs squashfs-tools debootstrap
    python3-venv python3-pip python3-setuptools)

install_packages() {
    local missing=() package
    for package in "${PACKAGES[@]}"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok' || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    say "installing ${missing[*]}"
    forbid_service_starts
    apt-get update -q >"$LOGS/apt.log" 2>&1 || die "apt-get update failed; see $LOGS/apt.log"
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}" \
        >>"$LOGS/apt.log" 2>&1 || die "apt-get install failed; see $LOGS/apt.log"
    allow_service_starts
}

# The packages would start their own daemons with their own configuration; ours are started by up.sh.
forbid_service_starts() {
    [ -e /usr/sbin/policy-rc.d ] && return
    printf '#!/bin/sh\nexit 101 # written by the bbu test cluster\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
}

allow_service_starts() {
    ! grep -qs 'bbu test cluster' /usr/sbin/policy-rc.d || rm /usr/sbin/policy-rc.d
}

# Apptainer is a package of Debian unstable only, and needs a newer libc than Debian 12 has. It is
# unpacked beside the libraries it needs, and its two programs are pointed at those: the host's libc stays.
install_apptainer() {
    local root=$BBU_TESTBED/apptainer
    if ! "$root/usr/bin/apptainer" version >/dev/null 2>&1; then
        rm -rf "$root" "$root.new" && mkdir -p "$root.new/debs"
        download_newer_debs "$root.new/debs" apptainer/unstable libc6/trixie libseccomp2/trixie libsqlite3-0/trixie
        unpack_apptainer "$root.new" "$root"
        mv "$root.new" "$root"
        "$root/usr/bin/apptainer" version >/dev/null || die "the unpacked Apptainer does not run; see above"
        say "installed Apptainer $("$root/usr/bin/apptainer" version) in $root"
    fi
    mkdir -p "$root/usr/var/lib/apptainer/mnt/session"
    chmod 666 /dev/fuse
}

# download_newer_debs FOLDER PACKAGE/SUITE...: with apt lists of its own, from the mirror the machine uses.
download_newer_debs() {
    local folder=$1 mirror lists=$STATE/apt suite
    shift
    mirror=$("$REPO/containers/mirror.sh")
    mkdir -p "$lists/partial"
    for suite in $(printf '%s\n' "${@#*/}" | sort -u); do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
    done >"$STATE/apt.list"
    local apt=(apt-get -q -o "Dir::Etc::sourcelist=$STATE/apt.list" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$lists" -o APT::Sandbox::User=root)
    { "${apt[@]}" update && cd "$folder" && "${apt[@]}" download "$@"; } >>"$LOGS/apt.log" 2>&1 ||
        die "could not download $* from $mirror; see $LOGS/apt.log"
    cd "$REPO" || exit
    rm -rf "$lists" # 60 MB that nobody reads again
}

# unpack_apptainer FOLDER FINAL: lay the files out under FOLDER, which will be renamed to FINAL.
unpack_apptainer() {
    local folder=$1 final=$2
    unpack_debs "$folder" apptainer
    # A relocated Apptainer looks for configuration and state below its prefix, and its two programs derive
    # that prefix from different depths: usr for one, usr/lib for the other.
    mv "$folder/etc" "$folder/usr/etc"
    ln -s ../etc ../var "$folder/usr/lib/"
    use_libraries "$final/lib" "$folder"/usr/bin/apptainer "$folder"/usr/lib/x86_64-linux-gnu/apptainer/bin/starter
}

# install_slurm FOLDER: the Slurm of Debian's next release, in the same way. Jobs stay in the host's userland,
# since nothing but Slurm's own programs is pointed at the newer libc.
install_slurm() {
    local root=$1
    "$root/usr/sbin/slurmd" -V >/dev/null 2>&1 && return
    rm -rf "$root" "$root.new" && mkdir -p "$root.new/debs"
    download_newer_debs "$root.new/debs" slurm{ctld,d,-client,-wlm-basic-plugins}/trixie libc6/trixie libhwloc15/trixie
    unpack_slurm "$root.new" "$root"
    mv "$root.new" "$root"
    "$root/usr/sbin/slurmd" -V >/dev/null || die "the unpacked Slurm does not run; see above"
    say "installed $("$root/usr/sbin/slurmd" -V) in $root"
}

# unpack_slurm FOLDER FINAL: as unpack_apptainer. The packages leave the daemons' usual names to
# update-alternatives, and their programs find Slurm's own library among the plugins.
unpack_slurm() {
    local folder=$1 final=$2 daemon
    unpack_debs "$folder" slurm
    rm "$folder"/usr/lib/x86_64-linux-gnu/slurm-wlm/mpi_pmix* # its library is not here, and every log would say so
    for daemon in slurmctld slurmd slurmstepd; do ln -s "$daemon-wlm" "$folder/usr/sbin/$daemon"; done
    ln -s ../usr/lib/x86_64-linux-gnu/slurm-wlm/libslurmfull.so "$folder/lib/"
    use_libraries "$final/lib" "$folder"/usr/bin/* "$folder"/usr/sbin/*-wlm
}

# unpack_debs FOLDER NAME: the packages called NAME* in FOLDER/debs as they are, of all others the libraries
# alone, into FOLDER/lib.
unpack_debs() {
    local folder=$1 name=$2 deb
    for deb in "$folder"/debs/*.deb; do
        case ${deb##*/} in
            "$name"*) dpkg-deb -x "$deb" "$folder" ;;
            *) dpkg-deb -x "$deb" "$folder/debs/x" ;;
        esac
    done
    mkdir "$folder/lib"
    cp -a "$folder"/debs/x/usr/lib/x86_64-linux-gnu/*.so* "$folder/lib/"
    rm -rf "$folder/debs" "$folder/usr/share/doc" "$folder/usr/share/man"
}

# use_libraries LIB PROGRAM...: let programs run by the libc in LIB, and find their libraries there first.
use_libraries() {
    local lib=$1 program
    shift
    for program in "$@"; do
        patchelf --set-interpreter "$lib/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$lib" "$program"
    done
}

create_user() {
    if ! id "$BBU_USER" >/dev/null 2>&1; then
        useradd --create-home --home-dir "$BBU_TESTBED/home" --shell /bin/bash "$BBU_USER"
        say "created the user $BBU_USER"
    fi
    grep -q "^$BBU_USER:" /etc/subuid || usermod --add-subuids 300000-365535 "$BBU_USER"
    grep -q "^$BBU_USER:" /etc/subgid || usermod --add-subgids 300000-365535 "$BBU_USER"
    install -d -o "$BBU_USER" -g "$BBU_USER" "$BBU_TESTBED"/{home,shared,images}
}

# The login node has the torch-free base dependencies and nothing else; refreshed when their list changes.
make_login_venv() {
    local venv=$BBU_TESTBED/login dependencies
    [ -f "$REPO/pyproject.toml" ] || { say "no pyproject.toml yet: login venv left out"; return; }
    dependencies=$(/usr/bin/python3 "$REPO/tests/cluster/base_dependencies.py" "$REPO/pyproject.toml")
    [ "$dependencies" = "$(cat "$venv/dependencies.txt" 2>/dev/null)" ] && return
    /usr/bin/python3 -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet -r /dev/stdin <<<"$dependencies" >"$LOGS/login-venv.log" 2>&1 ||
        die "could not install the login venv; see $LOGS/login-venv.log"
    echo "$dependencies" >"$venv/dependencies.txt"
    say "login venv has $(wc -l <"$venv/dependencies.txt") base dependencies"
}

# $ENV_FILE: what a login shell on this cluster has; sourced by people, and the first cluster's by the user's
# own login shells.
write_env() {
    cat >"$ENV_FILE" <<END
export BBU_TESTBED=$BBU_TESTBED SLURM_CONF=$SLURM_CONF
export BBU_IMAGE_CACHE=$BBU_TESTBED/images
export PATH=$SLURM_PATH$BBU_TESTBED/apptainer/usr/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
END
    [ "$CLUSTER" != bbu ] || echo ". $ENV_FILE" >"$BBU_TESTBED/home/.bash_profile"
}
