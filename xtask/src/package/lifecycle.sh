# Installs, uses, upgrades and removes the packages beside this file, under a systemd of its own, as root. Arguments: the
# version of the packages in old/, and of those in new/. Stops at the first command that fails.
set -eu
old=$1
new=$2
cd "$(dirname "$0")"
export DEBIAN_FRONTEND=noninteractive

say() { printf '\n--- %s\n' "$*"; }

fail() {
    echo "FAILED: $*" >&2
    journalctl --no-pager -u 'cuckoo-machinery*' | tail -n 50 >&2
    exit 1
}

# Prints all files of the system, except those that change by themselves and those of apt.
files() {
    find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /srv -o -path /root \
        -o -path /var/cache -o -path /var/log -o -path /var/lib/apt -o -path /usr/local -o -path /var/tmp -o -path /var/lib/systemd/catalog \
        -o -path '/var/lib/dpkg/*-old' -o -path '/var/backups/*' -o -path '/etc/*-' \) -prune -o -print | sort
}

qemu() { grep -l '^qemu-system' /proc/[0-9]*/comm 2> /dev/null | cut -d / -f 3; }
main_pid() { systemctl show --property=MainPID --value cuckoo-machinery.service; }
host() { cuckoo-machinery --cwd /srv/cuckoo "$@"; }
status() { host --json status | tr -d ' \n' | sed -n "s/.*\"$1\":\"\{0,1\}\([^\",}]*\).*/\1/p"; }
counted() { wc -c < /srv/vms/m/serial.log; }

# Waits until the browser outside of this Debian has seen that state of the machine on the wall.
expect_seen() {
    seen=$(cat seen)
    [ "$seen" = "$1" ] || fail "the wall in a browser: $seen"
}

# Waits until the guest has counted on. Its output is a file, so there is no event to wait for.
expect_counting() {
    before=$(counted)
    for try in $(seq 300); do
        [ "$(counted)" -gt "$before" ] && return
        sleep 0.1
    done
    fail "the guest does not count"
}

say "install with the recommended packages"
apt-get -q install -y ./old/cuckoo-machinery_*.deb
for program in cuckoo-machinery qemu-system-x86_64 qemu-img tcpdump; do
    command -v "$program" || fail "there is no $program"
done
# The other packages stay, so that they are no leftovers later.
apt-get -q purge -y cuckoo-machinery

say "install"
files > /tmp/before
apt-get -q install -y --no-install-recommends ./old/cuckoo-machinery_*.deb ./old/cuckoo-machinery-dev_*.deb
[ "$(cuckoo-machinery --version)" = "cuckoo-machinery $old" ] || fail "another version is installed"
[ "$(systemctl is-enabled cuckoo-machinery.service || true)" = disabled ] || fail "the unit is enabled"
[ "$(systemctl is-active cuckoo-machinery.service || true)" = inactive ] || fail "the unit is active"
getent group cuckoo-machinery || fail "there is no group"
getent passwd cuckoo-machinery || fail "there is no user"
for file in man/man1/cuckoo-machinery.1.gz bash-completion/completions/cuckoo-machinery zsh/vendor-completions/_cuckoo-machinery; do
    [ -s "/usr/share/$file" ] || fail "there is no $file"
done

say "the commands of the documentation"
install -d /srv/cuckoo
touch /srv/cuckoo/.cuckoocwd
cp -r /usr/share/cuckoo-machinery/conf /srv/cuckoo/
# This Debian has no bridge.
sed -i 's/^interface: br0/interface: lo/' /srv/cuckoo/conf/machineries/qemu.yaml
sed -i 's/listen_ip: .*/listen_ip: 127.0.0.1/' /srv/cuckoo/conf/cuckoo.yaml
echo 'web_listen: 127.0.0.1:0' >> /srv/cuckoo/conf/machinery-host.yaml
host import vmcloak /srv/vms
host check
host plugins
host plugins | grep -q /usr/lib/cuckoo-machinery/libmachinery_qemu.so || fail "the plugin is not that of the package"
systemctl enable --now cuckoo-machinery

