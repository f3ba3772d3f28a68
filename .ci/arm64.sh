#!/usr/bin/env bash
# Builds a bundle's arm64 image from Dockerfile.arm64 and runs `check` and `infer` in it, without Docker and a board:
#
#   .ci/arm64.sh [BUNDLE]      default: the demo's bundle
#
# buildah builds for real, each step under qemu. It proves the Dockerfile's steps, that what pip installs is right for
# arm64, and that the image answers as trained on a Cortex-A53, as its own user, with nothing that it could write to. It
# does not prove the published base image: no container registry is needed here, so a Debian of the same release that
# mmdebstrap makes from this machine's own apt sources stands in under the name that FROM has.
#
# Where something cannot be had (no root, no binfmt_misc, no Debian) it says so and ends with 0. What it makes stays in
# the cache ($EDGEKIT_CACHE, else the user's), so that the second time takes a minute.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { echo "arm64 image: skipped, not proved: $1"; exit 0; }
fail() { echo "arm64 image: FAILED: $1" >&2; exit 1; }
say() { echo "arm64 image: $* (after ${SECONDS} s)"; }

bundles=(edgekit-demo/dist/digits-*/)
bundle=${1:-${bundles[0]}}
bundle=${bundle%/}
[ -f "$bundle/manifest.json" ] || { echo "no bundle at $bundle: run 'uv run edgekit demo', or name one" >&2; exit 2; }

[ "$(id -u)" = 0 ] || skip "it needs root, for binfmt_misc and to unpack a Debian"
command -v apt-get >/dev/null || skip "it needs Debian"

# -- the tools

missing=()
for package in qemu-user-static mmdebstrap arch-test buildah crun; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1 ||
        skip "apt-get cannot install ${missing[*]}"
fi

binfmt=/proc/sys/fs/binfmt_misc
[ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt 2>/dev/null || skip "the kernel has no binfmt_misc"
if [ ! -e $binfmt/qemu-aarch64 ] && [ "$(uname -m)" != aarch64 ]; then
    cat /usr/lib/binfmt.d/qemu-aarch64.conf >$binfmt/register 2>/dev/null || skip "qemu cannot be registered with binfmt_misc"
fi

cache=${EDGEKIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edgekit}/arm64-image
mkdir -p "$cache"
work=$(mktemp -d "$cache/.work-XXXXXX")
store() { buildah --root "$cache/store" --runroot "$work/run" --storage-driver overlay "$@"; }
container="" tried=""
clean() {
    [ -z "$container" ] || store rm "$container" >/dev/null 2>&1 || true
    [ -z "$tried" ] || store rm "$tried" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap clean EXIT

# -- the stand-in for the base image

base=$(sed -n 's/^ARG BASE=//p' Dockerfile.arm64)
if ! store inspect --type image "$base" >/dev/null 2>&1; then
    archive=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Component: main' |
        awk '$1 !~ /-/ { print $2; exit }')
    [ -n "$archive" ] || skip "apt knows no Debian here"
    signed=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [signed-by=$signed] $archive bookworm main" >"$work/sources.list"
    # as Debian makes its slim images: merged /usr without the tool that merges it (and its perl), no manuals
    mmdebstrap --quiet --variant=minbase --architectures=arm64 --format=tar --include=usr-is-merged \
        --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        bookworm "$work/base.tar" "$work/sources.list" 2>"$work/log" || { tail -5 "$work/log"; fail "mmdebstrap"; }
    container=$(store from --arch arm64 scratch)
    store add --quiet "$container" "$work/base.tar" / >/dev/null
    store config --cmd bash --arch arm64 "$container"
    store commit --quiet --format docker "$container" "$base" >/dev/null
    store rm "$container" >/dev/null
    container=""
    rm "$work/base.tar"
    say "made a stand-in for $base"
fi

# -- the image

# Inside, pip must reach the index that it reaches here. Only what names an index: paths of this machine mean nothing there.
{
    echo "[global]"
    python3 -m pip config list 2>/dev/null |
        sed -nE "s/^[^=]*\.(index-url|extra-index-url|trusted-host|proxy|timeout|default-timeout)='(.*)'$/\1 = \2/p" |
        sed 's/^default-timeout/timeout/' | grep -v 'file:' || true
} >"$work/pip.conf"
volumes=(-v "$work/pip.conf:/etc/pip.conf:ro")
certificates=/etc/ssl/certs/ca-certificates.crt
if [ -f $certificates ]; then
    # not in its own place: the package ca-certificates, which pip brings, writes there
    echo "cert = /run/certificates.crt" >>"$work/pip.conf"
    volumes+=(-v "$certificates:/run/certificates.crt:ro")
fi

name="localhost/edgekit-$(basename "$bundle"):arm64"
began=$SECONDS
store bud --isolation chroot --platform linux/arm64 --pull-never --layers --network host --format docker \
    "${volumes[@]}" --build-arg "TITLE=$(basename "$bundle")" -f Dockerfile.arm64 -t "$name" "$bundle" >"$work/log" 2>&1 ||
    { tail -30 "$work/log"; fail "the build"; }
say "built $name in $((SECONDS - began)) s, $(grep -c 'Using cache' "$work/log" || true) steps from the cache"

# -- what is in it

tried=$(store from --pull-never --arch arm64 "$name")
root=$(store mount "$tried")
megabytes() { du -sxm "$@" 2>/dev/null | awk '{ sum += $1 } END { printf "%d MB", sum }'; }
echo "  image        $(megabytes "$root") unpacked, $(tar -C "$root" -cf - . | gzip -1 | wc -c | awk '{ printf "%d MB", $1 / 1e6 }') packed"
echo "  packages     $(megabytes "$root/packages")"
for folder in $(du -xm --max-depth=1 "$root/packages" | sort -rn | awk 'NR > 1 && $1 > 2 { print $2 }'); do
    printf '    %-36s %s\n' "$(basename "$folder")" "$(megabytes "$folder")"
done
echo "  bundle       $(megabytes "$root/bundle")"
echo "  the system   $(megabytes "$root"/{usr,lib,bin,sbin,etc,var}), of it Python $(megabytes "$root"/usr/lib/python3* "$root"/usr/bin/python3*)"
for tool in pip gcc; do
    [ -z "$(find "$root/usr/bin" "$root/packages" -maxdepth 1 -name "$tool*")" ] || fail "$tool is left in the image"
done

# -- check and infer, on the oldest core, with the image's own user, and nothing that it can write to

[ "$(store inspect --type image --format '{{.OCIv1.Config.User}}' "$name")" = 10001:10001 ] || fail "not the image's user"
in_image() { store run --isolation chroot --env QEMU_CPU=cortex-a53 "$tried" -- python3 run.py "$@"; }
began=$SECONDS
in_image check || fail "the check, on a cortex-a53"
in_image infer check/ >"$work/answers" || fail "infer, on a cortex-a53"
cut -c1-90 "$work/answers"
images=$(grep -c '"results": \[{' "$work/answers")
[ "$images" = "$(find "$bundle/check" -type f ! -name "expected.json" ! -name "outputs.npz" | wc -l)" ] || fail "infer answered for $images images"
say "check and infer on a cortex-a53 took $((SECONDS - began)) s under emulation, which says nothing of a board"
in_image check --bundle /nowhere 2>/dev/null && fail "a bundle that is not there passed"
echo "arm64 image: ok"
