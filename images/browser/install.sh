#!/bin/sh
# Puts what a browser instance needs on the base image, and leaves out what it never uses. Runs once, at build time.
set -eu
export DEBIAN_FRONTEND=noninteractive
. /etc/os-release

printf 'APT::Install-Recommends "false";\nAcquire::Languages "none";\n' > /etc/apt/apt.conf.d/90machineuse

apt-get update -q
apt-get upgrade -q -y
if [ "$ID" = ubuntu ]; then
    # Ubuntu's own chromium package is a stub that wants snapd, which no container has.
    apt-get install -q -y software-properties-common
    add-apt-repository -y ppa:xtradeb/apps
    apt-get purge -q -y --auto-remove software-properties-common
    apt-get update -q
fi
apt-get install -q -y chromium tigervnc-standalone-server blackbox tini python3-minimal libpython3-stdlib \
    fonts-liberation fonts-dejavu-core fonts-wqy-microhei fonts-noto-color-emoji ca-certificates tzdata

# noVNC is a folder of JavaScript; its package would bring Node.js and NumPy along.
cd /tmp
apt-get download -q novnc
dpkg-deb -x novnc_*.deb novnc
mkdir -p /usr/share/machineuse/www
cp -r novnc/usr/share/novnc/core novnc/usr/share/novnc/vendor /usr/share/machineuse/www/

# An image keeps whole seconds only: without this no cache would fit its folder, and each new browser would scan anew.
find /usr/share/fonts /usr/local/share/fonts -type d -exec touch -d @1700000000 {} + 2>/dev/null
fc-cache -f
install -d -m 1777 /tmp/.X11-unix
groupadd --gid 1000 machine
useradd --uid 1000 --gid 1000 --create-home --home-dir /home/machine --shell /bin/bash machine
chmod 0700 /home/machine

# What really runs here: the build reads it back for the image's labels.
printf '{"base": "%s %s", "chromium": "%s"}\n' "$ID" "$VERSION_ID" "$(dpkg-query -W -f '${Version}' chromium)" \
    > /usr/share/machineuse/versions.json

apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* /tmp/novnc*