say "the wall"
host wall > asked
expect_seen off
host restore-start m
expect_seen running
host stop m
expect_seen off
[ "$(stat --format='%a %U' /srv/cuckoo/operational/generated/machinery-host/wall.token)" = "600 root" ] || fail "others can read the token"

say "a run"
host restore-start m
host list
[ "$(status version)" = "$old" ] || fail "another version serves"
expect_counting
guest=$(qemu)
main=$(main_pid)
[ -n "$guest" ] || fail "there is no QEMU"

say "a plugin during the run of process $guest"
started=$(status started)
apt-get -q install -y --no-install-recommends ./old/cuckoo-machinery-kvm_*.deb
[ "$(status started)" != "$started" ] || fail "the host has not been replaced"
[ "$(main_pid) $(qemu)" = "$main $guest" ] || fail "the host or the guest is another process"

say "upgrade during the run of process $guest"
apt-get -q install -y --no-install-recommends ./new/cuckoo-machinery_*.deb ./new/cuckoo-machinery-kvm_*.deb ./new/cuckoo-machinery-dev_*.deb
host status
[ "$(status version)" = "$new" ] || fail "the new version does not serve"
[ "$(main_pid)" = "$main" ] || fail "the host is another process"
[ "$(qemu)" = "$guest" ] || fail "the guest has not survived"
host state m
[ "$(host state m)" = running ] || host --json state m | grep -q running || fail "the machine does not run"
expect_counting
systemctl is-enabled cuckoo-machinery.service
host stop m
[ -z "$(qemu)" ] || fail "the guest has survived its stop"
host restore-start m
expect_counting

say "removal during a run"
apt-get -q remove -y cuckoo-machinery cuckoo-machinery-kvm cuckoo-machinery-dev
[ -z "$(qemu)" ] || fail "the guest has survived the removal"
[ ! -e /usr/lib/cuckoo-machinery ] || fail "files are left: $(ls -R /usr/lib/cuckoo-machinery)"

say "purge"
# The others have nothing that a removal keeps, so apt does not know them any more.
apt-get -q purge -y cuckoo-machinery
files > /tmp/after
diff /tmp/before /tmp/after || fail "the list of files has changed"
[ -f /srv/cuckoo/conf/machineries/qemu.yaml ] || fail "the configuration is gone"
! systemctl cat cuckoo-machinery.service 2> /dev/null || fail "the unit is left"

say "the tarball"
tar -C /tmp -xf old/*.tar.*
cd /tmp/cuckoo-machinery-*/
cp -r --remove-destination bin lib share /usr/local/
systemctl daemon-reload
[ "$(/usr/local/bin/cuckoo-machinery --version)" = "cuckoo-machinery $old" ] || fail "another version is installed"
/usr/local/bin/cuckoo-machinery --cwd /srv/cuckoo check
/usr/local/bin/cuckoo-machinery --cwd /srv/cuckoo plugins | grep -q /usr/local/lib/cuckoo-machinery/libmachinery_qemu.so
systemctl start cuckoo-machinery
/usr/local/bin/cuckoo-machinery --cwd /srv/cuckoo restore-start m
expect_counting
systemctl stop cuckoo-machinery
[ -z "$(qemu)" ] || fail "the guest has survived the host"
find bin lib share -type f | (cd /usr/local && xargs -d '\n' rm -f)
left=$(find /usr/local -type f -name '*machinery*')
[ -z "$left" ] || fail "files are left: $left"

say "a plugin of an author, without a network"
cd /root/packages
apt-get -q install -y --no-install-recommends ./new/cuckoo-machinery_*.deb ./new/cuckoo-machinery-dev_*.deb
export CARGO_HOME=/tmp/cargo-home PATH=$PATH:/opt/cargo/bin RUSTUP_HOME=/opt/rustup
(cd /tmp && cuckoo-machinery new-plugin mine)
cd /tmp/machinery-mine
unshare --net cargo test --quiet > /tmp/cargo.log 2>&1 || fail "$(tail -n 50 /tmp/cargo.log)"
tail -n 3 /tmp/cargo.log
rm -rf /tmp/machinery-mine /tmp/cargo-home
apt-get -q purge -y cuckoo-machinery cuckoo-machinery-dev
files > /tmp/after
diff /tmp/before /tmp/after || fail "the list of files has changed"
say "done"
